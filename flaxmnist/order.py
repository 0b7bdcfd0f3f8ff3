"""The order in which training images are seen: a pure function of the config and the step.

Nothing is carried from one step to the next, so a resumed run goes on in the middle of an epoch with nothing to
restore.
"""

import functools
from dataclasses import replace

import numpy as np
from jaxtyping import Int32, Int64, UInt64

from flaxmnist.config import Config
from flaxmnist.errors import UserError


@functools.lru_cache(maxsize=2)
def permutation(order_seed: int, epoch: int, count: int) -> Int32[np.ndarray, " count"]:
    """The numbers 0 … ``count`` − 1 shuffled by (``order_seed``, ``epoch``); they cannot be written to.

    Philox is a generator that counts (Salmon et al. 2011), and NumPy promises that its raw output never changes;
    NumPy's own ``permutation`` carries no such promise.
    """
    key = np.array([order_seed, epoch], np.uint64)
    order = sort(np.random.Philox(key=key).random_raw(count)).astype(np.int32)
    order.flags.writeable = False
    return order


def sort(keys: UInt64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
    """The places of ``keys`` in ascending order, those of equal ones as they stand."""
    # NumPy's fastest sort takes a fifth of the stable one's time, and differs from it for equal keys alone.
    order = np.argsort(keys)
    return order if np.all(np.diff(keys[order]) > 0) else np.argsort(keys, kind="stable")


def steps_per_epoch(config: Config, count: int) -> int:
    """Steps that ``count`` training images make; raises UserError where the dropped last batch leaves none."""
    whole, rest = divmod(count, config.train.batch_size)
    if config.data.last_batch == "keep":
        return whole + (rest > 0)
    if whole == 0:
        raise UserError(
            f"train.batch_size {config.train.batch_size} is more than the {count} training images, so data.last_batch "
            "drop leaves no batch: make train.batch_size smaller, or use --data.last-batch keep"
        )
    return whole


def resolve(config: Config, count: int) -> Config:
    """``config`` with its length in steps, for ``count`` training images. Raises as ``steps_per_epoch``."""
    if config.train.epochs is None:
        return config
    steps = config.train.epochs * steps_per_epoch(config, count)
    return replace(config, train=replace(config.train, steps=steps, epochs=None))


def batch_indices(config: Config, count: int, start: int, stop: int) -> Int32[np.ndarray, "steps batch"]:
    """Which of ``count`` training images each step from ``start`` to before ``stop`` sees, by their place in the file.

    A short last batch is filled up with −1. Steps are those of the run: ``start`` is 0 at its beginning, and epochs
    follow each other. Raises as ``steps_per_epoch``.
    """
    per_epoch, size = steps_per_epoch(config, count), config.train.batch_size
    seed = config.seed if config.data.order_seed is None else config.data.order_seed
    indices = np.full((stop - start, size), -1, np.int32)
    for epoch in range(start // per_epoch, -(-stop // per_epoch)):
        origin = epoch * per_epoch
        first, last = max(start, origin), min(stop, origin + per_epoch)
        order = np.arange(count, dtype=np.int32) if config.data.order == "file" else permutation(seed, epoch, count)
        images = order[(first - origin) * size : (last - origin) * size]
        indices[first - start : last - start].reshape(-1)[: len(images)] = images
    return indices
