"""What a run tells while it goes: records, console lines, a progress bar, and where the time went."""

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

# Seconds between plain progress lines where there is no terminal to draw a bar on.
LINE_SECONDS = 30.0


class ConsoleHandler(logging.Handler):
    """Lines on standard error, above the progress bar where one is drawn."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def show(level: str) -> None:
    """Shows the package's messages from ``level`` ("debug", "info", "warning" or "error") on standard error."""
    logger.handlers = [ConsoleHandler()]
    logger.setLevel(level.upper())
    logger.propagate = False


class Progress:
    """How far a run is: a bar on a terminal, else a plain line every 30 s."""

    def __init__(self, total: int, start: int, batch_size: int):
        self.start = self.step = start
        self.batch_size = batch_size
        hidden = not sys.stderr.isatty() or not logger.isEnabledFor(logging.INFO)
        self.bar = tqdm(total=total, initial=start, unit="step", disable=hidden, dynamic_ncols=True, file=sys.stderr)
        self.total = total
        self.begin()

    def begin(self) -> None:
        """Counts time from now on."""
        self.began = self.lined = time.perf_counter()

    def show(self, step: int, loss: float | None = None, accuracy: float | None = None) -> None:
        """Says that ``step`` steps are done, and how the last of them did."""
        now, self.step = time.perf_counter(), step
        rate = (step - self.start) / (now - self.began)
        told = [f"{rate * self.batch_size:,.0f} images/s"]
        told += [f"{name} {value:.4f}" for name, value in (("loss", loss), ("accuracy", accuracy)) if value is not None]
        self.bar.set_postfix_str(", ".join(told), refresh=False)
        self.bar.update(step - self.bar.n)
        if self.bar.disable and now - self.lined > LINE_SECONDS:
            self.lined = now
            left = (self.total - step) / rate
            logger.info("%d of %d steps, %.0f steps/s, %.0f s left", step, self.total, rate, left)

    def close(self) -> None:
        self.bar.close()


def plain(value: Any) -> Any:
    """``value`` as JSON knows it; a float32 becomes the shortest number that still names it."""
    if isinstance(value, np.ndarray) and value.ndim:
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return float(str(value)) if value.dtype == np.float32 else value.item()
    return value


def read_records(path: Path, size: int | None = None) -> list[dict[str, Any]]:
    """The records in the first ``size`` bytes of ``path`` (None: all). Raises UserError where they are not whole."""
    try:
        content = path.read_bytes()[:size]
        records = [json.loads(line) for line in content.splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): --overwrite begins the run anew") from None
    if size is not None and len(content) < size:
        raise UserError(f"{path} has lost its end: {size} bytes were written; --overwrite begins the run anew")
    return records


class Records:
    """The records of a run in memory and, where there is a file, one JSON line each in ``metrics.jsonl``."""

    def __init__(self, path: Path | None, size: int = 0, *, write: bool = True):
        """Goes on behind the first ``size`` bytes of ``path``; what lies beyond them is cut off.

        Without ``write``, the records are read there and kept in memory alone.
        """
        self.history = [] if path is None or size == 0 else read_records(path, size)
        self.file = None
        if path is not None and write:
            self.file = path.open("ab")
            self.file.truncate(size)

    def add(self, step: int, epoch: int, split: str, **values: Any) -> None:
        """One record: after ``step`` updates, in ``epoch``, of ``split``. No value may be a time or a duration."""
        record = {"step": step, "epoch": epoch, "split": split} | {name: plain(value) for name, value in values.items()}
        self.history.append(record)
        if self.file is not None:
            self.file.write(json.dumps(record, allow_nan=False).encode() + b"\n")

    def sync(self) -> int:
        """Returns the bytes of the file, when all of them are on the disk."""
        if self.file is None:
            return 0
        self.file.flush()
        os.fsync(self.file.fileno())
        return self.file.tell()

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


class Clock:
    """Seconds spent on each kind of work."""

    def __init__(self, began: float | None = None):
        """``began`` is what ``time.perf_counter()`` said when the command started (None: now)."""
        self.began = time.perf_counter() if began is None else began
        self.seconds: dict[str, float] = {}
        self.before = 0.0

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Adds the time of the block to ``name``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def resume(self, seconds: dict[str, float]) -> None:
        """Adds what the run had spent before it was stopped."""
        for name, spent in seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + spent
            self.before += spent

    def total(self) -> float:
        """Seconds since the start, and those of the stretches before."""
        return self.before + time.perf_counter() - self.began


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` to ``path`` at once: a reader sees the old file or the whole new one."""
    beside = path.with_name(path.name + ".tmp")
    with beside.open("w") as file:
        json.dump(value, file, indent=2, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
