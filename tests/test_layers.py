"""Initial values, convolution and its gradients, sizes, pooling, dropout."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flaxmnist import config
from flaxmnist.core import layers

KEY = jax.random.key(0)


@pytest.mark.parametrize(
    ("size", "window", "padding", "expected"),
    [
        (28, 5, "SAME", 28),
        (28, 5, "VALID", 24),
        (3, 5, "VALID", 0),
    ],
)
def test_output_size(size, window, padding, expected):
    assert layers.output_size(size, window, padding) == expected


def test_pooling_before_and_after_the_bias_are_identical(normal):
    conv = layers.Conv(2, 3, 3, bias_init=nnx.initializers.normal(1.0), rngs=nnx.Rngs(0))
    x = normal(2, 7, 7, 2)
    np.testing.assert_array_equal(conv(x, pool=True), layers.max_pool(conv(x)))


def test_space_to_depth_turns_each_block_into_one_pixel():
    image = jnp.arange(20.0).reshape(1, 4, 5, 1)
    blocks = layers.space_to_depth(image, 2)
    assert blocks.shape == (1, 2, 3, 4)
    np.testing.assert_array_equal(blocks[0, 0, 0], [0, 1, 5, 6])
    np.testing.assert_array_equal(blocks[0, 1, 2], [14, 0, 19, 0])
    np.testing.assert_array_equal(layers.space_to_depth(image, 1), image)


@pytest.mark.parametrize("side", [4, 5, 7])
def test_max_pool_returns_the_maximum_of_each_block(side, normal):
    x = normal(2, side, side, 3)
    pooled = layers.max_pool(x)
    half = -(-side // 2)
    assert pooled.shape == (2, half, half, 3)
    for i, j in itertools.product(range(half), range(half)):
        block = x[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
        np.testing.assert_array_equal(pooled[:, i, j], block.max(axis=(1, 2)))


@pytest.mark.parametrize("shape", [(2, 4, 5, 3), (1, 7, 6, 1), (0, 4, 4, 2)])
@pytest.mark.parametrize("ties", [False, True])
def test_gradient_of_max_pool_is_that_of_jax(shape, ties, normal):
    """Also if values of a block are equal: they share the gradient."""
    x = jnp.round(normal(*shape)) if ties else normal(*shape)
    y, vjp = jax.vjp(layers.max_pool, x)
    expected_vjp = jax.vjp(lambda x: layers.blocks(x).max(axis=(2, 4)), x)[1]
    dy = normal(*y.shape)
    np.testing.assert_array_equal(vjp(dy)[0], expected_vjp(dy)[0])


def test_dropout_keeps_the_mean_and_drops_the_given_fraction():
    x = jnp.ones((200, 500))
    dropped = layers.dropout(x, 0.4, KEY)
    assert abs(float((dropped == 0).mean()) - 0.4) < 0.01
    assert set(np.unique(dropped)) == {0, np.float32(1 / np.float32(0.6))}
    assert abs(float(dropped.mean()) - 1) < 0.01


def test_dropout_accepts_a_traced_rate():
    x = jnp.ones((20, 20))
    np.testing.assert_array_equal(
        jax.jit(lambda rate: layers.dropout(x, rate, KEY))(0.25), layers.dropout(x, 0.25, KEY)
    )


@pytest.mark.parametrize(
    ("initial", "mean", "stddev", "low", "high"),
    [
        (config.Constant(0.1), 0.1, 0, 0.1, 0.1),
        (config.Normal(2.0), 0, 2.0, -12, 12),
        (config.TruncatedNormal(0.1), 0, 0.1 * 0.8796, -0.2, 0.2),
        (config.Uniform(0.0, 0.1), 0.05, 0.1 / 12**0.5, 0, 0.1),
        (config.Glorot(), 0, (2 / 700) ** 0.5, -((6 / 700) ** 0.5), (6 / 700) ** 0.5),
        (config.LeCun(2.0), 0, 2 / 400**0.5, -2 * 2 / 400**0.5 / 0.8796, 2 * 2 / 400**0.5 / 0.8796),
    ],
)
def test_initial_values(initial, mean, stddev, low, high):
    values = np.asarray(layers.initializer(initial)(KEY, (400, 300), jnp.float32))
    assert abs(values.mean() - mean) < 0.02 * max(stddev, 1e-3)
    assert abs(values.std() - stddev) < 0.01 * max(stddev, 1e-3)
    assert low - 1e-6 <= values.min()
    assert values.max() <= high + 1e-6


def test_dense_multiplies_and_adds(normal):
    layer = layers.Dense(3, 2, rngs=nnx.Rngs(0))
    assert layer.kernel.shape == (2, 3)
    x = normal(4, 3)
    expected = [[sum(float(x[b, i]) * float(layer.kernel[o, i]) for i in range(3)) for o in range(2)] for b in range(4)]
    np.testing.assert_allclose(layer(x), np.array(expected), rtol=1e-5)


def test_normalise_scales_to_the_unit_interval():
    images = np.array([0, 51, 255], np.uint8).reshape(3, 1, 1, 1)
    np.testing.assert_allclose(np.ravel(layers.normalise(jnp.asarray(images))), [0, 0.2, 1])
