"""The test of a classifier, for a reader: metrics with intervals by patient, and thresholds."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ssl_jax.evaluate.multilabel import Threshold, at_threshold, threshold_at_sensitivity
from ssl_jax.evaluate.scores import metrics
from ssl_jax.evaluate.uncertainty import auc_intervals


def thresholds_of(
    logits: np.ndarray, labels: np.ndarray, classes: Sequence[str], sensitivity: float
) -> dict[str, dict[str, Any]]:
    """For each class with a positive image in labels [N, K]: the `Threshold` that reaches `sensitivity`, as a
    probability, and the number of positives it rests on."""
    thresholds = {}
    for c, name in enumerate(classes):
        if positives := int((labels[:, c] >= 0.5).sum()):
            threshold = threshold_at_sensitivity(_sigmoid(logits[:, c]), labels[:, c], sensitivity)
            thresholds[name] = {**_to_json(threshold), "positives": positives}
    return thresholds


def judge(
    scores: np.ndarray,
    labels: np.ndarray,
    classes: Sequence[str],
    *,
    groups: np.ndarray | None,
    thresholds: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """`metrics` of logits [N, K]. For labels [N, K] also interval (of the AUCs, by groups [N]), groups (their number)
    and at_threshold (sensitivity and specificity here of `thresholds`, which were chosen on other images)."""
    result = metrics(scores, labels, classes)
    if labels.ndim == 1:
        return result
    result["interval"] = auc_intervals(scores, labels, classes, groups)
    result["groups"] = len(labels) if groups is None else len(np.unique(groups))
    result["at_threshold"] = {
        name: _to_json(at_threshold(_sigmoid(scores[:, c]), labels[:, c], thresholds[name]["threshold"]))
        for c, name in enumerate(classes)
        if name in thresholds
    }
    return result


def table(result: Mapping[str, Any]) -> list[str]:
    """The result of `judge` for labels [N, K] as text, one line per class."""
    width = max(map(len, result["support"]))
    lines = [f"  {'':{width}}  positives     AUC (95 % interval)      AP   sensitivity  specificity"]
    for name, auc in result["auc"].items():
        low, high = result["interval"]["auc"][name] or (math.nan, math.nan)
        line = f"  {name:{width}}  {result['support'][name]:9}  {auc:.3f} ({low:.3f} to {high:.3f})"
        line += f"   {result['ap'][name]:.3f}"
        if at := result["at_threshold"].get(name):
            line += f"{_format(at['sensitivity']):>14}{_format(at['specificity']):>13}"
        lines.append(line)
    return lines


def _format(share: float | None) -> str:
    return "–" if share is None else f"{share:.3f}"


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    from scipy.special import expit

    return expit(np.asarray(logits, np.float64))


def _to_json(threshold: Threshold) -> dict[str, float | None]:
    """With None for nan, which JSON cannot write."""
    return {key: None if math.isnan(value) else value for key, value in threshold._asdict().items()}
