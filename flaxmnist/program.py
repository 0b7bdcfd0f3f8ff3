"""The one place that compiles training."""

import functools
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from flaxmnist import order, parallel, steps
from flaxmnist.config import Config
from flaxmnist.data import Dataset, Split
from flaxmnist.state import Metrics, TrainState

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


@functools.lru_cache(maxsize=2)
def _creation(config: Config, shape: tuple[int, int], classes: int, mesh: Mesh) -> Callable[[], TrainState]:
    return jax.jit(partial(steps.create_state, config, shape, classes), out_shardings=parallel.whole(mesh))


def place(split: Split, mesh: Mesh) -> Split:
    """The images and labels of ``split``, whole on every device."""
    return Split(*jax.device_put(tuple(split), parallel.whole(mesh)))


class Program:
    """The training program of a run, compiled once: any number of steps up to ``capacity``."""

    def __init__(self, config: Config, state: TrainState, train: Split, mesh: Mesh):
        self.config, self.train = config, train
        self.capacity = min(LONGEST, config.train.length)
        self.whole, self.columns = parallel.whole(mesh), parallel.split_columns(mesh)
        function = jax.jit(
            partial(steps.train_steps, config),
            in_shardings=(self.whole, self.whole, self.whole, self.columns, self.whole),
            out_shardings=self.whole,
            donate_argnums=0,
        )
        self.compiled = function.lower(state, *train, *self.place(0, 0)).compile()

    def place(self, start: int, count: int) -> tuple[Array, Array]:
        """The arguments that say which ``count`` steps from ``start`` on to do."""
        indices = np.zeros((self.capacity, self.config.train.batch_size), np.int32)
        indices[:count] = order.batch_indices(self.config, len(self.train.labels), start, start + count)
        return jax.device_put(indices, self.columns), jax.device_put(np.int32(count), self.whole)

    def __call__(self, state: TrainState, start: int, count: int) -> tuple[TrainState, Metrics]:
        """``count`` steps from ``state``, which is at step ``start`` and may not be used any more."""
        return self.compiled(state, *self.train, *self.place(start, count))


@partial(jax.jit, static_argnums=0)
def train_logits(config: Config, state: TrainState, images: Array) -> Float[Array, "b classes"]:
    """The logits that the next step would see for ``images``, with its dropout and augmentation."""
    return steps.train_logits(config, state.graphdef, state.params, images, state.step)
