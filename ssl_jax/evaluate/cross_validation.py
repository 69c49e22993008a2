"""How well a logistic regression learns from few labels, where none can be spared for a test: cross-validation."""

import warnings
from collections.abc import Sequence

import numpy as np

from ssl_jax.errors import UserError
from ssl_jax.evaluate.multilabel import mean_auc
from ssl_jax.evaluate.references import regression

FOLDS = 5
Split = tuple[np.ndarray, np.ndarray]  # indices of the images to train on, and of those to test on


def folds(labels: np.ndarray, seed: int = 0, groups: np.ndarray | None = None) -> list[Split]:
    """Up to FOLDS stratified splits of images with known labels [N] or, several per image, [N, K].

    Images of one group [N] are in one fold. If the most frequent class has fewer than FOLDS images (or groups), there
    are as many folds. Of several labels per image, the class with the fewest positives counts. Raises UserError if
    there are fewer than two folds.
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    labels = np.asarray(labels)
    kind = labels if labels.ndim == 1 else _rarest(labels)
    units = np.arange(len(labels)) if groups is None else np.asarray(groups)
    count = min(FOLDS, max(len(np.unique(units[kind == c])) for c in np.unique(kind)))
    if count < 2:
        unit = "images" if groups is None else "groups"
        raise UserError(f"labels: no class has two {unit}; allowed: at least two of one class, to test on the second")
    splitter = (StratifiedKFold if groups is None else StratifiedGroupKFold)(count, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that a class has fewer images than there are folds
        splits = list(splitter.split(np.zeros(len(labels)), kind, groups=groups))
    return [(train, test) for train, test in splits if len(train) and len(test)]


def _rarest(labels: np.ndarray) -> np.ndarray:
    """For each image of labels [N, K], the rarest of its positive classes; K if it has none."""
    positive = labels >= 0.5
    order = np.argsort(positive.sum(axis=0), kind="stable")
    return np.append(order, labels.shape[1])[np.c_[positive[:, order], np.ones(len(labels), bool)].argmax(axis=1)]


def cross_validated(
    features: np.ndarray,
    labels: np.ndarray,
    splits: Sequence[Split],
    *,
    classes: int,
    seed: int = 0,
    groups: np.ndarray | None = None,
) -> np.ndarray:
    """The score float [len(splits)] of a `regression` on each fold, trained on the others.

    features [N, D]; labels int [N]: top-1; labels float [N, K]: mean AUC, nan where no class has both positives and
    negatives. The strength of the penalty is chosen anew in each training part.
    """
    scores = []
    for train, test in splits:
        within = None if groups is None else groups[train]
        probe = regression(features[train], labels[train], classes=classes, seed=seed, groups=within)
        logits = probe.scores(features[test])
        if labels.ndim == 1:
            scores.append(float((logits.argmax(axis=1) == labels[test]).mean()))
        else:
            scores.append(mean_auc(logits, labels[test]) or np.nan)
    return np.array(scores)


def mean_and_error(scores: np.ndarray) -> tuple[float, float]:
    """(mean, standard error of the mean) of the scores of folds, without those that are nan.

    >>> mean_and_error(np.array([0.5, 1.0, np.nan]))
    (0.75, 0.25)
    """
    known = scores[~np.isnan(scores)]
    if len(known) < 2:
        return float(known.mean()) if len(known) else float("nan"), float("nan")
    return float(known.mean()), float(known.std(ddof=1) / np.sqrt(len(known)))
