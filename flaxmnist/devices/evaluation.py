"""Predictions for any number of images, and exact scores."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Int32, Num

from flaxmnist.core.definition import Definition, split
from flaxmnist.core.layers import Images, normalise
from flaxmnist.core.metrics import METRICS, log_softmax
from flaxmnist.devices import parallel
from flaxmnist.errors import UserError

# Images per device in one forward pass: enough for fast kernels, few enough to keep a CNN's activations in cache.
FORWARD_BATCH = 250

# Largest shift of an image in a prediction, in pixels: (2·4 + 1)² = 81 copies.
MAX_SHIFTS = 4


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Predictions for images, and their scores."""

    images: Images = field(repr=False)
    labels: Int[np.ndarray, " n"] = field(repr=False)
    logits: Float[np.ndarray, "n classes"] = field(repr=False)
    scores: dict[str, float]  # of each of core.metrics.METRICS
    confusion: Int[np.ndarray, "classes classes"]  # images by true class (row) and prediction (column)
    class_names: tuple[str, ...]

    @property
    def count(self) -> int:
        """The number of images."""
        return len(self.labels)

    @property
    def loss(self) -> float:
        """The mean cross-entropy, in nats."""
        return self.scores["loss"]

    @property
    def accuracy(self) -> float:
        """The fraction of correct predictions."""
        return self.scores["accuracy"]

    @property
    def probabilities(self) -> Float[np.ndarray, "n classes"]:
        """The probabilities of all classes, which sum to 1."""
        return np.exp(log_softmax(self.logits))

    @property
    def mistakes(self) -> Int[np.ndarray, " k"]:
        """The indices of the images whose most probable class is not their label."""
        return np.flatnonzero(self.logits.argmax(axis=1) != self.labels)


@jax.jit
def forward(
    definition: Definition, params: Any, buffers: Any, images: Images, indices: Int32[Array, "k m"]
) -> Float[Array, "k m classes"]:
    """Return the logits of the images at ``indices``, in batches of ``m``."""

    def logits(rows: Int32[Array, " m"]) -> Float[Array, "m classes"]:
        model = definition.merge(params, buffers)
        model.eval()
        return model(normalise(images[rows]))  # pyright: ignore[reportCallIssue]

    return jax.lax.map(logits, indices)


def predict_logits(model: nnx.Module, images: Images, shifts: int = 0) -> Float[np.ndarray, "n classes"]:
    """Return the logits of one or more images, in evaluation mode, computed on all devices that hold the weights.

    For ``shifts`` see ``over_shifts``.
    """
    return over_shifts(lambda images: forward_in_batches(model, images), images, shifts)


def over_shifts(
    predict: Callable[..., Float[np.ndarray, "n classes"]], images: Images, shifts: int
) -> Float[np.ndarray, "n classes"]:
    """Return the logits of ``predict`` or, unless ``shifts`` is 0, the logarithm of its mean probabilities over shifts.

    Each image is shifted along both axes by every number of pixels up to ``shifts``, and filled with zeros.
    """
    if not 0 <= shifts <= MAX_SHIFTS:
        raise UserError(f"shifts must be in [0, {MAX_SHIFTS}] pixels, but is {shifts}")
    return predict(images) if shifts == 0 else mean_prediction(map(predict, shifted(np.asarray(images), shifts)))


def shifted(images: Num[np.ndarray, "n h w c"], shifts: int) -> Iterator[Num[np.ndarray, "n h w c"]]:
    """Yield the (2·shifts + 1)² shifted copies of ``images``."""
    _, height, width, _ = images.shape
    padded = np.pad(images, ((0, 0), (shifts, shifts), (shifts, shifts), (0, 0)))
    for row, column in np.ndindex(2 * shifts + 1, 2 * shifts + 1):
        yield padded[:, row : row + height, column : column + width]


def mean_prediction(predictions: Iterable[Float[np.ndarray, "n classes"]]) -> Float[np.ndarray, "n classes"]:
    """Return the logarithm of the mean probabilities of several logits for the same images."""
    logarithms = [log_softmax(logits) for logits in predictions]
    return np.logaddexp.reduce(logarithms, axis=0) - np.log(len(logarithms))


def forward_in_batches(model: nnx.Module, images: Images) -> Float[np.ndarray, "n classes"]:
    """Return the logits of one or more images. Raise UserError if there are none."""
    if len(images) == 0:
        raise UserError("there are no images to predict: pass at least one")
    definition, params, buffers = split(model)
    mesh = parallel.mesh_of(params)
    num_shards = 1 if mesh is None else mesh.shape[parallel.BATCH]
    size = num_shards * min(FORWARD_BATCH, -(-len(images) // num_shards))
    # The last batch is padded with copies of the last image, whose logits are cut off below.
    indices = np.minimum(np.arange(len(images) + -len(images) % size, dtype=np.int32), len(images) - 1)
    indices = indices.reshape(-1, size)
    if mesh is not None:
        images = parallel.put(images, parallel.replicated(mesh))
        indices = parallel.put(indices, parallel.sharded(mesh, None, parallel.BATCH))
    logits = forward(definition, params, buffers, images, indices)
    if mesh is not None:
        logits = parallel.gather(logits, mesh)
    return np.asarray(logits).reshape(indices.size, -1)[: len(images)]


def predict(
    model: nnx.Module, images: Images, shifts: int = 0
) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, "n classes"]]:
    """Return the most probable class of each image, and the probabilities of all classes, which sum to 1.

    With ``shifts``, the probabilities are the mean over copies of the image shifted by up to that many pixels.
    """
    logits = predict_logits(model, images, shifts)
    return logits.argmax(axis=1), np.exp(log_softmax(logits))


def evaluate(
    model: nnx.Module,
    images: Images,
    labels: Int32[np.ndarray, " n"],
    class_names: tuple[str, ...] = (),
    shifts: int = 0,
) -> Evaluation:
    """Return the metrics and the confusion matrix over exactly these images. For ``shifts`` see ``predict``."""
    return score_logits(predict_logits(model, images, shifts), images, labels, class_names)


def score_logits(
    logits: Float[np.ndarray, "n classes"],
    images: Images,
    labels: Int32[np.ndarray, " n"],
    class_names: tuple[str, ...] = (),
) -> Evaluation:
    """Return the scores of the ``logits`` of ``images`` against ``labels``. Classes without names are numbered."""
    labels = np.asarray(labels)
    confusion = np.zeros((logits.shape[1], logits.shape[1]), np.int64)
    np.add.at(confusion, (labels, logits.argmax(axis=1)), 1)
    scores = {name: metric.score(logits, labels) for name, metric in METRICS.items()}
    return Evaluation(images, labels, logits, scores, confusion, class_names or tuple(map(str, range(len(confusion)))))
