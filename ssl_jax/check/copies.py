"""Copies of an image: equal pixels, and near duplicates, which are closer to each other than chance brings images."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ssl_jax.config import Data
from ssl_jax.data.decoding import read_image
from ssl_jax.errors import UnreadableError
from ssl_jax.neighbours import distance, nearest_others, normalized

NEIGHBOURS = 10
CHANCE = 1e-4  # share of images that chance may bring as close to another as a copy
SIDE = 12  # px of the side at which pixels are compared: fine enough to tell images apart, too coarse for compression
CROPPED = 0.05  # share of the sides that a copy may lack
CROPS = [(x * CROPPED / 2, y * CROPPED / 2) for x in range(3) for y in range(3)]  # left and top of the parts
CHUNK = 8192  # pairs at a time
Pair = tuple[int, int, float]  # two images, the earlier first, and their cosine similarity


def equal(digests: Sequence[bytes], files: Sequence[tuple[str, ...]], data: Data) -> list[tuple[int, int]]:
    """(first, other) for every image with the same pixels as an earlier one.

    digests: of the pixels as they are read, resized. Files that agree in them are compared at their full size.
    files: of each image, () for arrays. data: with the number of channels.
    """
    firsts: dict[bytes, list[int]] = {}
    found = []
    for i, digest in enumerate(digests):
        earlier = firsts.setdefault(digest, [])
        same = next((first for first in earlier if _same_files(files[first], files[i], data)), None)
        if same is None:
            earlier.append(i)
        else:
            found.append((same, i))
    return found


def _same_files(a: tuple[str, ...], b: tuple[str, ...], data: Data) -> bool:
    if len(a) != len(b):
        return False
    # Of arrays, which have no files, the digest has compared the pixels.
    return all(_same_file(*pair, data) for pair in zip(a, b, strict=True))


def _same_file(a: str, b: str, data: Data) -> bool:
    try:
        return Path(a).read_bytes() == Path(b).read_bytes() or np.array_equal(_full(a, data), _full(b, data))
    except (OSError, UnreadableError):
        return False


def _full(path: str, data: Data) -> np.ndarray:
    return read_image([path], 0, 1 if data.bands else data.channels, data)


def near(small: np.ndarray, features: np.ndarray | None) -> list[Pair]:
    """The pairs of near duplicates, the most similar first.

    small: uint8 [N, S, S, C]; features: embeddings [N, D], or None. Two images are near duplicates if `by_chance` is
    below CHANCE for either of them, by their pixels or by their embeddings.
    """
    count = min(NEIGHBOURS, len(small) - 1)
    if count < 3:
        return []
    pairs: dict[tuple[int, int], float] = {}
    pixels = described(small)
    index, similarity = nearest_others(pixels, count)
    _add(pairs, index, similarity, _cropped(small, pixels, index, similarity))
    if features is not None:
        index, similarity = nearest_others(features - features.mean(axis=0), count)
        _add(pairs, index, similarity, similarity)
    return [(i, j, cosine) for (i, j), cosine in sorted(pairs.items(), key=lambda item: (-item[1], item[0]))]


def _add(pairs: dict[tuple[int, int], float], index: np.ndarray, similarity: np.ndarray, best: np.ndarray) -> None:
    """Adds the pairs that are closer than chance, with their cosine similarity. best: the similarities to judge by."""
    apart, closest = (distance(each.astype(np.float64)) for each in (similarity, best))
    for i, rank in np.argwhere(by_chance(apart, closest) < CHANCE).tolist():
        j = int(index[i, rank])
        pair, cosine = (min(i, j), max(i, j)), 1 - float(closest[i, rank]) ** 2 / 2
        pairs[pair] = max(cosine, pairs.get(pair, -1))


def described(small: np.ndarray, left: float = 0, top: float = 0, share: float = 1) -> np.ndarray:
    """Rows float32 [N, P] of length 1: pixels uint8 [N, S, S, C] of a part of the image at SIDE px, less their mean.

    left, top: of the part; share: its sides; all as shares of the image's sides.
    """
    across, down = (_areas(small.shape[1], start, start + share) for start in (left, top))
    values = np.einsum("yi,nijc,xj->nyxc", down, small.astype(np.float32), across, optimize=True)
    values = values.reshape(len(small), -1)
    return normalized(values - values.mean(axis=1, keepdims=True))


def _areas(size: int, start: float, stop: float) -> np.ndarray:
    """Float32 [SIDE, size]: the share of each of `size` px in each of SIDE pixels that cover start to stop."""
    edges, pixel = np.linspace(start, stop, SIDE + 1)[:, None] * size, np.arange(size)
    overlap = np.clip(np.minimum(edges[1:], pixel + 1) - np.maximum(edges[:-1], pixel), 0, None)
    return (overlap / overlap.sum(axis=1, keepdims=True)).astype(np.float32)


def _cropped(small: np.ndarray, pixels: np.ndarray, index: np.ndarray, similarity: np.ndarray) -> np.ndarray:
    """The similarity to each neighbour, or of one of the CROPS of either to the other, whichever is the largest."""
    best, count = similarity.ravel().copy(), index.shape[1]
    rows, neighbours = np.repeat(np.arange(len(index)), count), index.ravel()
    for whole, part in ((rows, neighbours), (neighbours, rows)):
        order = np.argsort(whole, kind="stable")  # so that few images are cropped at a time
        for start in range(0, len(order), CHUNK):
            places = order[start : start + CHUNK]
            images, of = np.unique(whole[places], return_inverse=True)
            others = pixels[part[places]]
            for left, top in CROPS:
                crop = described(small[images], left, top, 1 - CROPPED)
                best[places] = np.maximum(best[places], np.einsum("np,np->n", crop[of], others))
    return best.reshape(similarity.shape)


def by_chance(distances: np.ndarray, best: np.ndarray | None = None) -> np.ndarray:
    """How probably the nearest of k neighbours would be as close as each of the others is, float [N, k - 1].

    distances [N, k]: from each image to its k nearest neighbours, sorted. If images lie evenly around a point in m
    dimensions, the k - 1 nearer ones fall within a share r of the k-th distance with probability r^m each, so at least
    one does with at most (k - 1) r^m. m is the median of its local estimates, which copies do not move.
    best [N, k]: what is judged instead of `distances`, if something is known to be closer than it looks.
    Source: Levina and Bickel, Maximum likelihood estimation of intrinsic dimension, NIPS 2004, equation 8.
    """

    def logs(values: np.ndarray) -> np.ndarray:
        share = np.maximum(values[:, :-1], 1e-9) / np.maximum(distances[:, -1:], 1e-9)
        return -np.log(np.clip(share, 1e-9, 1 - 1e-9))

    dimension = np.median(1 / logs(distances).mean(axis=1))
    return (distances.shape[1] - 1) * np.exp(-dimension * logs(distances if best is None else best))
