"""Uncertainty of a test score: the bootstrap by patient, and DeLong's test of two models on the same images."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from ssl_jax.errors import UserError


def bootstrap_by_group(
    statistic: Callable[[np.ndarray], Any], groups: np.ndarray, repeats: int = 1000, seed: int = 0
) -> tuple[Any, Any]:
    """(low, high) of the 95 % percentile interval of `statistic` over draws of whole groups, with replacement.

    statistic: takes indices int [M], which may repeat, and returns a number or an array. Draws in which it is nan (no
    positive image, say) are left out; what is nan in all draws stays nan.
    groups: int [N], equal for images of one patient. Images of a patient are alike, so drawing single images would
    make the interval too narrow.
    """
    return percentiles([statistic(index) for index in _draws(groups, repeats, seed)])


def bootstrap_weights(groups: np.ndarray, repeats: int = 1000, seed: int = 0) -> np.ndarray:
    """How often each image is in each draw of `bootstrap_by_group`, float [repeats, N].

    A statistic that these weights determine is computed for all draws at once; its `percentiles` are the interval.
    """
    draws = _draws(groups, repeats, seed)
    return np.stack([np.bincount(index, minlength=len(groups)) for index in draws]).astype(np.float64)


def _draws(groups: np.ndarray, repeats: int, seed: int) -> Iterator[np.ndarray]:
    order = np.argsort(groups, kind="stable")
    count = np.unique(groups, return_counts=True)[1]
    first = np.cumsum(count) - count
    rng = np.random.default_rng(seed)
    for _ in range(repeats):
        drawn = rng.integers(0, len(count), len(count))
        size = count[drawn]
        within = np.arange(size.sum()) - np.repeat(np.cumsum(size) - size, size)
        yield order[np.repeat(first[drawn], size) + within]


def percentiles(values: Any) -> tuple[Any, Any]:
    """(low, high): the 2.5th and 97.5th percentile over draws (first axis), ignoring nan."""
    draws = np.asarray(values, np.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # nan in all draws
        low, high = np.nanpercentile(draws, (2.5, 97.5), axis=0)
    return (float(low), float(high)) if draws.ndim == 1 else (low, high)


def class_aucs(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """ROC AUC of each class, float [K], nan for a class without both positives and negatives.

    scores and labels [N, K], labels NaN where unknown. Equal to scikit-learn's `roc_auc_score`, but fast enough for a
    bootstrap.
    """
    from scipy.stats import rankdata

    aucs = np.full(labels.shape[1], np.nan)
    for c, label in enumerate(labels.T):
        known = ~np.isnan(label)
        present = label[known] >= 0.5
        positives = int(present.sum())
        if 0 < positives < len(present):
            ranks = rankdata(scores[known, c])[present].sum() - positives * (positives + 1) / 2
            aucs[c] = ranks / (positives * (len(present) - positives))
    return aucs


def auc_intervals(
    scores: np.ndarray, labels: np.ndarray, classes: Sequence[str], groups: np.ndarray | None = None
) -> dict[str, Any]:
    """{"macro_auc": [low, high], "auc": {class: [low, high]}} by `bootstrap_by_group`; None where an AUC has none.

    scores and labels [N, K]; groups [N], equal for images of one patient, None if every image is its own group. If a
    class lacks positives or negatives in a draw, the macro AUC of that draw is the mean over the other classes.
    """

    def statistic(index: np.ndarray) -> np.ndarray:
        aucs = class_aucs(scores[index], labels[index])
        defined = aucs[~np.isnan(aucs)]
        return np.append(aucs, defined.mean() if len(defined) else np.nan)

    bounds = bootstrap_by_group(statistic, np.arange(len(labels)) if groups is None else groups)
    *single, macro = [None if np.isnan(low) else [float(low), float(high)] for low, high in zip(*bounds, strict=True)]
    return {"macro_auc": macro, "auc": dict(zip(classes, single, strict=True))}


class DeLong(NamedTuple):
    """difference: auc_a - auc_b; half: half width of its 95 % interval; p: two-sided p-value of no difference."""

    auc_a: float
    auc_b: float
    difference: float
    half: float
    p: float


def delong(scores_a: np.ndarray, scores_b: np.ndarray, labels: np.ndarray) -> DeLong:
    """DeLong's comparison of the AUC of two models on the same images, for one class.

    scores [N] of each model; labels [N]: 0, 1 or NaN (ignored). half and p are nan if there is only one positive or
    one negative, whose variance is unknown. Images are treated as independent; if patients have several, use
    `bootstrap_by_group` on the difference.
    Source: DeLong, DeLong, Clarke-Pearson, Biometrics 44, 1988; by midranks as Sun and Xu, IEEE SPL 21, 2014.

    Raises UserError if lengths differ or positives or negatives are missing.
    """
    from scipy.stats import norm

    labels = np.asarray(labels, np.float64)
    scores = [np.asarray(s, np.float64) for s in (scores_a, scores_b)]
    if any(s.shape != labels.shape for s in scores):
        lengths = " and ".join(str(len(s)) for s in scores)
        raise UserError(f"scores: {lengths} for {len(labels)} labels; allowed: one per label")
    known = ~np.isnan(labels)
    present = labels[known] >= 0.5
    if not 0 < present.sum() < len(present):
        raise UserError("labels: only one kind; an AUC needs both positives and negatives")
    above, below = zip(*(_placements(s[known], present) for s in scores), strict=True)
    (auc_a, auc_b), difference = np.mean(above, axis=1), np.subtract(*np.mean(above, axis=1))
    parts = [np.subtract(*side) for side in (above, below)]
    error = np.sqrt(sum(part.var(ddof=1) / len(part) if len(part) > 1 else np.nan for part in parts))
    p = 2 * norm.sf(abs(difference) / error) if error else float(difference == 0)
    return DeLong(float(auc_a), float(auc_b), float(difference), float(norm.ppf(0.975) * error), float(p))


def _placements(scores: np.ndarray, present: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each positive the share of negatives below it, for each negative the share of positives above it; a tie
    counts half."""
    from scipy.stats import rankdata

    ranks = rankdata(scores)
    positives, negatives = scores[present], scores[~present]
    above = (ranks[present] - rankdata(positives)) / len(negatives)
    below = 1 - (ranks[~present] - rankdata(negatives)) / len(positives)
    return above, below
