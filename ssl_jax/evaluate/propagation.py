"""Label propagation: few labels spread over the graph of nearest neighbours to all other images."""

import numpy as np

from ssl_jax.errors import UserError
from ssl_jax.evaluate.linear import Probe, linear_probe
from ssl_jax.neighbours import evened, nearest_others

NEIGHBOURS = 20
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
    several = labels.ndim == 2
    if several:
        known = np.concatenate([np.nan_to_num(labels), np.nan_to_num(1 - labels)], axis=1)
    else:
        known = np.arange(classes) == labels[:, None]
    if not known.any():
        raise UserError("labels: none is known; allowed: at least one")
    spread = _solve(_graph(features, k), known.astype(np.float64), alpha)
    if several:
        present, absent = spread[:, :classes], spread[:, classes:]
        return _shares(np.stack([present, absent], axis=-1))[..., 0]
    return _shares(spread)


def spread(known: np.ndarray, labels: np.ndarray, others: np.ndarray, classes: int) -> np.ndarray:
    """`propagate` from the embeddings [N, D] of labelled images to those of others [M, D]: float32 [N + M, classes].

    Neighbours are those of `evened` embeddings.
    """
    rest = np.full((len(others), *labels.shape[1:]), -1 if labels.ndim == 1 else np.nan, labels.dtype)
    features = evened(np.concatenate([known, others]))
    return propagate(features, np.concatenate([labels, rest]), classes, k=min(NEIGHBOURS, len(features) - 1))


def spread_probe(
    known: np.ndarray,
    labels: np.ndarray,
    others: np.ndarray,
    *,
    classes: int,
    seed: int,
    groups: np.ndarray | None = None,
) -> Probe:
    """A `linear_probe` of labelled embeddings [N, D] and of others [M, D], which get the labels that `spread` gives
    them; with several labels per image, its probabilities. groups: of all [N + M], the labelled ones first."""
    shares = spread(known, labels, others, classes)
    labels = shares if labels.ndim == 2 else shares.argmax(axis=1)
    return linear_probe(np.concatenate([known, others]), labels, classes=classes, seed=seed, groups=groups)


def _graph(features: np.ndarray, k: int):
    """The symmetric, normalised graph as a sparse matrix, float64 [N, N]."""
    from scipy import sparse

    index, similarity = nearest_others(features, k)
    start = np.arange(0, index.size + 1, k)
    weights = np.maximum(similarity, 0).astype(np.float64) ** POWER
    directed = sparse.csr_matrix((weights.ravel(), index.ravel(), start), shape=(len(index), len(index)))
    graph = directed + directed.T
    degree = np.asarray(graph.sum(axis=1)).ravel()
    scale = sparse.diags(1 / np.sqrt(np.where(degree > 0, degree, 1)))
    return scale @ graph @ scale


def _solve(graph, known: np.ndarray, alpha: float) -> np.ndarray:
    """Z [N, K] of (I - alpha graph) Z = known; never negative."""
    from scipy import sparse
    from scipy.sparse.linalg import cg

    matrix = sparse.identity(graph.shape[0], format="csr") - alpha * graph
    columns = [cg(matrix, column, rtol=TOLERANCE)[0] if column.any() else column for column in known.T]
    return np.maximum(np.stack(columns, axis=1), 0)


def _shares(values: np.ndarray) -> np.ndarray:
    """Rows (along the last axis) that sum to 1, float32; rows of zeros become equal shares."""
    total = values.sum(axis=-1, keepdims=True)
    shares = np.where(total > 0, values / np.where(total > 0, total, 1), 1 / values.shape[-1])
    return shares.astype(np.float32)
