"""Numbers from scores, and what several seeds say together. The computing is scikit-learn's and scipy's."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ssl_jax.errors import UserError
from ssl_jax.evaluate import multilabel


def metrics(scores: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    """What can be said of scores float [N, K] (logits, or probabilities whose rows sum to 1) for labels int [N].

    Floats: top1, top5 (of more than five classes), balanced_accuracy (mean recall), macro_auc. By class name: recall,
    auc (one against the rest), support. confusion: counts, [true][predicted]. left_out: classes without an example
    among the labels; they are part of no mean, and have neither recall nor auc.

    Labels float [N, K], several an image: scores are logits, and `multilabel.metrics` says what is returned.

    Raises UserError if shapes do not fit or scores are not finite.
    """
    from sklearn.metrics import confusion_matrix, roc_auc_score, top_k_accuracy_score

    scores, labels = np.asarray(scores, np.float64), np.asarray(labels)
    if scores.shape != (len(labels), len(classes)) or not len(labels):
        raise UserError(
            f"scores {list(scores.shape)}: allowed: one row for each of {len(labels)} labels, {len(classes)} columns"
        )
    if not np.isfinite(scores).all():
        raise UserError("scores: not finite; the classifier's training diverged, likely a learning rate too high")
    if labels.ndim == 2:
        return multilabel.metrics(scores, labels, classes)
    numbers = np.arange(len(classes))
    odds = _probabilities(scores)
    confusion = confusion_matrix(labels, scores.argmax(axis=1), labels=numbers)
    support = confusion.sum(axis=1)
    present = np.flatnonzero(support).tolist()
    recall = {classes[c]: float(confusion[c, c] / support[c]) for c in present}
    both = [c for c in present if support[c] < len(labels)]  # an AUC needs examples and counterexamples
    auc = {classes[c]: float(roc_auc_score(labels == c, odds[:, c])) for c in both}
    made: dict[str, Any] = {"top1": float(np.trace(confusion) / len(labels))}
    if len(classes) > 5:
        made["top5"] = float(top_k_accuracy_score(labels, scores, k=5, labels=numbers))
    made["balanced_accuracy"] = float(np.mean(list(recall.values())))
    if auc:
        made["macro_auc"] = float(np.mean(list(auc.values())))
    return made | {
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


def interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """(mean, half width of its 95 % interval) by Student's t; the half width of a single value is nan.

    >>> interval([1.0, 2.0, 3.0])[0]
    2.0
    """
    from scipy.stats import t

    given = np.asarray(values, np.float64)
    n = len(given)
    if n < 2:
        return float(given.mean()), math.nan
    return float(given.mean()), float(t.ppf(0.975, n - 1) * given.std(ddof=1) / math.sqrt(n))


def paired(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """(mean, half width of the 95 % interval) of a - b, where a[i] and b[i] share everything but what is compared."""
    return interval(np.asarray(a, np.float64) - np.asarray(b, np.float64))
