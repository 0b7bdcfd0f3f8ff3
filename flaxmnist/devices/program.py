"""Compiled programs: the only module that compiles training."""

import functools
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from flaxmnist import fields
from flaxmnist.config import Config
from flaxmnist.core import steps
from flaxmnist.core.state import Metrics, TrainState
from flaxmnist.core.steps import Step
from flaxmnist.data import order
from flaxmnist.data.sets import Dataset, Split
from flaxmnist.devices import parallel

# jit compiles one program for all devices, pmap one per device.
Backend = Literal["jit", "pmap"]

# Makes the arrays of a step from the config and the data.
MakeArrays = Callable[[Config, Dataset], Any]

# Limits of a call: steps, so that its metrics stay small, and images, so that their indices take at most 256 MB.
MAX_STEPS, MAX_IMAGES = 1000, 2**26


def use_compilation_cache() -> None:
    """Keep compiled programs in ``JAX_COMPILATION_CACHE_DIR`` or ~/.cache/flaxmnist, for later processes.

    Only on GPU and TPU: on CPU, cached programs were rejected and have crashed.
    """
    if jax.default_backend() != "cpu":
        if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
            jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache/flaxmnist"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def make_deterministic() -> None:
    """Make programs on GPU deterministic: no atomics, no autotuning (https://openxla.org/xla/determinism).

    Call it before the first use of a device. CPU and TPU are deterministic without it.
    """
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true".strip()


def initial_state(config: Config, data: Dataset, mesh: Mesh) -> TrainState:
    """Return the state before the first step, sharded as in training."""
    return _jit_create_state(config, data.train.images.shape[1:], data.classes, mesh)()


def with_weights(state: TrainState, weights: Mapping[str, np.ndarray]) -> TrainState:
    """Return the initial ``state`` with ``weights``, parameters and buffers by dotted name, in place of its own."""

    def choose(path: Any, leaf: Array) -> Array:
        name = steps.dotted(path)
        sharding: Any = leaf.sharding
        return parallel.put(weights[name], sharding) if name in weights else leaf

    params, buffers = (jax.tree_util.tree_map_with_path(choose, tree) for tree in (state.params, state.buffers))
    ema, statistics = state.ema and jax.tree.map(jnp.copy, params), state.statistics and jax.tree.map(jnp.copy, buffers)
    return replace(state, params=params, buffers=buffers, ema=ema, statistics=statistics)


def state_shapes(config: Config, data: Dataset, mesh: Mesh) -> TrainState:
    """Return the shapes, dtypes and shardings of a state."""
    shapes = steps.state_shapes(config, data.train.images.shape[1:], data.classes)
    shardings = parallel.state_shardings(shapes, mesh)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes, shardings
    )


@functools.lru_cache(maxsize=2)
def _jit_create_state(config: Config, shape: tuple[int, ...], classes: int, mesh: Mesh) -> Callable[[], TrainState]:
    create = partial(steps.create_state, config, shape, classes)
    return jax.jit(create, out_shardings=parallel.state_shardings(jax.eval_shape(create), mesh))


def step_arrays(make: MakeArrays | None, config: Config, data: Dataset) -> Any:
    """Return the arrays of a step of the user's; None if it has none."""
    return None if make is None else jax.tree.map(jnp.asarray, make(config, data))


def put_split(split: Split, mesh: Mesh) -> Split:
    """Put images and labels on the devices, replicated."""
    return parallel.put(split, parallel.replicated(mesh))


class Program:
    """The training program of a run: compiled once, it does any number of steps up to ``capacity``."""

    def __init__(
        self,
        config: Config,
        state: TrainState,
        train: Split,
        mesh: Mesh,
        backend: Backend = "jit",
        step: Step = steps.train_step,
        arrays: Any = None,
    ):
        """``arrays`` are those of ``step``."""
        self.config, self.train, self.arrays = config, train, arrays
        # Equal shards, of which the last ones end in padding if the batch does not divide.
        num_shards = mesh.shape[parallel.BATCH]
        padded_size = -(-config.train.batch_size // num_shards) * num_shards
        self.capacity = min(MAX_STEPS, config.train.length, max(1, MAX_IMAGES // padded_size))
        self.replicated, self.batch_sharding = parallel.replicated(mesh), parallel.sharded(mesh, None, parallel.BATCH)
        # jit takes the indices of a step's batch as one row, pmap as one row per device.
        self.batch_shape = (padded_size,) if backend == "jit" else (num_shards, padded_size // num_shards)
        if backend == "jit":
            state_shardings = parallel.state_shardings(state, mesh)
            function = partial(steps.train_steps, config, step=step)
            if num_shards > 1:
                # Shard explicitly, as pmap does. By itself, XLA splits the groups that a convolution's gradient sums
                # over, and exchanges images: quickstart has 138 steps/s on two CPU devices, and 235 in this form.
                function = jax.shard_map(
                    partial(function, axis_name=parallel.BATCH),
                    mesh=mesh,
                    in_specs=(P(), P(), P(), P(None, parallel.BATCH), P(), P()),
                    out_specs=P(),
                    axis_names={parallel.BATCH},
                    check_vma=False,
                )
            function = jax.jit(
                function,
                in_shardings=(state_shardings, *2 * (self.replicated,), self.batch_sharding, *2 * (self.replicated,)),
                out_shardings=(state_shardings, self.replicated),
                donate_argnums=0,
            )
        else:
            function = jax.pmap(
                partial(steps.train_steps, config, step=step, axis_name=parallel.BATCH),
                axis_name=parallel.BATCH,
                in_axes=(None, None, None, 1, None, None),
                out_axes=None,
                devices=list(mesh.devices.flat),
                donate_argnums=0,
            )
        self.compiled = function.lower(state, *train, *self.step_arguments(0, 0), arrays).compile()
        self.bytes = memory_bytes(self.compiled)

    def step_arguments(self, start: int, count: int) -> tuple[Array, Array]:
        """Return the batch indices of ``count`` steps from ``start``, with padding steps and images, and ``count``."""
        indices = np.full((self.capacity, math.prod(self.batch_shape)), -1, np.int32)
        indices[:count, : self.config.train.batch_size] = order.batch_indices(
            self.config, len(self.train.labels), start, start + count
        )
        indices = parallel.put(indices.reshape(self.capacity, *self.batch_shape), self.batch_sharding)
        return indices, parallel.put(np.array(count, np.int32), self.replicated)

    def __call__(self, state: TrainState, start: int, count: int) -> tuple[TrainState, Metrics]:
        """Do ``count`` steps from ``state``, which is at step ``start`` and is donated."""
        return self.compiled(state, *self.train, *self.step_arguments(start, count), self.arrays)


class TrialProgram:
    """Several trials of a config as one program; they differ in their seeds and in the values of the fields ``names``.

    Each device trains ``trials_per_device`` of them independently: bitwise identical to a single run if that is 1,
    vmapped otherwise. With ``share_order`` all trials train on the same batches.
    """

    def __init__(
        self,
        config: Config,
        names: tuple[str, ...],
        data: Dataset,
        train: Split,
        mesh: Mesh,
        trials_per_device: int,
        share_order: bool,
        step: Step = steps.train_step,
        make_arrays: MakeArrays | None = None,
    ):
        self.make_arrays = make_arrays
        self.config, self.train, self.share_order = config, train, share_order
        self.size, vmapped = trials_per_device * mesh.size, trials_per_device > 1
        images_per_step = config.train.batch_size * (1 if share_order else self.size)
        max_steps = MAX_STEPS // 4 if vmapped else MAX_STEPS
        self.capacity = min(max_steps, config.train.length, max(1, MAX_IMAGES // images_per_step))
        replicated = parallel.replicated(mesh)
        trial_sharding = self.trial_sharding = parallel.sharded(mesh, parallel.BATCH)
        self.index_sharding = replicated if share_order else trial_sharding

        def trial_config(seed, values):
            traced = config
            for name, value in zip(("seed", *names), (seed, *values), strict=True):
                traced = fields.replace(traced, name, value, check=False)
            return traced

        def create(seed, values):
            return steps.create_state(trial_config(seed, values), data.train.images.shape[1:], data.classes)

        def advance(seed, values, state, arrays, indices, images, labels, count):
            traced = trial_config(seed, values)
            return steps.train_steps(traced, state, images, labels, indices, count, arrays, step=step)

        def jit_trials(function, per_trial: tuple[bool, ...], donated: tuple[int, ...] = ()):
            axes = tuple(0 if has_axis else None for has_axis in per_trial)
            function = jax.vmap(function, axes) if vmapped else without_trial_axis(function, per_trial)
            if mesh.size > 1:
                specs = tuple(P(parallel.BATCH) if has_axis else P() for has_axis in per_trial)
                function = jax.shard_map(
                    function, mesh=mesh, in_specs=specs, out_specs=P(parallel.BATCH), check_vma=False
                )
            shardings = tuple(trial_sharding if has_axis else replicated for has_axis in per_trial)
            return jax.jit(function, in_shardings=shardings, out_shardings=trial_sharding, donate_argnums=donated)

        seeds, values = np.zeros(self.size, np.int32), np.zeros((self.size, len(names)), np.float32)
        self.create = jit_trials(create, (True, True))
        state = jax.eval_shape(self.create, seeds, values)
        indices = self.batch_indices([config] * self.size, 0, 0)
        per_trial = (True, True, True, True, not share_order, False, False, False)
        advance = jit_trials(advance, per_trial, donated=(2,))
        arrays = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((self.size, *leaf.shape), leaf.dtype),
            step_arrays(make_arrays, config, data),
        )
        self.compiled = advance.lower(seeds, values, state, arrays, indices, *train, np.int32(0)).compile()
        self.bytes = memory_bytes(self.compiled)

    def batch_indices(self, configs: list[Config], start: int, count: int) -> Array:
        """Return the batch indices of ``count`` steps from ``start``, for each trial or shared by all."""
        configs = configs[:1] if self.share_order else configs
        indices = np.zeros((len(configs), self.capacity, self.config.train.batch_size), np.int32)
        for rows, config in zip(indices, configs, strict=True):
            rows[:count] = order.batch_indices(config, len(self.train.labels), start, start + count)
        return parallel.put(indices[0] if self.share_order else indices, self.index_sharding)

    def arrays(self, configs: list[Config], data: Dataset) -> Any:
        """Return the arrays of the step, made for each trial, with a first axis for the trials."""
        trees = [step_arrays(self.make_arrays, config, data) for config in configs]
        return parallel.put(jax.tree.map(lambda *leaves: np.stack(leaves), *trees), self.trial_sharding)

    def __call__(
        self,
        seeds: np.ndarray,
        values: np.ndarray,
        state: TrainState,
        arrays: Any,
        configs: list[Config],
        start: int,
        count: int,
    ) -> tuple[TrainState, Metrics]:
        """Do ``count`` steps from ``state``, which is at step ``start`` and is donated."""
        indices = self.batch_indices(configs, start, count)
        return self.compiled(seeds, values, state, arrays, indices, *self.train, np.int32(count))


def memory_bytes(compiled: jax.stages.Compiled) -> int:
    """Return the bytes of device memory that ``compiled`` needs; 0 if unknown."""
    memory = compiled.memory_analysis()
    if memory is None:
        return 0
    return memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes


def without_trial_axis(function: Callable[..., Any], per_trial: tuple[bool, ...]) -> Callable[..., Any]:
    """Wrap ``function`` of one trial: its ``per_trial`` arguments and its results have a first axis of size 1."""

    def call(*arguments):
        squeezed = (
            jax.tree.map(lambda x: x[0], argument) if has_axis else argument
            for argument, has_axis in zip(arguments, per_trial, strict=True)
        )
        return jax.tree.map(lambda x: x[None], function(*squeezed))

    return call


@partial(jax.jit, static_argnums=0)
def train_logits(config: Config, state: TrainState, images: Array) -> Float[Array, "b classes"]:
    """Return the logits that the next training step computes for ``images``, with dropout and augmentation."""
    weights = jnp.ones(len(images))
    return steps.forward(config, state, state.params, steps.augmented_images(config, images, state.step), weights)[0]


def with_batch_statistics(config: Config, state: TrainState, train: Split) -> TrainState:
    """Return ``state`` with the batch statistics for evaluation that ``train.statistics_images`` asks for, if any.

    The images are evenly spaced in the training images, whose file may be sorted by class.
    """
    if config.train.statistics_images is None:
        return state
    mesh, last = parallel.mesh_of(state.params), len(train.labels) - 1
    sharding = None if mesh is None else parallel.replicated(mesh)
    indices = np.linspace(0, last, min(config.train.statistics_images, last + 1)).round().astype(int)
    images = parallel.put(train.images[indices], sharding)
    return replace(state, statistics=_jit_batch_statistics(sharding)(state, images))


@functools.lru_cache(maxsize=2)
def _jit_batch_statistics(sharding: NamedSharding | None) -> Callable[[TrainState, Array], Any]:
    return jax.jit(steps.batch_statistics, out_shardings=sharding)


class StepCost(NamedTuple):
    """The cost of one training step."""

    operations: float  # floating-point operations with direct convolutions, whatever form they have
    bytes: int  # temporary memory, in addition to state and images


def step_cost(
    config: Config, data: Dataset, step: Step = steps.train_step, arrays: MakeArrays | None = None
) -> StepCost:
    """Return XLA's cost estimate for one step of ``config``, whose length must be in steps."""
    made, direct = step_arrays(arrays, config, data), fields.replace(config, "train.convolution", "direct")
    operations = (lower_step(direct, data, step, made).cost_analysis() or {}).get("flops", math.nan)
    memory = lower_step(config, data, step, made).compile().memory_analysis()
    return StepCost(operations, 0 if memory is None else memory.temp_size_in_bytes)


def lower_step(config: Config, data: Dataset, step: Step, arrays: Any) -> jax.stages.Lowered:
    """Return one training step, lowered but not compiled."""
    state = steps.state_shapes(config, data.train.images.shape[1:], data.classes)
    indices = jax.ShapeDtypeStruct((config.train.batch_size,), np.int32)
    batch = jax.eval_shape(steps.take_batch, *data.train, indices)
    return jax.jit(partial(step, config), donate_argnums=0).lower(state, batch, arrays)
