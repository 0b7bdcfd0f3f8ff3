"""The one place that compiles training."""

import functools
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from flaxmnist import fields, order, parallel, steps
from flaxmnist.config import Config
from flaxmnist.data import Dataset, Split
from flaxmnist.state import Metrics, TrainState

# The two ways to compile training: one program over all devices, or one a device, which sum what they found.
Backend = Literal["jit", "pmap"]

# Most steps in one call, so that its metrics stay small; and most images, so that their indices take 256 MB at most.
LONGEST, MOST_IMAGES = 1000, 2**26


def keep_programs() -> None:
    """Lets a process find the programs that earlier ones compiled, on GPU and TPU, by version and device.

    They lie in ``JAX_COMPILATION_CACHE_DIR``, or ~/.cache/flaxmnist. Not on CPU, where kept programs were refused and
    have crashed.
    """
    if jax.default_backend() != "cpu":
        if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
            jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache/flaxmnist"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def make_deterministic() -> None:
    """Has programs for GPUs give the same bits every time, where they would not; on CPU and TPU nothing changes.

    Nothing is summed in the order of arrival then, and no kernel chosen by how long it happened to take
    (https://openxla.org/xla/determinism). To be called before devices are looked at.
    """
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true".strip()


def first_state(config: Config, data: Dataset, mesh: Mesh) -> TrainState:
    """The state before the first step, whole on every device."""
    return _creation(config, data.train.images.shape[1:3], data.classes, mesh)()


def state_shapes(config: Config, data: Dataset) -> TrainState:
    """The shapes and types of the arrays of a state."""
    return jax.eval_shape(partial(steps.create_state, config, data.train.images.shape[1:3], data.classes))


@functools.lru_cache(maxsize=2)
def _creation(config: Config, shape: tuple[int, int], classes: int, mesh: Mesh) -> Callable[[], TrainState]:
    create = partial(steps.create_state, config, shape, classes)
    return jax.jit(create, out_shardings=parallel.shardings(jax.eval_shape(create), mesh))


def place(split: Split, mesh: Mesh) -> Split:
    """The images and labels of ``split``, whole on every device."""
    return parallel.put(split, parallel.whole(mesh))


class Program:
    """The training program of a run, compiled once: any number of steps up to ``capacity``."""

    def __init__(self, config: Config, state: TrainState, train: Split, mesh: Mesh, backend: Backend = "jit"):
        self.config, self.train = config, train
        self.capacity = min(LONGEST, config.train.length, max(1, MOST_IMAGES // config.train.batch_size))
        self.whole, self.columns = parallel.whole(mesh), parallel.split_columns(mesh)
        # The indices of a step's images are one row for jit, and one for each device for pmap.
        batch = config.train.batch_size
        self.rows = (batch,) if backend == "jit" else (mesh.size, batch // mesh.size)
        if backend == "jit":
            lies = parallel.shardings(state, mesh)
            function = partial(steps.train_steps, config)
            if mesh.shape[parallel.BATCH] > 1:
                # Each device's part is written out, as for pmap. Left to cut the batch by itself, XLA cuts through the
                # groups that a convolution's gradient is summed in, and exchanges images: 138 steps/s of quickstart on
                # two devices of a CPU, against 235.
                function = jax.shard_map(
                    partial(function, axis_name=parallel.BATCH),
                    mesh=mesh,
                    in_specs=(P(), P(), P(), P(None, parallel.BATCH), P()),
                    out_specs=P(),
                    axis_names={parallel.BATCH},
                    check_vma=False,
                )
            function = jax.jit(
                function,
                in_shardings=(lies, self.whole, self.whole, self.columns, self.whole),
                out_shardings=(lies, self.whole),
                donate_argnums=0,
            )
        else:
            function = jax.pmap(
                partial(steps.train_steps, config, axis_name=parallel.BATCH),
                axis_name=parallel.BATCH,
                in_axes=(None, None, None, 1, None),
                out_axes=None,
                devices=list(mesh.devices.flat),
                donate_argnums=0,
            )
        self.compiled = function.lower(state, *train, *self.place(0, 0)).compile()
        self.bytes = memory_of(self.compiled)

    def place(self, start: int, count: int) -> tuple[Array, Array]:
        """The arguments that say which ``count`` steps from ``start`` on to do."""
        indices = np.zeros((self.capacity, self.config.train.batch_size), np.int32)
        indices[:count] = order.batch_indices(self.config, len(self.train.labels), start, start + count)
        placed = parallel.put(indices.reshape(self.capacity, *self.rows), self.columns)
        return placed, parallel.put(np.array(count, np.int32), self.whole)

    def __call__(self, state: TrainState, start: int, count: int) -> tuple[TrainState, Metrics]:
        """``count`` steps from ``state``, which is at step ``start`` and may not be used any more."""
        return self.compiled(state, *self.train, *self.place(start, count))


class Members:
    """Several runs of one config as one program; they differ in their seeds, and in the values of the fields ``names``.

    Each device trains ``each`` of them, and tells the others nothing: one as a run of its own would be trained, to the
    bit, several vectorised. With ``shared`` all see the same batches.
    """

    def __init__(
        self, config: Config, names: tuple[str, ...], data: Dataset, train: Split, mesh: Mesh, each: int, shared: bool
    ):
        self.config, self.train, self.shared, self.size = config, train, shared, each * mesh.size
        rows = config.train.batch_size * (1 if shared else self.size)
        self.capacity = min(LONGEST if each == 1 else LONGEST // 4, config.train.length, max(1, MOST_IMAGES // rows))
        self.whole, self.split = parallel.whole(mesh), parallel.split_rows(mesh)
        self.lies = self.whole if shared else self.split

        def member(seed, values):
            traced = fields.put(config, "seed", seed, check=False)
            for name, value in zip(names, values, strict=True):
                traced = fields.put(traced, name, value, check=False)
            return traced

        def create(seed, values):
            return steps.create_state(member(seed, values), data.train.images.shape[1:3], data.classes)

        def advance(seed, values, state, indices, images, labels, count):
            return steps.train_steps(member(seed, values), state, images, labels, indices, count)

        def compiled(function, split: tuple[bool, ...], donated: tuple[int, ...] = ()):
            axes = tuple(0 if along else None for along in split)
            function = jax.vmap(function, axes) if each > 1 else alone(function, split)
            if mesh.size > 1:
                specs = tuple(P(parallel.BATCH) if along else P() for along in split)
                function = jax.shard_map(
                    function, mesh=mesh, in_specs=specs, out_specs=P(parallel.BATCH), check_vma=False
                )
            shardings = tuple(self.split if along else self.whole for along in split)
            return jax.jit(function, in_shardings=shardings, out_shardings=self.split, donate_argnums=donated)

        seeds, values = np.zeros(self.size, np.int32), np.zeros((self.size, len(names)), np.float32)
        self.create = compiled(create, (True, True))
        state = jax.eval_shape(self.create, seeds, values)
        advance = compiled(advance, (True, True, True, not shared, False, False, False), donated=(2,))
        self.compiled = advance.lower(
            seeds, values, state, self.indices([config] * self.size, 0, 0), *train, np.int32(0)
        ).compile()
        self.bytes = memory_of(self.compiled)

    def indices(self, configs: list[Config], start: int, count: int) -> Array:
        """The batches of ``count`` steps from ``start`` on: of each member, or of all."""
        configs = configs[:1] if self.shared else configs
        indices = np.zeros((len(configs), self.capacity, self.config.train.batch_size), np.int32)
        for rows, config in zip(indices, configs, strict=True):
            rows[:count] = order.batch_indices(config, len(self.train.labels), start, start + count)
        return parallel.put(indices[0] if self.shared else indices, self.lies)

    def __call__(
        self, seeds: np.ndarray, values: np.ndarray, state: TrainState, configs: list[Config], start: int, count: int
    ) -> tuple[TrainState, Metrics]:
        """``count`` steps from ``state``, which is at step ``start`` and may not be used any more."""
        indices = self.indices(configs, start, count)
        return self.compiled(seeds, values, state, indices, *self.train, np.int32(count))


def memory_of(compiled: jax.stages.Compiled) -> int:
    """Bytes of a device's memory that running ``compiled`` takes, as far as is known."""
    memory = compiled.memory_analysis()
    if memory is None:
        return 0
    return memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes


def alone(function: Callable[..., Any], split: tuple[bool, ...]) -> Callable[..., Any]:
    """``function`` of one member for arguments that hold one, along a first axis where ``split`` says so."""

    def call(*arguments):
        only = (
            jax.tree.map(lambda x: x[0], each) if along else each for each, along in zip(arguments, split, strict=True)
        )
        return jax.tree.map(lambda x: x[None], function(*only))

    return call


@partial(jax.jit, static_argnums=0)
def train_logits(config: Config, state: TrainState, images: Array) -> Float[Array, "b classes"]:
    """The logits that the next step would see for ``images``, with its dropout and augmentation."""
    return steps.train_logits(config, state.graphdef, state.params, images, state.step)
