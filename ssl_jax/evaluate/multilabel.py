"""Metrics for several labels per image: each class is judged on its own, on the images where it is known.

Labels are float [N, K] in [0, 1], NaN where unknown. A soft label counts as positive from 0.5.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ssl_jax.errors import UserError
from ssl_jax.evaluate.uncertainty import class_aucs

BINS = 10


def metrics(scores: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    """All metrics of logits [N, K] for labels [N, K]. Called through `ssl_jax.evaluate.metrics`.

    By class name: auc, ap (average precision), support (images with the class), known (images whose label is known).
    Means over classes: macro_auc, macro_ap, brier (squared error of the probability), calibration_error (of
    `reliability`). left_out: classes without both positives and negatives, which enter no mean. reliability: the bins
    of all classes together.
    """
    from scipy.special import expit
    from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score

    known, present = ~np.isnan(labels), labels >= 0.5
    auc, ap, brier, error = {}, {}, [], []
    scored = [c for c in range(len(classes)) if len(np.unique(present[known[:, c], c])) == 2]
    for c in scored:
        rows = known[:, c]
        y, logit, name = present[rows, c], scores[rows, c], classes[c]
        auc[name] = float(roc_auc_score(y, logit))
        ap[name] = float(average_precision_score(y, logit))
        brier.append(brier_score_loss(y, expit(logit)))
        error.append(calibration_error(reliability(expit(logit), y)))
    by_class = {"macro_auc": list(auc.values()), "macro_ap": list(ap.values())}
    by_class |= {"brier": brier, "calibration_error": error}
    means: dict[str, Any] = {name: float(np.mean(values)) for name, values in by_class.items() if values}
    return means | {
        "auc": auc,
        "ap": ap,
        "support": {name: int(n) for name, n in zip(classes, present.sum(axis=0), strict=True)},
        "known": {name: int(n) for name, n in zip(classes, known.sum(axis=0), strict=True)},
        "left_out": [name for c, name in enumerate(classes) if c not in scored],
        "reliability": reliability(expit(scores[:, scored]), labels[:, scored]),
    }


def mean_auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Mean ROC AUC over the classes that have both positives and negatives; 0 if none has."""
    aucs = class_aucs(scores, labels)
    aucs = aucs[~np.isnan(aucs)]
    return float(aucs.mean()) if len(aucs) else 0.0


def log_likelihood(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean log-likelihood of the known labels [N, K]; 0 if none is known."""
    known = ~np.isnan(labels)
    z, y = logits[known], labels[known]
    return -float((np.logaddexp(0, z) - y * z).mean()) if len(y) else 0.0


def reliability(probabilities: np.ndarray, labels: np.ndarray, bins: int = BINS) -> list[dict[str, float]]:
    """A reliability diagram as rows, one for each of `bins` equal parts of [0, 1] that is not empty.

    probabilities and labels have the same shape; labels that are NaN do not count. A row holds low and high (the
    bounds of its part), count, predicted (mean probability) and observed (share of positives).
    Source: https://arxiv.org/abs/1706.04599, section 2.

    >>> [(row["count"], row["observed"]) for row in reliability(np.array([0.05, 0.95, 0.92]), np.array([0, 1, 0]))]
    [(1, 0.0), (2, 0.5)]
    """
    known = ~np.isnan(np.asarray(labels, np.float64))
    p, y = np.asarray(probabilities, np.float64)[known], np.asarray(labels)[known] >= 0.5
    part = np.minimum((p * bins).astype(int), bins - 1)
    rows = []
    for b in np.unique(part):
        inside = part == b
        values = {"count": int(inside.sum()), "predicted": float(p[inside].mean()), "observed": float(y[inside].mean())}
        rows.append({"low": b / bins, "high": (b + 1) / bins, **values})
    return rows


def calibration_error(rows: Sequence[dict[str, float]]) -> float:
    """Expected calibration error: mean of |predicted - observed| over rows of `reliability`, weighted by count.

    Source: https://arxiv.org/abs/1706.04599, equation 3.
    """
    counts = [row["count"] for row in rows]
    return float(np.average([abs(row["predicted"] - row["observed"]) for row in rows], weights=counts))


class Threshold(NamedTuple):
    """A threshold, and its sensitivity and specificity on some data. A score at or above it counts as positive."""

    threshold: float
    sensitivity: float  # true positive rate; nan without positives
    specificity: float  # true negative rate; nan without negatives


def threshold_at_sensitivity(scores: np.ndarray, labels: np.ndarray, sensitivity: float) -> Threshold:
    """The largest threshold whose sensitivity is at least `sensitivity`, for one class.

    scores [N]: logits or probabilities; labels [N]: 0, 1 or NaN.

    Raises UserError without a positive, or if sensitivity is not in (0, 1].

    >>> threshold_at_sensitivity(np.array([0.1, 0.4, 0.6, 0.9]), np.array([0, 1, 0, 1]), 0.9)
    Threshold(threshold=0.4, sensitivity=1.0, specificity=0.5)
    """
    if not 0 < sensitivity <= 1:
        raise UserError(f"sensitivity={sensitivity}: allowed: above 0, at most 1")
    known = ~np.isnan(np.asarray(labels, np.float64))
    scores, present = np.asarray(scores)[known], np.asarray(labels)[known] >= 0.5
    positives = np.sort(scores[present])[::-1]
    if not len(positives):
        raise UserError("labels: no positive image; a threshold needs at least one")
    threshold = positives[int(np.ceil(sensitivity * len(positives) - 1e-9)) - 1]
    return at_threshold(scores, present, float(threshold))


def at_threshold(scores: np.ndarray, labels: np.ndarray, threshold: float) -> Threshold:
    """Sensitivity and specificity of `threshold` on scores [N] and labels [N] of one class."""
    known = ~np.isnan(np.asarray(labels, np.float64))
    above, present = np.asarray(scores)[known] >= threshold, np.asarray(labels)[known] >= 0.5

    def share(values: np.ndarray) -> float:
        return float(values.mean()) if len(values) else float("nan")

    return Threshold(threshold, share(above[present]), share(~above[~present]))
