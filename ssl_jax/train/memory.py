"""What a train step needs of a device's memory, what is free, and the largest micro-batch that fits."""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ssl_jax import parallel
from ssl_jax.augment import preset_of
from ssl_jax.config import Config, Model
from ssl_jax.data import Source
from ssl_jax.errors import UserError
from ssl_jax.models import resolve_conv, resolve_model
from ssl_jax.network import Network
from ssl_jax.train.step import Setup, TrainState, in_memory, init_state, make_step, set_up

SHARE = 0.85  # of the free memory may be used: the rest is for other programs, and for what the estimate misses
PROBE = 8  # images, at least, in the parts whose program is compiled to learn what an image needs
QUICK = 64  # px, that a run without a GPU is advised to have if its images have twice that, or more


class Fit(NamedTuple):
    """How a batch is embedded."""

    micro_batch: int  # 0: the whole batch at once
    needed: float  # bytes per device, estimated
    free: float


def fit_to_memory(config: Config, source: Source, encoder: Network | None = None) -> Fit:
    """The whole batch where it fits in memory, else the largest micro-batch that does, or the smallest there is.

    What the step stores is first bounded from the shapes in the encoder, which takes a second. Only where that is not
    clearly less than what is free, the step is compiled once, with a small micro-batch: its temporaries, as the
    compiler counts them, grow as the images do.
    """
    train, free = config.train, free_memory()
    devices = train.devices or jax.device_count()
    setup = set_up(config, source, encoder)
    state = jax.eval_shape(lambda: init_state(setup, 0))
    # The state, its gradients and updates, and on the host the copy that a checkpoint writes.
    fixed = 4 * sum(map(nbytes, jax.tree.leaves(state))) / train.shard
    fixed += 2 * source.nbytes if in_memory(config, source) else 0
    bound = fixed + stored_values(setup) * train.batch / devices
    if bound <= SHARE * free:
        return Fit(0, bound, free)
    sizes = _smaller(config, source, encoder)
    if not sizes:
        return Fit(0, bound, free)
    small = next((n for n in sizes if n >= PROBE), sizes[-1])
    per_image = temporaries(_with_micro_batch(config, small), source, encoder) / small
    needed = {n: fixed + per_image * n / devices for n in (*sizes, train.batch)}
    best = max((n for n in needed if needed[n] <= SHARE * free), default=sizes[0])
    return Fit(best if best < train.batch else 0, needed[best], free)


def decisions(config: Config, source: Source, encoder: Network | None = None) -> dict[str, Callable[[], Any]]:
    """What a new run decides by the machine it starts on, and keeps: it changes last bits or BatchNorm's statistics.

    And the measures of its data.
    """

    def micro_batch():
        if config.train.micro_batch != "auto":
            return config.train.micro_batch
        fit = fit_to_memory(config, source, encoder)
        if line := describe(fit, config):
            print(line, flush=True)
        return fit.micro_batch

    def model():
        side = min(source.shape[:2])
        chosen = decided_model(config.model, side, source.shape[2])
        name = chosen if isinstance(chosen, str) else chosen["name"]
        if not config.model.name and encoder is None:
            why = "the weights it starts from (config.model.init)" if config.model.init else ""
            why = why or "the size of the images and this machine (config.model.name)"
            print(f"model {name}, by {why}", flush=True)
        if side >= 2 * QUICK and jax.default_backend() == "cpu":
            times = round((side / QUICK) ** 2)
            quick = f"config.data.size={QUICK} is about {times} times as fast"
            print(f"images of {side} px are slow without a GPU: {quick}", flush=True)
        return chosen

    def data():
        if config.augment.preset == "auto":
            chosen = preset_of("auto", min(source.shape[:2]))
            print(f"views {chosen}, by the size of the images (config.augment.preset)", flush=True)
        return measures(source)

    conv = functools.partial(resolve_conv, config.model.conv)
    return {"conv": conv, "model": model, "micro_batch": micro_batch, "data": data}


def decided_model(model: Model, size: int, channels: int) -> str | dict[str, Any]:
    """The name of the network, with a stem if that was chosen, too. With model.init it is all options, so that the file
    is not needed to know them again."""
    resolved = resolve_model(model, size, channels=channels)
    if model.init:
        return {**dataclasses.asdict(resolved), "init": ""}
    return resolved.name if resolved.stem == model.stem else {"name": resolved.name, "stem": resolved.stem}


def measures(source: Source) -> dict[str, Any]:
    """What a run's state depends on in its data: with this, a checkpoint can be read without them (`ssl_jax.load`)."""
    classes = 0 if source.labels is None else len(source.classes)
    return {"images": len(source), "shape": list(source.shape), "classes": classes}


def with_decisions(config: Config, decided: Mapping[str, Any]) -> Config:
    """The config with the values of `decisions`."""
    options = decided["model"] if isinstance(decided["model"], Mapping) else {"name": decided["model"]}
    kept = ("init", "lora", "conv")
    options = {key: tuple(v) if isinstance(v, list) else v for key, v in options.items() if key not in kept}
    model = dataclasses.replace(config.model, **options, conv=decided["conv"])
    return dataclasses.replace(_with_micro_batch(config, decided["micro_batch"]), model=model)


def shrink(config: Config, source: Source, encoder: Network | None = None) -> Config | None:
    """The config with the next smaller micro-batch that is allowed; None if there is none."""
    sizes = _smaller(config, source, encoder)
    return _with_micro_batch(config, sizes[-1]) if sizes else None


def describe(fit: Fit, config: Config) -> str:
    """One line about a batch that is embedded in parts; "" if it is embedded at once."""
    batch, part = config.train.batch, fit.micro_batch
    memory = f"about {fit.needed / 1e9:.1f} GB of {fit.free / 1e9:.1f} GB free"
    if not part:
        return ""
    line = f"batch {batch} in {batch // part} parts of {part}: {memory}; the gradient is that of the whole batch"
    if fit.needed > fit.free:
        line += "; too much, so a smaller model or data.size may be needed"
    return line + f", BatchNorm's statistics are those of {config.train.bn_group or part} images"


def _with_micro_batch(config: Config, micro_batch: int) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, micro_batch=micro_batch))


def _smaller(config: Config, source: Source, encoder: Network | None) -> list[int]:
    """The micro-batches below that of `config` (below the batch, if it has none) that are allowed, ascending."""
    devices, largest = config.train.devices or jax.device_count(), config.train.part or config.train.batch
    return [n for n in range(devices, largest, devices) if _allowed(n, config, source, encoder)]


def _allowed(micro_batch: int, config: Config, source: Source, encoder: Network | None) -> bool:
    """Whether batch, BatchNorm groups and method accept this micro-batch; BatchNorm needs two images or more."""
    if config.train.batch % micro_batch or micro_batch < 2:
        return False
    try:
        set_up(_with_micro_batch(config, micro_batch), source, encoder)
    except UserError:
        return False
    return True


def temporaries(config: Config, source: Source, encoder: Network | None = None) -> int:
    """Bytes of temporary values of a step on one device, as the compiler counts them."""
    setup = set_up(config, source, encoder)
    mesh = parallel.mesh_of(jax.local_devices()[:1], config.train.batch)
    args = abstract_arguments(setup, config, source, mesh)
    compiled: Any = jax.jit(make_step(setup, config, mesh), donate_argnums=0).lower(*args).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def needed(compiled: Any) -> int:
    """Bytes per device that a compiled step needs: arguments, results and temporaries."""
    memory = compiled.memory_analysis()
    total = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return total - memory.alias_size_in_bytes


def beside_arguments(compiled: Any, state: TrainState) -> float:
    """Bytes per device that a compiled step takes when it runs; 0 if the compiler does not tell.

    Its arguments are there already, and its results take the place of the state. On a CPU, the copy of the state that a
    checkpoint writes comes on top.
    """
    counted = compiled.memory_analysis()
    on_cpu = jax.local_devices()[0].platform == "cpu"
    copy = sum(map(nbytes, jax.tree.leaves(state))) / jax.local_device_count() if on_cpu else 0
    return counted.temp_size_in_bytes + copy if counted else 0.0


def stored_values(setup: Setup) -> float:
    """Bytes of all values between the encoder's input and its output, for the views of one image.

    A step's temporaries were 0.14 to 0.42 of this for ResNets and ViTs, with a CPU's compiler.
    """
    total = 0.0
    for view in setup.views:
        images = jax.ShapeDtypeStruct((2, view.size, view.size, setup.shape[2]), jnp.float32)
        shapes = jax.eval_shape(setup.encoder.init, jax.random.key(0), images)
        traced = jax.make_jaxpr(lambda params, stats, x: setup.encoder.apply(params, stats, x, train=True))
        total += _bytes_of_values(traced(*shapes, images).jaxpr) / 2
    return total


def _bytes_of_values(jaxpr: Any) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        total += sum(nbytes(v.aval) for v in eqn.outvars)
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            total += _bytes_of_values(inner) if hasattr(inner, "eqns") else 0
    return total


def nbytes(x: Any) -> int:
    """Bytes of an array, or of one that only its shape and type stand for."""
    is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return x.size * (8 if is_key else x.dtype.itemsize)


def abstract_arguments(setup: Setup, config: Config, source: Source, mesh: Mesh) -> tuple[TrainState, dict[str, Any]]:
    """(state, batch) of a step as shapes, types and shardings, without any values."""
    abstract = jax.ShapeDtypeStruct
    state = jax.eval_shape(lambda: init_state(setup, 0))
    state = jax.tree.map(
        lambda x, sharding: abstract(x.shape, x.dtype, sharding=sharding), state, parallel.state_sharding(mesh, state)
    )
    batch, sharding = config.train.batch, parallel.batch_sharding(mesh)
    inputs: dict[str, Any] = {"image": abstract((batch, *source.shape), jnp.uint8, sharding=sharding)}
    inputs["index"] = abstract((batch,), jnp.int32, sharding=sharding)
    if source.labels is not None:
        labels = np.asarray(source.labels)
        inputs["label"] = abstract((batch, *labels.shape[1:]), labels.dtype, sharding=sharding)
    if source.objects is not None:
        inputs["pair"] = inputs["image"]
    if config.data.crops == "file":
        sides, channels = [view.size for view in setup.views], source.shape[2]
        crops = tuple(abstract((batch, side, side, channels), jnp.uint8, sharding=sharding) for side in sides)
        boxes = abstract((batch, len(sides), 6), jnp.float32, sharding=sharding)
        inputs = {k: v for k, v in inputs.items() if k not in ("image", "pair")} | {"crops": crops, "boxes": boxes}
    return state, inputs


def free_memory() -> float:
    """Bytes that each device of this process has free; infinite where that is unknown."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return free_on_host() / jax.local_device_count()
    stats = device.memory_stats() or {}
    return stats.get("bytes_limit", float("inf")) - stats.get("bytes_in_use", 0)


def free_on_host(root: Path = Path("/")) -> float:
    """Bytes that this process may still use: what the system has free, within the limits of its control groups."""
    meminfo = root / "proc/meminfo"
    if not meminfo.exists():  # not Linux: half of what is built in
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    free = 1024.0 * int(lines["MemAvailable"].split()[0])
    own = root / "proc/self/cgroup"
    groups = own.read_text().splitlines() if own.exists() else []
    for group in (Path(line[4:]) for line in groups if line.startswith("0::/")):  # version 2; version 1 is not read
        for folder in (group, *group.parents):
            free = min(free, _left(root / "sys/fs/cgroup" / folder))
    return free


def _left(group: Path) -> float:
    """What a control group has left of its limit. Its unused file cache counts as free."""
    try:
        limit, used = (group / "memory.max").read_text().strip(), int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return float("inf")
    return float("inf") if limit == "max" else int(limit) - used + int(stat.get("inactive_file", 0))
