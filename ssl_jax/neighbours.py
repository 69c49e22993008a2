"""Nearest neighbours among embeddings, by cosine similarity: exact, in bounded memory, on all cores."""

from collections.abc import Callable

import numpy as np

from ssl_jax.errors import UserError


def normalized(features: np.ndarray) -> np.ndarray:
    """Rows float32 [N, D] of length 1; a row of zeros stays as it is."""
    features = np.asarray(features, np.float32)
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def evening(features: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """A map of embeddings [M, D] to float32 [M, D] that centres `features` [N, D] and turns the standard deviation s of
    each of their principal components into sqrt(s): half of a whitening. The few directions in which most images differ
    then do not decide alone who is whose neighbour. Directions without variance become zero.

    Source: whitening before neighbours are looked for, Jegou and Chum, ECCV 2012; that half of it is better, our own
    measurement (benchmarks/few_labels.md).
    """
    mean = np.mean(features, axis=0, dtype=np.float64)
    centred = features - mean
    variance, axes = np.linalg.eigh(centred.T @ centred / len(centred))
    used = variance > 1e-8 * max(variance.max(), 1e-24)
    matrix = axes * np.where(used, np.maximum(variance, 1e-32) ** -0.25, 0)
    return lambda more: ((more - mean) @ matrix).astype(np.float32)


def evened(features: np.ndarray) -> np.ndarray:
    """Embeddings [N, D] under their own `evening`."""
    return evening(features)(features)


def nearest(queries: np.ndarray, features: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(indices int64 [M, k] into features, cosine similarities float32 [M, k]) of queries [M, D], nearest first.

    Distances are computed a chunk of queries at a time, so memory is N x D. Raises UserError if k is larger than N.
    """
    from sklearn.neighbors import NearestNeighbors

    if not 1 <= k <= len(features):
        raise UserError(f"k={k}: there are {len(features)} embeddings; allowed: 1 to {len(features)}")
    search = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(normalized(features))
    apart, index = search.kneighbors(normalized(queries))
    return index, (1 - np.square(apart) / 2).astype(np.float32)


def distance(similarity: np.ndarray) -> np.ndarray:
    """Euclidean distances of vectors of length 1 with these cosine similarities."""
    return np.sqrt(np.maximum(2 - 2 * similarity, 0))


def nearest_others(features: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """`nearest` of each row of features [N, D] among all other rows. Raises UserError if k is N or larger."""
    index, similarity = nearest(features, features, k + 1)
    # With duplicates the row itself may stand anywhere, or not at all: then the farthest one goes.
    own = index == np.arange(len(features))[:, None]
    own[~own.any(axis=1), -1] = True
    shape = len(features), k
    return index[~own].reshape(shape), similarity[~own].reshape(shape)
