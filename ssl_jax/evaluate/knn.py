"""k-nearest-neighbour classification: how good an embedding is as it is, without training anything."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax.errors import UserError

Features = Any  # [N, D]: an array of NumPy or JAX, or what can be sliced into such arrays, as `stored.StoredFeatures`

BANK = 32_768  # embeddings of the bank that are on the device at a time
QUERIES = 16_384  # queries, likewise


def knn_predict(
    bank: Features,
    bank_labels: jax.Array | np.ndarray,
    queries: Features,
    *,
    classes: int,
    k: int = 20,
    temperature: float = 0.1,
    chunk: int = 1024,
) -> np.ndarray:
    """Scores float32 [M, classes] of queries [M, D]: each class's share of the votes of the k nearest embeddings.

    Args:
      bank: [N, D], with bank_labels int [N] in 0 .. classes - 1; rows of the scores then sum to 1. With bank_labels
        float [N, classes], NaN where unknown, each class has a vote of its own: the share of positives among the
        neighbours whose label is known. If none is known it is the share in the whole bank, and 0.5 if that is unknown.
      temperature: neighbours are those of the largest cosine similarity s, and a vote weighs exp(s / temperature).
      chunk: queries compared at a time. The bank passes the device in parts of BANK, so the similarities in memory are
        at most chunk x BANK, however many images there are.

    The search is exact. Of equally near neighbours the first ones count. Source: instance discrimination, section 3.4,
    https://arxiv.org/abs/1805.01978.

    Raises UserError if k is larger than the bank.
    """
    if not 1 <= k <= len(bank):
        raise UserError(f"k={k}: the bank holds {len(bank)} embeddings; allowed: 1 to {len(bank)}")
    votes = []
    for start in range(0, len(queries), QUERIES):
        part = _padded(queries[start : start + QUERIES], min(QUERIES, len(queries)))
        near, index = _nearest(bank, part, k, min(chunk, len(part)))
        votes.append(np.asarray(_votes(near, index, bank_labels, temperature, classes=classes)))
    return np.concatenate(votes)[: len(queries)]


def _nearest(bank: Features, queries: Any, k: int, chunk: int) -> tuple[jax.Array, jax.Array]:
    """(similarities [M, k], indices [M, k]) of the k nearest of the bank, nearest first."""
    size, queries = min(BANK, len(bank)), _normalized(queries)
    near, index = jnp.full((len(queries), k), -jnp.inf), jnp.zeros((len(queries), k), jnp.int32)
    for start in range(0, len(bank), size):
        part = bank[start : start + size]
        near, index = _nearer(near, index, _padded(part, size), len(part), start, queries, chunk=chunk)
    return near, index


def knn_scores(
    bank: Features, labels: np.ndarray, queries: Features, *, classes: int, k: int, temperature: float
) -> np.ndarray:
    """The votes of `knn_predict` as scores for `metrics`: shares of one label, log-odds of several."""
    votes = knn_predict(bank, labels, queries, classes=classes, k=k, temperature=temperature)
    return votes if labels.ndim == 1 else log_odds(votes)


def log_odds(shares: np.ndarray) -> np.ndarray:
    """Logits of the shares of positives among neighbours; that all of them agree does not make it certain."""
    shares = np.clip(shares, 1e-6, 1 - 1e-6)
    return np.log(shares) - np.log1p(-shares)


def _padded(features: Any, size: int) -> Any:
    """With zeros up to `size` rows, so that parts of every length are compiled once."""
    missing = size - len(features)
    return np.pad(np.asarray(features), [(0, missing), (0, 0)]) if missing else features


@functools.partial(jax.jit, static_argnames="chunk")
def _nearer(near, index, part, count, start, queries, *, chunk):
    """The k nearest of those found so far and of the first `count` of a part of the bank, which begins at `start`."""
    part, k = _normalize(part), near.shape[1]

    def search(query, near, index):
        similarity = jnp.where(jnp.arange(len(part)) < count, jnp.matmul(part, query, precision="highest"), -jnp.inf)
        new, at = jax.lax.top_k(similarity, min(k, len(part)))
        near, order = jax.lax.top_k(jnp.concatenate([near, new]), k)  # of equals, those found first
        return near, jnp.concatenate([index, start + at.astype(index.dtype)])[order]

    return jax.lax.map(lambda each: search(*each), (queries, near, index), batch_size=chunk)


@functools.partial(jax.jit, static_argnames="classes")
def _votes(near, index, labels, temperature, *, classes):
    labels = jnp.asarray(labels)
    if labels.ndim == 2:
        known, positive = ~jnp.isnan(labels), jnp.nan_to_num(labels)
        fallback = jnp.where(known.any(axis=0), positive.sum(axis=0) / known.sum(axis=0), 0.5)

    def vote(near, index):
        weights = jax.nn.softmax(near / temperature)
        if labels.ndim == 2:
            voters = weights @ known[index]
            return jnp.where(voters > 0, weights @ positive[index] / voters, fallback)
        return jnp.zeros(classes).at[labels[index]].add(weights)

    return jax.lax.map(lambda each: vote(*each), (near, index), batch_size=min(1024, len(near)))


def _normalize(features):
    features = jnp.asarray(features, jnp.float32)
    return features / jnp.maximum(jnp.linalg.norm(features, axis=1, keepdims=True), 1e-12)


_normalized = jax.jit(_normalize)
