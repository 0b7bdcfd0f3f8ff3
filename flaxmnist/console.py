"""Log messages, the progress bar, and the seconds spent on each activity."""

import contextlib
import logging
import sys
import time
from collections.abc import Iterator

from tqdm.auto import tqdm

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


# The activities that a run measures.
ACTIVITIES = ("import", "data", "compile", "train", "evaluate", "checkpoint")


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
        """Add the ``seconds`` of the run before it was interrupted: of each activity, and in "total"."""
        seconds = dict(seconds)
        self.earlier_seconds += seconds.pop("total", sum(seconds.values()))  # old checkpoints have no total
        for name, spent in seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + spent

    def total(self) -> float:
        """Return the seconds since the start, plus those before the run was interrupted."""
        return self.earlier_seconds + time.perf_counter() - self.start_time
