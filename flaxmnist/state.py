"""What a training step takes and gives."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int32, UInt8


class Batch(NamedTuple):
    """The images of a step; those of weight 0 fill up a short batch and count for nothing."""

    images: UInt8[Array, "b h w 1"]
    labels: Int32[Array, " b"]
    weights: Float[Array, " b"]  # 1 or 0


class Totals(NamedTuple):
    """Sums over examples; floats, which are exact for whole numbers up to 2²⁴."""

    loss: Float[Array, "..."]
    correct: Float[Array, "..."]
    images: Float[Array, "..."]


class Metrics(NamedTuple):
    """What a step saw before its update: its own batch, and its epoch up to and with that batch."""

    batch: Totals
    epoch: Totals
    gradient_norm: Float[Array, "..."]  # of the batch's mean loss, before clipping

    def nonfinite(self, start: int, count: int) -> dict[int, str]:
        """Says, by step, what is not finite in the first ``count`` places, which are steps from ``start`` on."""
        found = {}
        for name, values in (("gradient norm", self.gradient_norm), ("loss", self.batch.loss)):
            for place in np.flatnonzero(~np.isfinite(values[:count])):
                found[start + int(place)] = f"the {name} at step {start + place} is {values[place]}"
        return dict(sorted(found.items()))


def row_before(step: int, steps: list[int]) -> int:
    """How many of ``steps``, which ascend, come right before ``step`` without a gap."""
    row = 0
    while row < len(steps) and steps[-1 - row] == step - 1 - row:
        row += 1
    return row


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything a run goes on from: a pytree of arrays beside the static structure of the model."""

    graphdef: nnx.GraphDef = field(metadata={"static": True})
    step: Int32[Array, ""]  # steps done
    params: Any  # weights as nested dicts
    opt_state: optax.OptState
    ema: Any  # averaged weights as nested dicts; None where the config has no train.ema_decay
    epoch: Totals  # of the epoch the next step belongs to, so far

    @property
    def weights(self) -> Any:
        """The weights to evaluate and predict with: the averaged ones, where there are such."""
        return self.params if self.ema is None else self.ema

    @property
    def model(self) -> nnx.Module:
        """The model with ``weights``."""
        return nnx.merge(self.graphdef, self.weights)
