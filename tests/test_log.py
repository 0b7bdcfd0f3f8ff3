"""Records and console lines of chunks, evaluations and skipped steps, from made-up metrics."""

import logging

import numpy as np
import pytest
from conftest import evaluated, small

from flaxmnist.core.state import Metrics, Totals
from flaxmnist.errors import Diverged
from flaxmnist.loop.log import TrainingLog, means
from flaxmnist.store.records import Records

# The metrics of steps 0 to 5, in epochs of three steps. The last batch of an epoch has 8 images, the others have 16.
BATCHES = Totals(
    loss=np.array([32, 16, 12, 8, 4, 1], np.float32),
    correct=np.array([2, 4, 6, 8, 12, 8], np.float32),
    images=np.array([16, 16, 8, 16, 16, 8], np.float32),
)
EPOCHS = Totals(*(np.concatenate([sums[:3].cumsum(), sums[3:].cumsum()]) for sums in BATCHES))
METRICS = Metrics(BATCHES, EPOCHS, gradient_norm=np.arange(6, dtype=np.float32) / 4, extra={})


@pytest.fixture
def log(caplog):
    """A function that returns the log of a run with these fields of ``train``."""
    caplog.set_level(logging.INFO, logger="flaxmnist")
    return lambda **train: TrainingLog(small(**train), 3, Records(None), 0)


def chunk(start: int, count: int, metrics: Metrics = METRICS) -> tuple[int, int, Metrics]:
    """Return the arguments of a report, with zeros after ``count``, as the training program returns them."""
    arrays = [[np.append(sums[start : start + count], np.float32(0)) for sums in totals] for totals in metrics[:2]]
    norms = np.append(metrics.gradient_norm[start : start + count], np.float32(0))
    return start, count, Metrics(Totals(*arrays[0]), Totals(*arrays[1]), norms, {})


def with_values(*, loss: dict[int, float] | None = None, norm: dict[int, float] | None = None) -> Metrics:
    """Return METRICS with other losses or gradient norms at some steps."""
    losses, norms = BATCHES.loss.copy(), METRICS.gradient_norm.copy()
    for array, values in ((losses, loss or {}), (norms, norm or {})):
        array[list(values)] = list(values.values())
    return METRICS._replace(batch=BATCHES._replace(loss=losses), gradient_norm=norms)


@pytest.mark.parametrize(
    ("report", "lines"),
    [
        (
            "loss",
            [
                "step 0, loss 2.0000, accuracy 0.1250",
                "step 2, loss 1.5000, accuracy 0.7500",
                "step 4, loss 0.2500, accuracy 0.7500",
            ],
        ),
        ("epoch_cost", ["Epoch: 0001, Cost: 1.500000000", "Epoch: 0002, Cost: 0.324999988"]),
        (
            "batch_loss",
            [
                "epoch 0, batch 0, loss 2.000000",
                "epoch 0, batch 2, loss 1.500000",
                "epoch 1, batch 0, loss 0.500000",
                "epoch 1, batch 2, loss 0.125000",
            ],
        ),
        ("batch_accuracy", []),
        ("probabilities", []),
    ],
)
def test_lines_of_the_steps(report, lines, log, caplog):
    log(report=report, log_every=2).chunk(*chunk(0, 6))
    assert caplog.messages == lines


def test_records_of_the_steps_and_epochs(log):
    """The records of several chunks are those of one."""
    one, several = log(log_every=2), log(log_every=2)
    one.chunk(*chunk(0, 6))
    for start, count in ((0, 1), (1, 3), (4, 2)):
        several.chunk(*chunk(start, count))
    assert one.records.text == several.records.text
    assert one.records.history == [
        {"step": 0, "epoch": 0, "split": "train", "loss": 2.0, "accuracy": 0.125, "gradient_norm": 0.0},
        {"step": 2, "epoch": 0, "split": "train", "loss": 1.5, "accuracy": 0.75, "gradient_norm": 0.5},
        {"step": 3, "epoch": 1, "split": "epoch", "loss": 1.5, "accuracy": 0.3},
        {"step": 4, "epoch": 1, "split": "train", "loss": 0.25, "accuracy": 0.75, "gradient_norm": 1.0},
        {"step": 6, "epoch": 2, "split": "epoch", "loss": 0.325, "accuracy": 0.7},
    ]


def test_accuracy_before_a_step(log, caplog):
    log = log(report="batch_accuracy")
    for step, accuracy in ((0, 0.09375), (100, 0.86), (200, 1.0)):
        log.batch_accuracy(step, evaluated(16, loss=0.5, accuracy=accuracy))
    assert caplog.messages == [
        "step 0, training accuracy 0.09375",
        "step 100, training accuracy 0.86",
        "step 200, training accuracy 1",
    ]
    expected = {"step": 100, "epoch": 33, "split": "batch", "loss": 0.5, "accuracy": 0.86}
    assert log.records.history[1] == expected


def test_probabilities_before_a_step(log, caplog):
    log = log(report="probabilities")
    log.batch_probabilities(3, np.array([[0.25, 0.75], [1e-7, 1 - 1e-7]]))
    assert caplog.messages == ["step 3, probabilities\n[[0.25 0.75]\n [0.   1.  ]]"]
    expected = {"step": 3, "epoch": 1, "split": "batch", "probabilities": [[0.25, 0.75], [0.0, 1.0]]}
    assert log.records.history == [expected]


def test_evaluation(log, caplog):
    log = log()
    log.evaluation(6, "validation", evaluated(30, loss=0.25, accuracy=0.9))
    log.evaluation(6, "test", evaluated(45, loss=1.23456, accuracy=0.5))
    assert caplog.messages == [
        "step 6, validation loss 0.2500, accuracy 0.9000",
        "step 6, test loss 1.2346, accuracy 0.5000",
    ]
    assert log.records.history[0] == {"step": 6, "epoch": 2, "split": "validation", "loss": 0.25, "accuracy": 0.9}
    with pytest.raises(Diverged, match=r"^the test loss after step 6 is nan$"):
        log.evaluation(6, "test", evaluated(45, loss=np.nan, accuracy=0.1))
    assert len(log.records.history) == 2


def test_a_nonfinite_step_is_skipped_and_recorded(log, caplog):
    """It has no record of its own, but the epoch has one."""
    log = log(log_every=1, skip_nonfinite=1, report="epoch_cost")
    log.chunk(*chunk(0, 6, with_values(loss={2: np.nan, 4: -np.inf})))
    assert [(r["step"], r["split"], r.get("count")) for r in log.records.history] == [
        (0, "train", None),
        (1, "train", None),
        (2, "skipped", 1),
        (3, "epoch", None),
        (3, "train", None),
        (4, "skipped", 2),
        (5, "train", None),
        (6, "epoch", None),
    ]
    assert [line for line in caplog.messages if "skipped" in line] == [
        "the loss at step 2 is nan: this step is skipped",
        "the loss at step 4 is -inf: this step is skipped",
    ]


@pytest.mark.parametrize(
    ("allowed", "reason"), [(0, "step 2 is nan"), (1, "step 3 is inf, after 1 steps in a row were skipped")]
)
def test_one_nonfinite_step_too_many(allowed, reason, log):
    """The records before it are kept, so that they are saved with the run."""
    log = log(log_every=1, skip_nonfinite=allowed)
    metrics = with_values(norm={2: np.nan, 3: np.inf})
    with pytest.raises(Diverged, match=f"^the gradient norm at {reason}$"):
        log.chunk(*chunk(0, 6, metrics))
    assert [r["step"] for r in log.records.history if r["split"] == "train"] == [0, 1]


def test_an_epoch_without_images_has_no_record(log):
    """All of its steps were skipped."""
    empty = METRICS._replace(epoch=Totals(*np.zeros((3, 6), np.float32)))
    log = log(skip_nonfinite=6)
    log.chunk(*chunk(0, 6, empty))
    assert not [record for record in log.records.history if record["split"] == "epoch"]


def test_means_of_steps_that_were_not_done_are_nan():
    losses, accuracies = means(Totals(np.array([8.0, 0.0]), np.array([4.0, 0.0]), np.array([16.0, 0.0])))
    np.testing.assert_array_equal(losses, [0.5, np.nan])
    np.testing.assert_array_equal(accuracies, [0.25, np.nan])
