"""The flagship on the middle 24×24 pixels."""

from dataclasses import dataclass

import jax
from flax import nnx

import flaxmnist as fm

FLAGSHIP = fm.load_experiment("flagship")


class Crop(nnx.Module):
    def __init__(self, network: nnx.Module, border: int):
        self.network, self.border = network, border

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.network(x[:, self.border : -self.border, self.border : -self.border])


@dataclass(frozen=True)
class Cropped:
    border: int = 2  # pixels

    def make(self, shape: tuple[int, ...], classes: int, rngs: nnx.Rngs) -> Crop:
        return Crop(FLAGSHIP.model.make(shape, classes, rngs), self.border)


config = fm.replace(fm.replace(FLAGSHIP, "name", "crop"), "model", Cropped())
