"""Optimizers and schedules against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flaxmnist import config, fields
from flaxmnist.core.kernels import Kernel
from flaxmnist.core.optim import make_optimizer

GRADIENTS = [np.array(g) for g in ([1.0, -2.0], [0.5, 0.5], [-3.0, 1.0])]


def train(optimizer: config.BaseOptimizer, updates=3) -> np.ndarray:
    """Return the parameters [1, 1] after updates by the three gradients."""
    transformation, params = make_optimizer(optimizer, updates, {}), jnp.ones(2)
    state = transformation.init(params)
    for gradient in GRADIENTS:
        update, state = transformation.update(jnp.asarray(gradient, jnp.float32), state, params)
        params = optax.apply_updates(params, update)
    return np.asarray(params)


def test_sgd():
    np.testing.assert_allclose(train(config.SGD(learning_rate=0.1)), 1 - 0.1 * sum(GRADIENTS), rtol=1e-6)


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum(nesterov):
    params, velocity = np.ones(2), np.zeros(2)
    for gradient in GRADIENTS:
        velocity = gradient + 0.9 * velocity
        params = params - 0.1 * (gradient + 0.9 * velocity if nesterov else velocity)
    np.testing.assert_allclose(train(config.SGD(learning_rate=0.1, momentum=0.9, nesterov=nesterov)), params, rtol=1e-5)


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_adam(decay):
    params, mean, square = np.ones(2), np.zeros(2), np.zeros(2)
    for t, gradient in enumerate(GRADIENTS, 1):
        mean, square = 0.8 * mean + 0.2 * gradient, 0.9 * square + 0.1 * gradient**2
        step = (mean / (1 - 0.8**t)) / (np.sqrt(square / (1 - 0.9**t)) + 1e-3)
        params = params - 0.1 * (step + decay * params)
    adam = config.Adam(learning_rate=0.1, b1=0.8, b2=0.9, eps=1e-3, weight_decay=decay)
    np.testing.assert_allclose(train(adam), params, rtol=1e-5)


def test_muon_orthogonalises_matrices_and_applies_nadam_to_vectors():
    """Singular values of the updates are similar, and their root mean square is the same for every shape."""
    left, right = np.linalg.qr(np.random.default_rng(0).normal(size=(12, 4)))[0], np.eye(4)
    kernels = {("dense",): Kernel((1,), (0,), True), ("kernel",): Kernel((0, 1, 2), (3,), False)}
    gradients = {"dense": left.T * [[8.0], [4.0], [2.0], [1.0]], "bias": np.array([3.0, -0.5])}
    gradients["kernel"] = (left @ np.diag([8.0, 4.0, 2.0, 1.0]) @ right).reshape(2, 2, 3, 4)
    gradients = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), gradients)
    transformation = make_optimizer(config.Muon(learning_rate=0.1), 1, kernels)
    updates, _ = transformation.update(gradients, transformation.init(gradients), gradients)
    for matrix in (updates["dense"], updates["kernel"].reshape(12, 4)):
        values = np.linalg.svd(matrix, compute_uv=False) / (0.1 * 0.2 * np.sqrt(12))
        assert values.min() > 0.6
        assert values.max() < 1.3
    step = 0.1 * (0.9 * 0.1 / (1 - 0.9**2) + 1)  # first step of Nadam
    np.testing.assert_allclose(updates["bias"], [-step, step], rtol=1e-4)


def test_lion():
    params, mean = np.ones(2), np.zeros(2)
    for gradient in GRADIENTS:
        params = params - 0.1 * (np.sign(0.9 * mean + 0.1 * gradient) + 0.2 * params)
        mean = 0.99 * mean + 0.01 * gradient
    np.testing.assert_allclose(train(config.Lion(learning_rate=0.1, weight_decay=0.2)), params, rtol=1e-5)


@pytest.mark.parametrize("kind", [config.Adam, config.Lion])
def test_weight_decay_may_leave_out_biases_and_scales(kind):
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    transformation = make_optimizer(kind(learning_rate=0.1, weight_decay=0.5, decay_vectors=False), 1, {})
    updates, _ = transformation.update(jax.tree.map(jnp.zeros_like, params), transformation.init(params), params)
    np.testing.assert_allclose(updates["kernel"], np.full((2, 2), -0.05), rtol=1e-6)
    np.testing.assert_array_equal(updates["bias"], np.zeros(2))


def test_clipping_scales_the_gradient():
    clipped = [g * min(1, 1 / np.linalg.norm(g)) for g in GRADIENTS]
    np.testing.assert_allclose(train(config.SGD(learning_rate=0.1, clip_norm=1.0)), 1 - 0.1 * sum(clipped), rtol=1e-6)


def test_accumulation_applies_the_mean_gradient():
    accumulated = train(config.SGD(learning_rate=0.1, accumulate=3))
    np.testing.assert_allclose(accumulated, 1 - 0.1 * sum(GRADIENTS) / 3, rtol=1e-6)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (config.Flat(), {0: 0.5, 70: 0.5}),
        (config.Cosine(), {0: 0.5, 50: 0.25, 100: 0.0}),
        (config.Cosine(end=0.1), {0: 0.5, 100: 0.05}),
        (config.Cosine(warmup_steps=20), {0: 0.0, 10: 0.25, 20: 0.5, 60: 0.25, 100: 0.0}),
        (config.OneCycle(peak=0.3, start_divisor=25, end_divisor=1e5), {0: 0.02, 30: 0.5, 100: 0.5 / 1e5}),
        (config.Exponential(decay=0.5, every=10), {0: 0.5, 5: 0.5 * 0.5**0.5, 20: 0.125}),
        (config.WarmupStableDecay(), {0: 0.0, 5: 0.25, 10: 0.5, 80: 0.5, 90: 0.25, 100: 0.0}),
        (config.WarmupStableDecay(warmup=0.0, decay=0.5, end=0.2), {0: 0.5, 50: 0.5, 75: 0.3, 100: 0.1}),
    ],
)
def test_schedules(kind, expected):
    rate = kind.make(0.5, 100)
    for step, value in expected.items():
        np.testing.assert_allclose(float(rate(jnp.int32(step))), value, rtol=1e-4, atol=1e-8)


def test_schedule_changes_the_learning_rate():
    """The first update of a warm-up has rate 0, so only the other two change the parameters."""
    optimizer = config.SGD(learning_rate=0.1, schedule=config.Cosine(warmup_steps=1000))
    expected = 1 - 1e-4 * (1 * GRADIENTS[1] + 2 * GRADIENTS[2])
    np.testing.assert_allclose(train(optimizer, 2000), expected, rtol=1e-5)


def test_learning_rate_may_be_traced():
    """As in a sweep: the learning rate is an argument of the compiled program."""

    def update(rate):
        optimizer = fields.replace(config.SGD(), "learning_rate", rate, check=False)
        transformation = make_optimizer(optimizer, 1, {})
        return transformation.update(jnp.ones(1), transformation.init(jnp.ones(1)))[0]

    np.testing.assert_allclose(jax.jit(update)(jnp.float32(0.25)), [-0.25])
