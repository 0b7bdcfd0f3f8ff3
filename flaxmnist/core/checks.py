"""Checks of what a user brings, by its shapes, before anything is compiled or written."""

import inspect
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.tree_util import keystr, tree_leaves_with_path

from flaxmnist.config import MODELS, OBJECTIVES, Config
from flaxmnist.core import layers, metrics, steps
from flaxmnist.core.state import Metrics, TrainState
from flaxmnist.data.sets import Dataset, Split
from flaxmnist.errors import UserError

# Names in a record of a training step.
RESERVED = {"step", "epoch", "split", "loss", "accuracy", "gradient_norm"}


def check(config: Config, data: Dataset, step: steps.Step, arrays: Any, num_shards: int) -> None:
    """Raise UserError if a model, a loss or a step of the user's, or a field about parts of the model, does not fit.

    Batches are trained in ``num_shards`` shards; ``arrays`` are those of the step.
    """
    if config.train.monitor not in metrics.METRICS:
        names = ", ".join(metrics.METRICS)
        raise UserError(f"train.monitor must be one of {names}, but is {config.train.monitor!r}")
    if config.data.order == "file" and not data.file_order:
        raise UserError(f"data.order file needs the original files, not {data.source}: use --data.order shuffled")
    state = steps.state_shapes(config, data.train.images.shape[1:], data.classes)
    if not isinstance(config.model, MODELS):
        check_model(config, state, data.train, data.classes, num_shards)
    if step is not steps.train_step or not isinstance(config.objective, OBJECTIVES):
        check_step(config, state, data.train, step, arrays)
    if config.train.frozen:
        check_frozen(config, state.params)
    if config.train.statistics_images and not any(isinstance(module, nnx.BatchNorm) for module in modules_of(state)):
        raise UserError("train.statistics_images needs a model with batch normalisation: leave it None")


def modules_of(state: TrainState) -> list[nnx.Module]:
    """Return the model of a state and all modules in it."""
    return [module for _, module in nnx.iter_modules(state.definition.merge(state.params, state.buffers))]


def check_model(config: Config, state: TrainState, train: Split, classes: int, num_shards: int) -> None:
    """Raise UserError if a model of the user's cannot be trained on batches of ``train`` in ``num_shards`` shards."""
    images = jax.ShapeDtypeStruct((2, *train.images.shape[1:]), jnp.float32)
    weights = jax.ShapeDtypeStruct((2,), jnp.float32)
    logits, _ = jax.eval_shape(partial(steps.forward, config), state, state.params, images, weights)
    if logits.shape[1] != classes:
        raise UserError(f"the model must return {classes} logits for each image, but returns {logits.shape[1]}")
    uneven = config.train.batch_size % num_shards > 0
    short = config.data.last_batch == "keep" and len(train.labels) % config.train.batch_size > 0
    counts_padding = any(
        isinstance(module, nnx.BatchNorm) and not isinstance(module, layers.BatchNorm) for module in modules_of(state)
    )
    if counts_padding and (uneven or short):
        raise UserError(
            "nnx.BatchNorm would count the padding of incomplete batches: use flaxmnist.BatchNorm, or "
            f"--data.last-batch drop with a train.batch_size divisible by {num_shards} devices"
        )


def check_step(config: Config, state: TrainState, train: Split, step: steps.Step, arrays: Any) -> None:
    """Raise UserError if a ``step`` of the user's does not return a state like its argument, and scalar metrics."""
    try:
        inspect.signature(step).bind(config, state, train, arrays, axis_name=None)
    except TypeError as error:
        raise UserError(f"step must take (config, state, batch, arrays, *, axis_name=None): {error}") from None
    batch = jax.eval_shape(steps.take_batch, *train, jax.ShapeDtypeStruct((config.train.batch_size,), jnp.int32))
    output = jax.eval_shape(partial(step, config), state, batch, arrays)
    if not (isinstance(output, tuple) and len(output) == 2 and isinstance(output[1], Metrics)):
        raise UserError("the step must return a pair of TrainState and Metrics, as flaxmnist.update does")
    for path, message in differences(state, output[0]):
        raise UserError(f"the step must return a state like its argument, but state{path} {message}")
    if taken := RESERVED & output[1].extra.keys():
        raise UserError(f"metrics.extra has {min(taken)!r}, which every record has already: use another name")
    for path, leaf in tree_leaves_with_path(output[1]):
        if leaf.shape:
            raise UserError(
                f"the step must return scalar metrics, but metrics{keystr(path)} has shape {list(leaf.shape)}"
            )


def differences(expected: Any, found: Any) -> Iterator[tuple[str, str]]:
    """Yield the path and a description of each array whose shape or dtype differs between two pytrees."""
    old, new = (
        {keystr(path): f"{leaf.dtype} {list(leaf.shape)}" for path, leaf in leaves}
        for leaves in map(tree_leaves_with_path, (expected, found))
    )
    for path in sorted(old.keys() | new.keys()):
        if old.get(path) != new.get(path):
            yield path, f"is {old.get(path, 'absent')} before and {new.get(path, 'absent')} after"


def check_frozen(config: Config, params: Any) -> None:
    """Raise UserError if a name in ``train.frozen`` fits no parameter, or if all are frozen."""
    names = [steps.dotted(path) for path, _ in tree_leaves_with_path(params)]
    for prefix in config.train.frozen:
        if not any(f"{name}.".startswith(f"{prefix}.") for name in names):
            start = f"use the beginning of {', '.join(names)}"
            raise UserError(f"train.frozen {prefix} fits no parameter: {start}")
    if all(steps.is_frozen(config, name) for name in names):
        raise UserError("train.frozen contains all parameters: leave some to train")
