"""Metrics of scores, and confidence intervals over seeds, computed by scikit-learn and scipy."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ssl_jax.errors import UserError
from ssl_jax.evaluate import multilabel


def metrics(scores: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    """All metrics of scores float [N, K] (logits, or probabilities whose rows sum to 1) for labels int [N].

    Floats: top1, top5 (with more than five classes), balanced_accuracy (mean recall), macro_auc. By class name: recall,
    auc (one against the rest), support. confusion: counts, [true][predicted]. left_out: classes without an example,
    which enter no mean and have neither recall nor auc.

    For labels float [N, K], several per image, scores are logits and the result is that of `multilabel.metrics`.

    Raises UserError if shapes do not fit or scores are not finite.
    """
    from sklearn.metrics import confusion_matrix, roc_auc_score, top_k_accuracy_score

    scores, labels = np.asarray(scores, np.float64), np.asarray(labels)
    if scores.shape != (len(labels), len(classes)) or not len(labels):
        raise UserError(
            f"scores: shape {list(scores.shape)}; allowed: one row per label ({len(labels)}), {len(classes)} columns"
        )
    if not np.isfinite(scores).all():
        raise UserError("scores: not finite; the classifier's training diverged, probably from a high learning rate")
    if labels.ndim == 2:
        return multilabel.metrics(scores, labels, classes)
    numbers = np.arange(len(classes))
    probabilities = _probabilities(scores)
    confusion = confusion_matrix(labels, scores.argmax(axis=1), labels=numbers)
    support = confusion.sum(axis=1)
    present = np.flatnonzero(support).tolist()
    recall = {classes[c]: float(confusion[c, c] / support[c]) for c in present}
    scored = [c for c in present if support[c] < len(labels)]  # an AUC needs positives and negatives
    auc = {classes[c]: float(roc_auc_score(labels == c, probabilities[:, c])) for c in scored}
    result: dict[str, Any] = {"top1": float(np.trace(confusion) / len(labels))}
    if len(classes) > 5:
        result["top5"] = float(top_k_accuracy_score(labels, scores, k=5, labels=numbers))
    result["balanced_accuracy"] = float(np.mean(list(recall.values())))
    if auc:
        result["macro_auc"] = float(np.mean(list(auc.values())))
    return result | {
        "recall": recall,
        "auc": auc,
        "support": {name: int(n) for name, n in zip(classes, support, strict=True)},
        "left_out": [name for name, n in zip(classes, support, strict=True) if not n],
        "confusion": confusion.tolist(),
    }


def _probabilities(scores: np.ndarray) -> np.ndarray:
    if (scores >= 0).all() and np.allclose(scores.sum(axis=1), 1, atol=1e-4):
        return scores
    odds = np.exp(scores - scores.max(axis=1, keepdims=True))
    return odds / odds.sum(axis=1, keepdims=True)


def selection_score(scores: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """(accuracy, mean log-likelihood) of logits [N, K]: hyper-parameters with the largest pair are chosen.

    On a handful of held-out images many candidates have the same accuracy; the likelihood then decides. For labels
    [N, K] the mean AUC takes the place of the accuracy. Scores that are not finite get (-1, -inf).
    """
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels)
    if not np.isfinite(scores).all():
        return -1.0, -np.inf
    if labels.ndim == 2:
        return multilabel.mean_auc(scores, labels), multilabel.log_likelihood(scores, labels)
    shifted = scores - scores.max(axis=1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    accuracy = (scores.argmax(axis=1) == labels).mean()
    return float(accuracy), float(log_probabilities[np.arange(len(labels)), labels].mean())


def log_frequencies(labels: np.ndarray, classes: int) -> np.ndarray:
    """Scores [K] that depend on no image: log shares of labels [N], or log-odds of labels [N, K].

    Half an image is added, as nothing is certain.
    """
    if labels.ndim == 1:
        return np.log(np.bincount(labels, minlength=classes) + 0.5)
    return np.log(np.nansum(labels, axis=0) + 0.5) - np.log(np.nansum(1 - labels, axis=0) + 0.5)


def class_shares(labels: np.ndarray, classes: int, align: bool | str) -> np.ndarray:
    """How frequent classes are taken to be, float64 [K]: as among labels [N] or [N, K] (align=True), or all that
    have a label equally ("equal"). With several labels per image, the share of images that have each."""
    if align is True:
        odds = np.exp(log_frequencies(labels, classes))
        return odds / (1 + odds if labels.ndim == 2 else odds.sum())
    if labels.ndim == 2:
        raise UserError("config.finetune.align='equal': with several labels per image; allowed: False or True")
    present = np.bincount(labels[labels >= 0], minlength=classes) > 0
    return present / present.sum()


def interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """(mean, half width of its 95 % interval) by Student's t. The half width of a single value is nan.

    >>> interval([1.0, 2.0, 3.0])[0]
    2.0
    """
    from scipy.stats import t

    x = np.asarray(values, np.float64)
    n = len(x)
    if n < 2:
        return float(x.mean()), math.nan
    return float(x.mean()), float(t.ppf(0.975, n - 1) * x.std(ddof=1) / math.sqrt(n))


def paired(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """(mean, half width of its 95 % interval) of a - b, for pairs a[i], b[i] that differ only in what is compared."""
    return interval(np.asarray(a, np.float64) - np.asarray(b, np.float64))
