"""The metrics of an evaluation: named numbers, which records, results and reports contain. Add yours to METRICS."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

Logits = Float[np.ndarray, "n classes"]
Labels = Int[np.ndarray, " n"]


class Metric(NamedTuple):
    """A function of the logits and labels of all images, and which values are better (for ``train.monitor``)."""

    score: Callable[[Logits, Labels], float]
    larger_is_better: bool = True


def log_softmax(logits: Logits) -> Logits:
    """Return the logarithm of each row's softmax, in double precision."""
    with np.errstate(invalid="ignore"):  # infinite logits give NaN
        shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def cross_entropy(logits: Logits, labels: Labels) -> float:
    """Return the mean cross-entropy in nats."""
    return float(-np.take_along_axis(log_softmax(logits), labels[:, None], axis=1).mean())


def accuracy(logits: Logits, labels: Labels) -> float:
    """Return the fraction of images whose most probable class is their label."""
    return float((logits.argmax(axis=1) == labels).mean())


def top2_accuracy(logits: Logits, labels: Labels) -> float:
    """Return the fraction of images whose label is among the two most probable classes."""
    top2 = np.argsort(-logits, axis=1, kind="stable")[:, :2]  # of equal logits the first, like argmax
    return float((top2 == labels[:, None]).any(axis=1).mean())


def calibration_error(logits: Logits, labels: Labels) -> float:
    """Return the expected calibration error of Guo et al. 2017, "On calibration of modern neural networks".

    It is the mean of |accuracy − confidence| over 15 bins of the confidence, weighted by their images.
    """
    return reliability(np.exp(log_softmax(logits)), labels).error()


METRICS = {
    "loss": Metric(cross_entropy, larger_is_better=False),
    "accuracy": Metric(accuracy),
    "top2_accuracy": Metric(top2_accuracy),
    "calibration_error": Metric(calibration_error, larger_is_better=False),
}


def goodness(name: str, scores: Mapping[str, float]) -> float:
    """Return the metric ``name`` such that larger is better: with its sign changed if smaller is better."""
    return scores[name] if METRICS[name].larger_is_better else -scores[name]


class Reliability(NamedTuple):
    """Predictions in equal bins of their confidence: their number, and the sums of confidences and of correct ones."""

    counts: Int[np.ndarray, " bins"]
    confidence: Float[np.ndarray, " bins"]
    correct: Float[np.ndarray, " bins"]

    def error(self) -> float:
        """Return the mean of |accuracy − confidence| over the bins, weighted by their counts."""
        return float(np.abs(self.correct - self.confidence).sum() / self.counts.sum())


def reliability(probabilities: Float[np.ndarray, "n classes"], labels: Labels, bins: int = 15) -> Reliability:
    """Bin the predictions by their confidence, the probability of the predicted class. NaN counts as confidence 0."""
    confidence, correct = np.nan_to_num(probabilities.max(axis=1)), probabilities.argmax(axis=1) == labels
    rows = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    return Reliability(*(np.bincount(rows, weights, minlength=bins) for weights in (None, confidence, correct)))
