"""Training in chunks: their lengths, their reports, and how they end early."""

import threading
import time

import pytest

from flaxmnist.loop import advance as module
from flaxmnist.loop.advance import Pace, advance


class Counter:
    """A program whose state is the number of steps done; it notes its calls in ``events``, like ``report``."""

    def __init__(self, capacity: int = 10, seconds_per_step: float = 0):
        self.capacity, self.seconds_per_step = capacity, seconds_per_step
        self.events: list[tuple] = []

    def __call__(self, state, start, count):
        assert state == start
        self.events.append(("train", start, count))
        time.sleep(self.seconds_per_step * count)
        return state + count, f"metrics of {start}"

    def report(self, start, count, metrics):
        assert metrics == f"metrics of {start}"
        self.events.append(("report", start, count))

    def advance(self, until, *, step=0, pace=None, stop=None, **options):
        pace, stop = pace or Pace(1e9), stop or threading.Event()
        return advance(self, step, step, until, pace=pace, report=self.report, stop=stop, **options)

    def counts(self) -> list[int]:
        return [count for event, _, count in self.events if event == "train"]


def test_each_chunk_is_reported_while_the_next_one_computes():
    program = Counter(capacity=10)
    assert program.advance(25, step=3) == (25, 25, False, False)
    assert program.events == [
        ("train", 3, 10),
        ("train", 13, 10),
        ("report", 3, 10),
        ("train", 23, 2),
        ("report", 13, 10),
        ("report", 23, 2),
    ]


def test_nothing_is_trained_or_reported_at_the_end():
    program = Counter()
    assert program.advance(7, step=7) == (7, 7, False, False)
    assert program.events == []


def test_a_stop_takes_effect_after_the_current_chunk():
    program, stop = Counter(), threading.Event()
    stop.set()
    assert program.advance(25, stop=stop) == (10, 10, True, False)
    assert program.events == [("train", 0, 10), ("report", 0, 10)]


def test_a_stop_during_a_report_comes_after_the_chunk_that_computes_then():
    program, stop = Counter(), threading.Event()
    report = program.report
    program.report = lambda *arguments: report(*arguments) or stop.set()
    assert program.advance(100, stop=stop) == (20, 20, True, False)
    assert program.events[-2:] == [("report", 0, 10), ("report", 10, 10)], "every chunk is reported"


def test_a_stop_in_the_last_chunk_is_reported():
    program, stop = Counter(), threading.Event()
    stop.set()
    assert program.advance(10, stop=stop) == (10, 10, True, False)


@pytest.mark.parametrize("pauses", [0, 1, 2, 5])
def test_a_pause_ends_it_after_a_chunk_but_does_not_stop_the_run(pauses):
    """At least one chunk is trained, so that a run whose disk stays full makes progress."""
    program = Counter()
    answers = iter([False] * pauses + [True] * 9)
    step = 10 * (pauses + 1)
    assert program.advance(100, pause=lambda: next(answers)) == (step, step, False, True)
    assert program.counts() == [10] * (pauses + 1)
    assert [event for event, *_ in program.events].count("report") == pauses + 1


def test_a_report_that_raises_ends_it():
    program = Counter()

    def fail(*_):
        raise ArithmeticError

    program.report = fail
    with pytest.raises(ArithmeticError):
        program.advance(100)
    assert program.counts() == [10, 10]


@pytest.mark.parametrize(
    ("rate", "first"), [(0.01, 1), (1.0, 1), (7.9, 7), (50.0, 50), (1e30, 100), (float("inf"), 100)]
)
def test_the_pace_sets_the_length_of_the_first_chunk(rate, first):
    """A chunk takes about a second; it has at least one step, and at most ``capacity``."""
    program = Counter(capacity=100)
    program.advance(1000, pace=Pace(rate))
    assert program.counts()[0] == first


def test_the_pace_is_measured(monkeypatch):
    """The sleep takes at least 1 ms per step, so at most 100 of them fit into 0.1 s."""
    monkeypatch.setattr(module, "CHUNK_SECONDS", 0.1)
    program, pace = Counter(capacity=1000, seconds_per_step=1e-3), Pace(100.0)
    program.advance(60, pace=pace)
    assert program.counts()[:2] == [10, 10], "the first measurement comes with the report of the first chunk"
    assert 0 < pace.steps_per_second <= 1000
    fast = Pace(1.0)
    Counter(capacity=1000).advance(5000, pace=fast)
    assert fast.steps_per_second > 1000


def test_the_pace_counts_the_time_in_which_processes_agree(monkeypatch):
    """With several processes, that is where they wait for a chunk: here 20 ms for each one of 10 steps."""

    def agree(*values):
        time.sleep(0.02)
        return values

    monkeypatch.setattr(module.processes, "agree", agree)
    pace = Pace(1e9)
    Counter(capacity=10).advance(100, pace=pace)
    assert 0 < pace.steps_per_second <= 500
