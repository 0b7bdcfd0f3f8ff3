"""The one place that compiles training."""

import functools
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from flaxmnist import order, parallel, steps
from flaxmnist.config import Config
from flaxmnist.data import Dataset, Split
from flaxmnist.state import Metrics, TrainState

# The two ways to compile training: one program over all devices, or one a device, which sum what they found.
Backend = Literal["jit", "pmap"]

# Most steps in one call, so that its metrics stay small.
LONGEST = 1000


def keep_programs() -> None:
    """Lets a process find the programs that earlier ones compiled, on GPU and TPU, by version and device.

    They lie in ``JAX_COMPILATION_CACHE_DIR``, or ~/.cache/flaxmnist. Not on CPU, where kept programs were refused and
    have crashed.
    """
    if jax.default_backend() != "cpu":
        if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
            jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache/flaxmnist"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


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
        self.capacity = min(LONGEST, config.train.length)
        self.whole, self.columns = parallel.whole(mesh), parallel.split_columns(mesh)
        # The indices of a step's images: a row for jit, which cuts it itself, and one for each device of pmap.
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

    def place(self, start: int, count: int) -> tuple[Array, Array]:
        """The arguments that say which ``count`` steps from ``start`` on to do."""
        indices = np.zeros((self.capacity, self.config.train.batch_size), np.int32)
        indices[:count] = order.batch_indices(self.config, len(self.train.labels), start, start + count)
        placed = parallel.put(indices.reshape(self.capacity, *self.rows), self.columns)
        return placed, parallel.put(np.array(count, np.int32), self.whole)

    def __call__(self, state: TrainState, start: int, count: int) -> tuple[TrainState, Metrics]:
        """``count`` steps from ``state``, which is at step ``start`` and may not be used any more."""
        return self.compiled(state, *self.train, *self.place(start, count))


@partial(jax.jit, static_argnums=0)
def train_logits(config: Config, state: TrainState, images: Array) -> Float[Array, "b classes"]:
    """The logits that the next step would see for ``images``, with its dropout and augmentation."""
    return steps.train_logits(config, state.graphdef, state.params, images, state.step)
