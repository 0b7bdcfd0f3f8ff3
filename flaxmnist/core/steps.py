"""Training as pure functions: the initial state, one step, many steps in one program.

Nothing here compiles, shards, donates or prints. ``config`` is static, everything else is arrays.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, Int32, PRNGKeyArray, UInt8

from flaxmnist.config import MODELS, BaseOptimizer, Config, Flat, Objective
from flaxmnist.core import layers, models, objective, optim
from flaxmnist.core.augment import augment
from flaxmnist.core.definition import split
from flaxmnist.core.state import Batch, Gradient, Metrics, Totals, TrainState
from flaxmnist.data.order import steps_per_epoch
from flaxmnist.data.sets import Split
from flaxmnist.errors import UserError

# Every random number of a run is a function of (seed, stream, step), so that no key has to be carried or saved.
STREAMS = ("init", "dropout", "augment")

# The objective of each image, [b], from its logits [b, classes] and the augmented batch.
Losses = Callable[[Float[Array, "b classes"], Batch], Float[Array, " b"]]

# Layers that must know which devices share a batch. Not all that have an ``axis_name``: LayerNorm's is another one.
SHARED = (nnx.BatchNorm, layers.Dropout)


def is_slow(_: Any, module: Any) -> bool:
    """Return True for an ``nnx.Conv`` with XLA's own gradient, which is slow within a loop on CPU."""
    return isinstance(module, nnx.Conv) and module.conv_general_dilated is jax.lax.conv_general_dilated


def stream_key(seed: int | Int[Array, ""], stream: str, step: int | Int[Array, ""] = 0) -> PRNGKeyArray:
    """Return the random key of one of STREAMS at one step."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), STREAMS.index(stream)), step)


def create_state(config: Config, shape: Sequence[int], classes: int) -> TrainState:
    """Return the state before the first step, for images of ``shape`` (height, width, channels)."""
    init = stream_key(config.seed, "init")
    module = models.make_model(config.model, shape, classes, nnx.Rngs(default=jax.random.fold_in(init, 1), params=init))
    definition, params, buffers = split(module)
    return TrainState(
        definition=definition,
        step=jnp.int32(0),
        params=params,
        buffers=buffers,
        opt_state=make_optimizer(config).init(params),
        ema=None if config.train.ema_decay is None else jax.tree.map(jnp.copy, params),
        epoch=Totals(*jnp.zeros(3)),
    )


def number_of_updates(config: Config) -> int:
    """Return how many updates a run of the length in ``config`` makes."""
    return config.train.length // getattr(config.optimizer, "accumulate", 1)


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """Return the optimizer for a run of the length in ``config``."""
    return config.optimizer.make(number_of_updates(config))


def sum_over_devices(tree: Any, axis_name: str | None) -> Any:
    """Return the sums of the arrays of ``tree`` over the devices that share a batch."""
    return tree if axis_name is None else jax.lax.psum(tree, axis_name)


def augmented_images(
    config: Config,
    images: UInt8[Array, "b h w c"],
    step: int | Int[Array, ""],
    *,
    axis_name: str | None = None,
) -> Float[Array, "b h w c"]:
    """Return the images in [0, 1], augmented as in step ``step``: the same in a shard as in a batch."""
    offset = 0 if axis_name is None else jax.lax.axis_index(axis_name) * images.shape[0]
    key = stream_key(config.seed, "augment", step)
    return augment(config.data.augment, key, layers.normalise(images), offset=offset)


def forward(
    config: Config,
    state: TrainState,
    params: Any,
    images: Float[Array, "b h w c"],
    weights: Float[Array, " b"],
    *,
    axis_name: str | None = None,
) -> tuple[Float[Array, "b classes"], Any]:
    """Return the logits of the model in training mode, computed in ``train.compute_dtype``, and its new buffers.

    ``weights`` are those of the batch, for ``layers.BatchNorm``. For ``axis_name`` see ``train_step``.
    """
    dtype, shard = config.train.compute_dtype, 0 if axis_name is None else jax.lax.axis_index(axis_name)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    model = state.definition.merge(params, state.buffers, stream_key(config.seed, "dropout", state.step), shard)
    model.train()
    set_attributes = partial(model.set_attributes, raise_if_not_found=False)
    set_attributes(SHARED, axis_name=axis_name)
    set_attributes(layers.BatchNorm, weights=weights)
    set_attributes(is_slow, conv_general_dilated=layers.conv_general_dilated)
    logits = model(images.astype(dtype)).astype(jnp.float32)
    set_attributes(layers.BatchNorm, weights=None)
    _, _, buffers = split(model)
    if logits.ndim != 2 or len(logits) != len(images):
        expected = f"logits [{len(images)}, classes] for {len(images)} images"
        raise UserError(f"the model must return {expected}, but returns {list(logits.shape)}")
    if jax.tree.map(jnp.shape, buffers) != jax.tree.map(jnp.shape, state.buffers):
        raise UserError("a call of the model changes the names or shapes of its variables: keep them the same")
    return logits, jax.tree.map(lambda new, old: new.astype(old.dtype), buffers, state.buffers)


def check_model(config: Config, train: Split, classes: int, num_shards: int) -> None:
    """Raise UserError if a model of the user's cannot be trained on batches of ``train`` in ``num_shards`` shards."""
    if isinstance(config.model, MODELS):
        return
    state = jax.eval_shape(partial(create_state, config, train.images.shape[1:], classes))
    images = jax.ShapeDtypeStruct((2, *train.images.shape[1:]), jnp.float32)
    weights = jax.ShapeDtypeStruct((2,), jnp.float32)
    logits, _ = jax.eval_shape(partial(forward, config), state, state.params, images, weights)
    if logits.shape[1] != classes:
        raise UserError(f"the model must return {classes} logits for each image, but returns {logits.shape[1]}")
    uneven = config.train.batch_size % num_shards > 0
    short = config.data.last_batch == "keep" and len(train.labels) % config.train.batch_size > 0
    modules = [module for _, module in nnx.iter_modules(state.definition.merge(state.params, state.buffers))]
    counts_padding = any(
        isinstance(module, nnx.BatchNorm) and not isinstance(module, layers.BatchNorm) for module in modules
    )
    if counts_padding and (uneven or short):
        raise UserError(
            "nnx.BatchNorm would count the padding of incomplete batches: use flaxmnist.BatchNorm, or "
            f"--data.last-batch drop with a train.batch_size divisible by {num_shards} devices"
        )


def check_step(config: Config, train: Split, classes: int, step: "Step", arrays: Any) -> None:
    """Raise UserError if a ``step`` of the user's does not return a state like its argument, and scalar metrics."""
    if step is train_step:
        return
    state = jax.eval_shape(partial(create_state, config, train.images.shape[1:], classes))
    batch = jax.eval_shape(take_batch, *train, jax.ShapeDtypeStruct((config.train.batch_size,), jnp.int32))
    output = jax.eval_shape(partial(step, config), state, batch, arrays)
    if not (isinstance(output, tuple) and len(output) == 2 and isinstance(output[1], Metrics)):
        raise UserError("the step must return a pair of TrainState and Metrics, as flaxmnist.update does")
    for path, message in differences(state, output[0]):
        raise UserError(f"the step must return a state like its argument, but state{path} {message}")
    for path, leaf in jax.tree_util.tree_leaves_with_path(output[1]):
        if leaf.shape:
            name = jax.tree_util.keystr(path)
            raise UserError(f"the step must return scalar metrics, but metrics{name} has shape {list(leaf.shape)}")


def differences(expected: Any, found: Any) -> Iterator[tuple[str, str]]:
    """Yield the path and a description of each array whose shape or dtype differs between two pytrees."""
    old, new = (
        {jax.tree_util.keystr(path): f"{leaf.dtype} {list(leaf.shape)}" for path, leaf in leaves}
        for leaves in map(jax.tree_util.tree_leaves_with_path, (expected, found))
    )
    for path in sorted(old.keys() | new.keys()):
        if old.get(path) != new.get(path):
            yield path, f"is {old.get(path, 'absent')} before and {new.get(path, 'absent')} after"


def gradient(
    config: Config,
    state: TrainState,
    params: Any,
    batch: Batch,
    *,
    losses: Losses | None = None,
    axis_name: str | None = None,
) -> Gradient:
    """Return the gradient of the batch's mean objective at ``params``, with the augmentation and dropout of the step.

    ``losses(logits, batch)`` returns the objective of each image from its logits and the augmented batch (None: that of
    the config). For ``axis_name`` see ``train_step``.
    """
    images = sum_over_devices(jnp.sum(batch.weights), axis_name)
    batch = batch._replace(images=augmented_images(config, batch.images, state.step, axis_name=axis_name))
    plain = losses is None and objective.is_cross_entropy(config.objective)

    def loss(params):
        logits, buffers = forward(config, state, params, batch.images, batch.weights, axis_name=axis_name)
        # Padding must not affect the sums and the gradient, even if its loss is not finite.
        logits = jnp.where(batch.weights[:, None] > 0, logits, 0)
        values = losses(logits, batch) if losses else config.objective.losses(logits, batch.labels)
        reported = values if plain else objective.cross_entropy(Objective(), logits, batch.labels)
        total, correct = jnp.sum(values * batch.weights), objective.correct(logits, batch.labels)
        counted = (jnp.sum(reported * batch.weights), jnp.sum(correct * batch.weights), jnp.sum(batch.weights))
        extra = {} if plain else {"objective": total / images}
        return total / images, (Totals(*counted), extra, buffers)

    gradients, (totals, extra, buffers) = jax.grad(loss, has_aux=True)(params)
    gradients, totals, extra = sum_over_devices((gradients, totals, extra), axis_name)
    return Gradient(gradients, totals, mean_over_devices(buffers, axis_name), extra)


def mean_over_devices(buffers: Any, axis_name: str | None) -> Any:
    """Return the means of the floating-point arrays of ``buffers``, which batch statistics leave unchanged."""
    if axis_name is None:
        return buffers
    floating = partial(jnp.issubdtype, arg2=jnp.floating)
    return jax.tree.map(lambda x: jax.lax.pmean(x, axis_name) if floating(x.dtype) else x, buffers)


def update(config: Config, state: TrainState, gradient: Gradient) -> tuple[TrainState, Metrics]:
    """Update the state by the ``gradient`` of a batch, and count the step.

    Return also the metrics before the update. A step that is not finite may be left out, see ``train.skip_nonfinite``.
    """
    norm, totals = optax.tree.norm(gradient.params), gradient.totals
    extra = gradient.extra | learning_rate(config, state)
    unchanged = state = replace(state, step=state.step + 1)
    updates, opt_state = make_optimizer(config).update(gradient.params, state.opt_state, state.params)
    params, epoch = optax.apply_updates(state.params, updates), jax.tree.map(jnp.add, state.epoch, totals)
    state = replace(state, params=params, buffers=gradient.buffers, opt_state=opt_state, epoch=epoch)
    if config.train.ema_decay is not None:
        # First the plain mean of all weights so far, until its 1/step falls below the moving average's 1 − decay.
        rate = jnp.maximum(1 - config.train.ema_decay, 1 / state.step)
        state = replace(state, ema=jax.tree.map(lambda mean, new: mean + rate * (new - mean), state.ema, params))
    if config.train.skip_nonfinite:
        finite = jnp.isfinite(totals.loss) & jnp.isfinite(norm)
        state = jax.tree.map(partial(jnp.where, finite), state, unchanged)
    return state, Metrics(totals, state.epoch, norm, extra)


def learning_rate(config: Config, state: TrainState) -> dict[str, Float[Array, ""]]:
    """Return the learning rate of the next update by name; nothing for an optimizer without a known schedule."""
    optimizer = config.optimizer
    if not isinstance(optimizer, BaseOptimizer):
        return {}
    if isinstance(optimizer.schedule, Flat):
        return {"learning_rate": jnp.asarray(optimizer.learning_rate, jnp.float32)}
    # Optax's own count of updates: fewer than steps, if gradients are accumulated or steps are skipped.
    counts = optim.schedule_counts(state.opt_state)
    schedule = optimizer.schedule.make(optimizer.learning_rate, number_of_updates(config))
    return {"learning_rate": jnp.asarray(schedule(counts[0]), jnp.float32)} if counts else {}


@runtime_checkable
class Step(Protocol):
    """A training step: ``train_step``, or one of your own with the same arguments."""

    def __call__(
        self, config: Config, state: TrainState, batch: Batch, arrays: Any, *, axis_name: str | None = None
    ) -> tuple[TrainState, Metrics]: ...


def train_step(
    config: Config, state: TrainState, batch: Batch, arrays: Any = None, *, axis_name: str | None = None
) -> tuple[TrainState, Metrics]:
    """Update once by the mean gradient of the batch; return the new state and the metrics before the update.

    With several devices, each calls this on its shard of the batch (equal shards, in order) with the ``axis_name`` over
    which to sum losses, counts and gradients. The mean is over the images of the full batch. ``arrays`` are for steps
    of your own.
    """
    return update(config, state, gradient(config, state, state.params, batch, axis_name=axis_name))


def take_batch(images: UInt8[Array, "n h w c"], labels: Int32[Array, " n"], indices: Int32[Array, " b"]) -> Batch:
    """Return the batch of the images at ``indices``; index −1 is padding of weight 0."""
    rows = jnp.maximum(indices, 0)
    return Batch(images[rows], labels[rows], (indices >= 0).astype(jnp.float32), indices)


def train_steps(
    config: Config,
    state: TrainState,
    images: UInt8[Array, "n h w c"],
    labels: Int32[Array, " n"],
    indices: Int32[Array, "capacity b"],
    count: Int32[Array, ""],
    arrays: Any = None,
    *,
    step: Step = train_step,
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
        state, new = step(config, state, take_batch(images, labels, indices[i]), arrays, axis_name=axis_name)
        return state, jax.tree.map(lambda values, value: values.at[i].set(value), metrics, new)

    first = take_batch(images, labels, indices[0])
    _, metrics = jax.eval_shape(partial(step, config, axis_name=axis_name), state, first, arrays)
    empty = jax.tree.map(lambda _: jnp.zeros(indices.shape[0]), metrics)
    return jax.lax.fori_loop(0, count, body, (state, empty))
