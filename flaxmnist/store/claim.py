"""Claim a folder for a run or a sweep: decide if it may start, resume or overwrite there."""

import itertools
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from flaxmnist import fields
from flaxmnist.console import logger
from flaxmnist.errors import UserError, check_local
from flaxmnist.store import manifest
from flaxmnist.store.files import read_json, write_error
from flaxmnist.store.lock import Lock
from flaxmnist.store.manifest import Saved
from flaxmnist.store.provenance import RunInfo
from flaxmnist.store.records import read_records
from flaxmnist.store.result import Result

# Fields that may change when a run is resumed (its length may).
MAY_CHANGE = {"train.steps", "train.epochs", "train.keep", "train.report"} | {
    f"train.{event}_every" for event in ("log", "evaluate", "checkpoint")
}


@dataclass(frozen=True)
class Layout:
    """The files and folders that a kind of folder may contain, and the file that identifies it."""

    noun: str
    marker: str
    contents: set[str]


COMMON = {"lock", "result.json", "plots", "report.html"}
RUN_CONTENTS = COMMON | {"config.json", "metrics.jsonl", "checkpoints", "tensorboard", "export"}
RUN = Layout("a run folder", "config.json", RUN_CONTENTS)
SWEEP_CONTENTS = COMMON | {"sweep.json", "parts", "curves.npz", "unfinished.npz", "export"}
SWEEP = Layout("the folder of a sweep", "sweep.json", SWEEP_CONTENTS)


def new_folder(name: str) -> Path:
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


def claim(folder: Path, lock: Lock, layout: Layout, *, resume: bool, overwrite: bool) -> set[str]:
    """Create or lock ``folder``, and return the names of its files. With ``overwrite``, remove those of ``layout``.

    Raise UserError if the folder is not empty and neither ``resume`` nor ``overwrite`` is set, if it is of another
    kind, or if another process holds the lock.
    """
    check_local(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in folder.iterdir()}
        if names and not (resume or overwrite):
            raise UserError(
                f"{folder} is not empty: pass --resume to continue, --overwrite to start from scratch, or another "
                "--workdir"
            )
        known = {name for name in names if name.removesuffix(".tmp") in layout.contents}
        # A run may resume among other people's files, such as a scheduler's logs, but not in a sweep's folder.
        foreign = names - known if overwrite else names & {RUN.marker, SWEEP.marker}
        if foreign and layout.marker not in names:
            raise UserError(f"{folder} is not {layout.noun}, but has {min(foreign)}: use another --workdir")
        lock.take(folder)
        if not overwrite:
            return names
        for path in (folder / name for name in known - {"lock"}):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        return names - known
    except OSError as error:
        raise write_error(folder, error) from None


def claim_run(
    folder: Path, lock: Lock, run: RunInfo, resume: bool, overwrite: bool, allow_config_change: bool
) -> tuple[bool, int | None]:
    """Claim ``folder`` for ``run``. Raise UserError also if the run to resume has another config, data or more steps.

    Return whether the run is finished there, and the step of the checkpoint to resume from, None to start from scratch.
    This is the only place that verifies that checkpoint by its SHA-256.
    """
    names = claim(folder, lock, RUN, resume=resume, overwrite=overwrite)
    checkpoints = folder / "checkpoints"
    if "config.json" not in names and not manifest.steps(checkpoints):
        return False, None
    saved = manifest.newest(checkpoints)
    previous = read_run_info(folder, saved, fields.user_classes(run.config))
    changed = compare(previous, run, folder, allow_config_change)
    if saved is None:
        if manifest.steps(checkpoints):
            logger.warning("%s has no intact checkpoint: the run starts from scratch", folder)
        else:
            logger.info("%s has no checkpoint yet: the run starts at step 0", folder)
        return False, None
    if saved.step > run.config.train.length:
        raise UserError(f"{folder} already has {saved.step} steps: train.steps must be at least {saved.step}")
    same = not changed and previous.config.train.steps == run.config.train.steps
    return "result.json" in names and is_intact(folder, saved) and same, saved.step


def read_run_info(folder: Path, saved: Saved | None, classes: Iterable[type]) -> RunInfo:
    """Load ``config.json``, or its copy in the checkpoint ``saved`` if the file is damaged or missing.

    ``classes`` are the user's that the config may contain.
    """
    try:
        return read_json(folder / "config.json", RunInfo, classes)
    except UserError as error:
        if saved is None or isinstance(error, fields.UnknownClass):
            raise
        logger.warning("%s: using its copy in the checkpoint at step %d", error, saved.step)
        return fields.from_json(saved.info.run, RunInfo, classes)


def compare(previous: RunInfo, run: RunInfo, folder: Path, allow_change: bool) -> bool:
    """Return True if fields outside MAY_CHANGE differ. Raise UserError naming them unless ``allow_change``."""
    old, new = (
        fields.flatten(fields.to_json(info.config))
        | {"data.source": info.data.source, "step": info.step.name if info.step else "the built-in one"}
        for info in (previous, run)
    )
    changed = [name for name in sorted(old | new) if old.get(name) != new.get(name) and name not in MAY_CHANGE]
    differences = ", ".join(f"{name} ({old.get(name)} before, {new.get(name)} now)" for name in changed)
    if changed and not allow_change:
        raise UserError(f"{folder} was started with other values: {differences}; use those or --allow-config-change")
    if changed:
        logger.warning("resuming %s with other values: %s", folder, differences)
    elif run.step != previous.step:
        logger.warning("resuming %s although the source of the step %s has changed", folder, new["step"])
    return bool(changed)


def is_intact(folder: Path, saved: Saved) -> bool:
    """Return True if result.json, metrics.jsonl and the newest checkpoint ``saved`` belong together; else warn."""
    try:
        result, records = read_json(folder / "result.json", Result), read_records(folder / "metrics.jsonl")
        test = {"split": "test", "loss": result.test_loss, "accuracy": result.test_accuracy}
        if saved.step != result.steps:
            raise UserError(f"{folder} has no intact checkpoint at its last step, {result.steps}")
        if not (records and test.items() <= records[-1].items()):
            raise UserError(f"{folder}/metrics.jsonl does not end with the test record of result.json")
    except UserError as error:
        logger.warning("%s: the run resumes from its last checkpoint", error)
        return False
    return True
