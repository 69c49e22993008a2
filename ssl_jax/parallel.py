"""Devices and processes: the mesh, and what is split over it. No other module counts devices or processes.

Every array of a batch is split along its first axis over all devices. Parameters and the rest of the state are
replicated, or split among `config.train.shard` devices. Under `jax.jit` all code sees the global batch and whole
parameters, so losses and BatchNorm need no collectives. If there are several processes, each loads the images of its
own devices, and the first one writes all files.
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
    """A mesh of the first `devices` devices (0: all). Their number must divide `batch` and `micro_batch`."""
    available = len(jax.devices())
    if devices > available:
        raise UserError(f"config.train.devices={devices}: only {available} found; allowed: 0 (all) to {available}")
    return mesh_of(jax.devices()[: devices or available], batch, micro_batch, shard)


def mesh_of(devices: Sequence[Any], batch: int, micro_batch: int = 0, shard: int = 1) -> Mesh:
    """A mesh [devices / shard, shard] of these devices. UserError if batch, micro_batch or shard do not fit them."""
    count = len(devices)
    if micro_batch % count:
        raise UserError(
            f"config.train.micro_batch={micro_batch}: not divisible by the {count} devices; "
            f"allowed: multiples of {count}"
        )
    if batch % count:
        nearest = [b for b in (batch // count * count, -(-batch // count) * count) if b]
        raise UserError(
            f"config.train.batch={batch}: not divisible by the {count} devices; allowed: multiples of {count}, "
            f"such as {' or '.join(map(str, nearest))} (or change config.train.devices)"
        )
    if count % shard:
        raise UserError(f"config.train.shard={shard}: allowed: a divisor of the {count} devices")
    # Auto axes: with explicit ones, jax's default, z @ z.T raises an error for sharded embeddings z.
    axes = (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh((count // shard, shard), AXES, axis_types=axes, devices=devices)


def mesh_within(batch: int, least: int) -> Mesh:
    """A mesh of as many of this process's devices as split `batch` into equal parts of at least `least`; or of one."""
    devices = jax.local_devices()
    fitting = [n for n in range(2, len(devices) + 1) if batch % n == 0 and batch // n >= least]
    return mesh_of(devices[: max(fitting, default=1)], batch)


AXES = ("data", "shard")
SMALL = 2**16  # arrays of the state with up to this many elements are not worth splitting
LARGE = 2**26  # arrays with this many (a queue, a bank) are split over all devices, whatever config.train.shard says


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis split over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def use_mesh(mesh: Mesh | None) -> AbstractContextManager[Any]:
    """Sets the mesh of `shard_batch` while a step is traced."""
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh) if mesh else nullcontext()


def shard_batch(x: jax.Array) -> jax.Array:
    """Splits x [B, ...] along its first axis over the mesh of `use_mesh`; without one, x is unchanged."""
    return x if jax.sharding.get_abstract_mesh().empty else jax.lax.with_sharding_constraint(x, PartitionSpec(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def state_sharding(mesh: Mesh, state: Any) -> Any:
    """The sharding of each array of a train state: its longest divisible axis is split; small arrays are replicated."""

    def place(x: Any) -> NamedSharding:
        mesh_axes = AXES if x.size >= LARGE else AXES[1:]
        parts = math.prod(mesh.shape[axis] for axis in mesh_axes)
        divisible = [(length, -axis) for axis, length in enumerate(x.shape) if length % parts == 0]
        if parts == 1 or x.size <= SMALL or not divisible:
            return replicated(mesh)
        return NamedSharding(mesh, PartitionSpec(*[None] * -max(divisible)[1], mesh_axes))

    return jax.tree.map(place, state)


TIMEOUT = 30  # seconds without a heartbeat after which a process counts as dead, and all others end
MAX_BYTES = 4096  # of the message from the first process to the others


def join_processes(cluster: bool = False) -> None:
    """Joins the other processes of the job, if there are any. Call it before anything asks jax for its devices.

    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID name them, or the variables that SLURM's srun, Open
    MPI and GKE set. With `cluster`, jax looks everywhere else too, such as on the metadata server of a TPU pod.
    """
    env = os.environ
    options: Any = {"heartbeat_timeout_seconds": TIMEOUT, "shutdown_timeout_seconds": TIMEOUT}
    if "JAX_COORDINATOR_ADDRESS" in env:
        try:
            count, process_id = int(env["JAX_NUM_PROCESSES"]), int(env["JAX_PROCESS_ID"])
        except (KeyError, ValueError):
            raise UserError(
                "JAX_COORDINATOR_ADDRESS: set without numbers in JAX_NUM_PROCESSES and JAX_PROCESS_ID; "
                "allowed: all three or none"
            ) from None
        jax.distributed.initialize(env["JAX_COORDINATOR_ADDRESS"], count, process_id, **options)
        return
    # srun sets SLURM_STEP_NUM_TASKS. A batch script without srun has only SLURM_NTASKS, and is a single process.
    tasks = max(int(env.get(name, 1)) for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"))
    if cluster or tasks > 1 or "," in env.get("TPU_WORKER_HOSTNAMES", ""):
        jax.distributed.initialize(**options)


def is_main_process() -> bool:
    """Whether this is the first process, which writes files and prints."""
    return jax.process_index() == 0


def run_on_main(work: Callable[[], Any]) -> Any:
    """Calls `work` in the first process and returns its result, which must be JSON, in all of them.

    The others wait; if it fails, they exit.
    """
    if jax.process_count() == 1:
        return work()
    from jax.experimental.multihost_utils import broadcast_one_to_all

    failure: Exception | None = None
    result = b""
    if is_main_process():
        try:
            result = json.dumps(work()).encode()
        except Exception as error:
            failure = error
    message = np.frombuffer(result.ljust(MAX_BYTES), np.uint8)
    received = np.asarray(broadcast_one_to_all(message)).tobytes().strip()
    if failure:
        raise failure
    if not received:
        raise SystemExit(2)  # the first process prints the reason
    return json.loads(received)


def any_process(flag: bool) -> bool:
    """Whether `flag` is true in any process."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental.multihost_utils import process_allgather

    return bool(np.any(process_allgather(np.array(flag))))


def sum_over_processes(x: np.ndarray) -> np.ndarray:
    """The sum of every process's x, which has the same shape and type in all."""
    if jax.process_count() == 1:
        return x
    from jax.experimental.multihost_utils import process_allgather

    return np.sum(process_allgather(x), axis=0, dtype=x.dtype)


def local_rows(mesh: Mesh, batch: int) -> np.ndarray:
    """The rows of a batch that this process's devices hold, int64 [N], ascending."""
    slices = batch_sharding(mesh).addressable_devices_indices_map((batch,)).values()
    return np.unique(np.concatenate([np.arange(batch)[rows] for rows in slices if rows is not None]))


def global_batch(mesh: Mesh, batch: int, rows: np.ndarray, parts: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays [batch, ...] split over all devices, from this process's `rows` of them: a tree [len(rows), ...]."""

    def place(part: np.ndarray) -> jax.Array:
        def rows_of_device(index):
            start, stop, _ = index[0].indices(batch)
            first = np.searchsorted(rows, start)
            return part[first : first + stop - start]

        return jax.make_array_from_callback((batch, *part.shape[1:]), batch_sharding(mesh), rows_of_device)

    return jax.tree.map(place, dict(parts))


def replicate(mesh: Mesh, tree: Any) -> Any:
    """Host arrays, the same in every process, copied to all devices."""
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(np.shape(x), replicated(mesh), lambda index: np.asarray(x)[index]), tree
    )


def per_device(mesh: Mesh, value: int) -> jax.Array:
    """int32 [devices], in which each process sets the entries of its own devices to its `value`."""
    count = mesh.devices.size
    return jax.make_array_from_callback(
        (count,), batch_sharding(mesh), lambda index: np.full(len(np.arange(count)[index]), value, np.int32)
    )


def gather(tree: Any) -> Any:
    """The tree with all arrays replicated. All processes must call this together."""

    def gather_leaf(x: Any) -> Any:
        sharding = getattr(x, "sharding", None)
        if not isinstance(sharding, NamedSharding) or sharding.is_fully_replicated:
            return x
        return jax.jit(lambda x: x, out_shardings=NamedSharding(sharding.mesh, PartitionSpec()))(x)

    return jax.tree.map(gather_leaf, tree)


def to_local(tree: Any) -> Any:
    """The tree as arrays that this process can use without the others. All processes must call this together."""
    tree = gather(tree)
    return tree if jax.process_count() == 1 else jax.device_put(jax.device_get(tree))
