"""Device meshes, shardings and device memory."""

import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flaxmnist.core.kernels import map_kernels
from flaxmnist.core.state import TrainState
from flaxmnist.errors import UserError

# The axes of a mesh: images of a batch and trials of a sweep are sharded over one, wide dense kernels over the other.
BATCH, MODEL = "batch", "model"


def make_mesh(devices: int | None = None, model_parallel: int = 1) -> Mesh:
    """Return a BATCH × MODEL mesh of the first ``devices`` devices (None: all devices of all processes).

    ``model_parallel`` is the size of MODEL. Raise UserError if there are too few devices or it does not divide them.
    """
    available = jax.devices()
    if devices is not None and not 1 <= devices <= len(available):
        raise UserError(f"--devices is {devices}, but {len(available)} are available: use 1 to {len(available)}")
    count = devices or len(available)
    if jax.process_count() > 1 and count < len(available):
        raise UserError(f"several processes must use all of their {len(available)} devices: omit --devices")
    if model_parallel < 1 or count % model_parallel:
        raise UserError(f"--model-parallel {model_parallel} does not divide {count} devices: use a divisor of {count}")
    # With explicit axes, the default, gathers and integer labels raise errors.
    auto = jax.sharding.AxisType.Auto
    shape = count // model_parallel, model_parallel
    return jax.make_mesh(shape, (BATCH, MODEL), (auto, auto), devices=available[:count])


def check_model(state: TrainState, mesh: Mesh) -> None:
    """Raise UserError if MODEL has several devices, but no parameter can be sharded over it."""
    count = mesh.shape[MODEL]
    if count > 1 and all(sharding == replicated(mesh) for sharding in jax.tree.leaves(state_shardings(state, mesh))):
        kernels = map_kernels(lambda leaf, kernel: (leaf, kernel), state.params, state.kernels)
        leaves = jax.tree.leaves(kernels, is_leaf=lambda node: isinstance(node, tuple))
        shapes = ", ".join("×".join(map(str, leaf.shape)) for leaf, kernel in leaves if kernel and kernel.dense)
        raise UserError(
            f"--model-parallel {count} divides no dimension of a dense kernel ({shapes}): use a divisor of one of them"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding that replicates an array on every device."""
    return sharded(mesh)


def sharded(mesh: Mesh, *axes: str | None) -> NamedSharding:
    """Return the sharding that splits each dimension over the mesh axis given for it, if it is not None."""
    return NamedSharding(mesh, PartitionSpec(*axes))


def state_shardings(state: TrainState, mesh: Mesh) -> Any:
    """Return the sharding of each array of a state: known dense kernels are split over MODEL, all others replicated.

    A kernel is split along its outputs or, if these are not divisible, along its inputs; then its inputs are on the
    devices on which the previous layer computed them. Optimizer state is sharded as its parameters.
    """
    count = mesh.shape[MODEL]

    def sharding(leaf, kernel):
        axes = (*kernel.outputs, *kernel.inputs) if kernel is not None and kernel.dense else ()
        axis = next((axis for axis in axes if leaf.shape[axis] % count == 0), None)
        return replicated(mesh) if axis is None else sharded(mesh, *axis * (None,), MODEL)

    return map_kernels(sharding, state, {} if count == 1 else state.kernels)


def put(tree: Any, sharding: NamedSharding | None) -> Any:
    """Put the arrays of ``tree``, equal in all processes, on the devices of ``sharding`` (None: the default device)."""
    if sharding is None or sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)
    # With several processes, device_put would compare the arrays of all processes at every call.
    return jax.tree.map(lambda array: jax.make_array_from_callback(array.shape, sharding, array.__getitem__), tree)


def gather(tree: Any, mesh: Mesh) -> Any:
    """Return ``tree`` with all arrays replicated, so that each process can read them."""
    return _resharding(replicated(mesh))(tree)


@functools.lru_cache(maxsize=2)
def _resharding(sharding: NamedSharding) -> Callable[[Any], Any]:
    return jax.jit(lambda tree: tree, out_shardings=sharding)


def mesh_of(tree: Any) -> Mesh | None:
    """Return the mesh of the arrays of ``tree``; None if they are on a device without a mesh."""
    sharding = getattr(jax.tree.leaves(tree)[0], "sharding", None)
    return sharding.mesh if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh) else None


# --- Memory ---------------------------------------------------------------------------------------------------------


def device_memory(mesh: Mesh) -> float:
    """Return the total memory of a device in bytes; on CPU, the machine's divided by the devices of this process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    num_local = sum(device.process_index == jax.process_index() for device in mesh.devices.flat)
    return stats.get("bytes_limit", machine_memory() / num_local)


def machine_memory() -> int:
    """Return the memory of this machine in bytes, or the limit of its container."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    path = Path("/sys/fs/cgroup/memory.max")
    limit = path.read_text().strip() if path.is_file() else "max"
    return min(physical, int(limit)) if limit.isdecimal() else physical


def bytes_per_device(tree: Any) -> int:
    """Return the bytes that the arrays of ``tree``, which have shardings, take on one device."""
    shards = ((leaf.sharding.shard_shape(leaf.shape), leaf.dtype) for leaf in jax.tree.leaves(tree))
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in shards)


def check_memory(name: str, size: int, mesh: Mesh) -> None:
    """Raise UserError if ``name``, of ``size`` bytes, exceeds the memory of a device."""
    limit = device_memory(mesh)
    if size > limit:
        raise UserError(
            f"{name} takes {size / 1e9:,.1f} GB, but a device has {limit / 1e9:,.1f} GB: use a smaller model or a "
            "smaller train.batch_size"
        )


@contextlib.contextmanager
def memory_errors() -> Iterator[None]:
    """Within the block, raise UserError if a device runs out of memory."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"out of memory ({reason}): use a smaller model or a smaller train.batch_size") from error
