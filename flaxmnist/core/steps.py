"""Training as pure functions: the initial state, one step, many steps in one program.

Nothing here compiles, shards, donates or prints. ``config`` is static, everything else is arrays.
"""

import itertools
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, Int32, PRNGKeyArray, UInt8

from flaxmnist import fields
from flaxmnist.config import Config
from flaxmnist.core import layers, models, objective, optim
from flaxmnist.core.augment import augment
from flaxmnist.core.state import Batch, Metrics, Totals, TrainState
from flaxmnist.data.order import steps_per_epoch

# Every random number of a run is a function of (seed, stream, step), so that no key has to be carried or saved.
STREAMS = ("init", "dropout", "augment")


def stream_key(seed: int | Int[Array, ""], stream: str, step: int | Int[Array, ""] = 0) -> PRNGKeyArray:
    """Return the random key of one of STREAMS at one step."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), STREAMS.index(stream)), step)


def create_state(config: Config, shape: tuple[int, int], classes: int) -> TrainState:
    """Return the state before the first step, for images of ``shape`` (height, width)."""
    rngs = nnx.Rngs(params=stream_key(config.seed, "init"))
    graphdef, variables = nnx.split(models.make_model(config.model, shape, classes, rngs))
    params = nnx.to_pure_dict(variables)
    return TrainState(
        graphdef=graphdef,
        step=jnp.int32(0),
        params=params,
        opt_state=make_optimizer(config).init(params),
        ema=None if config.train.ema_decay is None else jax.tree.map(jnp.copy, params),
        epoch=Totals(*jnp.zeros(3)),
    )


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """Return the optimizer for a run of the length in ``config``."""
    return optim.make_optimizer(config.optimizer, config.train.length // config.optimizer.accumulate)


def train_logits(
    config: Config,
    graphdef: nnx.GraphDef,
    params: Any,
    images: UInt8[Array, "b h w 1"],
    step: int | Int[Array, ""],
    *,
    axis_name: str | None = None,
) -> Float[Array, "b classes"]:
    """Return the logits of a training step: with augmentation and dropout, computed in ``train.compute_dtype``.

    For ``axis_name`` see ``train_step``. Augmentation and dropout of an image are the same in a shard as in a batch.
    """
    shard, num_shards = (0, 1) if axis_name is None else (jax.lax.axis_index(axis_name), jax.lax.axis_size(axis_name))
    dtype, rate = config.train.compute_dtype, config.model.dropout
    model = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf.astype(dtype), params))
    key, x = stream_key(config.seed, "augment", step), layers.normalise(images)
    x = augment(config.data.augment, key, x, offset=shard * images.shape[0]).astype(dtype)
    if fields.is_zero(rate):
        return model(x).astype(jnp.float32)
    key, layer = stream_key(config.seed, "dropout", step), itertools.count()

    def dropout(values):
        return layers.dropout(values, rate, jax.random.fold_in(key, next(layer)), shard=shard, num_shards=num_shards)

    return model(x, dropout=dropout).astype(jnp.float32)


def train_step(
    config: Config, state: TrainState, batch: Batch, *, axis_name: str | None = None
) -> tuple[TrainState, Metrics]:
    """Update once by the mean gradient of the batch; return the new state and the metrics before the update.

    With several devices, each calls this on its shard of the batch (equal shards, in order) with the ``axis_name`` over
    which to sum losses, counts and gradients. The mean is over the images of the full batch.
    """

    def sum_over_devices(tree):
        return tree if axis_name is None else jax.lax.psum(tree, axis_name)

    images = sum_over_devices(jnp.sum(batch.weights))

    def loss(params):
        logits = train_logits(config, state.graphdef, params, batch.images, state.step, axis_name=axis_name)
        # Padding must not affect the sums and the gradient, even if its loss is not finite.
        logits = jnp.where(batch.weights[:, None] > 0, logits, 0)
        losses = objective.cross_entropy(config.objective, logits, batch.labels)
        total, correct = jnp.sum(losses * batch.weights), objective.correct(logits, batch.labels)
        return total / images, Totals(total, jnp.sum(correct * batch.weights), jnp.sum(batch.weights))

    gradients, totals = sum_over_devices(jax.grad(loss, has_aux=True)(state.params))
    norm = optax.tree.norm(gradients)
    unchanged = state = replace(state, step=state.step + 1)
    updates, opt_state = make_optimizer(config).update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    state = replace(state, params=params, opt_state=opt_state, epoch=jax.tree.map(jnp.add, state.epoch, totals))
    if config.train.ema_decay is not None:
        # First the plain mean of all weights so far, until its 1/step falls below the moving average's 1 − decay.
        rate = jnp.maximum(1 - config.train.ema_decay, 1 / state.step)
        state = replace(state, ema=jax.tree.map(lambda mean, new: mean + rate * (new - mean), state.ema, params))
    if config.train.skip_nonfinite:
        finite = jnp.isfinite(totals.loss) & jnp.isfinite(norm)
        state = jax.tree.map(partial(jnp.where, finite), state, unchanged)
    return state, Metrics(totals, state.epoch, norm)


def take_batch(images: UInt8[Array, "n h w 1"], labels: Int32[Array, " n"], indices: Int32[Array, " b"]) -> Batch:
    """Return the batch of the images at ``indices``; index −1 is padding of weight 0."""
    rows = jnp.maximum(indices, 0)
    return Batch(images[rows], labels[rows], (indices >= 0).astype(jnp.float32))


def train_steps(
    config: Config,
    state: TrainState,
    images: UInt8[Array, "n h w 1"],
    labels: Int32[Array, " n"],
    indices: Int32[Array, "capacity b"],
    count: Int32[Array, ""],
    *,
    axis_name: str | None = None,
) -> tuple[TrainState, Metrics]:
    """Do ``count`` steps in one program, on the batches given by the first rows of ``indices``.

    ``count`` is traced, so that one compiled program serves chunks of up to ``capacity`` steps, and results do not
    depend on how a run is divided into chunks. For ``axis_name`` see ``train_step``. Return the new state and the
    metrics of each step, [capacity], with zeros after ``count``.
    """
    epoch_length = steps_per_epoch(config, images.shape[0])

    def body(i, carry):
        state, metrics = carry
        starts_epoch = state.step % epoch_length == 0
        state = replace(state, epoch=jax.tree.map(lambda total: jnp.where(starts_epoch, 0, total), state.epoch))
        state, new = train_step(config, state, take_batch(images, labels, indices[i]), axis_name=axis_name)
        return state, jax.tree.map(lambda values, value: values.at[i].set(value), metrics, new)

    empty = jax.tree.map(lambda _: jnp.zeros(indices.shape[0]), Metrics(state.epoch, state.epoch, state.step))
    return jax.lax.fori_loop(0, count, body, (state, empty))
