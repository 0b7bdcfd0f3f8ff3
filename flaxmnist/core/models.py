"""The built-in models as Flax modules: images in, logits out. Images are uint8, or floats in [0, 1]."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.nn import initializers
from jaxtyping import Array, Float

from flaxmnist import config
from flaxmnist.core import layers
from flaxmnist.core.convolution import Form, set_form
from flaxmnist.core.definition import split
from flaxmnist.core.layers import Images
from flaxmnist.errors import UserError

Logits = Float[Array, "b classes"]
Rate = float | Float[Array, ""]


class Softmax(nnx.Module):
    """Softmax regression: logits = pixels·Wᵀ + b, with one row of W per class."""

    def __init__(
        self,
        *,
        shape: Sequence[int] = (28, 28),
        classes: int = 10,
        dropout: Rate = 0.0,
        kernel_init: initializers.Initializer = initializers.zeros,
        bias_init: initializers.Initializer = initializers.zeros,
        rngs: nnx.Rngs,
    ):
        self.dense = layers.Dense(math.prod(shape), classes, kernel_init=kernel_init, bias_init=bias_init, rngs=rngs)
        self.dropout = layers.Dropout(dropout)

    def __call__(self, images: Images) -> Logits:
        return self.dense(self.dropout(layers.flatten(layers.normalise(images))))


class MLP(nnx.Module):
    """A sequence of dense layers, with ReLU after each but the last."""

    def __init__(
        self,
        *,
        shape: Sequence[int] = (28, 28),
        classes: int = 10,
        hidden: Sequence[int] = (512,),
        dropout: Rate = 0.0,
        kernel_init: initializers.Initializer = layers.LECUN_NORMAL,
        bias_init: initializers.Initializer = initializers.zeros,
        rngs: nnx.Rngs,
    ):
        sizes = (math.prod(shape), *hidden, classes)
        self.layers = nnx.List(
            layers.Dense(inputs, outputs, kernel_init=kernel_init, bias_init=bias_init, rngs=rngs)
            for inputs, outputs in pairwise(sizes)
        )
        self.dropouts = nnx.List(layers.Dropout(dropout) for _ in hidden)

    def __call__(self, images: Images) -> Logits:
        x = layers.flatten(layers.normalise(images))
        for layer, dropout in zip(self.layers[:-1], self.dropouts, strict=True):
            x = dropout(jax.nn.relu(layer(x)))
        return self.layers[-1](x)


class CNN(nnx.Module):
    """Convolution, 2×2 max-pooling and ReLU for each of ``features``; dense with ReLU; dropout; dense.

    ``space_to_depth`` is the side of the blocks of pixels that first become channels. This speeds up the first
    convolution, because a single input channel makes poor use of matrix units.
    """

    def __init__(
        self,
        *,
        shape: Sequence[int] = (28, 28),
        classes: int = 10,
        features: Sequence[int] = (32, 64),
        kernel: Sequence[int] = (5,),
        space_to_depth: int = 1,
        padding: layers.Padding = "SAME",
        dense: int = 1024,
        dropout: Rate = 0.0,
        kernel_init: initializers.Initializer = layers.LECUN_NORMAL,
        bias_init: initializers.Initializer = initializers.zeros,
        rngs: nnx.Rngs,
    ):
        initial = {"kernel_init": kernel_init, "bias_init": bias_init, "rngs": rngs}
        self.space_to_depth = space_to_depth
        kernels = tuple(kernel) * len(features) if len(kernel) == 1 else tuple(kernel)
        inputs = space_to_depth**2 * math.prod(shape[2:])
        self.convs = nnx.List(
            layers.Conv(inputs, outputs, side, padding=padding, **initial)
            for (inputs, outputs), side in zip(pairwise((inputs, *features)), kernels, strict=True)
        )
        height, width = (-(-size // space_to_depth) for size in shape[:2])
        for side in kernels:
            height, width = (-(-layers.output_size(size, side, padding) // 2) for size in (height, width))
        if height < 1 or width < 1:
            raise UserError(
                f"the CNN has no pixel left of {shape[0]}×{shape[1]} after {len(features)} {padding} convolutions "
                f"with kernels {kernels} and pooling: use a smaller model.kernel, fewer model.features or padding SAME"
            )
        self.dense = layers.Dense(height * width * features[-1], dense, **initial)
        self.logits = layers.Dense(dense, classes, **initial)
        self.dropout = layers.Dropout(dropout)

    def feature_maps(self, images: Images) -> list[Float[Array, "b _ _ _"]]:
        """Return the output of each convolution after pooling and ReLU: [b, height, width, features]."""
        x = layers.space_to_depth(layers.normalise(images), self.space_to_depth)
        # ReLU after pooling gives the same values with a quarter of the work.
        return [x := jax.nn.relu(conv(x, pool=True)) for conv in self.convs]

    def __call__(self, images: Images) -> Logits:
        x = jax.nn.relu(self.dense(layers.flatten(self.feature_maps(images)[-1])))
        return self.logits(self.dropout(x))


def first_weights(model: nnx.Module, shape: Sequence[int] = (28, 28, 1)) -> Float[np.ndarray, "n h w"] | None:
    """Return the weights of the first layer as ``n`` images, one per output and channel; None for other models.

    A dense layer's weights have the ``shape`` of the images. Those of a convolution over blocks are unfolded to pixels.
    """
    height, width, channels = (*shape, 1)[:3]
    match model:
        case Softmax() | MLP():
            kernel = np.asarray((model.dense if isinstance(model, Softmax) else model.layers[0]).kernel[...])
            return kernel.reshape(-1, height, width, channels).transpose(0, 3, 1, 2).reshape(-1, height, width)
        case CNN():
            kernel, block = np.asarray(model.convs[0].kernel[...]), model.space_to_depth
            side, _, inputs, outputs = kernel.shape
            pixels = kernel.reshape(side, side, block, block, inputs // block**2, outputs).transpose(5, 4, 0, 2, 1, 3)
            return pixels.reshape(-1, side * block, side * block)
        case _:
            return None


def arguments(model: config.SoftmaxConfig | config.MLPConfig | config.CNNConfig) -> dict[str, Any]:
    """Return the arguments of the module that ``model`` describes, with functions for its initial values."""
    initial = {name: layers.initializer(getattr(model, name)) for name in ("kernel_init", "bias_init")}
    return vars(model) | initial


def make_model(
    model: config.Model, shape: Sequence[int], classes: int, rngs: nnx.Rngs, convolution: Form = "auto"
) -> nnx.Module:
    """Return the module that ``model`` describes, for images of ``shape`` (height, width, channels).

    Without channels, there is one. ``convolution`` is the form of its convolutions, ``train.convolution`` in a config.
    Raise UserError if ``model`` makes anything else.
    """
    module = model.make((*shape, 1)[:3], classes, rngs)
    if not isinstance(module, nnx.Module):
        raise UserError(f"{type(model).__name__}.make must return an nnx.Module, but returned {type(module).__name__}")
    set_form(module, convolution)
    return module


def with_weights(
    config: config.Config, shape: Sequence[int], classes: int, weights: Mapping[str, np.ndarray]
) -> nnx.Module:
    """Return the module of ``config`` with the given ``weights``, named by dotted paths such as "convs.0.kernel".

    They are parameters and buffers. Raise UserError if names, shapes or dtypes differ from those of the module.
    """
    make = partial(make_model, config.model, shape, classes, convolution=config.train.convolution)
    definition, *variables = jax.eval_shape(lambda: split(make(rngs=nnx.Rngs(0))))
    leaves, tree = jax.tree_util.tree_flatten_with_path(tuple(variables))
    expected = {jax.tree_util.keystr(path[1:], simple=True, separator="."): leaf for path, leaf in leaves}
    if wrong := sorted(expected.keys() ^ weights.keys()):
        raise UserError(f"the weights have {'no' if wrong[0] in expected else 'unknown'} {wrong[0]!r}")
    for name, leaf in expected.items():
        if (weights[name].shape, weights[name].dtype) != (leaf.shape, leaf.dtype):
            found, needed = (f"{array.dtype} {list(array.shape)}" for array in (weights[name], leaf))
            raise UserError(f"the weights {name} are {found}, but the model needs {needed}")
    arrays = [jax.numpy.asarray(weights[name]) for name in expected]
    module = definition.merge(*jax.tree.unflatten(tree, arrays))
    module.eval()
    return module
