"""Training from one step to another, in chunks of steps.

A chunk is one call of a compiled program. While it computes, the previous one is reported.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from flaxmnist.core.state import Metrics, TrainState
from flaxmnist.devices import processes

# Approximate upper bound on the seconds per chunk, and so on the delay before a signal takes effect.
CHUNK_SECONDS = 1.0


class Steps(Protocol):
    """A compiled program that does ``count`` ≤ ``capacity`` steps from ``state``, which is at step ``start``."""

    @property
    def capacity(self) -> int: ...

    def __call__(self, state: TrainState, start: int, count: int) -> tuple[TrainState, Metrics]: ...


@dataclass
class Pace:
    """An estimate of the speed, from which the length of the next chunk follows."""

    steps_per_second: float = 1.0


class Advanced(NamedTuple):
    """The state after some steps."""

    state: TrainState
    step: int
    stopping: bool  # True if any process of the run was told to stop
    pausing: bool  # True if any of them asked for a pause


def advance(
    program: Steps,
    state: TrainState,
    step: int,
    until: int,
    *,
    pace: Pace,
    report: Callable[[int, int, Metrics], None],
    stop: threading.Event,
    pause: Callable[[], bool] = lambda: False,
) -> Advanced:
    """Train from ``step`` to ``until``; return early, after a whole chunk, if ``stop`` is set or ``pause()`` is true.

    ``state`` is donated. ``report(start, count, metrics)`` is called for each chunk, in order, before this returns.
    """
    unreported, reported_at, stopping, pausing = None, time.perf_counter(), False, False
    while step < until and not stopping and not pausing:
        count = max(1, int(min(until - step, program.capacity, pace.steps_per_second * CHUNK_SECONDS)))
        state, metrics = program(state, step, count)
        if unreported is not None:
            report(*unreported)
            # From report to report, because with several processes ``agree`` waits for the chunk, not ``report``.
            now = time.perf_counter()
            pace.steps_per_second, reported_at = unreported[1] / (now - reported_at), now
        unreported = step, count, metrics
        step += count
        # Agree after each chunk, so that all processes stop or pause at the same step.
        stopping, pausing, pace.steps_per_second = processes.agree(stop.is_set(), pause(), pace.steps_per_second)
    if unreported is not None:
        report(*unreported)
    return Advanced(state, step, stopping, pausing)
