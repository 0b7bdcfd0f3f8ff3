"""Experiment files: Python files that define a ``config`` and, if they like, their own ``step`` and ``arrays``."""

import hashlib
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from flaxmnist.config import Config
from flaxmnist.errors import UserError


class ExperimentFile(NamedTuple):
    """The content of an experiment file."""

    config: Config
    options: dict[str, Any]  # its ``step`` and ``arrays`` if it defines them: arguments of ``fit`` and ``sweep``


def find_experiment(name: str | Path) -> Path:
    """Return the path of an experiment: a file, or the name of one that comes with flaxmnist, such as "quickstart"."""
    here = Path(__file__).parent  # in a wheel, it contains the experiments
    files = [folder / f"experiments/{name}.py" for folder in (here, here.parent) if str(name).isidentifier()]
    # Path.is_file raises OSError if a name is too long.
    return next(filter(os.path.isfile, [Path(name), *files]), Path(name))


def load_module(path: Path) -> ModuleType:
    """Run a Python file as a module, only once per process unless it changes, so that its classes stay the same."""
    content = path.read_bytes()
    name = f"{path.stem}_{hashlib.sha256(str(path).encode() + content).hexdigest()[:16]}"
    if name not in sys.modules:
        sys.modules[name] = module = ModuleType(name)  # dataclasses look up the types of their fields there
        module.__file__ = str(path)
        try:
            exec(compile(content, path, "exec"), vars(module))
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def load_experiment(path: str | Path) -> Config:
    """Run an experiment file, or the experiment with this name, which is Python code, and return its config.

    Raise UserError if the file is missing, fails, or defines no ``config``.
    """
    return read_experiment(path).config


def read_experiment(path: str | Path) -> ExperimentFile:
    """Run an experiment file and return its config, and its step if it has one. Raise as ``load_experiment`` does."""
    path = find_experiment(path)
    if not os.path.isfile(path):
        raise UserError(f"no experiment file {path}: pass the path of a .py file, or a name such as quickstart")
    try:
        names = vars(load_module(path.resolve()))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (Exception, SystemExit) as error:
        raise UserError(f"{path} does not run: {type(error).__name__}: {' '.join(str(error).split())}") from error
    if not isinstance(names.get("config"), Config):
        raise UserError(f"{path} defines no config: it must assign a flaxmnist.config.Config to `config`")
    options = {name: names[name] for name in ("step", "arrays") if name in names}
    if wrong := [name for name, value in options.items() if not callable(value)]:
        raise UserError(f"{path}: {wrong[0]} must be a function")
    return ExperimentFile(names["config"], options)
