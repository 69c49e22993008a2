"""The images of each step, and their batches: a pure function of (seed, step), never of the order of reading."""

import contextlib
import functools
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import numpy as np

from ssl_jax.data.blocks import Blocks
from ssl_jax.data.source import Source
from ssl_jax.errors import UserError

PIECE = 16  # images that grain passes on at a time; passing on one takes three times as long as reading it from a cache
T = TypeVar("T")
Batch = dict[str, Any]  # arrays [B, ...], or tuples of them, by name


def order(seed: int, examples: int, batch: int, step: int, blocks: Blocks | None = None) -> np.ndarray:
    """Indices int64 [batch] of the images in `step`. Nothing is stored, so steps may come in any order.

    Each epoch of `examples // batch` steps is a permutation of all images. Those left after the last full batch are not
    used in that epoch. blocks: of the source (`Source.blocks`); the permutation is then theirs. Raises UserError if the
    batch is larger than the data set.

    >>> epoch = [order(0, 10, 5, step) for step in (0, 1)]
    >>> sorted(np.concatenate(epoch).tolist())
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """
    if batch > examples:
        raise UserError(
            f"config.train.batch={batch}: larger than the data set ({examples} images); allowed: 1 to {examples}"
        )
    epoch, position = divmod(step, examples // batch)
    permutation = blocks.permutation(seed, epoch) if blocks else _permutation(seed, examples, epoch)
    return permutation[position * batch : (position + 1) * batch]


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, examples: int, epoch: int) -> np.ndarray:
    # Reading ahead may need two epochs at once. The modulus makes negative seeds possible.
    indices = np.random.Generator(np.random.PCG64([seed % 2**64, epoch])).permutation(examples)
    indices.flags.writeable = False  # callers get slices of the cached array
    return indices


class Partners:
    """For each image of a step, another image of the same object, drawn uniformly; a single image gets itself.

    A function of (seed, step), like `order`. objects: int [N], numbers from 0 (`Source.objects`).

    >>> Partners(np.array([0, 1, 0]))(0, np.array([0, 1, 2]), 0).tolist()
    [2, 1, 0]
    """

    def __init__(self, objects: np.ndarray):
        self.objects, self.counts = objects, np.bincount(objects)
        self.by_object = np.argsort(objects, kind="stable")  # images, sorted by object
        self.position = np.argsort(self.by_object)  # of each image in by_object
        self.first = np.cumsum(self.counts) - self.counts  # position of each object's first image in by_object

    def __call__(self, seed: int, index: np.ndarray, step: int) -> np.ndarray:
        """Indices int64 [B] of the partners of the images `index` [B]."""
        objects = self.objects[index]
        rng = np.random.Generator(np.random.PCG64([seed % 2**64, step, 1]))
        offset = 1 + rng.integers(0, np.maximum(self.counts[objects] - 1, 1))
        first = self.first[objects]
        return self.by_object[first + (self.position[index] - first + offset) % self.counts[objects]]


class Cut(Protocol):
    """Makes a batch row by row, such as `crops.Cutter`."""

    def empty(self, count: int) -> Batch:
        """Arrays [count, ...] for as many images."""

    def fill(self, out: Batch, row: int, source: Source, step: int, position: int, images: Sequence[int]) -> None:
        """Writes the row of `out` for the image at a position of the batch of `step`. images: its index, and that of
        its partner if there is one."""


def batches(
    source: Source,
    *,
    batch: int,
    seed: int,
    start: int,
    stop: int,
    workers: int = 2,
    rows: np.ndarray | None = None,
    decode: bool = True,
    cut: Cut | None = None,
) -> Iterator[Batch]:
    """The batches of steps start to stop - 1: the same images in the same order, whether they are decoded or not.

    Every batch contains "index", int32 [B]: the images of the step.
    decode=True: also "image" uint8 [B,H,W,C], "label" if the source has labels and, if it has objects, "pair" uint8
        [B,H,W,C], the images chosen by `Partners`. `workers` threads of grain decode about two batches ahead.
    decode=False, for images in memory: nothing is read. If the source has objects, also "partner" int32 [B], the
        indices chosen by `Partners`.

    cut: with decode=True, what fills its arrays ("crops" and "boxes") in place of "image" and "pair".
    rows: the rows of the batch to return, such as those of this process; None: all.
    """
    rows = np.arange(batch) if rows is None else rows
    partners = None if source.objects is None else Partners(source.objects)

    @functools.lru_cache(maxsize=4)  # every piece of a step calls it
    def indices(step: int) -> dict[str, np.ndarray]:
        index = order(seed, len(source), batch, step, source.blocks)
        selected = {"index": index[rows].astype(np.int32)}
        if partners:
            selected["partner"] = partners(seed, index, step)[rows].astype(np.int32)
        return selected

    if not decode:
        yield from (dict(indices(step)) for step in range(start, stop))
        return
    with contextlib.closing(_decode_ahead(source, indices, rows, start, stop, workers, cut)) as decoded:
        for step, images in zip(range(start, stop), decoded):
            index = indices(step)["index"]
            labels = {} if source.labels is None else {"label": source.labels[index]}
            yield {"index": index, **images, **labels}


def _decode_ahead(
    source: Source,
    indices: Callable[[int], Mapping[str, np.ndarray]],
    rows: np.ndarray,
    start: int,
    stop: int,
    workers: int,
    cut: Cut | None,
) -> Generator[Batch, None, None]:
    """Yields the "image" of each step, and its "pair" if there are partners; or what `cut` makes of them. grain reads
    PIECE images at a time."""
    import grain

    pieces = -(-len(rows) // PIECE)
    names = {"index": "image", "partner": "pair"}

    filled: dict[int, Batch] = {}  # the arrays of a step, into which every piece writes its rows: no copies to join

    def load(position: int) -> Batch:
        step, piece = divmod(position, pieces)
        part = slice(piece * PIECE, (piece + 1) * PIECE)
        if cut:
            out = filled.setdefault(step, cut.empty(len(rows)))
            for row in range(len(rows))[part]:
                images = [int(values[row]) for values in indices(step).values()]
                cut.fill(out, row, source, step, int(rows[row]), images)
            return {}
        return {names[key]: source.load_many(values[part]) for key, values in indices(step).items()}

    indices(start)  # a batch that is too large fails here rather than in a thread
    positions = grain.MapDataset.range(start * pieces, stop * pieces)
    reading = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=max(2 * pieces, workers))
    loaded = iter(positions.map(load).to_iter_dataset(reading))
    try:
        for step in range(start, stop):
            parts = [next(loaded) for _ in range(pieces)]
            joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            yield filled.pop(step, joined)
    except UserError as error:
        raise UserError(str(error.args[0]).partition("\n")[0]) from None  # without grain's note about its traceback
    finally:
        loaded.close()  # ends the threads, also when the caller stops early


def ahead(fetch: Callable[[int], T], count: int) -> Iterator[T]:
    """fetch(0), fetch(1), ... fetch(count - 1), each called in a thread while the one before is used. What it raises is
    raised here."""
    with ThreadPoolExecutor(1) as thread:
        following = [thread.submit(fetch, step) for step in range(count)[:1]]
        for step in range(1, count + 1):
            made = following.pop().result()
            following += [thread.submit(fetch, step)] if step < count else []
            yield made
