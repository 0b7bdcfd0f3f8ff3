"""Inputs and outputs of a training step."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int32, UInt8

from flaxmnist.core.definition import Definition
from flaxmnist.core.kernels import Kernels, find_kernels


class Batch(NamedTuple):
    """The images of a step; those of weight 0 are the padding of a short batch and do not count."""

    images: UInt8[Array, "b h w c"] | Float[Array, "b h w c"]  # floats in [0, 1] once augmented
    labels: Int32[Array, " b"]
    weights: Float[Array, " b"]  # 1 or 0
    indices: Int32[Array, " b"]  # of the images in the training set; −1: padding


class Totals(NamedTuple):
    """Sums over images, as floats, which are exact for integers up to 2²⁴."""

    loss: Float[Array, "..."]  # cross-entropy, whatever training minimises
    correct: Float[Array, "..."]
    images: Float[Array, "..."]


class Gradient(NamedTuple):
    """The gradient and the metrics of one batch; the same on every device."""

    params: Any  # gradient of the batch's mean objective, as nested dicts
    totals: Totals  # of the batch
    buffers: Any  # new state of the model, as nested dicts
    extra: dict[str, Float[Array, ""]]  # further metrics of the batch, by name


class Metrics(NamedTuple):
    """Metrics of a step before its update: of its batch, and of its epoch up to and including that batch."""

    batch: Totals
    epoch: Totals
    gradient_norm: Float[Array, "..."]  # of the batch's mean objective, before clipping
    extra: dict[
        str, Float[Array, "..."]
    ]  # recorded by name, such as the learning rate; sums over devices are the step's

    def nonfinite(self, start: int, count: int) -> dict[int, str]:
        """Return a message per non-finite step among the first ``count`` entries, the steps from ``start`` on."""
        messages = {}
        for name, values in (("gradient norm", self.gradient_norm), ("loss", self.batch.loss)):
            for index in np.flatnonzero(~np.isfinite(values[:count])):
                messages[start + int(index)] = f"the {name} at step {start + index} is {values[index]}"
        return dict(sorted(messages.items()))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything a run resumes from: a pytree of arrays, and the static structure of the model."""

    definition: Definition = field(metadata={"static": True})
    step: Int32[Array, ""]  # steps done
    params: Any  # weights as nested dicts
    buffers: Any  # other state of the model, such as running averages, as nested dicts
    statistics: Any  # the same for evaluation, see train.statistics_images; None without
    opt_state: optax.OptState
    ema: Any  # averaged weights as nested dicts; None if the config has no train.ema_decay
    epoch: Totals  # so far, of the epoch of the last step

    @property
    def weights(self) -> Any:
        """The weights for evaluation and prediction: the averaged ones if there are any."""
        return self.params if self.ema is None else self.ema

    @property
    def evaluation_buffers(self) -> Any:
        """The other state of the model for evaluation and prediction."""
        return self.buffers if self.statistics is None else self.statistics

    @property
    def kernels(self) -> Kernels:
        """The kernels of the model."""
        return find_kernels(self.definition.merge(self.params, self.buffers))

    @property
    def model(self) -> nnx.Module:
        """The model with ``weights`` and ``evaluation_buffers``, in evaluation mode."""
        model = self.definition.merge(self.weights, self.evaluation_buffers)
        model.eval()
        return model
