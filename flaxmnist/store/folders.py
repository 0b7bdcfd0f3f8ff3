"""Run folders: read and check their files, and decide if a run may start or resume in one."""

import contextlib
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from flaxmnist import fields
from flaxmnist.config import Config
from flaxmnist.console import ACTIVITIES, logger
from flaxmnist.data.sets import Dataset
from flaxmnist.errors import UserError
from flaxmnist.store import manifest
from flaxmnist.store.files import write_json
from flaxmnist.store.lock import Lock
from flaxmnist.store.records import read_records

CONTENTS = {"config.json", "metrics.jsonl", "checkpoints", "result.json", "tensorboard", "lock"}
CONTENTS |= {"plots", "report.html", "export"}

# The fields of result.json and their types.
RESULT = {
    "experiment": str,
    "seed": int,
    "backend": str,
    "devices": int,
    "device_kind": str,
    "steps": int,
    "epochs": float,
    "test_accuracy": float,
    "test_loss": float,
    "test_count": int,
    "validation_accuracy": float | None,
    "params": int,
    "params_sha256": str,
    "steps_per_second": float | None,
    "seconds": dict,
    "peak_memory_bytes": int,
    "versions": dict,
}

# Seconds to wait before each further attempt to save at the end of a run.
LAST_RETRIES = (0.5, 2.0, 5.0)

# Fields that may change when a run is resumed (its length may).
MAY_CHANGE = {"train.steps", "train.epochs", "train.keep", "train.report"} | {
    f"train.{event}_every" for event in ("log", "evaluate", "checkpoint")
}


def read_json(path: Path) -> dict[str, Any]:
    """Load a JSON object. Raise UserError if ``path`` does not contain one."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path.parent} is not a run folder: {path.name} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: it is not a JSON object")
    return value


def read_description(folder: Path) -> dict[str, Any]:
    """Load ``config.json``, or the copy in the newest checkpoint if the file is damaged or missing."""
    try:
        description = read_json(folder / "config.json")
        check_description(folder / "config.json", description)
        return description
    except UserError as error:
        saved = manifest.newest(folder / "checkpoints")
        if saved is None:
            raise
        logger.warning("%s: using its copy in the checkpoint at step %d", error, saved.step)
        return saved.metadata["run"]


def read_result(folder: Path) -> dict[str, Any]:
    """Load ``result.json``. Raise UserError if it is damaged."""
    result = read_json(folder / "result.json")
    for name, kind in RESULT.items():
        fields.check_types(kind, result.get(name), f"{folder}/result.json is damaged: {name}")
    seconds = result["seconds"]
    for name in (*ACTIVITIES, "total"):
        fields.check_types(float, seconds.get(name), f"{folder}/result.json is damaged: seconds.{name}")
    if seconds["total"] <= 0 or result["test_count"] <= 0:
        raise UserError(f"{folder}/result.json is damaged: seconds.total and test_count must be above 0")
    return result


def check_description(path: Path, description: dict[str, Any]) -> None:
    """Raise UserError if ``description``, loaded from ``path``, lacks a valid config or description of the data."""
    with damage_as_user_error(path):
        try:
            fields.from_json(description["config"], Config)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        data = description["data"]
        height, width, classes = *data["shape"], data["classes"]
        valid = all(type(size) is int and size > 0 for size in (height, width, classes, data["train"]))
        if not (valid and all(type(data[name]) is str for name in ("name", "source"))):
            raise UserError(f"{path} is damaged: its description of the data is invalid")


def resume_step(folder: Path, config: Config) -> int | None:
    """Return the step to resume from, or None to start from scratch. Raise UserError if ``config`` ends before it."""
    saved = manifest.newest(folder / "checkpoints")
    if saved is not None:
        check_length(folder, saved.step, config)
        return saved.step
    if manifest.steps(folder / "checkpoints"):
        logger.warning("%s has no intact checkpoint: the run starts from scratch", folder)
    return None


def write_error(folder: Path, error: OSError) -> UserError:
    return UserError(f"cannot write to {folder}: {error.strerror or error}; fix that, or use another --workdir")


@contextlib.contextmanager
def damage_as_user_error(path: Path) -> Iterator[None]:
    """Raise UserError if the block fails because of missing or unexpected content in ``path``, a file or a folder."""
    try:
        yield
    except UserError:
        raise
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path} is damaged or incomplete: {error!r}") from error


def describe_run(
    config: Config, data: Dataset, mesh: Mesh, backend: str, experiment: str | Path | None
) -> dict[str, Any]:
    """Return the content of ``config.json``."""
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
    return {
        "count": mesh.size,
        "kind": mesh.devices.flat[0].device_kind,
        "processes": jax.process_count(),
        "backend": backend,
        "mesh": dict(mesh.shape),
    }


def describe_data(data: Dataset) -> dict[str, Any]:
    sizes = {name: 0 if split is None else len(split.labels) for name, split in data.splits().items()}
    shape = list(data.train.images.shape[1:3])
    return {"name": data.name, "source": data.source, "classes": data.classes, "shape": shape} | sizes


def git_commit() -> str | None:
    """Return the commit of this code, or None if it is not in a repository or git is not installed."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        process = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return process.stdout.strip()


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    packages = ("flaxmnist", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    return {"python": sys.version.split()[0]} | {name: metadata.version(name) for name in packages}


def fresh_folder(name: str) -> Path:
    """Create and return ``runs/NAME-YYYYMMDD-HHMMSS``, with a number appended if that exists."""
    stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    for number in itertools.count(1):
        folder = Path("runs", stem if number == 1 else f"{stem}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            if not Path("runs").is_dir():
                raise UserError("runs is a file: pass --workdir") from None
        except OSError as error:
            raise write_error(folder, error) from None
    raise AssertionError("unreachable")


def is_finished(
    folder: Path, lock: Lock, description: dict[str, Any], resume: bool, overwrite: bool, allow_change: bool
) -> bool:
    """Take the ``lock``, and return True if ``folder`` contains this run, finished. With ``overwrite``, empty it.

    Raise UserError if the folder is not empty and neither ``resume`` nor ``overwrite`` is set, if it is not a run
    folder, if another run holds the lock, or if the run to resume has another config or other data.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in folder.iterdir()}
        if names and not (resume or overwrite):
            raise UserError(
                f"{folder} is not empty: pass --resume to continue, --overwrite to start from scratch, or another "
                "--workdir"
            )
        if overwrite and "config.json" not in names and not {name.removesuffix(".tmp") for name in names} <= CONTENTS:
            raise UserError(f"{folder} is not a run folder and is not overwritten: use another --workdir")
        lock.take(folder)
        if overwrite:
            for path in folder.iterdir():
                if path.name.removesuffix(".tmp") in CONTENTS - {"lock"}:
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            return False
    except OSError as error:
        raise write_error(folder, error) from None
    if "config.json" not in names and not manifest.steps(folder / "checkpoints"):
        return False
    old_description = read_description(folder)
    old, new = (fields.from_json(each.get("config"), Config) for each in (old_description, description))
    changed = compare_configs(old_description, description, folder, allow_change)
    if "result.json" not in names:
        return False
    try:
        steps = check_result(folder)
    except UserError as error:
        logger.warning("%s: the run resumes from its last checkpoint", error)
        return False
    check_length(folder, steps, new)
    return old.train.steps == new.train.steps and not changed


def check_result(folder: Path) -> int:
    """Return the number of steps of the finished run in ``folder``. Raise UserError if its files are damaged."""
    saved = manifest.newest(folder / "checkpoints")
    with damage_as_user_error(folder):
        result, records = read_result(folder), read_records(folder / "metrics.jsonl")
        steps, test = result["steps"], (result["test_loss"], result["test_accuracy"])
        if saved is None or saved.step != steps:
            raise UserError(f"{folder} has no intact checkpoint at step {steps}, the last step in its result.json")
        if (records[-1]["split"], records[-1]["loss"], records[-1]["accuracy"]) != ("test", *test):
            raise UserError(f"{folder}/metrics.jsonl does not end with the test record of result.json")
    return steps


def save_or_rescue(folder: Path, save: Callable[[], None], rescue: Callable[[Path], str]) -> None:
    """Call ``save``, which writes to ``folder``, until it succeeds or all attempts have raised OSError.

    In the latter case call ``rescue`` with a new folder elsewhere, and raise UserError with the advice it returns.
    """
    reason = None
    for pause in (0.0, *LAST_RETRIES):
        time.sleep(pause)
        try:
            return save()
        except OSError as error:
            reason = error.strerror or error
            logger.warning("cannot save to %s (%s)", folder, reason)
    for find_parent in (tempfile.gettempdir, Path.home, Path.cwd):
        elsewhere = None
        try:
            elsewhere = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=find_parent()))
            advice = rescue(elsewhere)
        except (OSError, RuntimeError):  # Path.home raises RuntimeError if the user has no home directory
            if elsewhere is not None:
                shutil.rmtree(elsewhere, ignore_errors=True)
        else:
            raise UserError(f"cannot save to {folder} ({reason}): {advice}")
    raise UserError(f"cannot save to {folder} ({reason}) or anywhere else: only earlier checkpoints are kept")


def begin_run(folder: Path, description: dict[str, Any]) -> None:
    """Write ``config.json``, and remove the result of an earlier run."""
    (folder / "result.json").unlink(missing_ok=True)
    write_json(folder / "config.json", description)


def check_length(folder: Path, steps: int, config: Config) -> None:
    if steps > config.train.length:
        raise UserError(f"{folder} already has {steps} steps: train.steps must be at least {steps}")


def compare_configs(
    old_description: dict[str, Any], new_description: dict[str, Any], folder: Path, allow_change: bool
) -> bool:
    """Return True if fields outside MAY_CHANGE differ. Raise UserError naming them unless ``allow_change``."""
    old, new = (
        fields.flatten(each["config"]) | {"data.source": each.get("data", {}).get("source")}
        for each in (old_description, new_description)
    )
    changed = [name for name in sorted(old | new) if old.get(name) != new.get(name) and name not in MAY_CHANGE]
    differences = ", ".join(f"{name} ({old.get(name)} before, {new.get(name)} now)" for name in changed)
    if changed and not allow_change:
        raise UserError(f"{folder} was started with other values: {differences}; use those or --allow-config-change")
    if changed:
        logger.warning("resuming %s with other values: %s", folder, differences)
    return bool(changed)
