"""A model's answers on any number of images, counted exactly."""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Int32

from flaxmnist import parallel
from flaxmnist.errors import UserError
from flaxmnist.layers import Images

# Images of a device in one forward pass: enough for fast kernels, few enough that a CNN's activations stay in cache.
FORWARD_BATCH = 250


@dataclass(frozen=True, eq=False)
class Evaluation:
    """How a model did on ``count`` images."""

    loss: float  # mean cross-entropy, in nats
    accuracy: float  # share answered rightly
    count: int  # images
    confusion: Int[np.ndarray, "classes classes"]  # images by true class (row) and answer (column)


def forward(
    graphdef: nnx.GraphDef, params: Any, images: Images, indices: Int32[Array, "k m"]
) -> Float[Array, "k m classes"]:
    """The logits of the images that ``indices`` name, ``m`` at a time."""
    model = nnx.merge(graphdef, params)
    return jax.lax.map(lambda chosen: model(images[chosen]), indices)


_forward = partial(jax.jit, static_argnums=0)(forward)


def predict_logits(model: nnx.Module, images: Images) -> Float[np.ndarray, "n classes"]:
    """The logits of each image, without dropout, for any number of images from 1 on.

    The work is spread over the devices that the model's weights lie on.
    """
    if len(images) == 0:
        raise UserError("there are no images to predict")
    graphdef, params = nnx.split(model)
    mesh = parallel.mesh_of(params)
    parts = 1 if mesh is None else mesh.shape[parallel.BATCH]
    size = parts * min(FORWARD_BATCH, -(-len(images) // parts))
    # The last batch is filled up with the last image, and what comes of that is cut off again.
    indices = np.minimum(np.arange(len(images) + -len(images) % size, dtype=np.int32), len(images) - 1)
    indices = indices.reshape(-1, size)
    if mesh is None:
        answers = _forward(graphdef, params, images, indices)
    else:
        placed = parallel.put(images, parallel.whole(mesh)), parallel.put(indices, parallel.split_columns(mesh))
        answers = parallel.gather(_forward(graphdef, params, *placed), mesh)
    return np.asarray(answers).reshape(indices.size, -1)[: len(images)]


def log_softmax(logits: Float[np.ndarray, "n classes"]) -> Float[np.ndarray, "n classes"]:
    """The logarithm of each row's softmax, in double precision."""
    with np.errstate(invalid="ignore"):  # infinite logits have no softmax: NaN says so
        shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def predict(model: nnx.Module, images: Images) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, "n classes"]]:
    """The most probable class of each image, and the probabilities of all classes, which sum to 1."""
    logits = predict_logits(model, images)
    return logits.argmax(axis=1), np.exp(log_softmax(logits))


def evaluate(model: nnx.Module, images: Images, labels: Int32[np.ndarray, " n"]) -> Evaluation:
    """Loss, accuracy and confusion matrix over exactly these images."""
    return score(predict_logits(model, images), np.asarray(labels))


def score(logits: Float[np.ndarray, "n classes"], labels: Int32[np.ndarray, " n"]) -> Evaluation:
    """What ``logits`` are worth against ``labels``."""
    answers = logits.argmax(axis=1)
    confusion = np.zeros((logits.shape[1], logits.shape[1]), np.int64)
    np.add.at(confusion, (labels, answers), 1)
    losses = -np.take_along_axis(log_softmax(logits), labels[:, None], axis=1)
    return Evaluation(
        loss=float(losses.mean()),
        accuracy=float((answers == labels).mean()),
        count=len(labels),
        confusion=confusion,
    )


class Reliability(NamedTuple):
    """Answers by the probability they were given, in equal intervals of it; sums over those in each."""

    answers: Int[np.ndarray, " bins"]
    confidence: Float[np.ndarray, " bins"]
    right: Float[np.ndarray, " bins"]

    def error(self) -> float:
        """The mean of |accuracy − confidence| over the intervals, weighted by the answers in each."""
        return float(np.abs(self.right - self.confidence).sum() / self.answers.sum())


def reliability(
    probabilities: Float[np.ndarray, "n classes"], labels: Int32[np.ndarray, " n"], bins: int = 15
) -> Reliability:
    """How often answers were right that were given with some confidence.

    Its ``error()`` is the expected calibration error of Guo et al. 2017, "On calibration of modern neural networks".
    """
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    places = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    sums = (np.bincount(places, weights, minlength=bins) for weights in (None, confidence, right))
    return Reliability(*sums)
