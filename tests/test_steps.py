"""One step, and the program of many steps, as pure functions."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import MODELS, assert_same, slow, small

import flaxmnist as fm
from flaxmnist.config import SGD, Adam, Augment, Config, Data, Objective
from flaxmnist.core import steps
from flaxmnist.core.state import Batch, Metrics, TrainState
from flaxmnist.data import order

create_state = jax.jit(steps.create_state, static_argnums=(0, 1, 2))
train_step, train_steps = jax.jit(steps.train_step, static_argnums=0), jax.jit(steps.train_steps, static_argnums=0)


def make_batch(data, size: int, padding: int = 0) -> Batch:
    """Return the first ``size`` training images, followed by ``padding`` images of weight 0."""
    indices = jnp.concatenate([jnp.arange(size), jnp.full(padding, -1)]).astype(jnp.int32)
    return steps.take_batch(*map(jnp.asarray, data.train), indices)


def logits_of(config: Config, state: TrainState, images) -> jax.Array:
    """Return the logits that the next step computes for ``images``."""
    augmented = steps.augmented_images(config, images, state.step)
    return steps.forward(config, state, state.params, augmented, jnp.ones(len(images)))[0]


def run(config: Config, data, stops: list[int], capacity: int) -> tuple[TrainState, list[Metrics]]:
    """Train in chunks that end at the steps ``stops``; return the final state and the metrics of each chunk."""
    images, labels = map(jnp.asarray, data.train)
    state, chunks = create_state(config, (28, 28), 10), []
    for start, stop in zip([0, *stops], stops, strict=False):
        indices = np.zeros((capacity, config.train.batch_size), np.int32)
        indices[: stop - start] = order.batch_indices(config, len(labels), start, stop)
        state, metrics = train_steps(config, state, images, labels, indices, np.int32(stop - start))
        chunks.append(jax.tree.map(lambda values, count=stop - start: values[:count], metrics))
    return state, chunks


@pytest.mark.parametrize("model", ["softmax", slow("mlp"), slow("cnn")])
def test_step_updates_by_the_gradient_of_the_mean_loss(model, few):
    config = small(model, optimizer=SGD(learning_rate=0.5))
    state = create_state(config, (28, 28), 10)
    batch = make_batch(few, 16)

    def loss(params):
        logits = state.definition.merge(params, {})(batch.images)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), batch.labels[:, None], 1))

    value, gradient = jax.value_and_grad(loss)(state.params)
    new_state, metrics = train_step(config, state, batch)
    np.testing.assert_allclose(metrics.batch.loss / metrics.batch.images, value, rtol=1e-5)
    expected = jax.tree.map(lambda p, g: p - 0.5 * g, state.params, gradient)
    for new, wanted in zip(jax.tree.leaves(new_state.params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(new, wanted, rtol=1e-4, atol=1e-6)
    assert new_state.step == 1


def test_padding_does_not_count(few):
    config = small("mlp")
    state = create_state(config, (28, 28), 10)
    short = train_step(config, state, make_batch(few, 11))
    padded = train_step(config, state, make_batch(few, 11, padding=5))
    assert padded[1].batch.images == 11
    for a, b in zip(jax.tree.leaves(short), jax.tree.leaves(padded), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_padding_with_infinite_loss_does_not_affect_the_gradient(few):
    """Padding is computed on image 0, whose cost as written is infinite here."""
    objective = Objective(labels="one_hot", form="probabilities")
    config = replace(small(), objective=objective)
    state = create_state(config, (28, 28), 10)
    images = jnp.concatenate([jnp.full((1, 28, 28, 1), 255, jnp.uint8), jnp.zeros((3, 28, 28, 1), jnp.uint8)])
    dense = state.params["dense"]
    state = replace(state, params={"dense": dense | {"kernel": dense["kernel"].at[1].set(1.0)}})
    batch = steps.take_batch(images, jnp.zeros(4, jnp.int32), jnp.array([1, 2, -1], jnp.int32))
    new_state, _ = train_step(config, state, batch)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(new_state.params))


@pytest.mark.parametrize(
    "config",
    [
        small("softmax"),
        slow(small("cnn", optimizer=Adam(), data=Data(name="digits", augment=Augment(shift=2)), ema_decay=0.9)),
        replace(small("mlp", optimizer=SGD(momentum=0.9, accumulate=3)), model=replace(MODELS["mlp"], dropout=0.3)),
    ],
    ids=["softmax", "cnn", "mlp"],
)
def test_chunks_do_not_change_the_bits(config, few):
    """Epochs have five steps, and their last batch is short."""
    state, (metrics,) = run(config, few, [12], capacity=12)
    chunked, chunks = run(config, few, [1, 3, 7, 12], capacity=12)
    assert_same(state, chunked)
    assert_same(metrics, jax.tree.map(lambda *values: jnp.concatenate(values), *chunks))


def test_epoch_totals_restart_every_epoch(few):
    _, (metrics,) = run(small(), few, [12], capacity=15)
    assert metrics.batch.images.tolist() == [16, 16, 16, 16, 6] * 2 + [16, 16]
    assert metrics.epoch.images.tolist() == [16, 32, 48, 64, 70] * 2 + [16, 32]
    np.testing.assert_allclose(metrics.epoch.loss[9], metrics.batch.loss[5:10].sum(), rtol=1e-6)


def test_average_is_first_the_plain_mean_then_decays(few):
    config = small(ema_decay=0.75, steps=6)
    states = [run(config, few, [count], capacity=6)[0] for count in range(1, 7)]
    kernels = [np.asarray(state.params["dense"]["kernel"], np.float64) for state in states]
    mean = np.mean(kernels[:4], axis=0)
    np.testing.assert_allclose(states[3].ema["dense"]["kernel"], mean, rtol=1e-4, atol=1e-7)
    mean += 0.25 * (kernels[4] - mean)
    np.testing.assert_allclose(states[4].ema["dense"]["kernel"], mean, rtol=1e-4, atol=1e-7)
    assert states[4].weights is states[4].ema


def test_streams_and_steps_have_different_keys():
    keys = [steps.stream_key(seed, stream, step) for seed in (0, 1) for stream in steps.STREAMS for step in (0, 1)]
    assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == len(keys)


@pytest.mark.parametrize("name", ["softmax", slow("mlp"), slow("cnn")])
def test_bfloat16_agrees_with_float32_up_to_rounding(name, few):
    """Logits agree to 2 %. Parameters stay float32, so that small updates are not lost."""
    config = small(name)
    half = replace(config, train=replace(config.train, compute_dtype="bfloat16"))
    state, images = create_state(config, (28, 28), 10), jnp.asarray(few.train.images[:8])
    state = replace(state, params=jax.tree.map(lambda leaf: leaf + 0.01, state.params))
    exact, rounded = (logits_of(c, state, images) for c in (config, half))
    assert rounded.dtype == jnp.float32
    assert 0 < jnp.abs(rounded - exact).max() < 0.02 * jnp.abs(exact).max()
    new_state, _ = steps.train_step(half, state, steps.take_batch(*map(jnp.asarray, few.train), jnp.arange(8)))
    assert {leaf.dtype for leaf in jax.tree.leaves(new_state.params)} == {jnp.dtype("float32")}


def test_dropout_depends_on_step_and_seed(few):
    config = replace(small("mlp"), model=replace(MODELS["mlp"], dropout=0.5))
    state, images = create_state(config, (28, 28), 10), jnp.asarray(few.train.images[:4])
    logits = [
        logits_of(replace(config, seed=seed), replace(state, step=jnp.int32(step)), images).tolist()
        for seed in (0, 1)
        for step in (0, 1)
    ]
    assert len(set(map(str, logits))) == 4


@pytest.mark.parametrize(
    "objective", [Objective(), Objective(labels="one_hot"), Objective(labels="one_hot", form="probabilities")]
)
def test_every_form_of_the_cost_trains(objective, few):
    config = replace(small(), objective=objective)
    _, (metrics,) = run(config, few, [20], capacity=20)
    assert metrics.batch.loss[19] < 0.6 * metrics.batch.loss[4], "both are the last, short batch of an epoch"


GOLDEN = {
    "softmax_beginners": (2.3025851, 2.2962792),
    "softmax_epochs": (23.267641, 19.934309),
    "mlp_scratch": (6.2120595, 4.8286896),
    "cnn_experts": (7.4879737, 6.4803834),
    "cnn_layers": (2.3090692, 2.3026111),
    "quickstart": (2.3550363, 2.2892141),
}


@pytest.mark.parametrize("name", [slow(name) if "cnn" in name else name for name in GOLDEN])
def test_golden_first_steps(name, digits):
    """Losses of the first two steps on the digits. A change affects every result: document it and why."""
    experiment = order.resolve_length(fm.load_experiment(name), len(digits.train.labels))
    _, (metrics,) = run(experiment, digits, [2], capacity=2)
    np.testing.assert_allclose(metrics.batch.loss / metrics.batch.images, GOLDEN[name], rtol=1e-5)
