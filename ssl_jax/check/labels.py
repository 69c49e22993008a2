"""Labels that are probably wrong, and classes that can't be told apart: judged by models that have not seen the image.

Labels are ranked by self-confidence, as in confident learning (https://arxiv.org/abs/1911.00068, section 3.2). How many
are listed follows from what the model itself expects (`improbable`).
"""

import warnings
from typing import NamedTuple

import numpy as np

FOLDS = 5
STRENGTH = 0.1  # C of scikit-learn: a strong penalty, so that a model does not learn the wrong labels by heart
EXPECTED = 0.5  # largest share of a list that may be right
ALIKE = 0.25  # share of the images of two classes that are taken for the other one; 0.5 is guessing


class Doubt(NamedTuple):
    """An image whose label is probably wrong.

    given, guess: indices of classes; for one of several labels per image 0 or 1. column: of that label; -1 for one
    label per image. probability: of the given one; guessed: of the guess.
    """

    image: int
    given: int
    guess: int
    column: int
    probability: float
    guessed: float


def out_of_fold(features: np.ndarray, labels: np.ndarray, groups: np.ndarray | None = None) -> np.ndarray:
    """Probabilities float [N, K] of labels int [N], each by logistic regression on the other folds.

    features [N, D]. groups [N]: images of one group are in one fold. Classes are those from 0 to the largest label.
    nan for images of classes with fewer than FOLDS images or groups, and for all images if fewer than two others are
    left.
    """
    from joblib import parallel_config
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    result = np.full((len(labels), labels.max(initial=-1) + 1), np.nan)
    units = np.arange(len(labels)) if groups is None else groups
    large = [c for c in np.unique(labels) if len(np.unique(units[labels == c])) >= FOLDS]
    judged = np.flatnonzero(np.isin(labels, large))
    if len(large) < 2:
        return result
    kind = StratifiedKFold if groups is None else StratifiedGroupKFold
    folds = kind(FOLDS, shuffle=True, random_state=0)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=STRENGTH, max_iter=200))
    within = None if groups is None else groups[judged]
    with parallel_config("threading"), threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the optimizer could go on
        found = cross_val_predict(
            model, features[judged], labels[judged], groups=within, cv=folds, method="predict_proba", n_jobs=-1
        )
    result[judged] = 0
    result[np.ix_(judged, large)] = found
    return result


def calibrated(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Probabilities [N, K] to the power that fits labels int [N] best by the Brier score, and normalised again.

    That score is bounded, so a few wrong labels, of which the model is sure, hardly move it.
    Source: temperature scaling, https://arxiv.org/abs/1706.04599, section 4.2.
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import softmax

    logits, truth = np.log(np.maximum(probabilities, 1e-30)), np.eye(probabilities.shape[1])[labels]

    def brier(log_power: float) -> float:
        return float(np.square(softmax(logits * np.exp(log_power), axis=1) - truth).sum())

    return softmax(logits * np.exp(minimize_scalar(brier, bounds=(-3, 3), method="bounded").x), axis=1)


def improbable(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Indices of the images whose label is probably wrong, the least probable label first.

    Were all labels right, the model that gave these calibrated probabilities [N, K] would expect some labels as
    improbable as t: the sum of all probabilities up to t. Listed are the labels up to the largest t at which that sum
    is at most half (EXPECTED) of the labels found there. So about half of the list or more should be wrong, and if the
    labels are right, it is empty or short.
    """
    own = probabilities[np.arange(len(labels)), labels]
    order = np.argsort(own, kind="stable")
    every = np.sort(probabilities, axis=None)
    sums = np.cumsum(every)
    expected = sums[np.searchsorted(every, own[order], side="right") - 1]
    within = np.flatnonzero(expected <= EXPECTED * np.arange(1, len(own) + 1))
    listed = order[: within[-1] + 1] if len(within) else order[:0]
    return listed[probabilities[listed].argmax(axis=1) != labels[listed]]


def doubts(probabilities: np.ndarray, labels: np.ndarray) -> list[Doubt]:
    """Of out-of-fold probabilities [N, K], which may be nan for some images, and labels int [N]."""
    judged = np.flatnonzero(~np.isnan(probabilities).any(axis=1))
    if not len(judged):
        return []
    fitted, given = calibrated(probabilities[judged], labels[judged]), labels[judged]
    guess = fitted.argmax(axis=1)
    return [
        Doubt(int(judged[i]), int(given[i]), int(guess[i]), -1, float(fitted[i, given[i]]), float(fitted[i, guess[i]]))
        for i in improbable(fitted, given).tolist()
    ]


def doubts_of_several(features: np.ndarray, labels: np.ndarray, groups: np.ndarray | None = None) -> list[Doubt]:
    """The same for labels float [N, K], NaN where unknown, each column judged on its own."""
    found = []
    for column, values in enumerate(labels.T):
        known = np.flatnonzero(~np.isnan(values))
        given = (values[known] >= 0.5).astype(int)
        within = None if groups is None else groups[known]
        each = doubts(out_of_fold(features[known], given, within), given)
        found += [doubt._replace(image=int(known[doubt.image]), column=column) for doubt in each]
    return sorted(found, key=lambda doubt: (doubt.probability, doubt.image, doubt.column))


def alike(probabilities: np.ndarray, labels: np.ndarray) -> list[tuple[int, int, float]]:
    """(class, class, error) of the pairs of classes that can't be told apart, the worst first.

    error: if the choice is between the two, the share of images that get the other one, the mean over the classes.
    """
    present = np.unique(labels[~np.isnan(probabilities).any(axis=1)]).tolist()
    found = []
    for place, a in enumerate(present):
        of_a = probabilities[labels == a]
        for b in present[place + 1 :]:
            of_b = probabilities[labels == b]
            error = float(((of_a[:, b] >= of_a[:, a]).mean() + (of_b[:, a] >= of_b[:, b]).mean()) / 2)
            if error >= ALIKE:
                found.append((a, b, error))
    return sorted(found, key=lambda pair: -pair[2])
