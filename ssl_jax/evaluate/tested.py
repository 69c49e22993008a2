"""What a classifier's test says, for a person: scores with intervals by patient, thresholds, a reliability picture."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ssl_jax.evaluate.multilabel import at_threshold, threshold_at_sensitivity
from ssl_jax.evaluate.scores import metrics
from ssl_jax.evaluate.uncertainty import auc_intervals


def thresholds_of(
    logits: np.ndarray, labels: np.ndarray, classes: Sequence[str], sensitivity: float
) -> dict[str, dict[str, Any]]:
    """By class with a positive among labels [N, K]: the probability from which on `sensitivity` of them are found, what
    that gives there, and how many positives it rests on."""
    made = {}
    for c, name in enumerate(classes):
        if positives := int((labels[:, c] >= 0.5).sum()):
            found = threshold_at_sensitivity(_sigmoid(logits[:, c]), labels[:, c], sensitivity)
            made[name] = {**_plain(found), "positives": positives}
    return made


def judge(
    scores: np.ndarray,
    labels: np.ndarray,
    classes: Sequence[str],
    *,
    groups: np.ndarray | None,
    thresholds: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """`metrics` of logits [N, K]; for labels [N, K] also interval (of the AUCs, by groups [N]), groups (how many) and
    at_threshold (what `thresholds`, chosen on other images, give here)."""
    made = metrics(scores, labels, classes)
    if labels.ndim == 1:
        return made
    made["interval"] = auc_intervals(scores, labels, classes, groups)
    made["groups"] = len(labels) if groups is None else len(np.unique(groups))
    made["at_threshold"] = {
        name: _plain(at_threshold(_sigmoid(scores[:, c]), labels[:, c], thresholds[name]["threshold"]))
        for c, name in enumerate(classes)
        if name in thresholds
    }
    return made


def table(made: Mapping[str, Any]) -> list[str]:
    """A line a class of `judge`."""
    width = max(map(len, made["support"]))
    lines = [f"  {'':{width}}  positives     AUC (95 % interval)      AP   sensitivity  specificity"]
    for name, auc in made["auc"].items():
        low, high = made["interval"]["auc"][name] or (math.nan, math.nan)
        line = (
            f"  {name:{width}}  {made['support'][name]:9}  {auc:.3f} ({low:.3f} to {high:.3f})   {made['ap'][name]:.3f}"
        )
        at = made["at_threshold"].get(name)
        lines.append(line + (f"{_shown(at['sensitivity']):>14}{_shown(at['specificity']):>13}" if at else ""))
    return lines


def _shown(share: float | None) -> str:
    return "–" if share is None else f"{share:.3f}"


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    from scipy.special import expit

    return expit(np.asarray(logits, np.float64))


def _plain(threshold: Any) -> dict[str, float | None]:
    """For JSON, which knows no nan."""
    return {key: None if math.isnan(value) else value for key, value in threshold._asdict().items()}
