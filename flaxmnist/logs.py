"""Progress output of a run: log messages, a progress bar, records, and the time spent on each activity."""

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from flaxmnist.errors import UserError

logger = logging.getLogger("flaxmnist")

# Seconds between plain progress lines if there is no progress bar.
LINE_SECONDS = 30.0


class ConsoleHandler(logging.Handler):
    """Handler that writes to standard error, above the progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        # Standard error may be a file on a full disk, or a closed pipe.
        with contextlib.suppress(OSError):
            tqdm.write(self.format(record), file=sys.stderr)


def show_messages(level: str) -> None:
    """Log messages of at least ``level`` ("debug", "info", "warning" or "error") to standard error."""
    logger.handlers = [ConsoleHandler()]
    logger.setLevel(level.upper())
    logger.propagate = False


class Progress:
    """Progress of a run: a bar in a notebook, or on a terminal that shows messages; otherwise a line every 30 s."""

    def __init__(self, total: int, start: int, batch_size: int):
        self.total, self.start, self.step, self.batch_size = total, start, start, batch_size
        notebook = type(sys.stderr).__module__.startswith("ipykernel")
        visible = notebook or (sys.stderr.isatty() and logger.isEnabledFor(logging.INFO))
        # ``describe`` adds the times, because those of tqdm would include compilation.
        bar_format = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps{postfix}"
        options = {"miniters": 1, "dynamic_ncols": True, "file": sys.stderr, "disable": not visible}
        self.bar = tqdm(total=total, initial=start, bar_format=bar_format, **options)
        self.begin()

    def begin(self) -> None:
        """Start to measure the time."""
        self.start_time = self.line_time = time.perf_counter()

    def show(self, step: int, loss: float | None = None, accuracy: float | None = None) -> None:
        """Show that ``step`` steps are done, and the loss and accuracy of the last one."""
        now, self.step = time.perf_counter(), step
        text = self.describe(now - self.start_time, loss, accuracy)
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(step - self.bar.n)
        if self.bar.disable and now - self.line_time > LINE_SECONDS:
            self.line_time = now
            logger.info("%d of %d steps, %s", step, self.total, text)

    def describe(self, seconds: float, loss: float | None, accuracy: float | None) -> str:
        """Return the speed since the start, ``seconds`` ago, the latest metrics, and the estimated time left."""
        rate = (self.step - self.start) / seconds
        info = [f"{rate:,.{0 if rate >= 100 else 1}f} steps/s", f"{rate * self.batch_size:,.0f} images/s"]
        info += [f"{name} {value:.4f}" for name, value in (("loss", loss), ("accuracy", accuracy)) if value is not None]
        if rate:
            info.append(f"{tqdm.format_interval((self.total - self.step) / rate)} left")
        return ", ".join(info)

    def close(self) -> None:
        self.bar.close()


def to_json_value(value: Any) -> Any:
    """Return ``value`` with NumPy types converted for JSON; a float32 becomes the shortest decimal that round-trips."""
    if isinstance(value, np.ndarray) and value.ndim:
        return [to_json_value(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return float(str(value)) if value.dtype == np.float32 else value.item()
    return value


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


# Splits that may have millions of records, which a run never reads back.
FREQUENT = ("train", "epoch", "batch")


class Records:
    """The records of a run, one JSON object per line, in memory and, unless ``path`` is None, in ``metrics.jsonl``."""

    def __init__(self, path: Path | None, text: bytes = b""):
        """Continue after the records in ``text``, and make them the content of ``path``. Raise OSError on failure."""
        self.path, self.text, self.written = path, bytearray(text), len(text)
        self.few = [record for record in self.history if record["split"] not in FREQUENT]
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
            self.few.append(record)
        self.text += json.dumps(record, allow_nan=False).encode() + b"\n"

    @property
    def history(self) -> list[dict[str, Any]]:
        """Return all records."""
        return [json.loads(line) for line in self.text.splitlines()]

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


# The activities that a run measures.
SECONDS = ("import", "data", "compile", "train", "evaluate", "checkpoint")


class Clock:
    """Seconds spent on each activity."""

    def __init__(self, start_time: float | None = None):
        """``start_time`` is the value of ``time.perf_counter()`` at the start of the command (None: now)."""
        self.start_time = time.perf_counter() if start_time is None else start_time
        self.seconds: dict[str, float] = {}
        self.earlier_seconds = 0.0  # total before the run was resumed

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Add the time spent in the block to ``name``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def resume(self, seconds: dict[str, float]) -> None:
        """Add the ``seconds`` of the run before it was interrupted."""
        for name, spent in seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + spent
            self.earlier_seconds += spent

    def total(self) -> float:
        """Return the seconds since the start, plus those before the run was interrupted."""
        return self.earlier_seconds + time.perf_counter() - self.start_time


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` to ``path`` atomically. Raise OSError on failure."""
    write_file(path, json.dumps(value, indent=2, allow_nan=False).encode() + b"\n")


def write_file(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` atomically, and flush it to the disk. Raise OSError on failure."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
