"""Label propagation: few labels spread over the graph of nearest neighbours to all other images."""

import numpy as np

from ssl_jax.errors import UserError
from ssl_jax.evaluate.linear import Probe, linear_probe
from ssl_jax.evaluate.scores import class_shares
from ssl_jax.neighbours import evening, nearest, nearest_others

NEIGHBOURS = 20
ALPHA = 0.97  # how far labels spread in a pool; ours, from 20, 50 and 250 labels (benchmarks/few_labels.md)
POWER = 3  # of the cosine similarities that are the weights of the graph (arXiv 1904.04717, section 4)
TOLERANCE = 1e-6  # of the residual, relative to the right-hand side


def propagate(
    features: np.ndarray, labels: np.ndarray, classes: int, k: int = NEIGHBOURS, alpha: float = 0.99
) -> np.ndarray:
    """Probabilities float32 [N, classes] of all embeddings [N, D], whose rows sum to 1.

    labels: int [N] in 0 .. classes - 1, -1 where unknown. Labels float [N, classes], several per image, NaN where
    unknown, give the probability of each class for itself. An image that no label reaches gets equal odds.

    Solves (I - alpha W) Z = Y by conjugate gradients. W is the graph of the k nearest neighbours by cosine similarity,
    made symmetric and normalised; Y are the known labels. Sources: Zhou et al., NIPS 2003, for the equation; Iscen et
    al., https://arxiv.org/abs/1904.04717, for the graph.

    Raises UserError if no label is known, or if k or alpha do not fit.
    """
    labels = np.asarray(labels)
    if not 0 < alpha < 1:
        raise UserError(f"alpha={alpha}: allowed: between 0 and 1")
    known = _known(labels, classes)
    return _shares(_solve(_graph(features, k), known, alpha), labels.ndim == 2)


class Neighbourhood:
    """The graph of a pool of embeddings [M, D], made once, over which labels can be spread again and again.

    Neighbours are those of embeddings after their `evening`. Raises UserError if there are fewer than two.
    """

    def __init__(self, embeddings: np.ndarray):
        if len(embeddings) < 2:
            raise UserError(f"images without a label: {len(embeddings)}; allowed: at least 2, to have neighbours")
        self.embeddings, self._even = embeddings, evening(embeddings)
        self._features = self._even(embeddings)
        self._graph = _graph(self._features, min(NEIGHBOURS, len(embeddings) - 1))

    def spread(self, known: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
        """Probabilities float32 [M, classes] of the pool, as of `propagate`, from labelled embeddings [N, D], which may
        be in the pool or not: each gives its label to its nearest neighbours there, from which it spreads.

        Source: diffusion from outside of the graph, Iscen et al., https://arxiv.org/abs/1611.05113, section 3.2.
        """
        from scipy import sparse

        index, similarity = nearest(self._even(known), self._features, min(NEIGHBOURS, len(self._features)))
        shape, start = (len(known), len(self._features)), np.arange(0, index.size + 1, index.shape[1])
        weights = _shares(_weights(similarity), several=False)  # each label counts once
        given = sparse.csr_matrix((weights.ravel(), index.ravel(), start), shape=shape)
        return _shares(_solve(self._graph, given.T @ _known(labels, classes), ALPHA), labels.ndim == 2)


def spread_bank(
    known: np.ndarray, labels: np.ndarray, pool: Neighbourhood, *, classes: int, align: bool | str = False
) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings [N + M, D] and labels: labelled ones [N, D], then a pool [M, D] with the classes that are most
    probable after `spread`; with several labels per image, with the probabilities.

    align: see `aligned`; several labels stay as they are.
    """
    shares = pool.spread(known, labels, classes)
    if labels.ndim == 1:
        shares = aligned(shares, labels, align).argmax(axis=1)
    return np.concatenate([known, pool.embeddings]), np.concatenate([labels, shares])


def spread_probe(
    known: np.ndarray,
    labels: np.ndarray,
    pool: Neighbourhood,
    *,
    classes: int,
    seed: int,
    groups: np.ndarray | None = None,
    pool_groups: np.ndarray | None = None,
    align: bool | str = False,
) -> Probe:
    """A `linear_probe` of a `spread_bank`. groups [N] and pool_groups [M] count if both are known."""
    bank = spread_bank(known, labels, pool, classes=classes, align=align)
    both = None if groups is None or pool_groups is None else np.concatenate([groups, pool_groups])
    return linear_probe(*bank, classes=classes, seed=seed, groups=both)


def aligned(shares: np.ndarray, labels: np.ndarray, align: bool | str) -> np.ndarray:
    """Probabilities [M, K], each class scaled so that it is about as frequent as `class_shares` says; False: as they
    are. labels: int [N], from which they were spread."""
    if not align:
        return shares
    odds = shares * class_shares(labels, shares.shape[1], align) / np.maximum(shares.mean(axis=0), 1e-6)
    return odds / np.maximum(odds.sum(axis=1, keepdims=True), 1e-12)


def _known(labels: np.ndarray, classes: int) -> np.ndarray:
    """What is spread, float64 [N, C]: one column per class; of several labels, whether they are present, then absent.

    Raises UserError if no label is known.
    """
    if labels.ndim == 2:
        known = np.concatenate([np.nan_to_num(labels), np.nan_to_num(1 - labels)], axis=1)
    else:
        known = np.arange(classes) == labels[:, None]
    if not known.any():
        raise UserError("labels: none is known; allowed: at least one")
    return known.astype(np.float64)


def _graph(features: np.ndarray, k: int):
    """The symmetric, normalised graph as a sparse matrix, float64 [N, N]."""
    from scipy import sparse

    index, similarity = nearest_others(features, k)
    start = np.arange(0, index.size + 1, k)
    directed = sparse.csr_matrix((_weights(similarity).ravel(), index.ravel(), start), shape=(len(index), len(index)))
    graph = directed + directed.T
    degree = np.asarray(graph.sum(axis=1)).ravel()
    scale = sparse.diags(1 / np.sqrt(np.where(degree > 0, degree, 1)))
    return scale @ graph @ scale


def _weights(similarity: np.ndarray) -> np.ndarray:
    return np.maximum(similarity, 0).astype(np.float64) ** POWER


def _solve(graph, known: np.ndarray, alpha: float) -> np.ndarray:
    """Z [N, K] of (I - alpha graph) Z = known; never negative."""
    from scipy import sparse
    from scipy.sparse.linalg import cg

    matrix = sparse.identity(graph.shape[0], format="csr") - alpha * graph
    columns = [cg(matrix, column, rtol=TOLERANCE)[0] if column.any() else column for column in known.T]
    return np.maximum(np.stack(columns, axis=1), 0)


def _shares(values: np.ndarray, several: bool) -> np.ndarray:
    """float32 [N, K] of values [N, C]: rows that sum to 1; of several labels, the part of "present" in both. What no
    label reaches gets equal odds."""
    if several:
        values = np.stack(np.split(values, 2, axis=1), axis=-1)
    total = values.sum(axis=-1, keepdims=True)
    shares = np.where(total > 0, values / np.where(total > 0, total, 1), 1 / values.shape[-1]).astype(np.float32)
    return shares[..., 0] if several else shares
