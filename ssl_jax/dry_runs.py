"""`--dry-run`: what a command would do, need and write, from a few steps that leave nothing behind."""

import dataclasses
import itertools
import shutil
import statistics
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import numpy as np

from ssl_jax import parallel, progress
from ssl_jax.config import Config
from ssl_jax.data import Source, open_source
from ssl_jax.data.labelled import Labelled
from ssl_jax.encoder import Encoder
from ssl_jax.errors import visible
from ssl_jax.evaluate import finetuning
from ssl_jax.run_folder import StudyFolder
from ssl_jax.train import memory
from ssl_jax.train.start import last_state
from ssl_jax.train.step import batches, compile_step, init_state, set_up

STEPS = 4  # that are timed, unless one takes
LONG = 20  # seconds
LARGEST = 5  # classes that are named


def pretraining(config: Config, workdir: Path, source: Source) -> Iterator[str]:
    """Lines about a run: its data, length, memory, time and files. Takes as long as compiling and a few steps."""
    yield f"data      {describe_source(source)}"
    config = memory.with_decisions(config, {key: decide() for key, decide in memory.decisions(config, source).items()})
    setup, train = set_up(config, source), config.train
    mesh = parallel.make_mesh(train.devices, train.batch, train.part, train.shard)
    state = init_state(setup, train.seed, mesh)
    if config.train.init:
        state = last_state(config, state, print)
    trained = _millions(state.params)
    encoder = _millions(jax.eval_shape(setup.encoder.init, jax.random.key(0), _images(setup))[0])
    yield f"model     {config.method_name}, {config.model.name}: {encoder} parameters, {trained} while it trains"
    yield f"length    {setup.steps:,} steps of {train.batch} images ({train.duration})"
    size = sum(map(memory.nbytes, jax.tree.leaves(state)))
    feed = batches(config, source, mesh, 0, min(STEPS, setup.steps), setup.views, setup.method.shares)
    first, stop, seconds = next(feed), parallel.per_device(mesh, 0), []
    start = time.monotonic()
    step_fn = compile_step(setup, config, mesh, state, first, stop)
    compiling = time.monotonic() - start
    need, free = memory.needed(step_fn), memory.free_memory()
    yield f"memory    {size_of(need)} for a step, as the compiler counts, of {size_of(free)} free on each device"
    for batch in itertools.chain([first], feed):
        start = time.monotonic()
        state, metrics = step_fn(state, batch, stop)
        jax.block_until_ready(metrics)
        seconds.append(time.monotonic() - start)
        if sum(seconds) > LONG:
            break
    step, count = statistics.median(seconds), len(seconds)
    epoch = step * (len(source) // train.batch)
    yield (
        f"time      {clock(epoch)} per epoch, {clock(step * setup.steps)} in all, after {clock(compiling)} of compiling"
        f" ({train.batch / step:.0f} images/s in {count} step{'s' * (count > 1)}; evaluations are extra)"
    )
    yield f"writes    {_writes(workdir, train.keep * size)}: {train.keep} checkpoints of {size_of(size)}, the encoder"


def study(
    config: Config, folder: StudyFolder, pretrainings: Mapping[tuple[str, int], Config], given: Mapping[str, Encoder]
) -> Iterator[str]:
    """Lines about a study: its arms, label counts and cells, and each arm's first pretraining.

    given: the encoders of finished runs that arms start from.
    """
    settings = config.study
    cells = len(settings.arms) * len(settings.labels) * settings.seeds
    yield f"study     {len(settings.arms)} arms: {', '.join(settings.arms)}; {len(pretrainings)} pretrainings"
    labels = ", ".join(map(str, settings.labels))
    yield f"cells     {cells}: {settings.protocol} on {labels} labels, {settings.seeds} draws each"
    for arm, encoder in given.items():
        yield f"encoder   of {arm}: {encoder.about.get('method')}, from {settings.arms[arm]['from']}"
    for (arm, number), run in pretrainings.items():
        if not number:
            yield f"\n{arm}, {settings.pretrainings} of them:" if settings.pretrainings > 1 else f"\n{arm}:"
            yield from pretraining(run, folder.pretraining(arm).path, open_source(run.data))


def finetuning_run(encoder: Encoder, config: Config, train: Labelled, out: Path) -> Iterator[str]:
    """Lines about a classifier: its labels, steps, time and files."""
    settings, images, classes = config.finetune, train.source.all_images(), train.source.classes
    yield f"data      {describe_source(train.source)}"
    steps = finetuning.length(settings, len(train.labels))
    alone, students = finetuning.trainings(settings)
    count, more = alone + students, settings.unlabelled_batch
    yield f"length    {count} training{'s' * (count > 1)} of {steps:,} steps of {settings.batch} images"
    if students:
        yield f"          {students} of them of a student, which sees {more} images without a label at each step, too"
    few = dataclasses.replace(settings, steps=STEPS, epochs=0, lr=settings.lr[:1], head="zero")
    few = dataclasses.replace(few, backbone_ratio=settings.backbone_ratio[:1])
    seconds = []
    for _ in range(2):  # the first time it compiles
        start = time.monotonic()
        finetuning.finetune(encoder, images, train.labels, classes=len(classes), settings=few, seed=0)
        seconds.append(time.monotonic() - start)
    total = seconds[1] / STEPS * steps * (alone + students * (1 + more / settings.batch))
    yield f"time      about {clock(total)} in all, after {clock(seconds[0] - seconds[1])} of compiling"
    size = sum(map(memory.nbytes, jax.tree.leaves(encoder.params)))
    yield f"writes    {_writes(out, size)}: classifier.safetensors and classifier.json"


def describe_source(source: Source) -> str:
    """Number and shape of the images, and the largest classes."""
    height, width, channels = source.shape
    text = f"{len(source):,} images of {height}x{width} px, {channels} channel{'s' * (channels > 1)}"
    if source.labels is None:
        return f"{text}, no labels"
    labels, names = np.asarray(source.labels), source.classes
    counts = (
        np.nansum(labels > 0, axis=0) if labels.ndim == 2 else np.bincount(labels[labels >= 0], minlength=len(names))
    )
    order = np.argsort(-counts, kind="stable")[:LARGEST]
    largest = ", ".join(f"{visible(names[i])} {counts[i]:,}" for i in order)
    unlabelled = 0 if labels.ndim == 2 else int((labels < 0).sum())
    more = f", and {len(names) - LARGEST} more" if len(names) > LARGEST else ""
    rest = f"; {unlabelled:,} without a label" if unlabelled else ""
    return f"{text}, {len(names)} classes: {largest}{more}{rest}"


def clock(seconds: float) -> str:
    """12.3 s, or 1:02:03.

    >>> clock(12.34), clock(3723)
    ('12.3 s', '1:02:03')
    """
    return f"{seconds:.1f} s" if seconds < 60 else progress.clock(seconds)


def _images(setup):
    return jax.ShapeDtypeStruct((2, *setup.shape), np.float32)


def _millions(params) -> str:
    return f"{sum(x.size for x in jax.tree.leaves(params)) / 1e6:.3g} million"


def size_of(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _writes(folder: Path, count: float) -> str:
    """The folder, what it would hold, and what its disk has free."""
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    return f"{folder}, about {size_of(count)} of {size_of(shutil.disk_usage(existing).free)} free"
