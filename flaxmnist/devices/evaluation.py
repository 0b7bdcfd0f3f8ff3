"""Predictions for any number of images, and exact scores."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Int32

from flaxmnist.core.definition import Definition, split
from flaxmnist.core.layers import Images, normalise
from flaxmnist.core.metrics import METRICS, log_softmax
from flaxmnist.devices import parallel
from flaxmnist.errors import UserError

# Images per device in one forward pass: enough for fast kernels, few enough to keep a CNN's activations in cache.
FORWARD_BATCH = 250


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Scores of a model on ``count`` images."""

    scores: dict[str, float]  # of each of core.metrics.METRICS
    count: int  # images
    confusion: Int[np.ndarray, "classes classes"]  # images by true class (row) and prediction (column)
    class_names: tuple[str, ...]

    @property
    def loss(self) -> float:
        """The mean cross-entropy, in nats."""
        return self.scores["loss"]

    @property
    def accuracy(self) -> float:
        """The fraction of correct predictions."""
        return self.scores["accuracy"]


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


def predict_logits(model: nnx.Module, images: Images) -> Float[np.ndarray, "n classes"]:
    """Return the logits of one or more images, in evaluation mode, computed on all devices that hold the weights."""
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


def predict(model: nnx.Module, images: Images) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, "n classes"]]:
    """Return the most probable class of each image, and the probabilities of all classes, which sum to 1."""
    logits = predict_logits(model, images)
    return logits.argmax(axis=1), np.exp(log_softmax(logits))


def evaluate(
    model: nnx.Module, images: Images, labels: Int32[np.ndarray, " n"], class_names: tuple[str, ...] = ()
) -> Evaluation:
    """Return the metrics and the confusion matrix over exactly these images."""
    return score_logits(predict_logits(model, images), np.asarray(labels), class_names)


def score_logits(
    logits: Float[np.ndarray, "n classes"], labels: Int32[np.ndarray, " n"], class_names: tuple[str, ...] = ()
) -> Evaluation:
    """Return the scores of ``logits`` against ``labels``. Classes without names are numbered."""
    confusion = np.zeros((logits.shape[1], logits.shape[1]), np.int64)
    np.add.at(confusion, (labels, logits.argmax(axis=1)), 1)
    scores = {name: metric.score(logits, labels) for name, metric in METRICS.items()}
    return Evaluation(scores, len(labels), confusion, class_names or tuple(map(str, range(len(confusion)))))
