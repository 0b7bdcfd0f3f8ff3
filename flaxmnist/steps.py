"""Training as pure functions: the first state, one step, many steps in one program.

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

from flaxmnist import fields, layers, models, objective, optim
from flaxmnist.augment import augment
from flaxmnist.config import Config
from flaxmnist.order import steps_per_epoch
from flaxmnist.state import Batch, Metrics, Totals, TrainState

# Every random number of a run comes from (seed, stream, step), so that none has to be carried or saved.
STREAMS = ("init", "dropout", "augment")


def stream_key(seed: int | Int[Array, ""], stream: str, step: int | Int[Array, ""] = 0) -> PRNGKeyArray:
    """The key of one of STREAMS at one step."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), STREAMS.index(stream)), step)


def create_state(config: Config, shape: tuple[int, int], classes: int) -> TrainState:
    """The state before the first step, for images of ``shape`` (height, width) and so many ``classes``."""
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
    """The optimizer for a run as long as ``config`` says."""
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
    """The logits of a training step: on augmented images, with dropout, computed in ``train.compute_dtype``.

    ``axis_name`` is as in ``train_step``: what is drawn for an image is the same in a part of a batch as in the whole.
    """
    part, parts = (0, 1) if axis_name is None else (jax.lax.axis_index(axis_name), jax.lax.axis_size(axis_name))
    dtype, rate = config.train.compute_dtype, config.model.dropout
    model = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf.astype(dtype), params))
    key, x = stream_key(config.seed, "augment", step), layers.normalise(images)
    x = augment(config.data.augment, key, x, first=part * images.shape[0]).astype(dtype)
    if fields.is_off(rate):
        return model(x).astype(jnp.float32)
    key, layer = stream_key(config.seed, "dropout", step), itertools.count()

    def drop(values):
        return layers.dropout(values, rate, jax.random.fold_in(key, next(layer)), part=part, parts=parts)

    return model(x, dropout=drop).astype(jnp.float32)


def train_step(
    config: Config, state: TrainState, batch: Batch, *, axis_name: str | None = None
) -> tuple[TrainState, Metrics]:
    """One update by the mean gradient of the batch, and what was seen before it.

    Under ``jax.pmap`` each device calls this with its equal part of the batch, in order, and the axis' name: losses,
    counts and gradients are summed over it, and divided by the images of the whole batch.
    """

    def over_devices(tree):
        return tree if axis_name is None else jax.lax.psum(tree, axis_name)

    images = over_devices(jnp.sum(batch.weights))

    def loss(params):
        logits = train_logits(config, state.graphdef, params, batch.images, state.step, axis_name=axis_name)
        # A filling image must reach neither sum nor gradient, even where its own loss is not finite.
        logits = jnp.where(batch.weights[:, None] > 0, logits, 0)
        losses = objective.cross_entropy(config.objective, logits, batch.labels)
        total, correct = jnp.sum(losses * batch.weights), objective.correct(logits, batch.labels)
        return total / images, Totals(total, jnp.sum(correct * batch.weights), jnp.sum(batch.weights))

    gradients, totals = over_devices(jax.grad(loss, has_aux=True)(state.params))
    norm = optax.tree.norm(gradients)
    before = state = replace(state, step=state.step + 1)
    updates, opt_state = make_optimizer(config).update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    state = replace(state, params=params, opt_state=opt_state, epoch=jax.tree.map(jnp.add, state.epoch, totals))
    if config.train.ema_decay is not None:
        # The plain mean of the weights so far, until that reaches further back than the decay does.
        share = jnp.maximum(1 - config.train.ema_decay, 1 / state.step)
        state = replace(state, ema=jax.tree.map(lambda mean, new: mean + share * (new - mean), state.ema, params))
    if config.train.skip_nonfinite:
        finite = jnp.isfinite(totals.loss) & jnp.isfinite(norm)
        state = jax.tree.map(partial(jnp.where, finite), state, before)
    return state, Metrics(totals, state.epoch, norm)


def take_batch(images: UInt8[Array, "n h w 1"], labels: Int32[Array, " n"], indices: Int32[Array, " b"]) -> Batch:
    """The batch of the given images; index −1 is a filling of weight 0."""
    chosen = jnp.maximum(indices, 0)
    return Batch(images[chosen], labels[chosen], (indices >= 0).astype(jnp.float32))


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
    """``count`` steps in one program, on the batches that the first rows of ``indices`` name.

    ``count`` is traced, so one compiled program serves every stretch of at most ``capacity`` steps, and however a run
    is cut into stretches its bits are the same. ``axis_name`` is as in ``train_step``. Returns the metrics of each
    step, [capacity], those beyond ``count`` 0.
    """
    epoch_length = steps_per_epoch(config, images.shape[0])

    def body(i, carry):
        state, metrics = carry
        first = state.step % epoch_length == 0
        state = replace(state, epoch=jax.tree.map(lambda total: jnp.where(first, 0, total), state.epoch))
        state, seen = train_step(config, state, take_batch(images, labels, indices[i]), axis_name=axis_name)
        return state, jax.tree.map(lambda all_steps, one: all_steps.at[i].set(one), metrics, seen)

    empty = jax.tree.map(lambda _: jnp.zeros(indices.shape[0]), Metrics(state.epoch, state.epoch, state.step))
    return jax.lax.fori_loop(0, count, body, (state, empty))
