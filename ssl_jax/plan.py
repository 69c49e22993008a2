"""What a run will need of a TPU slice before it is paid for: its real step, compiled by the real TPU compiler.

Nothing is run. Memory, collectives and bytes are the compiler's; FLOPs are counted in the traced step, since the
compiler counts the body of a loop once. Seconds are a roofline from published figures of the chips: a prediction, and
rather a bound than a promise.
"""

import dataclasses
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ssl_jax import files, parallel, trainer
from ssl_jax.config import Config, Data
from ssl_jax.data import open_source
from ssl_jax.errors import UserError, unknown
from ssl_jax.report.figures import scaling

LOADED = {"imagenet2012": (1_281_167, 1000), "cifar10": (50_000, 10)}  # TFDS: images and classes of the training part
HOP = 1e-6  # seconds from chip to chip; about, as https://jax-ml.github.io/scaling-book/sharding has it


class Chip(NamedTuple):
    """Published figures. Source: https://docs.cloud.google.com/tpu/docs, the page of each version."""

    flops: float  # bfloat16, a second
    memory: float  # bytes
    bandwidth: float  # of its memory, bytes a second
    network: float  # one way over all its links, bytes a second
    links: int
    wraps: int  # a side of the slice that is a multiple of this closes to a ring
    megacore: bool  # its two cores are one device


CHIPS = {
    "v4": Chip(275e12, 32 * 2**30, 1200e9, 300e9, 6, 4, True),
    "v5e": Chip(197e12, 16 * 2**30, 819e9, 200e9, 4, 16, False),
    "v5p": Chip(459e12, 95e9, 2765e9, 600e9, 6, 4, True),
    "v6e": Chip(918e12, 32 * 2**30, 1638e9, 400e9, 4, 16, False),
}


@dataclass(frozen=True)
class Plan:
    """One config on one slice. Bytes, FLOPs and collectives are of one step on one chip."""

    topology: str
    chips: int
    batch: int
    micro_batch: int  # 0: the whole batch at once
    fits: bool
    memory: float  # bytes needed
    flops: float = 0.0
    bytes: float = 0.0  # read from and written to the chip's memory
    collectives: dict[str, tuple[int, float]] = dataclasses.field(default_factory=dict)  # kind: number, bytes
    compute_s: float = 0.0
    memory_s: float = 0.0
    network_s: float = 0.0
    steps: int = 0

    @property
    def version(self) -> str:
        """Of the chip, a key of CHIPS."""
        return self.topology.partition(":")[0]

    @property
    def step_s(self) -> float:
        """Predicted: arithmetic and memory overlap, what goes over the network is waited for."""
        return max(self.compute_s, self.memory_s) + self.network_s

    @property
    def limit(self) -> str:
        times = {"compute": self.compute_s, "memory": self.memory_s, "network": self.network_s}
        return max(times, key=times.__getitem__)

    @property
    def images_per_s(self) -> float:
        return self.batch / self.step_s

    @property
    def hours(self) -> float:
        return self.steps * self.step_s / 3600


@dataclass(frozen=True)
class Described:
    """As much of a data set as a step's shapes depend on."""

    examples: int
    shape: tuple[int, int, int]
    classes: Sequence[str]
    labels: Any
    objects: Any = None

    def __len__(self) -> int:
        return self.examples


def describe(data: Data, images: int, classes: int) -> Any:
    """The data set of a config, or with `images`, or for a known TFDS name, a description of it."""
    if not images and data.name == "tfds" and data.path in LOADED:
        images, classes = LOADED[data.path]
    if not images:
        return open_source(data)
    size = data.size or 224
    channels = data.channels or 3
    labels = np.zeros(1, np.int32) if classes else None
    names = [str(i) for i in range(classes)]
    return Described(data.limit or images, (size, size, channels), names, labels, np.zeros(1) if data.pairs else None)


def slice_of(topology: str) -> tuple[Chip, tuple[int, ...], list[Any]]:
    """Chip, sides and abstract devices of a slice such as "v5e:4x8"."""
    name, _, shape = topology.partition(":")
    if name not in CHIPS:
        raise unknown("--topology", name, CHIPS)
    if not re.fullmatch(r"\d+(x\d+)*", shape):
        raise UserError(f"--topology={topology}: allowed: VERSION:SIDExSIDE, such as v5e:4x8 or v4:2x2x4")
    # Without a TPU in this machine the compiler must not ask the network where one is, nor complain of its absence;
    # and as nothing runs on one, several processes may plan at once.
    here = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-4"}
    for key, value in (here | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}).items():
        os.environ.setdefault(key, value)
    try:
        from jax.experimental import topologies

        options = {"topology_name": topology, "chip_config_name": "megacore" if CHIPS[name].megacore else "default"}
        devices = topologies.get_topology_desc(platform="tpu", **options).devices
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        if "libtpu" in reason or "not installed" in reason:
            raise UserError("plan: needs the TPU compiler (libtpu); pip install 'ssl_jax[plan]'") from error
        raise UserError(f"--topology={topology}: {reason}") from error
    # A program for a TPU cannot be read back without one: JAX would try, warn and compile it again.
    jax.config.update("jax_enable_compilation_cache", False)
    return CHIPS[name], tuple(map(int, shape.split("x"))), list(devices)


def plan(config: Config, topology: str, source: Any) -> Plan:
    """Compiles the step of `config` for `topology`. Out of memory is no error: then `fits` is False."""
    chip, sides, devices = slice_of(topology)
    train = config.train
    mesh = parallel.mesh_of(devices, train.batch, train.micro_batch, train.shard)
    # As on a TPU: none of the formulations that are there for CPUs.
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, conv="lax"))
    setup = trainer.set_up(config, source)
    args = abstract(setup, config, source, mesh)
    step = trainer.make_step(setup, config, mesh)
    placed = jax.tree.map(lambda x: x.sharding, args[0])
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(placed, parallel.replicated(mesh)))
    traced = jitted.trace(*args)
    about: dict[str, Any] = {
        "topology": topology,
        "chips": len(devices),
        "batch": config.train.batch,
        "micro_batch": config.train.micro_batch,
        "steps": setup.steps,
    }
    try:
        compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    except jax.errors.JaxRuntimeError as error:
        used = out_of_memory(str(error), sum(map(_bytes_a_chip, jax.tree.leaves(args))))
        if not used:
            raise
        return Plan(**about, fits=False, memory=used)
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    needed = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    needed -= memory.alias_size_in_bytes
    if trainer.in_memory(config, source):
        needed += len(source) * math.prod(source.shape)
    flops = count_flops(traced.jaxpr.jaxpr) / len(devices)
    # A loop's body is counted once by the compiler, in FLOPs as in bytes.
    loops = max(1.0, flops / cost["flops"])
    found = list(collectives(compiled.as_text()))
    kinds = {
        kind: (sum(n for k, n, _ in found if k == kind), sum(n * b for k, n, b in found if k == kind))
        for kind in sorted({k for k, *_ in found})
    }
    return Plan(
        **about,
        fits=needed <= chip.memory,
        memory=needed,
        flops=flops,
        bytes=cost["bytes accessed"] * loops,
        collectives=kinds,
        compute_s=flops / chip.flops,
        memory_s=cost["bytes accessed"] * loops / chip.bandwidth,
        network_s=sum(n * seconds_of(kind, size, chip, sides) for kind, n, size in found),
    )


def out_of_memory(message: str, arguments: float) -> float:
    """Bytes that a chip would need, from what the TPU compiler says when they are not there; 0: it says anything else.

    One of its messages counts all that the step uses; another, what it makes on the way alone, without its arguments.
    """
    found = re.search(r"RESOURCE_EXHAUSTED.*?(?:Used |(HLO temporaries) \()([\d.]+)([KMGT])", message, re.DOTALL)
    if not found:
        return 0.0
    return float(found[2]) * 1024 ** ("KMGT".index(found[3]) + 1) + (arguments if found[1] else 0.0)


def _bytes_a_chip(x: jax.ShapeDtypeStruct) -> float:
    shape = x.sharding.shard_shape(x.shape) if x.sharding else x.shape
    return math.prod(shape) * (x.dtype.itemsize if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else 8)


def abstract(setup: trainer.Setup, config: Config, source: Any, mesh: Mesh) -> tuple[trainer.TrainState, dict]:
    """(state, batch) of a step: shapes and where they lie, no numbers."""
    state = jax.eval_shape(lambda: trainer.init_state(setup, 0))
    put = jax.ShapeDtypeStruct
    state = jax.tree.map(lambda x, at: put(x.shape, x.dtype, sharding=at), state, parallel.state_sharding(mesh, state))
    batch, at = config.train.batch, parallel.batch_sharding(mesh)
    inputs = {"image": put((batch, *source.shape), jnp.uint8, sharding=at)}
    inputs["index"] = put((batch,), jnp.int32, sharding=at)
    if source.labels is not None:
        labels = np.asarray(source.labels)
        inputs["label"] = put((batch, *labels.shape[1:]), labels.dtype, sharding=at)
    if source.objects is not None:
        inputs["pair"] = inputs["image"]
    return state, inputs


def largest_micro_batch(config: Config, topology: str, source: Any, needed: float) -> tuple[int, Plan | None]:
    """The most images at a time that fit, of the divisors of the batch: (0, None) if not even one a chip does."""
    chip, _, devices = slice_of(topology)
    batch, group = config.train.batch, config.train.bn_group or 1
    sizes = [n for n in range(1, batch) if batch % n == 0 and n % len(devices) == 0 and n % group == 0]
    best: tuple[int, Plan | None] = (0, None)
    low, high = 0, len(sizes)
    guess = sum(n <= batch * chip.memory / needed for n in sizes)  # memory grows about as the images do
    while low < high:
        middle = min(max(guess, low), high - 1)
        train = dataclasses.replace(config.train, micro_batch=sizes[middle])
        made = plan(dataclasses.replace(config, train=train), topology, source)
        if made.fits:
            best, low = (sizes[middle], made), middle + 1
            guess = low
        else:
            high = middle
            guess = high - 1
    return best


def count_flops(jaxpr: Any) -> float:
    """Of all matrix products and convolutions in a traced program, loops counted as often as they run."""
    total = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)
        elif eqn.primitive.name == "conv_general_dilated":
            kernel, names = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"].rhs_spec
            each = math.prod(kernel) / kernel[names[0]]  # products in one output
            # Between the rows and columns of a dilated input lie zeros, which nobody multiplies.
            zeros = math.prod(eqn.params["lhs_dilation"])
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * each / zeros
        times = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                total += times * count_flops(inner)
    return total


KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4}


def collectives(hlo: str) -> Iterator[tuple[str, int, float]]:
    """(kind, how often in a step, bytes of its result) of every collective in a compiled program's text.

    One that the TPU compiler spreads over several fusions, to hide it behind them, stands in each, with one channel.
    """
    lines: dict[str, list[str]] = {}
    calls: list[tuple[str, str, int]] = []
    current = ""
    for line in hlo.splitlines():
        if opened := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            current = opened[1]
            lines[current] = []
            if line.startswith("ENTRY"):
                calls.append(("", current, 1))
        elif current:
            lines[current].append(line)
            trips = re.search(r"known_trip_count[^\d]*(\d+)", line)
            times = int(trips[1]) if trips and " while(" in line else 1
            for name in re.findall(r"(?:body|calls|to_apply|called_computations)=\{?%?([\w.\-]+)", line):
                calls.append((current, name, times))
    callers: dict[str, list[tuple[str, int]]] = {}
    for caller, name, times in calls:
        callers.setdefault(name, []).append((caller, times))
    often = {"": 1}

    def runs(name: str) -> int:
        if name not in often:
            often[name] = sum(times * runs(caller) for caller, times in callers.get(name, ()))
        return often[name]

    channels: set[str] = set()
    for name, inside in lines.items():
        for line in inside:
            if made := re.search(rf"= (.*?) ({KINDS})(-start)?\(", line):
                channel = re.search(r"channel_id=\d+", line)
                if channel and channel[0] in channels:
                    continue
                channels |= {channel[0]} if channel else set()
                sizes = [
                    BYTES.get(kind, 4) * math.prod(int(n) for n in shape.split(",") if n)
                    for kind, shape in re.findall(r"(\w+)\[([\d,]*)\]", made[1])
                ]
                # The result of a start is (what goes in, what comes out, ...).
                size = max(sizes) if made[3] and made[2] != "all-reduce" else sum(sizes)
                yield made[2], runs(name), float(size)


def seconds_of(kind: str, size: float, chip: Chip, sides: tuple[int, ...]) -> float:
    """Of one collective over a whole slice: what each chip sends over its links, and the way of the first byte."""
    chips = math.prod(sides)
    if chips == 1:
        return 0.0
    share = (chips - 1) / chips
    sent = {"all-reduce": 2 * size * share, "reduce-scatter": size * (chips - 1), "collective-permute": size}
    used = sum((2 if side % chip.wraps == 0 else 1) for side in sides if side > 1)
    hops = sum(side // 2 if side % chip.wraps == 0 else side - 1 for side in sides) * (2 if kind == "all-reduce" else 1)
    return sent.get(kind, size * share) / (chip.network * used / chip.links) + hops * HOP


def compare(config: Config, slices: Sequence[str], source: Any) -> list[Plan]:
    """A plan for each slice, told as it is made; where the batch does not fit, of the largest micro-batch that does."""
    made = []
    for topology in slices:
        one = plan(config, topology, source)
        if not one.fits:
            room = CHIPS[one.version].memory
            print(f"{topology}: needs {one.memory / 2**30:.1f} of {room / 2**30:.1f} GiB a chip: does not fit")
            micro_batch, smaller = largest_micro_batch(config, topology, source, one.memory)
            if smaller is None:
                print(f"{topology}: not even an image a chip at a time fits (config.train.micro_batch)")
                made.append(one)
                continue
            print(f"{topology}: config.train.micro_batch={micro_batch} is the largest that fits")
            one = smaller
        print(told(one))
        made.append(one)
    return made


def as_row(one: Plan) -> dict[str, Any]:
    """Of a table; of what does not fit only the memory is known."""
    known = ("topology", "chips", "batch", "micro_batch", "fits", "memory")
    predicted = ("flops", "bytes", "compute_s", "memory_s", "network_s", "step_s", "limit", "images_per_s", "hours")
    row = {key: getattr(one, key) for key in known}
    row |= {key: getattr(one, key) if one.fits else "" for key in predicted}
    return row | {kind: one.collectives.get(kind, (0, 0.0))[0] for kind in KINDS.split("|")}


def told(one: Plan) -> str:
    """A few lines for people."""
    room = CHIPS[one.version].memory
    kinds = [f"{number} {kind} ({size / 1e6:.1f} MB)" for kind, (number, size) in one.collectives.items()]
    return "\n".join(
        [
            f"{one.topology}: {one.chips} chips, batch {one.batch}, prediction, nothing was run:",
            f"  memory       {one.memory / 2**30:.2f} of {room / 2**30:.1f} GiB a chip",
            f"  a step       {one.flops / 1e12:.3f} TFLOP and {one.bytes / 1e9:.2f} GB of memory traffic a chip",
            f"  collectives  {', '.join(kinds) or 'none'}",
            f"  time         arithmetic {1e3 * one.compute_s:.2f} ms, memory {1e3 * one.memory_s:.2f} ms, "
            f"network {1e3 * one.network_s:.2f} ms: limited by {one.limit}",
            f"  so           {1e3 * one.step_s:.2f} ms a step at best, {one.images_per_s:,.0f} images/s, "
            f"{one.hours:.1f} hours for {one.steps:,} steps",
        ]
    )


def command(config: Config, topology: str, sweep: str, images: int, classes: int, out: str) -> list[Plan]:
    """What `ssl-jax plan` does."""
    slices = [name for name in f"{topology},{sweep}".split(",") if name]
    if not slices:
        raise UserError(
            "--topology: missing; allowed: a TPU slice such as v5e:4x8 (or several: --sweep=v5e:2x4,v5e:4x4)"
        )
    for name in slices:  # a wrong name is told before anything is compiled
        slice_of(name)
    made = compare(config, slices, describe(config.data, images, classes))
    if len(made) > 1:
        first = next((one for one in made if one.fits), made[0])
        print("slice         chips  GiB a chip  ms a step   images/s  hours  limit    per chip, of the first")
        for one in made:
            if one.fits:
                share = one.images_per_s / one.chips / (first.images_per_s / first.chips)
                print(
                    f"{one.topology:12} {one.chips:6} {one.memory / 2**30:11.2f} {1e3 * one.step_s:10.2f} "
                    f"{one.images_per_s:10,.0f} {one.hours:6.1f}  {one.limit:8} {share:.0%}"
                )
    if out:
        rows = [as_row(one) for one in made]
        files.write_csv(Path(out) / "plan.csv", list(rows[0]), [list(row.values()) for row in rows])
        scaling([one for one in made if one.fits], Path(out) / "plan.png")
        print(f"table and figure: {out}")
    return made
