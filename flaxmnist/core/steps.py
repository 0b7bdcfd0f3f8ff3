"""Training as pure functions: the initial state, one step, many steps in one program.

Nothing here compiles, shards, donates or prints. ``config`` is static, everything else is arrays.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.tree_util import keystr, tree_map_with_path
from jaxtyping import Array, Float, Int, Int32, PRNGKeyArray, UInt8

from flaxmnist.config import Config, Flat, Objective, Optimizer
from flaxmnist.core import layers, models, objective, optim
from flaxmnist.core.augment import augment
from flaxmnist.core.definition import split
from flaxmnist.core.kernels import Kernels, find_kernels
from flaxmnist.core.state import Batch, Gradient, Metrics, Totals, TrainState
from flaxmnist.data.order import steps_per_epoch
from flaxmnist.errors import UserError

# Every random number of a run is a function of (seed, stream, step), so that no key has to be carried or saved.
STREAMS = ("init", "dropout", "augment")

# The objective of each image, [b], from its logits [b, classes] and the augmented batch.
Losses = Callable[[Float[Array, "b classes"], Batch], Float[Array, " b"]]

# Layers that must know which devices share a batch. Not all that have an ``axis_name``: LayerNorm's is another one.
SHARED = (nnx.BatchNorm, layers.Dropout)


def stream_key(seed: int | Int[Array, ""], stream: str, step: int | Int[Array, ""] = 0) -> PRNGKeyArray:
    """Return the random key of one of STREAMS at one step."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), STREAMS.index(stream)), step)


@functools.lru_cache(maxsize=8)
def state_shapes(config: Config, shape: tuple[int, ...], classes: int) -> TrainState:
    """Return the shapes and dtypes of the state of ``create_state``."""
    return jax.eval_shape(partial(create_state, config, shape, classes))


def create_state(config: Config, shape: Sequence[int], classes: int) -> TrainState:
    """Return the state before the first step, for images of ``shape`` (height, width, channels)."""
    init = stream_key(config.seed, "init")
    rngs = nnx.Rngs(default=jax.random.fold_in(init, 1), params=init)
    module = models.make_model(config.model, shape, classes, rngs, config.train.convolution)
    definition, params, buffers = split(module)
    return TrainState(
        definition=definition,
        step=jnp.int32(0),
        params=params,
        buffers=buffers,
        statistics=None if config.train.statistics_images is None else jax.tree.map(jnp.copy, buffers),
        opt_state=make_optimizer(config, find_kernels(module)).init(params),
        ema=None if config.train.ema_decay is None else jax.tree.map(jnp.copy, params),
        epoch=Totals(*jnp.zeros(3)),
    )


def number_of_updates(config: Config) -> int:
    """Return how many updates a run of the length in ``config`` makes."""
    return config.train.length // getattr(config.optimizer, "accumulate", 1)


def make_optimizer(config: Config, kernels: Kernels) -> optax.GradientTransformation:
    """Return the optimizer of a model with these ``kernels`` for a run of the length in ``config``."""
    optimizer, updates = config.optimizer, number_of_updates(config)
    if isinstance(optimizer, Optimizer):  # of the user's; it may inherit fields from BaseOptimizer
        return optimizer.make(updates)
    return optim.make_optimizer(optimizer, updates, kernels)


def unless_frozen(config: Config, tree: Any, frozen: Any) -> Any:
    """Return ``tree``, nested dicts like the parameters, but for frozen parameters the arrays of ``frozen``."""
    if not config.train.frozen:
        return tree
    return tree_map_with_path(lambda path, a, b: b if is_frozen(config, dotted(path)) else a, tree, frozen)


def zero_frozen(config: Config, gradients: Any) -> Any:
    """Return ``gradients`` with zeros for frozen parameters."""
    return unless_frozen(config, gradients, jax.tree.map(jnp.zeros_like, gradients))


def is_frozen(config: Config, name: str) -> bool:
    """Return True if ``train.frozen`` has the dotted ``name`` of a parameter, or the beginning of it."""
    return any(f"{name}.".startswith(f"{prefix}.") for prefix in config.train.frozen)


def dotted(path: Any) -> str:
    """Return the path of an array in nested dicts as a name such as "convs.0.kernel"."""
    return keystr(path, simple=True, separator=".")


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
    logits = model(images.astype(dtype)).astype(jnp.float32)
    set_attributes(layers.BatchNorm, weights=None)
    _, _, buffers = split(model)
    if logits.ndim != 2 or len(logits) != len(images):
        expected = f"logits [{len(images)}, classes] for {len(images)} images"
        raise UserError(f"the model must return {expected}, but returns {list(logits.shape)}")
    if jax.tree.map(jnp.shape, buffers) != jax.tree.map(jnp.shape, state.buffers):
        raise UserError("a call of the model changes the names or shapes of its variables: keep them the same")
    return logits, jax.tree.map(lambda new, old: new.astype(old.dtype), buffers, state.buffers)


def batch_statistics(state: TrainState, images: layers.Images) -> Any:
    """Return the buffers of ``state`` with the batch statistics of ``images`` in place of running averages.

    The images pass through the model as one batch, with the weights for evaluation and without dropout. Running
    averages belong to the weights of past steps, not to the averaged weights.
    """
    model = state.definition.merge(state.weights, jax.tree.map(jnp.copy, state.buffers))
    model.eval()
    model.set_attributes(nnx.BatchNorm, use_running_average=False, momentum=0.0)
    model(layers.normalise(images))  # pyright: ignore[reportCallIssue]
    return split(model)[2]


def gradient(
    config: Config,
    state: TrainState,
    params: Any,
    batch: Batch,
    *,
    images: Float[Array, "b h w c"] | None = None,
    losses: Losses | None = None,
    axis_name: str | None = None,
) -> Gradient:
    """Return the gradient of the batch's mean objective at ``params``, with the augmentation and dropout of the step.

    ``images`` are the augmented images (None: ``augmented_images`` of the batch). ``losses(logits, batch)`` returns the
    objective of each image from its logits and the augmented batch (None: that of the config). For ``axis_name`` see
    ``train_step``.
    """
    count = sum_over_devices(jnp.sum(batch.weights), axis_name)
    if images is None:
        images = augmented_images(config, batch.images, state.step, axis_name=axis_name)
    batch = batch._replace(images=images)
    plain = losses is None and objective.is_cross_entropy(config.objective)

    def loss(params):
        logits, buffers = forward(config, state, params, batch.images, batch.weights, axis_name=axis_name)
        # Padding must not affect the sums and the gradient, even if its loss is not finite.
        logits = jnp.where(batch.weights[:, None] > 0, logits, 0)
        values = losses(logits, batch) if losses else config.objective.losses(logits, batch.labels)
        if values.shape != batch.labels.shape:
            expected = f"one loss for each of {len(logits)} images"
            raise UserError(f"losses must return {expected}, but returns the shape {list(values.shape)}")
        reported = values if plain else objective.cross_entropy(Objective(), logits, batch.labels)
        total, correct = jnp.sum(values * batch.weights), objective.correct(logits, batch.labels)
        counted = (jnp.sum(reported * batch.weights), jnp.sum(correct * batch.weights), jnp.sum(batch.weights))
        extra = {} if plain else {"objective": total / count}
        return total / count, (Totals(*counted), extra, buffers)

    gradients, (totals, extra, buffers) = jax.grad(loss, has_aux=True)(params)
    gradients, totals, extra = sum_over_devices((gradients, totals, extra), axis_name)
    return Gradient(zero_frozen(config, gradients), totals, mean_over_devices(buffers, axis_name), extra)


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
    totals, gradients = gradient.totals, zero_frozen(config, gradient.params)
    norm = optax.tree.norm(gradients)
    extra = learning_rate(config, state) | gradient.extra
    unchanged = state = replace(state, step=state.step + 1)
    updates, opt_state = make_optimizer(config, state.kernels).update(gradients, state.opt_state, state.params)
    params = unless_frozen(config, optax.apply_updates(state.params, updates), state.params)
    epoch = jax.tree.map(jnp.add, state.epoch, totals)
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
    """Return the learning rate of the next update by name; nothing for an optimizer without field ``learning_rate``."""
    rate, schedule = (getattr(config.optimizer, name, None) for name in ("learning_rate", "schedule"))
    if rate is None:
        return {}
    if schedule is not None and not isinstance(schedule, Flat):
        # Optax's own count of updates: fewer than steps, if gradients are accumulated or steps are skipped.
        counts = optim.schedule_counts(state.opt_state)
        if not counts:
            return {}
        rate = schedule.make(rate, number_of_updates(config))(counts[0])
    return {"learning_rate": jnp.asarray(rate, jnp.float32)}


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
