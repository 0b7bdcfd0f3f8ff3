"""The devices a run uses, and how arrays lie on them."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flaxmnist.errors import UserError

# The axes of a mesh: over one the images of a batch are spread, over the other the dense kernels of a wide model.
BATCH, MODEL = "batch", "model"


def make_mesh(devices: int | None = None, model_parallel: int = 1) -> Mesh:
    """The first ``devices`` devices (None: all, of all processes) as a mesh of BATCH × MODEL.

    ``model_parallel`` is the size of MODEL. Raises UserError where there are fewer devices or they do not divide so.
    """
    available = jax.devices()
    if devices is not None and not 1 <= devices <= len(available):
        raise UserError(
            f"{devices} devices were asked for, but {len(available)} are here: give --devices a number up to that"
        )
    count = devices or len(available)
    if jax.process_count() > 1 and count < len(available):
        raise UserError(f"several processes use all of their {len(available)} devices: leave --devices out")
    if model_parallel < 1 or count % model_parallel:
        raise UserError(
            f"--model-parallel {model_parallel} does not divide {count} devices: give one of their divisors"
        )
    # Explicit axes, the default, would make gathers and integer labels raise.
    auto = jax.sharding.AxisType.Auto
    return jax.make_mesh(
        (count // model_parallel, model_parallel), (BATCH, MODEL), (auto, auto), devices=available[:count]
    )


def check_batch(batch_size: int, mesh: Mesh) -> None:
    """Raises UserError unless every part of the mesh gets as many images of a batch as the others."""
    parts = mesh.shape[BATCH]
    low = batch_size // parts * parts
    if low != batch_size:
        nearest = f"{low} or {low + parts}" if low else str(parts)
        raise UserError(
            f"train.batch_size {batch_size} does not divide by {parts} devices: take {nearest}, or fewer --devices"
        )


def check_model(params: Any, mesh: Mesh) -> None:
    """Raises UserError where the mesh would split a model that has nothing to split."""
    count = mesh.shape[MODEL]
    if count > 1 and all(sharding == whole(mesh) for sharding in jax.tree.leaves(shardings(params, mesh))):
        sides = ", ".join("×".join(map(str, leaf.shape)) for leaf in jax.tree.leaves(params) if leaf.ndim == 2)
        raise UserError(f"--model-parallel {count} divides no side of a dense kernel ({sides}): give a divisor of one")


def whole(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split_rows(mesh: Mesh) -> NamedSharding:
    """The first axis, the members of a sweep, spread over the devices."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def split_columns(mesh: Mesh) -> NamedSharding:
    """The second axis, a step's batch, spread over the devices."""
    return NamedSharding(mesh, PartitionSpec(None, BATCH))


def shardings(tree: Any, mesh: Mesh) -> Any:
    """How each array of a state lies on the mesh: dense kernels split over MODEL, all others whole.

    A kernel [outputs, inputs] is split by its outputs, or where these do not divide by its inputs, so that of two
    layers in a row the second takes its inputs where the first left them. Optimizer state has its parameter's shape,
    and lies as that does.
    """
    count = mesh.shape[MODEL]

    def sharding(leaf):
        divides = [side % count == 0 for side in leaf.shape]
        if count == 1 or leaf.ndim != 2 or not any(divides):
            return whole(mesh)
        return NamedSharding(mesh, PartitionSpec(MODEL) if divides[0] else PartitionSpec(None, MODEL))

    return jax.tree.map(sharding, tree)


def put(tree: Any, sharding: NamedSharding) -> Any:
    """``tree``, whose arrays are the same in every process, with each laid on the devices as ``sharding`` says."""
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)
    # Where some devices belong to other processes, device_put would first compare arrays with theirs, every time.
    return jax.tree.map(lambda array: jax.make_array_from_callback(array.shape, sharding, array.__getitem__), tree)


def gather(tree: Any, mesh: Mesh) -> Any:
    """``tree`` with every array whole on every device, so that each process can read it."""
    return _copy_to(whole(mesh))(tree)


@functools.lru_cache(maxsize=2)
def _copy_to(sharding: NamedSharding) -> Callable[[Any], Any]:
    return jax.jit(lambda tree: tree, out_shardings=sharding)


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh that the arrays of ``tree`` lie on; None where they were put on a device without one."""
    sharding = getattr(jax.tree.leaves(tree)[0], "sharding", None)
    return sharding.mesh if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh) else None


# --- Memory ---------------------------------------------------------------------------------------------------------


def memory(mesh: Mesh) -> float:
    """Bytes of a device of ``mesh``, or its part of the machine's. Not what is free, so that it is the same again."""
    counted = jax.local_devices()[0].memory_stats() or {}
    here = sum(device.process_index == jax.process_index() for device in mesh.devices.flat)
    return counted.get("bytes_limit", machine_memory() / here)


def machine_memory() -> int:
    """Bytes of memory of this machine, or those that its container may use."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    allowed = limit.read_text().strip() if limit.is_file() else "max"
    return min(physical, int(allowed)) if allowed.isdecimal() else physical


def check_memory(what: str, size: int, mesh: Mesh) -> None:
    """Raises UserError where the memory of a device does not hold ``size`` bytes, of ``what``."""
    if size > memory(mesh):
        raise UserError(
            f"{what} takes {size / 1e9:,.1f} GB, but a device has {memory(mesh) / 1e9:,.1f} GB: make the model, or "
            "train.batch_size, smaller"
        )


@contextlib.contextmanager
def memory_errors() -> Iterator[None]:
    """Within the block, running out of a device's memory raises UserError."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"out of memory: make the model, or train.batch_size, smaller ({reason})") from error
