"""The run folder: what lies in it, and whether a run may begin or go on there."""

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

from flaxmnist import fields, manifest
from flaxmnist.config import Config
from flaxmnist.data import Dataset
from flaxmnist.errors import UserError
from flaxmnist.lock import Lock
from flaxmnist.logs import SECONDS, logger, read_records, write_json

CONTENTS = {"config.json", "metrics.jsonl", "checkpoints", "result.json", "tensorboard", "lock"}
CONTENTS |= {"plots", "report.html", "export"}

# What result.json holds.
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

# Seconds between the last attempts to save, at the end.
LAST_RETRIES = (0.5, 2.0, 5.0)

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
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return value


def read_described(folder: Path) -> dict[str, Any]:
    """What ``config.json`` in ``folder`` holds or, where it is damaged or gone, the newest checkpoint knows of it."""
    try:
        described = read_json(folder / "config.json")
        check_described(folder / "config.json", described)
        return described
    except UserError as error:
        saved = manifest.newest(folder / "checkpoints")
        if saved is None:
            raise
        logger.warning("%s: taken from the checkpoint at step %d", error, saved.step)
        return saved.about["run"]


def read_result(folder: Path) -> dict[str, Any]:
    """What ``result.json`` in ``folder`` holds. Raises UserError where it is not what a run ends with."""
    result = read_json(folder / "result.json")
    for name, kind in RESULT.items():
        fields.check_types(kind, result.get(name), f"{folder}/result.json is damaged: {name}")
    seconds = result["seconds"]
    for name in (*SECONDS, "total"):
        fields.check_types(float, seconds.get(name), f"{folder}/result.json is damaged: seconds.{name}")
    if seconds["total"] <= 0 or result["test_count"] <= 0:
        raise UserError(f"{folder}/result.json is damaged: seconds.total and test_count must be above 0")
    return result


def check_described(path: Path, described: dict[str, Any]) -> None:
    """Raises UserError where ``described``, which ``path`` holds, does not say what was trained, and on what data."""
    with as_saved(path.parent):
        try:
            fields.from_json(described["config"], Config)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        data = described["data"]
        height, width, classes = *data["shape"], data["classes"]
        whole = all(type(size) is int and size > 0 for size in (height, width, classes, data["train"]))
        if not (whole and all(type(data[name]) is str for name in ("name", "source"))):
            raise UserError(f"{path} does not say what the data are")


def newest_step(folder: Path, config: Config) -> int | None:
    """The step that a run of ``config`` goes on from in ``folder``; None for the beginning. Raises UserError."""
    saved = manifest.newest(folder / "checkpoints")
    if saved is not None:
        check_longer(folder, saved.step, config)
        return saved.step
    if manifest.steps(folder / "checkpoints"):
        logger.warning("no checkpoint in %s is whole: the run begins anew", folder)
    return None


def unwritable(folder: Path, error: OSError) -> UserError:
    """What to say where ``folder`` cannot be written to."""
    return UserError(f"cannot write to {folder}: {error.strerror or error}; mend that, or give another --workdir")


@contextlib.contextmanager
def as_saved(folder: Path) -> Iterator[None]:
    """Within the block, what the files of ``folder`` lack, or hold in place of what was saved, raises UserError."""
    try:
        yield
    except UserError:
        raise
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"a file of {folder} does not hold what was saved there: {error!r}") from error


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
    """A new folder for a run: ``runs/NAME-YYYYMMDD-HHMMSS``, numbered where that is there already."""
    stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    for number in itertools.count(1):
        folder = Path("runs", stem if number == 1 else f"{stem}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            if not Path("runs").is_dir():
                raise UserError("runs is a file: give a --workdir") from None
        except OSError as error:
            raise unwritable(folder, error) from None
    raise AssertionError("there is always another number")


def is_finished(
    folder: Path, lock: Lock, described: dict[str, Any], resume: bool, overwrite: bool, allow_change: bool
) -> bool:
    """Whether the run that ``described`` tells of has been finished in ``folder``. With ``overwrite``, empties it.

    Takes the ``lock``. Raises UserError where something lies there and neither ``resume`` nor ``overwrite`` is given,
    where what lies there is no run, where another run is going, and where a resumed run differs from the one it would
    go on from.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found = {path.name for path in folder.iterdir()}
        if found and not (resume or overwrite):
            raise UserError(
                f"{folder} is not empty: give --resume to go on there, --overwrite to begin anew, or another --workdir"
            )
        if overwrite and "config.json" not in found and not {name.removesuffix(".tmp") for name in found} <= CONTENTS:
            raise UserError(f"{folder} is no run folder: --overwrite leaves it alone, give another --workdir")
        lock.take(folder)
        if overwrite:
            for path in folder.iterdir():
                if path.name.removesuffix(".tmp") in CONTENTS - {"lock"}:
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            return False
    except OSError as error:
        raise unwritable(folder, error) from None
    if not found & {"config.json", "checkpoints"}:
        return False
    if "config.json" not in found and not manifest.steps(folder / "checkpoints"):
        return False
    before = read_described(folder)
    config, new = (fields.from_json(each.get("config"), Config) for each in (before, described))
    changed = compare(before, described, folder, allow_change)
    if "result.json" not in found:
        return False
    try:
        done = check_result(folder)
    except UserError as error:
        logger.warning("%s: the run is finished again from its last checkpoint", error)
        return False
    check_longer(folder, done, new)
    return config.train.steps == new.train.steps and not changed


def check_result(folder: Path) -> int:
    """The steps of the finished run in ``folder``. Raises UserError where its files are not as it left them."""
    saved = manifest.newest(folder / "checkpoints")
    with as_saved(folder):
        result, records = read_result(folder), read_records(folder / "metrics.jsonl")
        steps, test = result["steps"], (result["test_loss"], result["test_accuracy"])
        if saved is None or saved.step != steps:
            raise UserError(f"{folder} has no checkpoint of the step that its result.json tells of")
        if (records[-1]["split"], records[-1]["loss"], records[-1]["accuracy"]) != ("test", *test):
            raise UserError(f"{folder}/metrics.jsonl does not end with the test that its result.json tells of")
    return steps


def persist(folder: Path, save: Callable[[], None], rescue: Callable[[Path], str]) -> None:
    """Returns once ``save``, which writes to ``folder``, does not raise OSError.

    Where it always does, has ``rescue`` write to a new folder wherever that can be, and raises UserError with what it
    says of how to go on.
    """
    reason = None
    for pause in (0.0, *LAST_RETRIES):
        time.sleep(pause)
        try:
            return save()
        except OSError as error:
            reason = error.strerror or error
            logger.warning("cannot save to %s (%s)", folder, reason)
    for place in (tempfile.gettempdir, Path.home, Path.cwd):
        elsewhere = None
        try:
            elsewhere = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=place()))
            advice = rescue(elsewhere)
        except (OSError, RuntimeError):  # a home that nobody has raises the latter
            if elsewhere is not None:
                shutil.rmtree(elsewhere, ignore_errors=True)
        else:
            raise UserError(f"cannot save to {folder} ({reason}): {advice}")
    raise UserError(f"cannot save to {folder} ({reason}), nor anywhere else: what was saved before is all that is kept")


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
