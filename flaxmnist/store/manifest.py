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

from flaxmnist.console import logger
from flaxmnist.errors import UserError

NAME, RECORDS = "manifest.json", "records.jsonl"

# Orbax writes these last, after the manifest; they contain times and a greeting, and restoring does not need them.
UNCHECKED = {"_CHECKPOINT_METADATA", "commit_success.txt"}


class DamagedError(Exception):
    """A checkpoint differs from what was saved; the message names the file."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint without its arrays."""

    step: int
    metadata: dict[str, Any]  # "accuracy" on the validation images at this step or None, "seconds", "run"
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


def read(folder: Path, step: int) -> Saved:
    """Verify the checkpoint at ``step`` and load all but its arrays. Raise DamagedError if any file has changed."""
    checkpoint = folder / str(step)
    content = read_manifest(checkpoint)
    try:
        found = dict(hashes(checkpoint))
    except OSError as error:
        raise read_error(error) from None
    for name, checksum in content["files"].items():
        if name not in found:
            raise DamagedError(f"{name} is missing")
        if found[name] != checksum:
            raise DamagedError(f"{name} has changed")
    return Saved(step, content["about"], (checkpoint / RECORDS).read_bytes())


def newest(folder: Path) -> Saved | None:
    """Return the newest intact checkpoint in ``folder``, or None. Warn about each newer one."""
    for step in steps(folder):
        try:
            return read(folder, step)
        except DamagedError as error:
            logger.warning("skipping the damaged checkpoint %s: %s", folder / str(step), error)
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
        raise UserError(f"checkpoint {folder / str(step)} is damaged: {error}; use --step latest") from None


def best(folder: Path, candidates: list[int]) -> int | None:
    """Return the step with the best validation accuracy, the newest if several, or None if none was evaluated."""
    accuracies = {}
    for step in candidates:
        with contextlib.suppress(DamagedError):
            accuracy = read_manifest(folder / str(step))["about"]["accuracy"]
            if accuracy is not None:
                accuracies[step] = accuracy
    return max(accuracies, key=lambda step: (accuracies[step], step)) if accuracies else None


# --- One checkpoint -------------------------------------------------------------------------------------------------


def write(folder: Path, metadata: dict[str, Any]) -> None:
    """Write the manifest of the checkpoint in ``folder``, whose other files must be complete."""
    content = {"about": metadata, "files": dict(sorted(hashes(folder)))}
    (folder / NAME).write_text(json.dumps({"sha256": sha256(content), "checkpoint": content}, indent=1))


def read_manifest(folder: Path) -> dict[str, Any]:
    """Load the manifest of the checkpoint in ``folder``. Raise DamagedError if it has changed."""
    try:
        document = json.loads((folder / NAME).read_text())
        checksum, content = document["sha256"], document["checkpoint"]
    except OSError as error:
        raise read_error(error) from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DamagedError(f"{NAME} has changed") from None
    if sha256(content) != checksum:
        raise DamagedError(f"{NAME} has changed")
    return content


def read_error(error: OSError) -> DamagedError | UserError:
    """Return a DamagedError for a missing file, a UserError for one that exists but cannot be read."""
    path = Path(error.filename)
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
        return DamagedError(f"{path.name} is missing")
    return UserError(f"{path} cannot be read ({error.strerror}): check the permissions and the disk")


def sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def hashes(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield the relative path and the SHA-256 of each file in ``folder``."""
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.is_file() and name not in UNCHECKED | {NAME}:
            with path.open("rb") as file:
                yield name, hashlib.file_digest(file, "sha256").hexdigest()
