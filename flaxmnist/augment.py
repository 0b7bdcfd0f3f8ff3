"""Random changes of the training images, on the device: shift, rotation, scale and elastic displacement.

All of them together say where in the image each pixel of the result comes from, and the image is read there once, so
that one bilinear resampling is all the blur there is.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from flaxmnist import config, fields

# Correlation length of the elastic displacement, in pixels: the one Simard et al. found best for MNIST.
SMOOTHNESS = 4.0


def augment(
    config: config.Augment,
    key: PRNGKeyArray,
    images: Float[Array, "b h w 1"],
    *,
    first: int | Int[Array, ""] = 0,
) -> Float[Array, "b h w 1"]:
    """Returns ``images`` each changed at random within ``config``, with zeros where a result looks outside its image.

    An image's change depends on ``key`` and its position in the batch alone, so that it is the same however a batch is
    spread over devices. Where this is called with a part of a batch, ``first`` is the position of that part's first
    image. The fields of ``config`` may be traced; a part whose field is the number 0 is left out of the program.

    Shift (pixels, each axis), rotation (degrees) and relative size (about the middle) are uniform within ± their
    field; the elastic displacement is that of Simard, Steinkraus & Platt (2003), see ``elastic``.
    """
    if all(fields.is_off(amount) for amount in (config.shift, config.rotate, config.scale, config.elastic)):
        return images
    _, height, width, _ = images.shape
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, first + jnp.arange(images.shape[0]))
    sources = jax.vmap(partial(draw_sources, config, shape=(height, width)))(keys)
    return jax.vmap(resample)(images, sources)


def draw_sources(config: config.Augment, key: PRNGKeyArray, shape: tuple[int, int]) -> Float[Array, "2 h w"]:
    """Returns where in an image of ``shape`` (height, width) each pixel of its change comes from: row and column."""
    # A key each, so that turning one part on leaves what the others draw as it was.
    keys = jax.random.split(key, 4)

    def draw(key: PRNGKeyArray, amount: ArrayLike, count: tuple[int, ...] = ()) -> Float[Array, "..."]:
        return (
            jax.random.uniform(key, count, jnp.float32, -1, 1) * amount
            if not fields.is_off(amount)
            else jnp.zeros(count)
        )

    shift, rotate, scale = draw(keys[0], config.shift, (2,)), draw(keys[1], config.rotate), draw(keys[2], config.scale)
    sources = affine(shape, shift, rotate, scale)
    if not fields.is_off(config.elastic):
        sources += config.elastic * elastic(keys[3], shape)
    return sources


def affine(
    shape: tuple[int, int], shift: Float[Array, "2"], rotate: ArrayLike, scale: ArrayLike
) -> Float[Array, "2 h w"]:
    """Returns each pixel's source (row, column) for a turn and a change of size about the middle, then a shift.

    ``shift`` is pixels down and to the right, ``rotate`` degrees anticlockwise, ``scale`` the growth as a fraction.
    """
    middle = (jnp.array(shape) - 1) / 2
    rows, columns = jnp.indices(shape) - (middle + shift).reshape(2, 1, 1)
    cosine, sine = jnp.cos(jnp.deg2rad(rotate)), jnp.sin(jnp.deg2rad(rotate))
    # The inverse of the change, for it is asked where a pixel comes from.
    turned = jnp.stack([cosine * rows + sine * columns, cosine * columns - sine * rows])
    return turned / (1 + scale) + middle.reshape(2, 1, 1)


def elastic(key: PRNGKeyArray, shape: tuple[int, int]) -> Float[Array, "2 h w"]:
    """Returns a smooth random displacement (down, right) whose length is 1 pixel in the root mean square.

    Simard, Steinkraus & Platt, "Best practices for convolutional neural networks applied to visual document analysis"
    (2003): uniform noise smoothed by a Gaussian of ``SMOOTHNESS`` pixels. Theirs is drawn at every pixel; here on a
    grid ``SMOOTHNESS`` pixels wide, which takes a sixth of the random numbers and gives as smooth a field, and beyond
    the edges too, which keeps it as strong there as in the middle.
    """
    down, across = (smoothing(length) for length in shape)
    count = (2, down.shape[1], across.shape[1])
    # Of variance 1/2, for the two components share the mean square. Drawn flat: on CPU, random numbers of several axes
    # took ten times as long to compile and three times as long to draw.
    noise = jax.random.uniform(key, (math.prod(count),), jnp.float32, -(1.5**0.5), 1.5**0.5).reshape(count)
    return jnp.einsum("hk,ckl,wl->chw", down, noise, across)


def smoothing(length: int) -> Float[Array, "length knots"]:
    """Returns Gaussian weights from noise points to pixels, scaled so that the variance of the noise is kept."""
    knots = jnp.arange(-2 * SMOOTHNESS, length + 2 * SMOOTHNESS, SMOOTHNESS)
    weights = jnp.exp(-(((jnp.arange(length)[:, None] - knots[None, :]) / SMOOTHNESS) ** 2) / 2)
    return weights / jnp.linalg.norm(weights, axis=1, keepdims=True)


def resample(image: Float[Array, "h w 1"], sources: Float[Array, "2 h w"]) -> Float[Array, "h w 1"]:
    """Returns ``image`` read at ``sources`` (row, column), bilinear, with zeros outside."""
    # For 256 images on two CPU cores this takes 0.5 ms, and in a loop 0.7 to 1.5; gathers of flat indices written by
    # hand 0.6, and 0.3 to 1.7; products with triangular weights, which need no gather, 7 and 5.
    return map_coordinates(image[:, :, 0], list(sources), order=1, mode="constant")[:, :, None].astype(image.dtype)
