"""What a run needs of a TPU slice, before anyone pays for it: its training step, compiled by the real TPU compiler.

Nothing is run. Memory, collectives and memory traffic are what the compiler reports. FLOPs are counted in the traced
step, because the compiler counts the body of a loop only once. Times come from a roofline with the published figures
of each chip: a prediction, and a lower bound rather than a promise.
"""

import contextlib
import dataclasses
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ssl_jax import files, hlo, parallel
from ssl_jax.config import Config, Data
from ssl_jax.data import Source, open_source
from ssl_jax.errors import UserError, first_line, unknown
from ssl_jax.models import resolve_conv, resolve_model
from ssl_jax.report.figures import scaling
from ssl_jax.train import memory
from ssl_jax.train.step import in_memory, make_step, set_up

KNOWN_DATA = {"imagenet2012": (1_281_167, 1000), "cifar10": (50_000, 10)}  # TFDS: training images, classes
# Sources of image files, or of records that hold some.
DECODED = ("folder", "csv", "chexpert", "tfds", "webdataset", "parquet")
# Images per second that a core with AVX-512 cuts from files: JPEGs of 500 x 375 px, two views of 224 px
# (benchmarks/README.md). How fast squares are read depends too much on the size of the files.
CORE_RATE = 290.0
HOP_SECONDS = 1e-6  # from one chip to the next, roughly; https://jax-ml.github.io/scaling-book/sharding


class Chip(NamedTuple):
    """Published figures, from the page of each version at https://docs.cloud.google.com/tpu/docs."""

    flops: float  # bfloat16, per second
    memory: float  # bytes
    bandwidth: float  # of its memory, bytes per second
    network: float  # all its links in one direction, bytes per second
    links: int
    wraps: int  # a side of a slice that is a multiple of this closes to a ring
    megacore: bool  # its two cores are one device


CHIPS = {
    "v4": Chip(275e12, 32 * 2**30, 1200e9, 300e9, 6, 4, True),
    "v5e": Chip(197e12, 16 * 2**30, 819e9, 200e9, 4, 16, False),
    "v5p": Chip(459e12, 95e9, 2765e9, 600e9, 6, 4, True),
    "v6e": Chip(918e12, 32 * 2**30, 1638e9, 400e9, 4, 16, False),
}


class Topology(NamedTuple):
    """A TPU slice, such as "v5e:4x8"."""

    version: str  # of the chip, a key of CHIPS
    sides: tuple[int, ...]

    @property
    def chip(self) -> Chip:
        return CHIPS[self.version]

    @property
    def chips(self) -> int:
        return math.prod(self.sides)

    def __str__(self) -> str:
        return f"{self.version}:{'x'.join(map(str, self.sides))}"


@dataclass(frozen=True)
class Plan:
    """One config on one slice. Bytes, FLOPs and collectives are those of one step on one chip."""

    topology: str
    chips: int
    batch: int
    micro_batch: int  # 0: the whole batch at once
    fits: bool
    memory: float  # bytes needed
    flops: float = 0.0
    bytes: float = 0.0  # read from and written to the chip's memory
    collectives: dict[str, tuple[int, float]] = dataclasses.field(default_factory=dict)  # kind -> number, bytes
    compute_s: float = 0.0
    memory_s: float = 0.0
    network_s: float = 0.0
    steps: int = 0
    core_rate: float = 0.0  # images that a core of the host decodes per second; 0: unknown, or nothing is decoded

    @property
    def version(self) -> str:
        """The version of the chip, a key of CHIPS."""
        return parse_topology(self.topology).version

    @property
    def step_s(self) -> float:
        """Predicted: arithmetic and memory traffic overlap, and the step waits for the network."""
        return max(self.compute_s, self.memory_s) + self.network_s

    @property
    def limit(self) -> str:
        """What takes longest: compute, memory or network."""
        times = {"compute": self.compute_s, "memory": self.memory_s, "network": self.network_s}
        return max(times, key=times.__getitem__)

    @property
    def images_per_s(self) -> float:
        return self.batch / self.step_s

    @property
    def cores(self) -> int:
        """Of all hosts together, to decode as fast as the chips train; 0: unknown, or nothing is decoded."""
        return math.ceil(self.images_per_s / self.core_rate) if self.core_rate else 0

    @property
    def hours(self) -> float:
        return self.steps * self.step_s / 3600


def parse_topology(topology: str) -> Topology:
    """Raises UserError unless it reads VERSION:SIDExSIDE with a known version."""
    version, _, sides = topology.partition(":")
    if version not in CHIPS:
        raise unknown("--topology", version, CHIPS)
    if not re.fullmatch(r"\d+(x\d+)*", sides):
        raise UserError(f"--topology={topology}: allowed: VERSION:SIDExSIDE, such as v5e:4x8 or v4:2x2x4")
    return Topology(version, tuple(map(int, sides.split("x"))))


# Read when libtpu is loaded. Without a TPU in this machine the compiler must not ask the network where one is, nor
# complain that there is none; and as nothing runs on one, several processes may plan at once.
LIBTPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
CACHE_SETTING = "jax_enable_compilation_cache"


@contextlib.contextmanager
def tpu_compiler() -> Iterator[None]:
    """Sets what the TPU compiler needs while it works on a machine without a TPU, and puts it back afterwards.

    That is LIBTPU_ENVIRONMENT, where the user has not set it, and JAX's compilation cache, which is off meanwhile: a
    program for a TPU cannot be read back without one, so JAX would try, warn and compile it again.
    """
    from jax.experimental.compilation_cache.compilation_cache import reset_cache

    added = {name: value for name, value in LIBTPU_ENVIRONMENT.items() if name not in os.environ}
    cached = getattr(jax.config, CACHE_SETTING)
    os.environ.update(added)
    jax.config.update(CACHE_SETTING, False)
    reset_cache()  # JAX looks at the setting only once, when it first compiles
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
        jax.config.update(CACHE_SETTING, cached)
        reset_cache()


@tpu_compiler()
def tpu_devices(topology: Topology) -> list[Any]:
    """Stand-ins for the devices of a slice, to compile for. Raises UserError if there is no such slice."""
    try:
        from jax.experimental import topologies

        core = "megacore" if topology.chip.megacore else "default"
        options = {"topology_name": str(topology), "chip_config_name": core}
        return list(topologies.get_topology_desc(platform="tpu", **options).devices)
    except Exception as error:
        reason = first_line(error)
        if "libtpu" in reason or "not installed" in reason:
            raise UserError("plan: needs the TPU compiler (libtpu); pip install 'ssl_jax[plan]'") from error
        raise UserError(f"--topology={topology}: {reason}") from error


def open_or_describe(data: Data, images: int = 0, classes: int = 0) -> Source:
    """The data set of a config, or a Source of its sizes alone: with `images`, or for a TFDS name in KNOWN_DATA."""
    if not images and data.name == "tfds" and data.path in KNOWN_DATA:
        images, classes = KNOWN_DATA[data.path]
    if not images:
        return open_source(data)
    images = data.limit or images
    size, channels = data.size or 224, data.channels or len(data.bands) or 3
    return Source(
        [""] * images,
        (size, size, channels),
        _no_image,
        labels=np.zeros(images, np.int32) if classes else None,
        classes=[str(i) for i in range(classes)],
        objects=np.zeros(images, np.int32) if data.pairs else None,
    )


def _no_image(index: int) -> np.ndarray:
    raise RuntimeError(f"image {index}: only the sizes of this data set are known")


@tpu_compiler()
def estimate(config: Config, topology: str, source: Source) -> Plan:
    """Compiles the step of `config` for `topology`. Running out of memory is no error: then `fits` is False."""
    tpu = parse_topology(topology)
    devices, chip = tpu_devices(tpu), tpu.chip
    train = config.train
    mesh = parallel.mesh_of(devices, train.batch, train.part, train.shard)
    conv = resolve_conv(config.model.conv, backend="tpu")
    model = resolve_model(dataclasses.replace(config.model, conv=conv), min(source.shape[:2]), "tpu", source.shape[2])
    config = dataclasses.replace(config, model=model)
    setup = set_up(config, source)
    args = memory.abstract_arguments(setup, config, source, mesh)
    placed = jax.tree.map(lambda x: x.sharding, args[0])
    step = make_step(setup, config, mesh)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(placed, parallel.replicated(mesh)))
    traced = jitted.trace(*args)
    known = Plan(str(tpu), len(devices), train.batch, train.part, fits=False, memory=0.0, steps=setup.steps)
    if config.data.crops == "file" and config.data.name in DECODED:
        known = dataclasses.replace(known, core_rate=CORE_RATE)
    try:
        compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    except jax.errors.JaxRuntimeError as error:
        needed = out_of_memory(str(error), sum(map(_bytes_per_chip, jax.tree.leaves(args))))
        if not needed:
            raise
        return dataclasses.replace(known, memory=needed)
    needed, cost = memory.needed(compiled), compiled.cost_analysis()
    if in_memory(config, source):
        needed += source.nbytes
    flops = count_flops(traced.jaxpr.jaxpr) / len(devices)
    # The compiler counts the body of a loop once, in FLOPs and in bytes alike.
    traffic = cost["bytes accessed"] * max(1.0, flops / cost["flops"])
    collectives = list(hlo.collectives(hlo.parse(compiled.as_text())))
    return dataclasses.replace(
        known,
        fits=needed <= chip.memory,
        memory=needed,
        flops=flops,
        bytes=traffic,
        collectives=totals(collectives),
        compute_s=flops / chip.flops,
        memory_s=traffic / chip.bandwidth,
        network_s=sum(one.runs * collective_seconds(one.kind, one.bytes, tpu) for one in collectives),
    )


def totals(collectives: Sequence[hlo.Collective]) -> dict[str, tuple[int, float]]:
    """{kind: (how many run, bytes of all of them)}."""
    added: dict[str, tuple[int, float]] = {}
    for kind, runs, size in sorted(collectives):
        number, total = added.get(kind, (0, 0.0))
        added[kind] = number + runs, total + runs * size
    return added


def out_of_memory(message: str, arguments: float) -> float:
    """Bytes per chip that a step needs, from the TPU compiler's error that there are too few; 0 for any other error.

    One of its messages counts everything the step uses; another one leaves out the step's `arguments`.
    """
    found = re.search(r"RESOURCE_EXHAUSTED.*?(?:Used |(HLO temporaries) \()([\d.]+)([KMGT])", message, re.DOTALL)
    if not found:
        return 0.0
    return float(found[2]) * 1024 ** ("KMGT".index(found[3]) + 1) + (arguments if found[1] else 0.0)


def _bytes_per_chip(x: jax.ShapeDtypeStruct) -> float:
    shape = x.sharding.shard_shape(x.shape) if x.sharding else x.shape
    return memory.nbytes(jax.ShapeDtypeStruct(shape, x.dtype))


def largest_micro_batch(config: Config, topology: str, source: Source, needed: float) -> tuple[int, Plan | None]:
    """The largest micro-batch that fits, with its plan; (0, None) if not even one image per chip fits.

    needed: bytes per chip for the whole batch at once.
    """
    tpu = parse_topology(topology)
    batch, group = config.train.batch, config.train.bn_group or 1
    sizes = [n for n in range(1, batch) if batch % n == 0 and n % tpu.chips == 0 and n % group == 0]
    best: tuple[int, Plan | None] = (0, None)
    low, high = 0, len(sizes)
    guess = sum(n <= batch * tpu.chip.memory / needed for n in sizes)  # memory grows roughly as the images do
    while low < high:
        middle = min(max(guess, low), high - 1)
        train = dataclasses.replace(config.train, micro_batch=sizes[middle])
        plan = estimate(dataclasses.replace(config, train=train), topology, source)
        if plan.fits:
            best, low = (sizes[middle], plan), middle + 1
            guess = low
        else:
            high = middle
            guess = high - 1
    return best


def count_flops(jaxpr: Any) -> float:
    """FLOPs of all matrix products and convolutions in a traced program, with loops counted as often as they run."""
    total = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)
        elif eqn.primitive.name == "conv_general_dilated":
            kernel, names = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"].rhs_spec
            products = math.prod(kernel) / kernel[names[0]]  # per output
            # Between the rows and columns of a dilated input lie zeros, which nobody multiplies.
            zeros = math.prod(eqn.params["lhs_dilation"])
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * products / zeros
        times = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                total += times * count_flops(inner)
    return total


def collective_seconds(kind: str, size: float, topology: Topology) -> float:
    """Time of one collective over a whole slice: what each chip sends over its links, and the way of the first byte."""
    chip, chips, sides = topology.chip, topology.chips, topology.sides
    if chips == 1:
        return 0.0
    share = (chips - 1) / chips
    sent = {"all-reduce": 2 * size * share, "reduce-scatter": size * (chips - 1), "collective-permute": size}
    used = sum((2 if side % chip.wraps == 0 else 1) for side in sides if side > 1)
    hops = sum(side // 2 if side % chip.wraps == 0 else side - 1 for side in sides) * (2 if kind == "all-reduce" else 1)
    return sent.get(kind, size * share) / (chip.network * used / chip.links) + hops * HOP_SECONDS


def compare(config: Config, topologies: Sequence[str], source: Source) -> list[Plan]:
    """A plan for each slice, printed as soon as it is known.

    Where the batch does not fit, it is the plan of the largest micro-batch that does.
    """
    plans = []
    for topology in topologies:
        plan = estimate(config, topology, source)
        if not plan.fits:
            memory = CHIPS[plan.version].memory
            print(
                f"{topology}: does not fit: needs {plan.memory / 2**30:.1f} GiB per chip "
                f"and has {memory / 2**30:.1f} GiB"
            )
            micro_batch, smaller = largest_micro_batch(config, topology, source, plan.memory)
            if smaller is None:
                print(f"{topology}: not even one image per chip fits (config.train.micro_batch)")
                plans.append(plan)
                continue
            print(f"{topology}: config.train.micro_batch={micro_batch} is the largest that fits")
            plan = smaller
        print(summary(plan))
        plans.append(plan)
    return plans


def table_row(plan: Plan) -> dict[str, Any]:
    """A row of plan.csv. Of a batch that does not fit only the memory is known; the other cells are empty."""
    known = ("topology", "chips", "batch", "micro_batch", "fits", "memory")
    times = ("compute_s", "memory_s", "network_s", "step_s")
    predicted = ("flops", "bytes", *times, "limit", "images_per_s", "hours", "cores")
    row = {key: getattr(plan, key) for key in known}
    row |= {key: getattr(plan, key) if plan.fits else "" for key in predicted}
    return row | {kind: plan.collectives.get(kind, (0, 0.0))[0] for kind in hlo.COLLECTIVES}


def summary(plan: Plan) -> str:
    """A few lines for people."""
    memory = CHIPS[plan.version].memory
    kinds = [f"{number} {kind} ({size / 1e6:.1f} MB)" for kind, (number, size) in plan.collectives.items()]
    host = (
        f"  hosts        {plan.cores:,} cores in all to feed it, if one decodes {plan.core_rate:.0f} images/s, as was "
        "measured with JPEGs of 500 x 375 px, two views of 224 px and AVX-512"
    )
    return "\n".join(
        [
            f"{plan.topology}: {plan.chips} chips, batch {plan.batch} (a prediction, nothing was run)",
            f"  memory       {plan.memory / 2**30:.2f} of {memory / 2**30:.1f} GiB per chip",
            f"  work         {plan.flops / 1e12:.3f} TFLOP and {plan.bytes / 1e9:.2f} GB of memory traffic "
            f"per step and chip",
            f"  collectives  {', '.join(kinds) or 'none'}",
            f"  time         arithmetic {1e3 * plan.compute_s:.2f} ms, memory {1e3 * plan.memory_s:.2f} ms, "
            f"network {1e3 * plan.network_s:.2f} ms: limited by {plan.limit}",
            f"  speed        at best {1e3 * plan.step_s:.2f} ms per step, {plan.images_per_s:,.0f} images/s, "
            f"{plan.hours:.1f} hours for {plan.steps:,} steps",
            *[host] * bool(plan.cores),
        ]
    )


def comparison(plans: Sequence[Plan]) -> str:
    """A line for each plan that fits; efficiency is images/s per chip, relative to the first of them."""
    plans = [plan for plan in plans if plan.fits]
    lines = ["slice         chips  GiB per chip  ms per step   images/s  hours  limit    efficiency"]
    for plan in plans:
        efficiency = plan.images_per_s / plan.chips / (plans[0].images_per_s / plans[0].chips)
        lines.append(
            f"{plan.topology:12} {plan.chips:6} {plan.memory / 2**30:13.2f} {1e3 * plan.step_s:12.2f} "
            f"{plan.images_per_s:10,.0f} {plan.hours:6.1f}  {plan.limit:8} {efficiency:.0%}"
        )
    return "\n".join(lines)


def command(config: Config, topology: str, sweep: str, images: int, classes: int, out: str) -> list[Plan]:
    """What `ssl-jax plan` does."""
    topologies = [name for name in f"{topology},{sweep}".split(",") if name]
    if not topologies:
        raise UserError(
            "--topology: missing; allowed: a TPU slice such as v5e:4x8 (or several: --sweep=v5e:2x4,v5e:4x4)"
        )
    for name in topologies:  # every mistake is found before anything is compiled
        tpu_devices(parse_topology(name))
    plans = compare(config, topologies, open_or_describe(config.data, images, classes))
    if len(plans) > 1:
        print(comparison(plans))
    if out:
        rows = [table_row(plan) for plan in plans]
        files.write_csv(Path(out) / "plan.csv", list(rows[0]), [list(row.values()) for row in rows])
        scaling([plan for plan in plans if plan.fits], Path(out) / "plan.png")
        print(f"table and figure: {out}")
    return plans
