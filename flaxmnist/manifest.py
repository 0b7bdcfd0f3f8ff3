"""The checkpoints in a folder: which are there, what they were saved of, and whether they are whole.

Beside the files of each lies a manifest: what it was saved of, and the SHA-256 of every file.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flaxmnist.errors import UserError
from flaxmnist.logs import logger

NAME, RECORDS = "manifest.json", "records.jsonl"

# Orbax writes them last; they hold times and a greeting, and restoring does without them.
UNCHECKED = {"_CHECKPOINT_METADATA", "commit_success.txt"}


class DamagedError(Exception):
    """A checkpoint is not what was saved; the message says what is wrong."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint, beside its arrays."""

    step: int
    about: dict[str, Any]  # "accuracy" on the validation images at this step or None, "seconds", "run"
    records: bytes  # what metrics.jsonl held


def steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in ``folder``, the newest first."""
    try:
        return sorted(
            (int(path.name) for path in folder.iterdir() if path.name.isdecimal() and len(path.name) <= 18),
            reverse=True,
        )
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror}): allow it") from None


def read(folder: Path, step: int) -> Saved:
    """The checkpoint at ``step`` without its arrays. Raises DamagedError unless every file is as it was saved."""
    known = verify(folder / str(step))
    return Saved(step, known, (folder / str(step) / RECORDS).read_bytes())


def newest(folder: Path) -> Saved | None:
    """The newest checkpoint in ``folder`` that is whole; None where there is none. Warns of each newer one."""
    for step in steps(folder):
        try:
            return read(folder, step)
        except DamagedError as error:
            logger.warning("checkpoint %s is damaged and left out: %s", folder / str(step), error)
    return None


def find(folder: Path, which: str) -> Saved | None:
    """The checkpoint called ``which``: "latest", "best" or a step. None where there is none that is whole.

    Raises UserError where that very one is damaged, or there are some but not that one.
    """
    if which == "latest":
        return newest(folder)
    there = steps(folder)
    if not there:
        return None
    if which == "best":
        step = best(folder, there)
        if step is None:
            raise UserError(
                f"{folder} has no best checkpoint: none was saved at a step evaluated on validation images "
                "(data.validation, train.evaluate_every); take --step latest"
            )
    elif not which.isdecimal() or len(which) > 18 or int(which) not in there:
        raise UserError(f"{folder} has no checkpoint {which}: give latest, best or one of {there[::-1]}")
    else:
        step = int(which)
    try:
        return read(folder, step)
    except DamagedError as error:
        raise UserError(f"checkpoint {folder / str(step)} is damaged: {error}; take --step latest") from None


def best(folder: Path, among: list[int]) -> int | None:
    """The newest step of the best validation accuracy ``among`` those saved; None where none was evaluated."""
    accuracies = {}
    for step in among:
        with contextlib.suppress(DamagedError):
            accuracies[step] = about(folder / str(step))["accuracy"]
    known = {step: accuracy for step, accuracy in accuracies.items() if accuracy is not None}
    return max(known, key=lambda step: (known[step], step)) if known else None


# --- One checkpoint -------------------------------------------------------------------------------------------------


def write(folder: Path, known: dict[str, Any]) -> None:
    """Completes the checkpoint in ``folder``, of which so much is ``known``."""
    told = {"about": known, "files": dict(sorted(hashes(folder)))}
    (folder / NAME).write_text(json.dumps({"sha256": sha256(told), "checkpoint": told}, indent=1))


def about(folder: Path) -> dict[str, Any]:
    """What is known of the checkpoint in ``folder``. Raises DamagedError where the manifest itself is not whole."""
    return read_whole(folder)["about"]


def verify(folder: Path) -> dict[str, Any]:
    """What is known of the checkpoint in ``folder``. Raises DamagedError unless every file is as it was saved."""
    told = read_whole(folder)
    try:
        found = dict(hashes(folder))
    except OSError as error:
        raise unreadable(error) from None
    for name, checksum in told["files"].items():
        if name not in found:
            raise DamagedError(f"{name} is missing")
        if found[name] != checksum:
            raise DamagedError(f"{name} has changed")
    return told["about"]


def read_whole(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / NAME).read_text())
        checksum, told = content["sha256"], content["checkpoint"]
    except OSError as error:
        raise unreadable(error) from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DamagedError(f"{NAME} has changed") from None
    if sha256(told) != checksum:
        raise DamagedError(f"{NAME} has changed")
    return told


def unreadable(error: OSError) -> DamagedError | UserError:
    """What to raise for a file that is gone, or that is there but is not given out: that may be mended."""
    path = Path(error.filename)
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
        return DamagedError(f"{path.name} is missing")
    return UserError(f"{path} cannot be read ({error.strerror}): mend that")


def sha256(told: Any) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def hashes(folder: Path) -> Iterator[tuple[str, str]]:
    """The path, from ``folder`` on, and SHA-256 of each file."""
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.is_file() and name not in UNCHECKED | {NAME}:
            with path.open("rb") as file:
                yield name, hashlib.file_digest(file, "sha256").hexdigest()
