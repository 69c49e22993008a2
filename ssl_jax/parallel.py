"""Devices: the mesh, what is split over it and what is not. Nothing else in the library counts devices.

Every array of a batch is split along its first axis over the mesh axis "data"; everything else is replicated. Under
`jax.jit` all code sees the global batch, so a loss or a BatchNorm needs no collective of its own.
"""

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ssl_jax.errors import UserError


def make_mesh(devices: int, batch: int, micro_batch: int = 0) -> Mesh:
    """A mesh of the first `devices` devices (0: all); `batch`, and `micro_batch` unless 0, must divide among them."""
    there = len(jax.devices())
    if devices > there:
        raise UserError(f"config.train.devices={devices}: only {there} found; allowed: 0 (all) to {there}")
    count = devices or there
    if micro_batch % count:
        raise UserError(
            f"config.train.micro_batch={micro_batch}: not divisible by the {count} devices; "
            f"allowed: multiples of {count}"
        )
    if batch % count:
        near = [b for b in (batch // count * count, -(-batch // count) * count) if b]
        raise UserError(
            f"config.train.batch={batch}: not divisible by the {count} devices; allowed: multiples of {count}, "
            f"such as {' or '.join(map(str, near))} (or config.train.devices)"
        )
    # Auto axes: under jax's default of explicit ones a product of sharded embeddings with themselves is refused.
    return jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:count])


def split(mesh: Mesh) -> NamedSharding:
    """First axis over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())
