"""Files of run folders: atomic writes, JSON, NumPy arrays, and errors that name the file."""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np

from flaxmnist import fields
from flaxmnist.errors import UserError

Content = TypeVar("Content")


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """Open a file that replaces ``path`` at the end of the block, flushed to the disk. Raise OSError on failure."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_file(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` atomically. Raise OSError on failure."""
    with atomic(path) as file:
        file.write(content)


def write_json(path: Path, value: Any) -> None:
    """Write ``value``, a dataclass or plain JSON, to ``path`` atomically. Raise OSError on failure."""
    write_file(path, json.dumps(fields.to_json(value), indent=2, allow_nan=False).encode() + b"\n")


def read_json(path: Path, kind: type[Content], classes: Iterable[type] = ()) -> Content:
    """Load the dataclass ``kind`` that ``write_json`` wrote, which may contain the user's ``classes``.

    Raise UserError if ``path`` is missing or damaged, or if a class is missing.
    """
    try:
        values = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path.parent} is not a run folder: {path.name} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    try:
        return fields.from_json(values, kind, classes)
    except fields.UnknownClass as error:
        raise fields.UnknownClass(f"{path}: {error}") from None
    except UserError as error:
        raise UserError(f"{path} is damaged: {error}") from None


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write ``arrays`` to ``path`` atomically. Raise OSError on failure."""
    with atomic(path) as file:
        np.savez(file, allow_pickle=False, **arrays)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Load the arrays in ``path``. Raise UserError if it is damaged."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except Exception as error:  # NumPy and zipfile raise many types
        raise UserError(f"{path} is damaged ({error})") from None


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
