"""How sure a score on a test set is: the bootstrap by patient, and DeLong's test of two models on the same images."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from ssl_jax.errors import UserError


def bootstrap_by_group(
    statistic: Callable[[np.ndarray], Any], groups: np.ndarray, repeats: int = 1000, seed: int = 0
) -> tuple[Any, Any]:
    """(low, high) of the 95 % percentile interval of `statistic` over draws of whole groups, with replacement.

    statistic: indices int [M], repeated ones too -> a number or an array; what is nan in a draw (no positive in it,
    say) counts nowhere, and what is nan in all draws stays nan.
    groups: int [N], equal for images of one patient. Images of a patient are alike, so that drawing images would show
    more certainty than there is.
    """
    return percentiles([statistic(index) for index in _draws(groups, repeats, seed)])


def bootstrap_weights(groups: np.ndarray, repeats: int = 1000, seed: int = 0) -> np.ndarray:
    """How often each image is in each draw of `bootstrap_by_group`, float [repeats, N].

    A statistic that can be told from them is found for all draws at once; `percentiles` of it are the interval.
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
    """(low, high): 2.5 % and 97.5 % of the values of all draws (first axis), nan left out."""
    made = np.asarray(values, np.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # nan in all draws
        low, high = np.nanpercentile(made, (2.5, 97.5), axis=0)
    return (float(low), float(high)) if made.ndim == 1 else (low, high)


def class_aucs(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """ROC AUC of each class, float [K], nan without both labels; scores and labels [N, K], labels NaN: not known.

    scikit-learn's `roc_auc_score`, only fast enough for a bootstrap.
    """
    from scipy.stats import rankdata

    made = np.full(labels.shape[1], np.nan)
    for c, label in enumerate(labels.T):
        known = ~np.isnan(label)
        present = label[known] >= 0.5
        positives = int(present.sum())
        if 0 < positives < len(present):
            ranks = rankdata(scores[known, c])[present].sum() - positives * (positives + 1) / 2
            made[c] = ranks / (positives * (len(present) - positives))
    return made


def auc_intervals(
    scores: np.ndarray, labels: np.ndarray, classes: Sequence[str], groups: np.ndarray | None = None
) -> dict[str, Any]:
    """{"macro_auc": [low, high], "auc": {class: [low, high]}} of `bootstrap_by_group`, None where there is none.

    scores and labels [N, K]; groups [N] of the patients, None: every image is one. In a draw without both labels of a
    class, the macro AUC is the mean over the other classes.
    """

    def statistic(index: np.ndarray) -> np.ndarray:
        aucs = class_aucs(scores[index], labels[index])
        there = aucs[~np.isnan(aucs)]
        return np.append(aucs, there.mean() if len(there) else np.nan)

    bounds = bootstrap_by_group(statistic, np.arange(len(labels)) if groups is None else groups)
    *each, macro = [None if np.isnan(low) else [float(low), float(high)] for low, high in zip(*bounds, strict=True)]
    return {"macro_auc": macro, "auc": dict(zip(classes, each, strict=True))}


class DeLong(NamedTuple):
    """difference = auc_a - auc_b, half: half width of its 95 % interval, p: two-sided, of no difference."""

    auc_a: float
    auc_b: float
    difference: float
    half: float
    p: float


def delong(scores_a: np.ndarray, scores_b: np.ndarray, labels: np.ndarray) -> DeLong:
    """DeLong's comparison of the AUC of two models on the same images, for one class.

    scores [N] of each model; labels [N]: 0, 1 or NaN (left out). half and p are nan with a single positive or
    negative, whose variance nobody knows. Images count as independent: where patients have
    several, take `bootstrap_by_group` of the difference.
    Source: DeLong, DeLong, Clarke-Pearson, Biometrics 44, 1988; by midranks as Sun and Xu, IEEE SPL 21, 2014.

    Raises UserError if lengths differ or there is one label only.
    """
    from scipy.stats import norm

    labels = np.asarray(labels, np.float64)
    scores = [np.asarray(s, np.float64) for s in (scores_a, scores_b)]
    if any(s.shape != labels.shape for s in scores):
        lengths = " and ".join(str(len(s)) for s in scores)
        raise UserError(f"scores: {lengths} for {len(labels)} labels; allowed: one for each")
    known = ~np.isnan(labels)
    present = labels[known] >= 0.5
    if not 0 < present.sum() < len(present):
        raise UserError("labels: only one kind; allowed: positives and negatives, to compare AUCs")
    above, below = zip(*(_placements(s[known], present) for s in scores), strict=True)
    (auc_a, auc_b), difference = np.mean(above, axis=1), np.subtract(*np.mean(above, axis=1))
    parts = [np.subtract(*side) for side in (above, below)]
    error = np.sqrt(sum(part.var(ddof=1) / len(part) if len(part) > 1 else np.nan for part in parts))
    p = 2 * norm.sf(abs(difference) / error) if error else float(difference == 0)
    return DeLong(float(auc_a), float(auc_b), float(difference), float(norm.ppf(0.975) * error), float(p))


def _placements(scores: np.ndarray, present: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each positive the share of negatives below it, for each negative the share of positives above; ties half."""
    from scipy.stats import rankdata

    ranks = rankdata(scores)
    positives, negatives = scores[present], scores[~present]
    above = (ranks[present] - rankdata(positives)) / len(negatives)
    below = 1 - (ranks[~present] - rankdata(negatives)) / len(positives)
    return above, below
