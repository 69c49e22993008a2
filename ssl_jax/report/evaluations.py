"""What evaluations and classifiers say, in HTML: tables beside what costs nothing, confusion, results by class."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from ssl_jax.evaluate.references import MAJORITY, PIXELS, RANDOM
from ssl_jax.report import plots, words
from ssl_jax.report.page import fold, note, percent, table

TESTED = ("top1", "balanced_accuracy", "macro_auc")  # what the table of classifiers shows
MAX_CELLS = 20  # classes up to which the confusion matrix shows its numbers


def evaluations(found: Sequence[tuple[str, Mapping[str, Any]]], command: str = "") -> str:
    """Table of all evaluations, given as (name of the run, content of the file), beside what costs nothing.

    command: how to make one, shown if there is none. Runs are named if there are several.
    """
    if not found:
        return note(f"None yet. To evaluate the encoder: {command}") if command else ""
    judged = {e.get("metric", "top1") for _, e in found}
    metrics = sorted({name for _, e in found for name in e["mean"]}, key=lambda m: (m not in judged, m != "top1", m))
    several, rows, told = len({run for run, _ in found}) > 1, [], []
    for run, e in sorted(found, key=_order):
        values = [_with_interval(e["mean"].get(m), e["interval"].get(m)) for m in metrics]
        beside = [_with_interval(_best(e, name), None) for name in (MAJORITY, PIXELS, RANDOM)]
        protocol = e["protocol"] + (f", step {step}" if (step := _other_step(e)) else "")
        about = [*[run] * several, protocol, str(e["labels"]), str(e["seeds"]), data_of(e), e["test"]]
        rows.append([*about, *values[:1], *beside, *values[1:]])
        if below := below_pixels([e]):
            told.append(f"{run}: {below}" if several else below)
    text = (
        "Mean over the draws of labels (seeds) ± half the width of its 95 % interval. Beside it is what costs nothing, "
    )
    text += (
        "on the same labels and test images, by the metric that the evaluation is judged by: raw pixels and a random "
    )
    text += "encoder, each by the better of linear and kNN."
    heads = [words.title(m) for m in metrics]
    head = [*["run"] * several, "protocol", "labels", "seeds", "data", "tested on"]
    head += [*heads[:1], MAJORITY, PIXELS, RANDOM, *heads[1:]]
    after = [*told, words.footnote(metrics)]
    return note(text) + table(head, rows, first_number=5 + several) + "".join(map(note, filter(None, after)))


def _order(entry: tuple[str, Mapping[str, Any]]) -> tuple[str, str, float]:
    run, evaluation = entry
    return run, evaluation["protocol"], math.inf if evaluation["labels"] == "all" else evaluation["labels"]


def data_of(evaluation: Mapping[str, Any]) -> str:
    """The data of an evaluation; those of an older version do not say."""
    data = evaluation.get("conditions", {}).get("data")
    return data["path"] or data["name"] if data else "–"


def _other_step(evaluation: Mapping[str, Any]) -> int:
    """The step of an encoder that is not the run's last one; else 0."""
    return evaluation.get("conditions", {}).get("step", 0)


def _best(evaluation: Mapping[str, Any], reference: str) -> float | None:
    """The better score of a reference, by the metric of the evaluation."""
    means = {
        name: each["mean"] for name, each in evaluation.get("references", {}).items() if name.startswith(reference)
    }
    metric = evaluation.get("metric")
    return max((mean[metric] for mean in means.values() if metric in mean), default=None)


def below_pixels(found: Sequence[Mapping[str, Any]]) -> str:
    """A sentence if an encoder does not beat raw pixels at some number of labels, even by its best protocol."""
    best: dict[Any, tuple[float, float, str]] = {}
    for e in (each for each in found if not _other_step(each)):
        pixels = _best(e, PIXELS)
        if pixels is None or e["metric"] not in e["mean"]:
            continue
        here, mine = (e["labels"], data_of(e), e["test"]), e["mean"][e["metric"]]
        if here not in best or mine - pixels > best[here][0] - best[here][1]:
            best[here] = mine, pixels, e["protocol"]
    for (labels, data, _), (mine, pixels, protocol) in best.items():
        if mine <= pixels:
            text = f"Not better than raw pixels: with {labels} labels of {data}, {protocol} reaches {percent(mine)}"
            return f"{text}, raw pixels {percent(pixels)}."
    return ""


def classifiers(found: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Table of the classifiers that `ssl-jax finetune` wrote, given as (folder, content of classifier.json)."""
    if not found:
        return ""
    rows = []
    for name, about in found:
        test, chosen = about.get("test", {}), about.get("chosen", {})
        scores = [f"{words.title(m)} {test[m]:.4f}" for m in TESTED if m in test]
        settings = ", ".join(f"{k} {chosen[k]:g}" for k in ("lr", "backbone_ratio") if k in chosen)
        data, validation = about.get("data", "–"), chosen.get("validation")
        rows.append([name, data, about.get("test_data") or "–", str(len(about["classes"])), settings])
        rows[-1] += ["–" if validation is None else f"{validation:.4f}", ", ".join(scores) or "–"]
    head = ["folder", "data", "tested on", "classes", "chosen", "score on held-out labels", "test"]
    text = (
        "Score on held-out labels: the one by which the settings were chosen, on labelled images that were kept out of "
    )
    text += "training: the accuracy, or with several labels per image the macro ROC AUC."
    return table(head, rows) + note(
        f"{text} {words.footnote(m for m in TESTED if any(m in a.get('test', {}) for _, a in found))}"
    )


def _with_interval(mean: float | None, half: float | None) -> str:
    return f"{mean:.4f}" + (f" ± {half:.4f}" if half is not None else "") if mean is not None else "–"


def confusion(evaluation: Mapping[str, Any]) -> str:
    """Heat map and per-class table of an evaluation, summed over its seeds."""
    classes, each = evaluation["classes"], evaluation["per_seed"]
    if not all("confusion" in seed for seed in each):
        return ""
    counts = np.sum([seed["confusion"] for seed in each], axis=0)
    actual, predicted, correct = counts.sum(axis=1), counts.sum(axis=0), np.diag(counts)
    shares = counts / np.maximum(actual, 1)[:, None]
    wrong = shares - np.diag(np.diag(shares))
    rows = []
    for c, name in enumerate(classes):
        recall, precision = (correct[c] / n[c] if n[c] else None for n in (actual, predicted))
        f1 = 2 * correct[c] / (actual[c] + predicted[c]) if actual[c] else None
        aucs = [seed["auc"][name] for seed in each if name in seed.get("auc", {})]
        other = wrong[c].argmax()
        mistaken = f"{classes[other]} ({percent(wrong[c, other])})" if wrong[c, other] > 0 else "–"
        numbers = [f"{actual[c] // len(each):,}", *map(percent, (recall, precision, f1))]
        rows.append([name, *numbers, f"{np.mean(aucs):.4f}" if aucs else "–", mistaken])
    head = ["class", "test images", "recall", "precision", "F1", "AUC", "most often mistaken for"]
    by_class = table(head, rows, first_number=1) + note(words.footnote(("recall", "precision", "f1", "auc")))
    text = f"{evaluation['protocol']}, {evaluation['labels']} labels, {data_of(evaluation)}, {evaluation['test']}"
    text += f"; sum over {len(each)} draws of labels." if len(each) > 1 else "."
    text += " Each row shows which classes the images of one class were predicted as, in percent."
    return note(text) + _matrix(shares, classes) + fold("Per class", by_class, folded=len(classes) > MAX_CELLS)


def by_class(evaluation: Mapping[str, Any]) -> str:
    """Table of a multi-label evaluation: means over its seeds."""
    each = evaluation["per_seed"]
    if not all("ap" in seed for seed in each):
        return ""

    def mean(metric: str, name: str) -> str:
        values = [seed[metric][name] for seed in each if name in seed[metric]]
        return f"{np.mean(values):.4f}" if values else "–"

    rows = [
        [name, *(f"{each[0][n][name]:,}" for n in ("known", "support")), mean("auc", name), mean("ap", name)]
        for name in evaluation["classes"]
    ]
    draws = f"; mean over {len(each)} draws of labels" if len(each) > 1 else ""
    return note(
        f"{evaluation['protocol']}, {evaluation['labels']} labels, {data_of(evaluation)}, {evaluation['test']}{draws}."
    ) + (
        table(["class", "labelled", "positive", "AUC", "average precision"], rows, first_number=1)
        + note(f"Labelled: test images whose label is known. {words.footnote(('auc', 'ap'))}")
    )


def _matrix(shares: np.ndarray, classes: Sequence[str]) -> str:
    if len(classes) > MAX_CELLS:
        return f'<img class="heat" alt="confusion matrix, one row per true class" src="{plots.heat(shares)}">'
    heads = "".join(f'<th scope="col"><span>{escape(c)}</span></th>' for c in classes)
    body = ""
    for name, row in zip(classes, shares, strict=True):
        cells = "".join(
            f'<td{" class=deep" if v > 0.5 else ""} style="--v:{v:.3f}">{round(100 * v) or "·"}</td>' for v in row
        )
        body += f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>'
    return f'<div class="wide"><table class="matrix"><tr><th>true \\ predicted</th>{heads}</tr>{body}</table></div>'
