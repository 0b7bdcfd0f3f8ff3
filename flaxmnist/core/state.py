"""Inputs and outputs of a training step."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int32, UInt8

from flaxmnist.core.definition import Definition


class Batch(NamedTuple):
    """The images of a step; those of weight 0 are the padding of a short batch and do not count."""

    images: UInt8[Array, "b h w c"]
    labels: Int32[Array, " b"]
    weights: Float[Array, " b"]  # 1 or 0


class Totals(NamedTuple):
    """Sums over images, as floats, which are exact for integers up to 2²⁴."""

    loss: Float[Array, "..."]
    correct: Float[Array, "..."]
    images: Float[Array, "..."]


class Metrics(NamedTuple):
    """Metrics of a step before its update: of its batch, and of its epoch up to and including that batch."""

    batch: Totals
    epoch: Totals
    gradient_norm: Float[Array, "..."]  # of the batch's mean loss, before clipping

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
    buffers: Any  # other state of the model, such as batch statistics, as nested dicts
    opt_state: optax.OptState
    ema: Any  # averaged weights as nested dicts; None if the config has no train.ema_decay
    epoch: Totals  # so far, of the epoch of the last step

    @property
    def weights(self) -> Any:
        """The weights for evaluation and prediction: the averaged ones if there are any."""
        return self.params if self.ema is None else self.ema

    @property
    def model(self) -> nnx.Module:
        """The model with ``weights``, in evaluation mode."""
        model = self.definition.merge(self.weights, self.buffers)
        model.eval()
        return model
