"""The run folder: what lies in it, and whether a run may begin or go on there."""

import itertools
import json
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from flaxmnist import fields
from flaxmnist.config import Config
from flaxmnist.data import Dataset
from flaxmnist.errors import UserError
from flaxmnist.logs import logger, write_json

CONTENTS = ("config.json", "metrics.jsonl", "checkpoints", "result.json", "tensorboard", "plots")

# What a resumed run may do otherwise than it began. The length of the run is among them.
MAY_DIFFER = {"train.steps", "train.epochs", "train.keep", "train.report"} | {
    f"train.{event}_every" for event in ("log", "evaluate", "checkpoint")
}


def read_json(path: Path) -> dict[str, Any]:
    """The object in ``path``. Raises UserError, naming the file, where there is none."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path.parent} is no run folder: it has no {path.name}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return value


def describe(config: Config, data: Dataset, mesh: Mesh, backend: str, experiment: str | Path | None) -> dict[str, Any]:
    """What ``config.json`` holds."""
    return {
        "config": fields.to_json(config),
        "experiment": None if experiment is None else str(experiment),
        "command": sys.argv,
        "git_commit": git_commit(),
        "versions": versions(),
        "devices": describe_devices(mesh, backend),
        "data": describe_data(data),
    }


def describe_devices(mesh: Mesh, backend: str) -> dict[str, Any]:
    """What a run is on."""
    return {
        "count": mesh.size,
        "kind": mesh.devices.flat[0].device_kind,
        "processes": jax.process_count(),
        "backend": backend,
        "mesh": dict(mesh.shape),
    }


def describe_data(data: Dataset) -> dict[str, Any]:
    """What a run is trained on."""
    sizes = {name: 0 if split is None else len(split.labels) for name, split in data.splits().items()}
    about = {"name": data.name, "source": data.source, "classes": data.classes}
    return about | {"shape": list(data.train.images.shape[1:3])} | sizes


def git_commit() -> str | None:
    """The commit of this code; None where it lies in no repository, or git is not installed."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        said = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return said.stdout.strip()


def versions() -> dict[str, str]:
    """The versions a result depends on."""
    packages = ("flaxmnist", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    return {"python": sys.version.split()[0]} | {name: metadata.version(name) for name in packages}


def fresh(name: str) -> Path:
    """A folder for a new run, not made yet: ``runs/NAME-YYYYMMDD-HHMMSS``, numbered where that is there already."""
    stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    folders = (Path("runs", stem if number == 1 else f"{stem}-{number}") for number in itertools.count(1))
    return next(folder for folder in folders if not folder.exists())


def is_finished(folder: Path, described: dict[str, Any], resume: bool, overwrite: bool, allow_change: bool) -> bool:
    """Whether the run that ``described`` tells of has been finished in ``folder``. With ``overwrite``, empties it.

    Raises UserError where something lies there and neither ``resume`` nor ``overwrite`` is given, where what lies there
    is no run, and where a resumed run differs from the one it would go on from.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found = {path.name for path in folder.iterdir()}
        if found and not (resume or overwrite):
            raise UserError(
                f"{folder} is not empty: give --resume to go on there, --overwrite to begin anew, or another --workdir"
            )
        if overwrite:
            if "config.json" not in found and not found <= set(CONTENTS):
                raise UserError(f"{folder} is no run folder: --overwrite leaves it alone, give another --workdir")
            for path in (folder / name for name in found & set(CONTENTS)):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            return False
        if "config.json" not in found:
            if any(path.name.isdecimal() for path in folder.glob("checkpoints/*")):
                raise UserError(f"{folder} has checkpoints but no config.json to say of what: give another --workdir")
            return False
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; give another --workdir") from None
    before = read_json(folder / "config.json")
    config, new = (fields.from_json(each.get("config"), Config) for each in (before, described))
    changed = compare(before, described, folder, allow_change)
    if "result.json" not in found:
        return False
    check_longer(folder, read_json(folder / "result.json").get("steps", 0), new)
    return config.train.steps == new.train.steps and not changed


def begin(folder: Path, described: dict[str, Any]) -> None:
    """Says in ``folder`` what is now run there, and that it is not finished."""
    (folder / "result.json").unlink(missing_ok=True)
    write_json(folder / "config.json", described)


def check_longer(folder: Path, done: int, config: Config) -> None:
    """Raises UserError where more steps are ``done`` in ``folder`` than ``config`` wants."""
    if done > config.train.length:
        raise UserError(f"{folder} has {done} steps already: train.steps must be at least that")


def compare(before: dict[str, Any], now: dict[str, Any], folder: Path, allow_change: bool) -> bool:
    """Whether fields differ that may not; then, unless ``allow_change``, raises UserError that names them."""
    old, new = (
        fields.flatten(each["config"]) | {"data.source": each.get("data", {}).get("source")} for each in (before, now)
    )
    changed = [name for name in sorted(old | new) if old.get(name) != new.get(name) and name not in MAY_DIFFER]
    differences = ", ".join(f"{name} ({old.get(name)} before, {new.get(name)} now)" for name in changed)
    if changed and not allow_change:
        raise UserError(f"{folder} was begun with other values: {differences}; give those, or --allow-config-change")
    if changed:
        logger.warning("going on with other values than %s was begun with: %s", folder, differences)
    return bool(changed)
