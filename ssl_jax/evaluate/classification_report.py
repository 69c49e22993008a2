"""The test report of a classifier: metrics with intervals by patient, and thresholds per class."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ssl_jax.evaluate.multilabel import Threshold, at_threshold, threshold_at_sensitivity
from ssl_jax.evaluate.scores import metrics
from ssl_jax.evaluate.uncertainty import auc_intervals


def choose_thresholds(
    logits: np.ndarray, labels: np.ndarray, classes: Sequence[str], sensitivity: float
) -> dict[str, dict[str, Any]]:
    """The `Threshold` per class that reaches `sensitivity`, as a probability, and the number of positives behind it.

    Classes without a positive image in labels [N, K] are left out.
    """
    thresholds = {}
    for c, name in enumerate(classes):
        if positives := int((labels[:, c] >= 0.5).sum()):
            threshold = threshold_at_sensitivity(_sigmoid(logits[:, c]), labels[:, c], sensitivity)
            thresholds[name] = {**_to_json(threshold), "positives": positives}
    return thresholds


def evaluate_on_test(
    scores: np.ndarray,
    labels: np.ndarray,
    classes: Sequence[str],
    *,
    groups: np.ndarray | None,
    thresholds: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """`metrics` of logits [N, K], and for labels [N, K] also:

    interval      95 % intervals of the AUCs, from a bootstrap over groups [N]; groups: their number
    at_threshold  sensitivity and specificity that `thresholds`, chosen on other images, give on these
    """
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


def format_report(result: Mapping[str, Any]) -> list[str]:
    """The result of `evaluate_on_test` for labels [N, K] as lines of text, one per class."""
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


def _format(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    from scipy.special import expit

    return expit(np.asarray(logits, np.float64))


def _to_json(threshold: Threshold) -> dict[str, float | None]:
    """As a dict, with None for nan, which JSON does not have."""
    return {key: None if math.isnan(value) else value for key, value in threshold._asdict().items()}
