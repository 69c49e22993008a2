"""Numbers from scores where an image has several labels: each class is a question of its own, some unanswered.

Labels are float [N, K]: in [0, 1], NaN where not known. A soft label counts as present from 0.5 on.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ssl_jax.errors import UserError
from ssl_jax.evaluate.uncertainty import class_aucs

BINS = 10


def metrics(scores: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    """What can be said of logits [N, K] for labels [N, K]; see `ssl_jax.evaluate.scores` for the way it is called.

    By class name: auc, ap (average precision), support (images with the class), known (images whose label is known).
    Means over classes: macro_auc, macro_ap, brier (squared error of the probability), calibration_error (of
    `reliability`). left_out: classes that do not have both labels; they are part of no mean. reliability: the bins of
    all classes together.
    """
    from scipy.special import expit
    from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score

    known, present = ~np.isnan(labels), labels >= 0.5
    auc, ap, brier, error = {}, {}, [], []
    judged = [c for c in range(len(classes)) if len(np.unique(present[known[:, c], c])) == 2]
    for c in judged:
        rows = known[:, c]
        y, logit, name = present[rows, c], scores[rows, c], classes[c]
        auc[name] = float(roc_auc_score(y, logit))
        ap[name] = float(average_precision_score(y, logit))
        brier.append(brier_score_loss(y, expit(logit)))
        error.append(calibration_error(reliability(expit(logit), y)))
    named = {"macro_auc": list(auc.values()), "macro_ap": list(ap.values()), "brier": brier, "calibration_error": error}
    made: dict[str, Any] = {name: float(np.mean(values)) for name, values in named.items() if values}
    return made | {
        "auc": auc,
        "ap": ap,
        "support": {name: int(n) for name, n in zip(classes, present.sum(axis=0), strict=True)},
        "known": {name: int(n) for name, n in zip(classes, known.sum(axis=0), strict=True)},
        "left_out": [name for c, name in enumerate(classes) if c not in judged],
        "reliability": reliability(expit(scores[:, judged]), labels[:, judged]),
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
    """How often what was given a probability is there: a row for each of `bins` equal parts of [0, 1] that holds any.

    probabilities and labels: of one shape; labels that are NaN do not count. Rows: low and high (the part), count,
    predicted (mean probability) and observed (share of positives).
    Source: reliability diagrams as in https://arxiv.org/abs/1706.04599, section 2.

    >>> [(row["count"], row["observed"]) for row in reliability(np.array([0.05, 0.95, 0.92]), np.array([0, 1, 0]))]
    [(1, 0.0), (2, 0.5)]
    """
    known = ~np.isnan(np.asarray(labels, np.float64))
    p, y = np.asarray(probabilities, np.float64)[known], np.asarray(labels)[known] >= 0.5
    part = np.minimum((p * bins).astype(int), bins - 1)
    rows = []
    for b in np.unique(part):
        mine = part == b
        about = {"count": int(mine.sum()), "predicted": float(p[mine].mean()), "observed": float(y[mine].mean())}
        rows.append({"low": b / bins, "high": (b + 1) / bins, **about})
    return rows


def calibration_error(rows: Sequence[dict[str, float]]) -> float:
    """Expected calibration error: mean of |predicted - observed| over the rows of `reliability`, by their counts.

    Source: https://arxiv.org/abs/1706.04599, equation 3.
    """
    counts = [row["count"] for row in rows]
    return float(np.average([abs(row["predicted"] - row["observed"]) for row in rows], weights=counts))


class Threshold(NamedTuple):
    """A score from which on an image counts as positive, and what that gives on the data it was chosen on."""

    threshold: float
    sensitivity: float  # share of the positives that are found
    specificity: float  # share of the negatives that are left alone; nan without negatives


def threshold_at_sensitivity(scores: np.ndarray, labels: np.ndarray, sensitivity: float) -> Threshold:
    """The largest threshold that finds at least the share `sensitivity` of the positives, for one class.

    scores [N]: logits or probabilities; labels [N]: 0, 1 or NaN. An image is positive if its score >= threshold.

    Raises UserError without a positive, or if sensitivity is not in (0, 1].

    >>> threshold_at_sensitivity(np.array([0.1, 0.4, 0.6, 0.9]), np.array([0, 1, 0, 1]), 0.9)
    Threshold(threshold=0.4, sensitivity=1.0, specificity=0.5)
    """
    if not 0 < sensitivity <= 1:
        raise UserError(f"sensitivity={sensitivity}: allowed: above 0, at most 1")
    known = ~np.isnan(np.asarray(labels, np.float64))
    scores, present = np.asarray(scores)[known], np.asarray(labels)[known] >= 0.5
    found = np.sort(scores[present])[::-1]
    if not len(found):
        raise UserError("labels: no positive; allowed: at least one, to find a threshold")
    threshold = found[int(np.ceil(sensitivity * len(found) - 1e-9)) - 1]
    return at_threshold(scores, present, float(threshold))


def at_threshold(scores: np.ndarray, labels: np.ndarray, threshold: float) -> Threshold:
    """What `threshold` gives on scores [N] and labels [N] of one class; nan where there is nothing to count."""
    known = ~np.isnan(np.asarray(labels, np.float64))
    above, present = np.asarray(scores)[known] >= threshold, np.asarray(labels)[known] >= 0.5

    def share(of: np.ndarray) -> float:
        return float(of.mean()) if len(of) else float("nan")

    return Threshold(threshold, share(above[present]), share(~above[~present]))
