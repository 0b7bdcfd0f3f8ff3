"""The fewest parameters for a mean test accuracy of 99 %: six convolutions with factored kernels.

    python launch/train.py experiments/tiny.py

Here: 1,074 parameters, 99.01 ± 0.12 % (mean ± std, seeds 0–9), 2 min on two cores of an AMD EPYC with AVX-512.
"""

from dataclasses import dataclass
from itertools import pairwise

import jax
from flax import nnx

import flaxmnist as fm
from flaxmnist.config import Adam, Augment, Config, Data, OneCycle, Train


class FactoredConv(nnx.Module):
    """A 3×3 convolution with kernel[y, x, i, o] = space[y, x, o] · mix[i, o]: nine weights per output, not per pair."""

    def __init__(self, inputs: int, outputs: int, padding: str, rngs: nnx.Rngs):
        self.space = nnx.Param(nnx.initializers.normal(1 / 3)(rngs.params(), (3, 3, outputs)))
        self.mix = nnx.Param(nnx.initializers.he_normal()(rngs.params(), (inputs, outputs)))
        self.padding = padding
        self.conv_general_dilated = jax.lax.conv_general_dilated  # replaced by the form of train.convolution

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.space[...][:, :, None, :] * self.mix[...][None, None]
        return self.conv_general_dilated(x, kernel, (1, 1), self.padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


class Network(nnx.Module):
    """Convolution, pooling (the first two times), batch normalisation, SiLU; the mean over pixels gives the logits."""

    def __init__(self, channels: int, widths: tuple[int, ...], classes: int, rngs: nnx.Rngs):
        first = nnx.Conv(channels, widths[0], (3, 3), padding="VALID", use_bias=False, rngs=rngs)
        paddings = ("VALID", "SAME", "SAME", "VALID", "VALID")
        pairs = zip(pairwise(widths), paddings, strict=True)
        self.convs = nnx.List([first, *(FactoredConv(*widths, padding, rngs) for widths, padding in pairs)])
        self.norms = nnx.List(fm.BatchNorm(width, momentum=0.95, rngs=rngs) for width in widths)
        self.logits = nnx.Linear(widths[-1], classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = conv(x)
            x = nnx.silu(norm(fm.max_pool(x) if i < 2 else x))
        return self.logits(x.mean((1, 2)))


@dataclass(frozen=True)
class Tiny:
    """A CNN with few parameters."""

    widths: tuple[int, int, int, int, int, int] = (6, 8, 8, 10, 10, 10)  # channels of each convolution

    def make(self, shape: tuple[int, ...], classes: int, rngs: nnx.Rngs) -> Network:
        return Network(shape[2], self.widths, classes, rngs)


config = Config(
    name="tiny",
    model=Tiny(),
    optimizer=Adam(learning_rate=0.06, b2=0.99, schedule=OneCycle(peak=0.2)),
    data=Data(augment=Augment(batch_shift=1), validation=0),
    train=Train(batch_size=128, epochs=24, ema_decay=0.998),
)
