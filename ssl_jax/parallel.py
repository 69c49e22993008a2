"""Devices and processes: the mesh, what is split over it and what is not. Nothing else counts devices or processes.

Every array of a batch is split along its first axis over all devices. Parameters and the rest of the state lie whole on
each device, or, with `config.train.shard`, split among so many of them. Under `jax.jit` all code sees the global batch
and whole parameters, so a loss or a BatchNorm needs no collective of its own. Of several processes each loads the
images of its own devices; files are written by the first.
"""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ssl_jax.errors import UserError


def make_mesh(devices: int, batch: int, micro_batch: int = 0, shard: int = 1) -> Mesh:
    """A mesh of the first `devices` devices (0: all); `batch`, and `micro_batch` unless 0, must divide among them."""
    there = len(jax.devices())
    if devices > there:
        raise UserError(f"config.train.devices={devices}: only {there} found; allowed: 0 (all) to {there}")
    return mesh_of(jax.devices()[: devices or there], batch, micro_batch, shard)


def mesh_of(devices: Sequence[Any], batch: int, micro_batch: int = 0, shard: int = 1) -> Mesh:
    """A mesh [devices / shard, shard] of these devices; raises UserError for what does not divide among them."""
    count = len(devices)
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
    if count % shard:
        raise UserError(f"config.train.shard={shard}: allowed: a divisor of the {count} devices")
    # Auto axes: under jax's default of explicit ones a product of sharded embeddings with themselves is refused.
    axes = (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh((count // shard, shard), AXES, axis_types=axes, devices=devices)


AXES = ("data", "shard")
SMALL = 2**16  # numbers in an array of the state up to which it is not worth splitting
LARGE = 2**26  # numbers from which it is split over all devices, whatever config.train.shard is (a queue, a bank)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """First axis over the devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def use_mesh(mesh: Mesh | None) -> AbstractContextManager[Any]:
    """While a step is traced: the mesh that `shard_batch` means."""
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh) if mesh else nullcontext()


def shard_batch(x: jax.Array) -> jax.Array:
    """Lays x [B, ...] along its first axis over the devices of the mesh of `use_mesh`; without one, as it is."""
    return x if jax.sharding.get_abstract_mesh().empty else jax.lax.with_sharding_constraint(x, PartitionSpec(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def state_sharding(mesh: Mesh, state: Any) -> Any:
    """Where each array of a train state lies: split along its longest axis that divides; small ones whole on each."""

    def place(x: Any) -> NamedSharding:
        over = AXES if x.size >= LARGE else AXES[1:]
        parts = math.prod(mesh.shape[axis] for axis in over)
        fits = [(length, -axis) for axis, length in enumerate(x.shape) if length % parts == 0]
        if parts == 1 or x.size <= SMALL or not fits:
            return replicated(mesh)
        return NamedSharding(mesh, PartitionSpec(*[None] * -max(fits)[1], over))

    return jax.tree.map(place, state)


SILENCE = 30  # seconds without a sign of life after which a process counts as dead, and all others end
ANSWER = 4096  # bytes of what the first process tells the others


def join_processes(cluster: bool = False) -> None:
    """Joins the other processes of the same job, if there are: before anything else asks jax for its devices.

    They are found by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or by what SLURM's srun, Open MPI
    and GKE put into the environment; with `cluster` by whatever else jax knows (a TPU pod's metadata server).
    """
    given = os.environ
    options: Any = {"heartbeat_timeout_seconds": SILENCE, "shutdown_timeout_seconds": SILENCE}
    if "JAX_COORDINATOR_ADDRESS" in given:
        try:
            count, mine = int(given["JAX_NUM_PROCESSES"]), int(given["JAX_PROCESS_ID"])
        except (KeyError, ValueError):
            raise UserError(
                "JAX_COORDINATOR_ADDRESS: set without numbers in JAX_NUM_PROCESSES and JAX_PROCESS_ID; "
                "allowed: all three or none"
            ) from None
        jax.distributed.initialize(given["JAX_COORDINATOR_ADDRESS"], count, mine, **options)
        return
    # SLURM_STEP_NUM_TASKS is srun's; a batch script alone has SLURM_NTASKS, and nobody else to wait for.
    tasks = max(int(given.get(name, 1)) for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"))
    if cluster or tasks > 1 or "," in given.get("TPU_WORKER_HOSTNAMES", ""):
        jax.distributed.initialize(**options)


def is_main_process() -> bool:
    """Whether this is the first process, the one that writes files and talks."""
    return jax.process_index() == 0


def run_on_main(work: Callable[[], Any]) -> Any:
    """What `work` returns (to be told in JSON) in the first process, told to all; they wait, and end if it fails."""
    if jax.process_count() == 1:
        return work()
    from jax.experimental.multihost_utils import broadcast_one_to_all

    failed: Exception | None = None
    told = b""
    if is_main_process():
        try:
            told = json.dumps(work()).encode()
        except Exception as error:
            failed = error
    message = np.frombuffer(told.ljust(ANSWER), np.uint8)
    heard = np.asarray(broadcast_one_to_all(message)).tobytes().strip()
    if failed:
        raise failed
    if not heard:
        raise SystemExit(2)  # the first process says why
    return json.loads(heard)


def any_process(sign: bool) -> bool:
    """Whether `sign` is true in any process."""
    if jax.process_count() == 1:
        return sign
    from jax.experimental.multihost_utils import process_allgather

    return bool(np.any(process_allgather(np.array(sign))))


def local_rows(mesh: Mesh, batch: int) -> np.ndarray:
    """Places int64 [N] in a batch of the images that this process' devices hold, ascending."""
    there = batch_sharding(mesh).addressable_devices_indices_map((batch,)).values()
    return np.unique(np.concatenate([np.arange(batch)[at] for at in there if at is not None]))


def global_batch(mesh: Mesh, batch: int, rows: np.ndarray, parts: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Arrays [batch, ...] split over all devices, of which this process has the `rows`: parts [len(rows), ...]."""

    def place(part: np.ndarray) -> jax.Array:
        def piece(at):
            first, last, _ = at[0].indices(batch)
            begin = np.searchsorted(rows, first)
            return part[begin : begin + last - first]

        return jax.make_array_from_callback((batch, *part.shape[1:]), batch_sharding(mesh), piece)

    return {name: place(part) for name, part in parts.items()}


def replicate(mesh: Mesh, tree: Any) -> Any:
    """Host arrays, the same in every process, on all devices."""
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(np.shape(x), replicated(mesh), lambda at: np.asarray(x)[at]), tree
    )


def per_device(mesh: Mesh, value: int) -> jax.Array:
    """int32 [devices], on the devices of each process its own `value`."""
    count = mesh.devices.size
    return jax.make_array_from_callback(
        (count,), batch_sharding(mesh), lambda at: np.full(len(np.arange(count)[at]), value, np.int32)
    )


def gather(tree: Any) -> Any:
    """Arrays of the state, split ones put together; all processes must ask."""

    def gather_leaf(x: Any) -> Any:
        at = getattr(x, "sharding", None)
        if not isinstance(at, NamedSharding) or at.is_fully_replicated:
            return x
        return jax.jit(lambda x: x, out_shardings=NamedSharding(at.mesh, PartitionSpec()))(x)

    return jax.tree.map(gather_leaf, tree)


def to_local(tree: Any) -> Any:
    """Arrays of the state as arrays of this process alone, which it may use without the others."""
    tree = gather(tree)
    return tree if jax.process_count() == 1 else jax.device_put(jax.device_get(tree))
