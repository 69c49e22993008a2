"""Which images a step sees, as a pure function of (seed, step); and the batches themselves, read ahead by grain."""

import functools
from collections.abc import Iterator

import numpy as np

from ssl_jax.data.source import Source
from ssl_jax.errors import UserError

PIECE = 16  # images that grain hands over at a time; one by one it costs three times what reading a cached image does


def order(seed: int, examples: int, batch: int, step: int) -> np.ndarray:
    """Indices int64 [batch] of the images in `step`. Nothing is stored: any step can be asked for, in any order.

    Epoch `step // (examples // batch)` is one permutation of all images; what is left over after the last whole batch
    waits for another epoch. Raises UserError if the batch is larger than the data set.

    >>> epoch = [order(0, 10, 5, step) for step in (0, 1)]
    >>> sorted(np.concatenate(epoch).tolist())
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """
    if batch > examples:
        raise UserError(
            f"config.train.batch={batch}: larger than the data set ({examples} images); allowed: 1 to {examples}"
        )
    epoch, position = divmod(step, examples // batch)
    return _permutation(seed, examples, epoch)[position * batch : (position + 1) * batch]


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, examples: int, epoch: int) -> np.ndarray:
    # Two epochs are in use at once while batches are read ahead. The modulus admits negative seeds.
    indices = np.random.Generator(np.random.PCG64([seed % 2**64, epoch])).permutation(examples)
    indices.flags.writeable = False  # callers get slices of the cached array
    return indices


class Partners:
    """For each image of a step another one of the same object, uniform; the image itself if it is alone.

    A function of (seed, step) like `order`. objects: int [N], numbers from 0 (`Source.objects`).

    >>> Partners(np.array([0, 1, 0]))(0, np.array([0, 1, 2]), 0).tolist()
    [2, 1, 0]
    """

    def __init__(self, objects: np.ndarray):
        self.objects, self.count = objects, np.bincount(objects)
        self.first = np.cumsum(self.count) - self.count  # of each object's images in by_object
        self.by_object = np.argsort(objects, kind="stable")
        self.place = np.argsort(self.by_object)  # of each image in by_object

    def __call__(self, seed: int, index: np.ndarray, step: int) -> np.ndarray:
        """Indices int64 [B] of the partners of the images `index` [B]."""
        mine = self.objects[index]
        rng = np.random.Generator(np.random.PCG64([seed % 2**64, step, 1]))
        further = 1 + rng.integers(0, np.maximum(self.count[mine] - 1, 1))
        first = self.first[mine]
        return self.by_object[first + (self.place[index] - first + further) % self.count[mine]]


def stream(
    source: Source, *, batch: int, seed: int, start: int, stop: int, workers: int, rows: np.ndarray | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """The batches of steps start to stop - 1, decoded ahead of use by `workers` threads of grain.

    Each is {"image": uint8 [B,H,W,C], "index": int64 [B]} and, if the source has labels, "label": int32 [B]; the same
    images in the same order as `source.arrays()[order(...)]`; with source.objects also "pair" uint8 [B,H,W,C], the
    images of `Partners`. About two batches are held ahead. rows: the places in the batch that are wanted, all if None.
    """
    import grain

    examples, labels = len(source), source.labels
    order(seed, examples, batch, start)  # an impossible batch is an error here, not in a thread

    partners = Partners(np.zeros(0, int) if source.objects is None else source.objects)

    @functools.lru_cache(maxsize=4)  # all images of a step ask for it
    def pairs(step: int) -> np.ndarray:
        return partners(seed, order(seed, examples, batch, step), step)[rows]

    def load(position: int) -> dict[str, np.ndarray]:
        step, piece = divmod(position, pieces)
        part = slice(piece * PIECE, (piece + 1) * PIECE)
        made = {"image": _images(source, order(seed, examples, batch, step)[rows][part])}
        return made if source.objects is None else {**made, "pair": _images(source, pairs(step)[part])}

    rows = np.arange(batch) if rows is None else rows
    pieces = -(-len(rows) // PIECE)
    positions = grain.MapDataset.range(start * pieces, stop * pieces)
    reading = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=max(2 * pieces, workers))
    images = iter(positions.map(load).to_iter_dataset(reading))
    try:
        for step in range(start, stop):
            index = order(seed, examples, batch, step)[rows]
            parts = [next(images) for _ in range(pieces)]
            made = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]} | {"index": index}
            yield made if labels is None else {**made, "label": labels[index]}
    except UserError as error:
        raise UserError(str(error).partition("\n")[0]) from None  # without what grain adds about its traceback
    finally:
        images.close()  # ends the threads, also when the caller stops early


def _images(source: Source, indices: np.ndarray) -> np.ndarray:
    return np.stack([source.load(int(i)) for i in indices])
