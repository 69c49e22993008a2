"""k-nearest-neighbour classification: how good an embedding is as it stands, without training anything."""

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
    """Scores float32 [M, classes] in [0, 1], rows sum to 1: share of the votes of the k nearest of the bank.

    bank [N, D] with bank_labels int [N] in 0 .. classes - 1; queries [M, D]. With bank_labels float [N, classes], NaN
    where not known, each class is a vote of its own: the share of "yes" among the neighbours whose label is known; of
    the whole bank where none is, and 0.5 where the bank knows nothing. Nearness is cosine similarity s, a vote
    weighs exp(s / temperature). `chunk` queries are compared at a time: memory is chunk x N.
    Source: instance discrimination, arXiv 1805.01978, section 3.4.

    Raises UserError if k is larger than the bank.
    """
    if not 1 <= k <= len(bank):
        raise UserError(f"k={k}: the bank holds {len(bank)} embeddings; allowed: 1 to {len(bank)}")
    return _votes(bank, bank_labels, queries, temperature, classes=classes, k=k, chunk=min(chunk, len(queries)))


@functools.partial(jax.jit, static_argnames=("classes", "k", "chunk"))
def _votes(bank, labels, queries, temperature, *, classes, k, chunk):
    bank, queries, labels = _normalize(bank), _normalize(queries), jnp.asarray(labels)
    if labels.ndim == 2:
        known, yes = ~jnp.isnan(labels), jnp.nan_to_num(labels)
        without = jnp.where(known.any(axis=0), yes.sum(axis=0) / known.sum(axis=0), 0.5)

    def of_one(query):
        near, index = jax.lax.top_k(jnp.matmul(bank, query, precision="highest"), k)
        weights = jax.nn.softmax(near / temperature)
        if labels.ndim == 2:
            voters = weights @ known[index]
            return jnp.where(voters > 0, weights @ yes[index] / voters, without)
        return jnp.zeros(classes).at[labels[index]].add(weights)

    return jax.lax.map(of_one, queries, batch_size=chunk)


def _normalize(features):
    features = jnp.asarray(features, jnp.float32)
    return features / jnp.maximum(jnp.linalg.norm(features, axis=1, keepdims=True), 1e-12)
