"""When something is due and when a run ends, as pure functions of config, step and what was recorded."""

from collections.abc import Mapping, Sequence

import numpy as np

from flaxmnist.config import Train
from flaxmnist.core.metrics import goodness


def is_due(step: int, length: int, every: int | None) -> bool:
    """Return True at multiples of ``every`` steps and at the end of a run of ``length`` steps."""
    return step == length or (every is not None and step % every == 0)


def next_due(step: int, length: int, *intervals: int | None, at: int | None = None) -> int:
    """Return the first step after ``step`` that is a multiple of one of the ``intervals``, ``at``, or the end."""
    once = [at] if at is not None and at > step else []
    return min([length, *once, *(step - step % every + every for every in intervals if every is not None)])


def is_logged(train: Train, step: int, epoch_length: int) -> bool:
    """Return True if the batch of ``step`` is recorded. With ``batch_loss``, batches are counted per epoch."""
    number = step % epoch_length if train.report == "batch_loss" else step
    return number % train.log_every == 0


def stops_early(train: Train, validations: Sequence[Mapping[str, float]]) -> bool:
    """Return True if ``train.stop_accuracy`` is reached or the last ``train.patience`` evaluations had no new best.

    ``validations`` are the scores of all evaluations on the validation images so far.
    """
    validations = [scores for scores in validations if train.monitor in scores]  # an older version had fewer metrics
    if not validations:
        return False
    reached = train.stop_accuracy is not None and max(v["accuracy"] for v in validations) >= train.stop_accuracy
    if train.patience is None:
        return reached
    since_best = len(validations) - 1 - int(np.argmax([goodness(train.monitor, scores) for scores in validations]))
    return reached or since_best >= train.patience


def may_skip(train: Train, step: int, skipped: Sequence[int]) -> bool:
    """Return True if ``step``, whose loss or gradient is not finite, may be skipped.

    ``skipped`` are the steps skipped before, ascending. At most ``train.skip_nonfinite`` in a row may be skipped.
    """
    in_a_row = 0
    while in_a_row < len(skipped) and skipped[-1 - in_a_row] == step - 1 - in_a_row:
        in_a_row += 1
    return in_a_row < train.skip_nonfinite
