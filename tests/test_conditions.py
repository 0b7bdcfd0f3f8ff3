"""When something is due, and when a run ends, as tables."""

import pytest

from flaxmnist.config import Train
from flaxmnist.loop.conditions import is_due, is_logged, may_skip, next_due, stops_early


@pytest.mark.parametrize(
    ("step", "every", "due"),
    [
        (0, 5, True),
        (4, 5, False),
        (5, 5, True),
        (19, 5, False),
        (20, 5, True),
        (20, 7, True),
        (19, None, False),
        (20, None, True),
        (7, 1, True),
        (5, 100, False),
        (20, 100, True),
    ],
)
def test_something_is_due_at_multiples_and_at_the_end(step, every, due):
    assert is_due(step, 20, every) == due


@pytest.mark.parametrize(
    ("step", "intervals", "next_step"),
    [
        (0, (), 20),
        (0, (None,), 20),
        (0, (5,), 5),
        (4, (5,), 5),
        (5, (5,), 10),
        (5, (5, 3), 6),
        (6, (None, 4, 3), 8),
        (17, (5, None), 20),
        (19, (100,), 20),
        (0, (100, 7), 7),
        (3, (1,), 4),
    ],
)
def test_the_next_step_at_which_something_is_due(step, intervals, next_step):
    assert next_due(step, 20, *intervals) == next_step
    assert any(is_due(next_step, 20, every) for every in (*intervals, None))
    assert not any(is_due(between, 20, every) for between in range(step + 1, next_step) for every in intervals)


@pytest.mark.parametrize(
    ("report", "logged"),
    [("loss", [0, 4, 8, 12]), ("epoch_cost", [0, 4, 8, 12]), ("batch_loss", [0, 4, 6, 10, 12])],
)
def test_batches_are_counted_from_the_start_of_the_run_or_of_the_epoch(report, logged):
    """In epochs of six steps."""
    train = Train(steps=20, log_every=4, report=report)
    assert [step for step in range(14) if is_logged(train, step, 6)] == logged


@pytest.mark.parametrize(
    ("options", "accuracies", "stops"),
    [
        ({}, [0.9, 0.8, 0.7], False),
        ({"stop_accuracy": 0.9}, [], False),
        ({"stop_accuracy": 0.9}, [0.5, 0.89], False),
        ({"stop_accuracy": 0.9}, [0.5, 0.9], True),
        ({"stop_accuracy": 0.9}, [0.95, 0.5], True),  # resumed
        ({"patience": 2}, [], False),
        ({"patience": 2}, [0.5], False),
        ({"patience": 2}, [0.5, 0.4], False),
        ({"patience": 2}, [0.5, 0.4, 0.45], True),
        ({"patience": 2}, [0.5, 0.5, 0.5], True),  # an equal one is not better
        ({"patience": 2}, [0.5, 0.4, 0.6], False),
        ({"patience": 1}, [0.5, 0.4], True),
        ({"patience": 2, "stop_accuracy": 0.9}, [0.5, 0.95], True),
        ({"patience": 2, "stop_accuracy": 0.9}, [0.5, 0.4, 0.3], True),
        ({"patience": 3, "stop_accuracy": 0.9}, [0.5, 0.4, 0.3], False),
    ],
)
def test_early_stopping(options, accuracies, stops):
    validations = [{"accuracy": accuracy, "loss": 1 - accuracy} for accuracy in accuracies]
    for monitor in ("accuracy", "loss"):
        assert stops_early(Train(steps=20, evaluate_every=1, monitor=monitor, **options), validations) == stops


@pytest.mark.parametrize(
    ("allowed", "step", "skipped", "may"),
    [
        (0, 5, [], False),
        (1, 5, [], True),
        (1, 0, [], True),
        (1, 5, [4], False),
        (1, 5, [3], True),
        (2, 5, [4], True),
        (2, 5, [3, 4], False),
        (2, 5, [0, 1, 2, 4], True),
        (2, 2, [0, 1], False),
        (3, 5, [1, 3, 4], True),
    ],
)
def test_only_so_many_steps_in_a_row_may_be_skipped(allowed, step, skipped, may):
    assert may_skip(Train(steps=20, skip_nonfinite=allowed), step, skipped) == may
