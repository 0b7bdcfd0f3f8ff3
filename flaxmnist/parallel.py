"""The devices a run uses, and how arrays lie on them."""

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flaxmnist.errors import UserError


def make_mesh(devices: int | None = None) -> Mesh:
    """The first ``devices`` devices (None: all) on one axis, "batch". Raises UserError where there are fewer."""
    available = jax.devices()
    if devices is not None and not 1 <= devices <= len(available):
        raise UserError(
            f"{devices} devices were asked for, but {len(available)} are here: give --devices a number up to that"
        )
    # Explicit axes, the default, would make gathers and integer labels raise.
    return jax.make_mesh(
        (devices or len(available),), ("batch",), axis_types=(jax.sharding.AxisType.Auto,), devices=available[:devices]
    )


def check_batch(batch_size: int, mesh: Mesh) -> None:
    """Raises UserError unless every device gets as many images of a batch as the others."""
    low = batch_size // mesh.size * mesh.size
    if low != batch_size:
        nearest = f"{low} or {low + mesh.size}" if low else str(mesh.size)
        raise UserError(
            f"train.batch_size {batch_size} does not divide by {mesh.size} devices: take {nearest}, or fewer --devices"
        )


def whole(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split_columns(mesh: Mesh) -> NamedSharding:
    """The second axis, a step's batch, spread over the devices."""
    return NamedSharding(mesh, PartitionSpec(None, "batch"))
