"""Which images a step sees, as a pure function of (seed, step); and the batches themselves, read ahead by grain."""

import functools
from collections.abc import Iterator

import numpy as np

from ssl_jax.data.source import Source
from ssl_jax.errors import UserError


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


def stream(
    source: Source, *, batch: int, seed: int, start: int, stop: int, workers: int
) -> Iterator[dict[str, np.ndarray]]:
    """The batches of steps start to stop - 1, decoded ahead of use by `workers` threads of grain.

    Each is {"image": uint8 [B,H,W,C], "index": int64 [B]} and, if the source has labels, "label": int32 [B]; the same
    images in the same order as `source.arrays()[order(...)]`. About two batches are held ahead.
    """
    import grain

    examples, labels = len(source), source.labels
    order(seed, examples, batch, start)  # an impossible batch is an error here, not in a thread

    def load(position: int) -> np.ndarray:
        step, place = divmod(position, batch)
        return source.load(int(order(seed, examples, batch, step)[place]))

    positions = grain.MapDataset.range(start * batch, stop * batch)
    reading = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=max(2 * batch, workers))
    images = iter(positions.map(load).to_iter_dataset(reading).batch(batch))
    try:
        for step in range(start, stop):
            index = np.array(order(seed, examples, batch, step))
            made = {"image": next(images), "index": index}
            yield made if labels is None else {**made, "label": labels[index]}
    finally:
        images.close()  # ends the threads, also when the caller stops early
