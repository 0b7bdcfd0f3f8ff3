"""The records of a run: metrics.jsonl, one JSON object per line."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from flaxmnist.console import logger
from flaxmnist.errors import UserError
from flaxmnist.store.files import write_file

# Splits that may have millions of records, which a run never reads back.
FREQUENT = ("train", "epoch", "batch")


class Records:
    """The records of a run, one JSON object per line, in memory and, unless ``path`` is None, in ``metrics.jsonl``."""

    def __init__(self, path: Path | None, text: bytes = b""):
        """Continue after the records in ``text``, and make them the content of ``path``. Raise OSError on failure."""
        self.path, self.text, self.written = path, bytearray(text), len(text)
        self.rare = [record for record in self.history if record["split"] not in FREQUENT]
        if path is None:
            return
        try:
            with path.open("r+b") as file:
                if file.read(len(text)) == text:
                    file.truncate(len(text))
                    return
            logger.warning("%s is damaged: restoring it from the checkpoint", path)
        except FileNotFoundError:
            pass
        write_file(path, text)

    def add(self, step: int, epoch: int, split: str, **values: Any) -> None:
        """Add a record. ``values`` must not contain times, so that equal runs have bitwise identical records."""
        record = {"step": step, "epoch": epoch, "split": split} | {
            name: to_json_value(value) for name, value in values.items()
        }
        if split not in FREQUENT:
            self.rare.append(record)
        self.text += json.dumps(record, allow_nan=False).encode() + b"\n"

    @property
    def history(self) -> list[dict[str, Any]]:
        """Return all records."""
        return [json.loads(line) for line in self.text.splitlines()]

    @property
    def validations(self) -> list[dict[str, Any]]:
        """Return the records of all evaluations on the validation images."""
        return [record for record in self.rare if record["split"] == "validation"]

    def last(self, split: str) -> dict[str, Any] | None:
        """Return the last record of ``split``, which must not be FREQUENT."""
        return next((record for record in reversed(self.rare) if record["split"] == split), None)

    def write(self) -> None:
        """Append new records to the file. Raise OSError on failure, keeping them for the next call."""
        if self.path is None:
            return
        if not self.path.exists():
            self.written = 0
            write_file(self.path, b"")
        with self.path.open("r+b", buffering=0) as file:
            file.seek(self.written)
            while self.written < len(self.text):
                self.written += file.write(bytes(self.text[self.written :]))


def to_json_value(value: Any) -> Any:
    """Return ``value`` with NumPy types converted for JSON.

    A float32 becomes the shortest decimal that round-trips; infinities and NaN, which JSON lacks, become None.
    """
    if isinstance(value, np.ndarray) and value.ndim:
        return [to_json_value(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        value = float(str(value)) if value.dtype == np.float32 else value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_records(path: Path) -> list[dict[str, Any]]:
    """Load the records in ``path``. Raise UserError if they are damaged."""
    try:
        records = [json.loads(line) for line in path.read_bytes().splitlines()]
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error})") from None
    for line, record in enumerate(records, start=1):
        if not is_valid_record(record):
            raise UserError(f"{path} is damaged (line {line} is not a record)")
    return records


def is_valid_record(record: Any) -> bool:
    """Return True if ``record`` has step, epoch and split and, if its split is a measurement, loss and accuracy."""
    if not isinstance(record, dict) or type(record.get("split")) is not str:
        return False
    counts = [record.get("step"), record.get("epoch")]
    measured = record["split"] in ("train", "epoch", "validation", "test")
    numbers = [record.get("loss"), record.get("accuracy")] if measured else []
    return all(type(count) is int and 0 <= count < 2**31 for count in counts) and all(
        isinstance(number, int | float) for number in numbers
    )
