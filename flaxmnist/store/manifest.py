"""Checkpoint manifests: list, choose and verify the checkpoints in a folder.

Each checkpoint contains a manifest with its metadata and the SHA-256 of every file.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flaxmnist import fields
from flaxmnist.console import logger
from flaxmnist.errors import UserError

NAME, RECORDS = "manifest.json", "records.jsonl"

# Orbax writes these last, after the manifest; they contain times and a greeting, and restoring does not need them.
UNCHECKED = {"_CHECKPOINT_METADATA", "commit_success.txt"}


class DamagedError(UserError):
    """A checkpoint differs from what was saved."""

    def __init__(self, checkpoint: Path, reason: str):
        super().__init__(f"checkpoint {checkpoint} is damaged: {reason}")


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """The metadata of a checkpoint."""

    accuracy: float | None  # on the validation images, if they were evaluated at this step
    goodness: float | None  # of train.monitor then, larger is better
    seconds: dict[str, float]  # spent by the run so far, by activity and in "total"
    run: dict[str, Any]  # a RunInfo as JSON, so that reading needs none of the user's classes


@dataclass(frozen=True)
class Saved:
    """A checkpoint without its arrays."""

    step: int
    info: CheckpointInfo
    records: bytes  # the content of metrics.jsonl


def steps(folder: Path) -> list[int]:
    """Return the steps of the checkpoints in ``folder``, the newest first."""
    try:
        names = [path.name for path in folder.iterdir()]
        return sorted((int(name) for name in names if name.isdecimal() and len(name) <= 18), reverse=True)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror}): check the permissions") from None


def read(folder: Path, step: int, *, verify: bool = True) -> Saved:
    """Load the checkpoint at ``step`` without its arrays.

    Raise DamagedError if any of its files has changed or, without ``verify``, if the manifest has.
    """
    checkpoint = folder / str(step)
    content = read_manifest(checkpoint)
    try:
        found = dict(hashes(checkpoint)) if verify else content["files"]
        for name, checksum in content["files"].items():
            if found.get(name) != checksum:
                raise DamagedError(checkpoint, f"{name} {'has changed' if name in found else 'is missing'}")
        records = (checkpoint / RECORDS).read_bytes()
    except OSError as error:
        raise read_error(checkpoint, error) from None
    try:
        return Saved(step, fields.from_json(with_goodness(content["about"]), CheckpointInfo), records)
    except UserError as error:
        # Not a DamagedError: it is intact, so that a run must not start from scratch because of it.
        raise UserError(f"{checkpoint / NAME} is from another version of flaxmnist: {error}") from None


def newest(folder: Path) -> Saved | None:
    """Return the newest intact checkpoint in ``folder``, or None. Warn about each newer one."""
    for step in steps(folder):
        try:
            return read(folder, step)
        except DamagedError as error:
            logger.warning("%s; skipping it", error)
    return None


def find(folder: Path, which: str) -> Saved | None:
    """Return the checkpoint ``which``: "latest", "best" or a step. Return None if there are no (intact) checkpoints.

    Raise UserError if the best checkpoint or that of the given step is damaged or missing.
    """
    if which == "latest":
        return newest(folder)
    saved_steps = steps(folder)
    if not saved_steps:
        return None
    if which == "best":
        step = best(folder, saved_steps)
        if step is None:
            raise UserError(
                f"{folder} has no best checkpoint: none was saved at a step evaluated on validation images "
                "(data.validation, train.evaluate_every); use --step latest"
            )
    elif not which.isdecimal() or len(which) > 18 or int(which) not in saved_steps:
        raise UserError(f"{folder} has no checkpoint {which}: use latest, best or one of {saved_steps[::-1]}")
    else:
        step = int(which)
    try:
        return read(folder, step)
    except DamagedError as error:
        raise UserError(f"{error}; use --step latest") from None


def best(folder: Path, candidates: list[int]) -> int | None:
    """Return the best step by ``train.monitor``, the newest if several, or None if none was evaluated."""
    found = {}
    for step in candidates:
        with contextlib.suppress(DamagedError):
            goodness = with_goodness(read_manifest(folder / str(step))["about"])["goodness"]
            if goodness is not None:
                found[step] = goodness
    return max(found, key=lambda step: (found[step], step)) if found else None


def with_goodness(about: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata of a checkpoint; before there was ``train.monitor``, it was the accuracy."""
    return {"goodness": about.get("accuracy")} | about


# --- One checkpoint -------------------------------------------------------------------------------------------------


def write(checkpoint: Path, info: CheckpointInfo) -> None:
    """Write the manifest of ``checkpoint``, a folder whose other files must be complete."""
    content = {"about": fields.to_json(info), "files": dict(sorted(hashes(checkpoint)))}
    (checkpoint / NAME).write_text(json.dumps({"sha256": sha256(content), "checkpoint": content}, indent=1))


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Load the manifest of ``checkpoint``. Raise DamagedError if it has changed."""
    try:
        document = json.loads((checkpoint / NAME).read_text())
        checksum, content = document["sha256"], document["checkpoint"]
    except OSError as error:
        raise read_error(checkpoint, error) from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DamagedError(checkpoint, f"{NAME} has changed") from None
    if sha256(content) != checksum:
        raise DamagedError(checkpoint, f"{NAME} has changed")
    return content


def read_error(checkpoint: Path, error: OSError) -> UserError:
    """Return a DamagedError for a missing file, another UserError for one that exists but cannot be read."""
    path = Path(error.filename or checkpoint)
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
        return DamagedError(checkpoint, f"{path.name} is missing")
    return UserError(f"{path} cannot be read ({error.strerror}): check the permissions and the disk")


def sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def hashes(checkpoint: Path) -> Iterator[tuple[str, str]]:
    """Yield the relative path and the SHA-256 of each file in ``checkpoint``."""
    for path in checkpoint.rglob("*"):
        name = str(path.relative_to(checkpoint))
        if path.is_file() and name not in UNCHECKED | {NAME}:
            with path.open("rb") as file:
                yield name, hashlib.file_digest(file, "sha256").hexdigest()
