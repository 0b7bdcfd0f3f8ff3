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
        # Standard error may be a file on a full disk, or a pipe that nobody reads any more.
        with contextlib.suppress(OSError):
            tqdm.write(self.format(record), file=sys.stderr)


def show(level: str) -> None:
    """Shows the package's messages from ``level`` ("debug", "info", "warning" or "error") on standard error."""
    logger.handlers = [ConsoleHandler()]
    logger.setLevel(level.upper())
    logger.propagate = False


class Progress:
    """How far a run is: a bar in a notebook, and on a terminal that shows messages; else a line every 30 s."""

    def __init__(self, total: int, start: int, batch_size: int):
        self.start = self.step = start
        self.batch_size = batch_size
        notebook = type(sys.stderr).__module__.startswith("ipykernel")
        drawn = notebook or (sys.stderr.isatty() and logger.isEnabledFor(logging.INFO))
        # Times are told by ``tell``: those of the bar would count from now on, with all that is compiled.
        form = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps{postfix}"
        self.bar = tqdm(
            total=total,
            initial=start,
            disable=not drawn,
            bar_format=form,
            miniters=1,
            dynamic_ncols=True,
            file=sys.stderr,
        )
        self.total = total
        self.begin()

    def begin(self) -> None:
        """Counts time from now on."""
        self.began = self.lined = time.perf_counter()

    def show(self, step: int, loss: float | None = None, accuracy: float | None = None) -> None:
        """Says that ``step`` steps are done, and how the last of them did."""
        now, self.step = time.perf_counter(), step
        told = self.tell(now - self.began, loss, accuracy)
        self.bar.set_postfix_str(told, refresh=False)
        self.bar.update(step - self.bar.n)
        if self.bar.disable and now - self.lined > LINE_SECONDS:
            self.lined = now
            logger.info("%d of %d steps, %s", step, self.total, told)

    def tell(self, seconds: float, loss: float | None, accuracy: float | None) -> str:
        """What the steps so far took, which is ``seconds``, what the last of them saw, and what is still to be done."""
        rate = (self.step - self.start) / seconds
        told = [f"{rate:,.{0 if rate >= 100 else 1}f} steps/s", f"{rate * self.batch_size:,.0f} images/s"]
        told += [f"{name} {value:.4f}" for name, value in (("loss", loss), ("accuracy", accuracy)) if value is not None]
        if rate:
            told.append(f"{tqdm.format_interval((self.total - self.step) / rate)} left")
        return ", ".join(told)

    def close(self) -> None:
        self.bar.close()


def plain(value: Any) -> Any:
    """``value`` as JSON knows it; a float32 becomes the shortest number that still names it."""
    if isinstance(value, np.ndarray) and value.ndim:
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return float(str(value)) if value.dtype == np.float32 else value.item()
    return value


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records in ``path``. Raises UserError where they cannot be read."""
    try:
        records = [json.loads(line) for line in path.read_bytes().splitlines()]
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error})") from None
    for line, record in enumerate(records, start=1):
        if not is_record(record):
            raise UserError(f"{path} is damaged (line {line} holds no record)")
    return records


def is_record(record: Any) -> bool:
    """Whether ``record`` has what all have; those of training and evaluation, loss and accuracy too."""
    if not isinstance(record, dict) or type(record.get("split")) is not str:
        return False
    counts = [record.get("step"), record.get("epoch")]
    measured = record["split"] in ("train", "epoch", "validation", "test")
    numbers = [record.get("loss"), record.get("accuracy")] if measured else []
    return all(type(count) is int and 0 <= count < 2**31 for count in counts) and all(
        isinstance(number, int | float) for number in numbers
    )


# Kinds of records of which there may be millions, and which a run does not look back at.
MANY = ("train", "epoch", "batch")


class Records:
    """The records of a run, one JSON line each, in memory and, where there is a file, in ``metrics.jsonl``."""

    def __init__(self, path: Path | None, text: bytes = b""):
        """Goes on behind ``text``, which is all that ``path`` shall hold, whatever it holds now. Raises OSError."""
        self.path, self.text, self.written = path, bytearray(text), len(text)
        self.few = [record for record in self.history if record["split"] not in MANY]
        if path is None:
            return
        try:
            with path.open("r+b") as file:
                if file.read(len(text)) == text:
                    file.truncate(len(text))
                    return
            logger.warning("%s was damaged, and is written anew as the checkpoint has it", path)
        except FileNotFoundError:
            pass
        write_file(path, text)

    def add(self, step: int, epoch: int, split: str, **values: Any) -> None:
        """One record: after ``step`` updates, in ``epoch``, of ``split``. No value may be a time or a duration."""
        record = {"step": step, "epoch": epoch, "split": split} | {name: plain(value) for name, value in values.items()}
        if split not in MANY:
            self.few.append(record)
        self.text += json.dumps(record, allow_nan=False).encode() + b"\n"

    @property
    def history(self) -> list[dict[str, Any]]:
        """All records."""
        return [json.loads(line) for line in self.text.splitlines()]

    def write(self) -> None:
        """Writes what is new. Raises OSError, and has it still then."""
        if self.path is None:
            return
        if not self.path.exists():
            self.written = 0
            write_file(self.path, b"")
        with self.path.open("r+b", buffering=0) as file:
            file.seek(self.written)
            while self.written < len(self.text):
                self.written += file.write(bytes(self.text[self.written :]))


# What the seconds of a run are told apart by.
SECONDS = ("import", "data", "compile", "train", "evaluate", "checkpoint")


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
    """Writes ``value`` to ``path`` at once. Raises OSError."""
    write_file(path, json.dumps(value, indent=2, allow_nan=False).encode() + b"\n")


def write_file(path: Path, content: bytes) -> None:
    """Writes ``content`` to ``path`` at once: a reader sees the old file or the whole new one. Raises OSError."""
    beside = path.with_name(path.name + ".tmp")
    with beside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
