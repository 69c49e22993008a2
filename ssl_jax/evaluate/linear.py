"""A linear probe: logistic regression on frozen embeddings."""

import warnings
from typing import Literal, NamedTuple

import numpy as np

from ssl_jax.evaluate.scores import selection_score
from ssl_jax.evaluate.subsets import holdout

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # C of scikit-learn: the inverse of the L2 penalty
MAX_TO_CHOOSE = 10_000  # examples used to choose C: more hardly change the choice and cost minutes


class Probe(NamedTuple):
    """weights float32 [D, K] and bias float32 [K], for unscaled features (the scaling is folded in).

    strength: the chosen C; validation: accuracy (or mean AUC) with it on the held-out part, nan if nothing was held
    out.
    """

    weights: np.ndarray
    bias: np.ndarray
    strength: float
    validation: float

    def scores(self, features: np.ndarray) -> np.ndarray:
        """Logits float32 [N, K] of features [N, D]."""
        return np.asarray(features, np.float32) @ self.weights + self.bias


def linear_probe(
    features: np.ndarray,
    labels: np.ndarray,
    *,
    classes: int,
    validation: float = 0.2,
    seed: int = 0,
    grid: tuple[float, ...] = STRENGTHS,
    groups: np.ndarray | None = None,
    class_weights: Literal["none", "balanced"] = "none",
    max_iter: int = 300,
) -> Probe:
    """Logistic regression (L-BFGS) on standardised features float [N, D] with labels int [N] in 0 .. classes - 1.

    Labels float [N, K] get one regression per class, on the images where the class is known; a class with only
    positives or only negatives gets the same score everywhere. Classes without an example are never predicted.

    The strength in `grid` with the best `selection_score` on a stratified `validation` share of the labels is chosen,
    the same for all classes; then all labels are fitted again. groups [N] are held out as a whole.
    class_weights="balanced" gives every kind of label the same total weight. max_iter: of L-BFGS.
    """
    features, labels = np.asarray(features, np.float32), np.asarray(labels)
    chosen, score = grid[len(grid) // 2], np.nan
    if len(grid) > 1 and 0 < validation < 1 and len(labels if groups is None else np.unique(groups)) > 1:
        kept, held = holdout(labels, validation, seed, groups)
        rng = np.random.default_rng(seed)
        kept, held = (_at_most(part, MAX_TO_CHOOSE, rng) for part in (kept, held))
        trials = []
        for strength in sorted(grid):
            weights, bias = _fit(features[kept], labels[kept], classes, strength, class_weights, max_iter)
            trials.append((*selection_score(features[held] @ weights + bias, labels[held]), -strength))
        score, _, negated = max(trials)  # of equals the strongest penalty
        chosen = -negated
    return Probe(*_fit(features, labels, classes, chosen, class_weights, max_iter), chosen, score)


def _at_most(indices: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    return indices if len(indices) <= count else np.sort(rng.choice(indices, count, replace=False))


def _fit(
    features: np.ndarray, labels: np.ndarray, classes: int, strength: float, class_weights: str, max_iter: int
) -> tuple[np.ndarray, np.ndarray]:
    """(weights float32 [D, K], bias float32 [K]) for unscaled features."""
    mean, std = features.mean(axis=0), features.std(axis=0)
    # A constant dimension carries no information: its weight becomes zero rather than huge.
    scale = np.where(std > 1e-6 * max(float(std.max()), 1e-12), 1 / np.maximum(std, 1e-12), 0)
    scaled, balanced = (features - mean) * scale, None if class_weights == "none" else class_weights
    if labels.ndim == 2:
        parts = [_binary(scaled, label, strength, balanced, max_iter) for label in labels.T]
        weights, bias = np.stack([w for w, _ in parts], axis=1), np.array([b for _, b in parts])
    else:
        weights, bias = _multinomial(scaled, labels, classes, strength, balanced, max_iter)
    weights *= scale[:, None]
    return weights.astype(np.float32), (bias - mean @ weights).astype(np.float32)


def _multinomial(scaled, labels, classes, strength, balanced, max_iter):
    """Weights [D, K] and bias [K] for one label per image."""
    present = np.unique(labels)
    weights, bias = np.zeros((scaled.shape[1], classes)), np.full(classes, -20.0)  # classes without an example keep -20
    if len(present) == 1:
        bias[present] = 0.0
        return weights, bias
    coefficients, intercept = _regression(scaled, labels, strength, balanced, max_iter)
    if len(present) == 2:  # scikit-learn keeps one column for two classes
        coefficients, intercept = np.stack([-coefficients[0], coefficients[0]]) / 2, np.array([-1, 1]) * intercept / 2
    weights[:, present], bias[present] = coefficients.T, intercept
    return weights, bias


def _binary(scaled, label, strength, balanced, max_iter):
    """Weights [D] and bias of one class; a soft label y counts as a positive of weight y and a negative of 1 - y."""
    known = ~np.isnan(label)
    x, y = scaled[known], label[known].astype(np.float64)
    if not (y > 0).any() or not (y < 1).any():  # log-odds of the share of positives, half an image short of certainty
        return np.zeros(scaled.shape[1]), np.log((y.sum() + 0.5) / ((1 - y).sum() + 0.5))
    used, weight = np.concatenate([y > 0, y < 1]), np.concatenate([y, 1 - y])
    target = np.repeat([1, 0], len(y))
    coefficients, intercept = _regression(
        np.concatenate([x[y > 0], x[y < 1]]), target[used], strength, balanced, max_iter, weight[used]
    )
    return coefficients[0].astype(np.float64), float(intercept[0])


def _regression(scaled, labels, strength, balanced, max_iter, weights=None):
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    # Products this small gain nothing from threads, and take 20 times as long if another process uses the cores.
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # weak penalties need not converge to be compared
        model = LogisticRegression(C=strength, max_iter=max_iter, class_weight=balanced).fit(scaled, labels, weights)
    return model.coef_, model.intercept_
