"""Building blocks of the models: initial values, dense, convolution, max-pooling, dropout, batch normalisation.

Plain functions on arrays, and Flax modules that hold weights. Everything here can be jitted, vmapped and
exported; only convolution and pooling do not support forward-mode derivatives.
"""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn import initializers
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from flaxmnist import config, fields
from flaxmnist.core.convolution import LAYOUT, Convolution
from flaxmnist.core.definition import BatchKey
from flaxmnist.errors import UserError

Padding = Literal["SAME", "VALID"]
# The standard deviation of a standard normal distribution truncated at ±2.
TRUNCATED_STDDEV = 0.87962566103423978
Images = UInt8[Array | np.ndarray, "b h w c"] | Float[Array | np.ndarray, "b h w c"]


def initializer(initial: config.Initial) -> initializers.Initializer:
    """Return the function (key, shape, dtype) -> array that draws the initial values described by ``initial``.

    The last two axes of ``shape`` are inputs and outputs; those before them are the sides of a kernel.
    """

    def draw(key, shape, dtype=jnp.float32, out_sharding=None):
        # Drawn in one dimension: on CPU, random arrays of several dimensions take 2.5 times as long to compile.
        flat = (math.prod(shape),)
        inputs, outputs = math.prod(shape[:-1]), math.prod(shape[:-2]) * shape[-1]
        match initial:
            case config.Constant(value):
                values = jnp.full(flat, value, dtype)
            case config.Normal(stddev):
                values = stddev * jax.random.normal(key, flat, dtype)
            case config.TruncatedNormal(stddev):
                values = stddev * jax.random.truncated_normal(key, -2, 2, flat, dtype)
            case config.Uniform(low, high):
                values = low + (high - low) * jax.random.uniform(key, flat, dtype)
            case config.Glorot(scale):
                values = scale * math.sqrt(6 / (inputs + outputs)) * jax.random.uniform(key, flat, dtype, -1, 1)
            case config.LeCun(scale):
                stddev = scale / math.sqrt(inputs) / TRUNCATED_STDDEV
                values = stddev * jax.random.truncated_normal(key, -2, 2, flat, dtype)
        return values.reshape(shape, out_sharding=out_sharding)

    return draw


LECUN_NORMAL = initializer(config.LeCun())


def normalise(images: Images) -> Float[Array, "b h w c"]:
    """Return pixels in [0, 1]: uint8 is divided by 255, floats are expected to be in [0, 1] already."""
    images = jnp.asarray(images)
    return images.astype(jnp.float32) / 255 if images.dtype == jnp.uint8 else images


def flatten(images: Float[Array, "b h w c"]) -> Float[Array, "b h*w*c"]:
    """Return each image as one row."""
    return images.reshape(images.shape[0], -1)


def space_to_depth(x: Float[Array, "b h w c"], side: int) -> Float[Array, "b h2 w2 {side}*{side}*c"]:
    """Turn each ``side``×``side`` block of pixels into the channels of one pixel; incomplete blocks are zero-padded."""
    b, h, w, c = x.shape
    x = jnp.pad(x, ((0, 0), (0, -h % side), (0, -w % side), (0, 0)))
    blocks = x.reshape(b, -(-h // side), side, -(-w // side), side, c).transpose(0, 1, 3, 2, 4, 5)
    return blocks.reshape(*blocks.shape[:3], side * side * c)


def check_inputs(noun: str, count: int, needed: int) -> None:
    """Raise UserError if images have another number of values or channels than the weights need."""
    if count != needed:
        raise UserError(f"the images have {count} {noun}, but the weights need {needed}: use images of the same shape")


class Dense(nnx.Module):
    """y = x·Wᵀ + b, with W of shape [outputs, inputs] and b of shape [outputs].

    This layout has long rows even if there are few outputs: with W as [784, 10] a CPU trained softmax regression at
    half the speed (7,500 against 13,500 steps/s on two cores, batch 100). ``kernel_init`` draws [inputs, outputs].
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        kernel_init: initializers.Initializer = LECUN_NORMAL,
        bias_init: initializers.Initializer = initializers.zeros,
        rngs: nnx.Rngs,
    ):
        self.kernel = nnx.Param(kernel_init(rngs.params(), (inputs, outputs), jnp.float32).T)
        self.bias = nnx.Param(bias_init(rngs.params(), (outputs,), jnp.float32))

    def __call__(self, x: Float[Array, "b i"]) -> Float[Array, "b o"]:
        check_inputs("values", x.shape[1], self.kernel.shape[1])
        return x @ self.kernel[...].T + self.bias[None, :]


class Conv(nnx.Module):
    """A convolution of stride 1 with a square kernel, W of shape [side, side, inputs, outputs], and a bias."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        *,
        padding: Padding = "SAME",
        kernel_init: initializers.Initializer = LECUN_NORMAL,
        bias_init: initializers.Initializer = initializers.zeros,
        rngs: nnx.Rngs,
    ):
        self.kernel = nnx.Param(kernel_init(rngs.params(), (kernel, kernel, inputs, outputs), jnp.float32))
        self.bias = nnx.Param(bias_init(rngs.params(), (outputs,), jnp.float32))
        self.padding: Padding = padding
        self.conv_general_dilated = Convolution()  # the name that ``nnx.Conv`` has for it

    def __call__(self, x: Float[Array, "b h w i"], *, pool: bool = False) -> Float[Array, "b h2 w2 o"]:
        """Convolve ``x``; with ``pool``, also apply 2×2 max-pooling."""
        check_inputs("channels", x.shape[3], self.kernel.shape[2])
        x = self.conv_general_dilated(x, self.kernel[...], (1, 1), self.padding, dimension_numbers=LAYOUT)
        # Adding the bias after pooling gives the same values with a quarter of the additions.
        return (max_pool(x) if pool else x) + self.bias[None, None, None, :]


def output_size(size: int, window: int, padding: Padding) -> int:
    """Return how many pixels a convolution outputs along an axis of ``size`` pixels.

    SAME pads so that each pixel is the centre of a window; VALID does not pad: a window of 5 gives 24 pixels of 28.
    """
    return size if padding == "SAME" else max(0, size - window + 1)


@jax.custom_vjp
def max_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """Return the maximum of each 2×2 block; the last row or column of an odd side forms smaller blocks.

    Equal maxima share the gradient, as with ``jnp.max``, but in a form that takes XLA a third of the time on CPU: 0.6
    instead of 2 ms for 50 images [28, 28, 32] (two cores of an AMD EPYC with AVX-512).
    """
    return blocks(x).max(axis=(2, 4))


def blocks(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 2 w2 2 c"]:
    """Return the 2×2 blocks of images, padded with −∞ if a side is odd."""
    b, h, w, c = x.shape
    x = jnp.pad(x, ((0, 0), (0, h % 2), (0, w % 2), (0, 0)), constant_values=-jnp.inf)
    return x.reshape(b, -(-h // 2), 2, -(-w // 2), 2, c)


def max_pool_backward(residuals, dy):
    x, y = residuals
    is_max = blocks(x) == y[:, :, None, :, None]
    count = sum(is_max[:, :, i, :, j].astype(dy.dtype) for i in (0, 1) for j in (0, 1))
    # The barrier keeps XLA from dividing once for each pixel of a block.
    share = jax.lax.optimization_barrier(dy / count)
    dx = jnp.where(is_max, share[:, :, None, :, None], 0)
    batch, height, width, channels = y.shape
    return (dx.reshape(batch, 2 * height, 2 * width, channels)[:, : x.shape[1], : x.shape[2]],)


def max_pool_forward(x):
    y = max_pool(x)
    return y, (x, y)


max_pool.defvjp(max_pool_forward, max_pool_backward)


class Dropout(nnx.Module):
    """Set each value to 0 with probability ``rate`` and divide the others by 1 − rate (Srivastava et al. 2014).

    It is active after ``model.train()``, which a training step calls. Unlike those of ``nnx.Dropout``, its masks are
    the same on any number of devices, and ``rate`` may be traced.
    """

    def __init__(self, rate: float | Float[Array, ""]):
        self.rate, self.deterministic = rate, False
        self.axis_name: str | None = None  # of the devices that share a batch, set by the training step
        # Another one in each training step.
        self.key = nnx.data(None) if fields.is_zero(rate) else BatchKey(jax.random.key(0), tag="dropout")

    def __call__(self, x: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
        if self.deterministic or self.key is None:
            return x
        name = self.axis_name
        shard, num_shards = (0, 1) if name is None else (jax.lax.axis_index(name), jax.lax.axis_size(name))
        return dropout(x, self.rate, self.key[...], shard=shard, num_shards=num_shards)


class BatchNorm(nnx.BatchNorm):
    """``nnx.BatchNorm`` with the statistics of the full batch: of all devices, and without padding images.

    Use it as ``nnx.BatchNorm``, on the last axis of an array whose first axis has the images of the batch. The default
    ``momentum`` of the running averages is 0.9, which suits short runs. A training step sets ``axis_name`` and
    ``weights``.
    """

    def __init__(self, features: int, *, momentum: float = 0.9, **options: Any):
        super().__init__(features, momentum=momentum, **options)
        self.weights: Float[Array, " b"] | None = nnx.data(None)  # of the images: 1, or 0 for padding; None: all 1

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Float[Array, "b ... c"], use_running_average: bool | None = None
    ) -> Float[Array, "b ... c"]:
        running = self.use_running_average if use_running_average is None else use_running_average
        mean, variance = (self.mean[...], self.var[...]) if running else self.update_averages(x)
        # One factor and one offset for each channel.
        factor = jax.lax.rsqrt(variance + self.epsilon)
        factor = factor if self.scale is None else factor * self.scale[...]
        offset = -mean * factor if self.bias is None else self.bias[...] - mean * factor
        factor, offset = (values.reshape((1,) * (x.ndim - 1) + (-1,)) for values in (factor, offset))
        return (x * factor + offset).astype(x.dtype)

    def update_averages(self, x: Float[Array, "b ... c"]) -> tuple[Float[Array, " c"], Float[Array, " c"]]:
        """Return the mean and the variance of the batch, and move the running averages towards them."""
        images = x.astype(jnp.float32).reshape(x.shape[0], -1, x.shape[-1])
        weights = jnp.ones(len(images)) if self.weights is None else self.weights

        def mean_of(values: Float[Array, "b n c"]) -> Float[Array, " c"]:
            sums = jnp.einsum("b,bnc->c", weights, values), weights.sum() * values.shape[1]
            total, count = sums if self.axis_name is None else jax.lax.psum(sums, self.axis_name)
            return total / count

        mean = mean_of(images)
        variance = mean_of((images - mean[None, None]) ** 2)
        for average, value in ((self.mean, mean), (self.var, variance)):
            average[...] = self.momentum * average[...] + (1 - self.momentum) * jax.lax.stop_gradient(value)
        return mean, variance


def dropout(
    x: Float[Array, "b ..."],
    rate: float | Float[Array, ""],
    key: PRNGKeyArray,
    *,
    shard: int | Int[Array, ""] = 0,
    num_shards: int = 1,
) -> Float[Array, "b ..."]:
    """Set each value to 0 with probability ``rate`` and divide the others by 1 − rate (Srivastava et al. 2014).

    If ``x`` is shard number ``shard`` of ``num_shards`` equal shards of a batch, it gets its slice of the batch's mask.
    """
    # Drawn in one dimension: on CPU, random arrays of several dimensions take twice as long to draw and to compile.
    # Each number depends only on its index, so that XLA draws only the shard's slice.
    mask = jax.random.bernoulli(key, 1 - rate, (num_shards * x.size,))
    mask = jax.lax.dynamic_slice(mask, (shard * x.size,), (x.size,)) if num_shards > 1 else mask
    return jnp.where(mask.reshape(x.shape), x / (1 - rate), 0)
