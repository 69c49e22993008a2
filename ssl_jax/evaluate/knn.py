"""k-nearest-neighbour classification: how good an embedding is as it is, without training anything."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax.errors import UserError


def knn_predict(
    bank: jax.Array | np.ndarray,
    bank_labels: jax.Array | np.ndarray,
    queries: jax.Array | np.ndarray,
    *,
    classes: int,
    k: int = 20,
    temperature: float = 0.1,
    chunk: int = 1024,
) -> jax.Array:
    """Scores float32 [M, classes] of queries [M, D]: each class's share of the votes of the k nearest embeddings.

    Args:
      bank: [N, D], with bank_labels int [N] in 0 .. classes - 1; rows of the scores then sum to 1. With bank_labels
        float [N, classes], NaN where unknown, each class has a vote of its own: the share of positives among the
        neighbours whose label is known. If none is known it is the share in the whole bank, and 0.5 if that is unknown.
      temperature: neighbours are those of the largest cosine similarity s, and a vote weighs exp(s / temperature).
      chunk: queries compared at a time; memory is chunk x N.

    Source: instance discrimination, section 3.4, https://arxiv.org/abs/1805.01978.

    Raises UserError if k is larger than the bank.
    """
    if not 1 <= k <= len(bank):
        raise UserError(f"k={k}: the bank holds {len(bank)} embeddings; allowed: 1 to {len(bank)}")
    return _votes(bank, bank_labels, queries, temperature, classes=classes, k=k, chunk=min(chunk, len(queries)))


def knn_scores(
    bank: np.ndarray, labels: np.ndarray, queries: np.ndarray, *, classes: int, k: int, temperature: float
) -> np.ndarray:
    """The votes of `knn_predict` as scores for `metrics`: shares of one label, log-odds of several."""
    votes = np.asarray(knn_predict(bank, labels, queries, classes=classes, k=k, temperature=temperature))
    return votes if labels.ndim == 1 else log_odds(votes)


def log_odds(shares: np.ndarray) -> np.ndarray:
    """Logits of the shares of positives among neighbours; that all of them agree does not make it certain."""
    shares = np.clip(shares, 1e-6, 1 - 1e-6)
    return np.log(shares) - np.log1p(-shares)


@functools.partial(jax.jit, static_argnames=("classes", "k", "chunk"))
def _votes(bank, labels, queries, temperature, *, classes, k, chunk):
    bank, queries, labels = _normalize(bank), _normalize(queries), jnp.asarray(labels)
    if labels.ndim == 2:
        known, positive = ~jnp.isnan(labels), jnp.nan_to_num(labels)
        fallback = jnp.where(known.any(axis=0), positive.sum(axis=0) / known.sum(axis=0), 0.5)

    def vote(query):
        near, index = jax.lax.top_k(jnp.matmul(bank, query, precision="highest"), k)
        weights = jax.nn.softmax(near / temperature)
        if labels.ndim == 2:
            voters = weights @ known[index]
            return jnp.where(voters > 0, weights @ positive[index] / voters, fallback)
        return jnp.zeros(classes).at[labels[index]].add(weights)

    return jax.lax.map(vote, queries, batch_size=chunk)


def _normalize(features):
    features = jnp.asarray(features, jnp.float32)
    return features / jnp.maximum(jnp.linalg.norm(features, axis=1, keepdims=True), 1e-12)
