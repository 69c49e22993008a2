"""What the cells of a study show together: means, paired differences, gains by class, and sentences about them.

    results.csv   one row per cell           summary.csv, summary.md   means and differences
    classes.csv   gains by class             patients.csv              differences with resampled test patients

A cell is a mapping with "arm", "labels", "seed", "chosen" and "scores", which `evaluate.metrics` returned.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssl_jax import files
from ssl_jax.evaluate.scores import interval, paired
from ssl_jax.evaluate.uncertainty import bootstrap_weights, percentiles

METRICS = ("top1", "balanced_accuracy", "macro_auc", "top5", "macro_ap", "brier")
REPEATS = 1000  # of the bootstrap over test patients
MAX_TESTED = 3000  # test images; with more there is no bootstrap
Cell = dict[str, Any]
Row = dict[str, Any]


def main_metric(cells: Sequence[Cell]) -> str:
    """macro_auc for multi-label data; top1 if all classes are about equally frequent in the test set, otherwise
    balanced_accuracy."""
    scores = cells[0]["scores"]
    if "top1" not in scores:
        return "macro_auc"
    support = [n for n in scores["support"].values() if n]
    return "top1" if max(support) <= 1.5 * min(support) else "balanced_accuracy"


def class_metric(metric: str) -> str:
    """The metric of each class whose mean over classes is `metric`; for top1, that mean is about the same."""
    return "auc" if metric == "macro_auc" else "recall"


def summarise(cells: Sequence[Cell], baseline: str) -> list[Row]:
    """Rows of arm x labels x metric, in the order of the cells: seeds, mean, half, difference, difference_half.

    half: half width of the 95 % interval of the mean over seeds. difference: mean of the paired differences to
    `baseline` over the seeds that both have, and half the width of its interval. None if there is no such number.
    """
    scores: dict[tuple[str, int], dict[int, Cell]] = {}
    for cell in cells:
        scores.setdefault((cell["arm"], cell["labels"]), {})[cell["seed"]] = cell["scores"]
    arms, counts = list(dict.fromkeys(a for a, _ in scores)), sorted({n for _, n in scores})
    rows = []
    for arm, count, name in ((a, n, m) for a in arms for n in counts for m in METRICS):
        by_seed = {seed: s[name] for seed, s in scores.get((arm, count), {}).items() if name in s}
        if not by_seed:
            continue
        base = {seed: s[name] for seed, s in scores.get((baseline, count), {}).items() if name in s}
        both = sorted(by_seed.keys() & base.keys())
        row = {"arm": arm, "labels": count, "metric": name, "seeds": len(by_seed)}
        row |= dict(zip(("mean", "half"), interval(list(by_seed.values())), strict=True))
        if arm != baseline and both:
            gain = paired([by_seed[s] for s in both], [base[s] for s in both])
        else:
            gain = (math.nan, math.nan)
        row |= dict(zip(("difference", "difference_half"), gain, strict=True))
        rows.append({k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()})
    return rows


def class_gains(cells: Sequence[Cell], baseline: str, metric: str) -> list[Row]:
    """Rows of arm x labels x class: gain (paired difference to `baseline` in a class's recall or auc) and its half."""
    rows = []
    for arm, count, pairs in _pairs(cells, baseline, metric):
        for name in pairs[0][0] if pairs else ():
            gain, half = paired([a[name] for a, _ in pairs], [b[name] for _, b in pairs])
            rows.append({"arm": arm, "labels": count, "class": name, "gain": gain, "half": half})
    return rows


def rarity(cells: Sequence[Cell], baseline: str, share: Mapping[str, float]) -> list[Row]:
    """Rows of arm x labels: Spearman's rank correlation between the gain of a class in AUC and its share, the mean over
    seeds, and half the width of its interval. Negative: rare classes gain more."""
    from scipy.stats import spearmanr

    rows = []
    for arm, count, pairs in _pairs(cells, baseline, "auc"):
        each = []
        for a, b in pairs:
            gains = [a[name] - b[name] for name in a]
            each.append(spearmanr(gains, [share[name] for name in a]).statistic if len(set(gains)) > 1 else 0.0)
        mean, half = interval(each)
        rows.append({"arm": arm, "labels": count, "correlation": mean, "half": half})
    return rows


def _pairs(cells: Sequence[Cell], baseline: str, metric: str) -> list[tuple[str, int, list[tuple[Any, Any]]]]:
    """(arm, labels, [(score of the arm, score of the baseline) for each seed that both have])."""
    scores = {(c["arm"], c["labels"], c["seed"]): c["scores"][metric] for c in cells}
    arms = [a for a in dict.fromkeys(c["arm"] for c in cells) if a != baseline]
    seeds = sorted({c["seed"] for c in cells})
    pairs = []
    for arm, count in ((a, n) for a in arms for n in sorted({c["labels"] for c in cells})):
        both = [s for s in seeds if (arm, count, s) in scores and (baseline, count, s) in scores]
        pairs.append((arm, count, [(scores[arm, count, s], scores[baseline, count, s]) for s in both]))
    return [entry for entry in pairs if entry[2]]


def over_patients(
    scores: Mapping[tuple[str, int], np.ndarray], labels: np.ndarray, groups: np.ndarray, baseline: str
) -> list[Row]:
    """Rows of arm x labels: low and high of the difference to `baseline` in macro AUC over resampled test patients.

    scores: (arm, label count) -> logits [S, N, K] of S seeds; labels float [N, K], NaN: unknown; groups int [N]:
    patients. The trained models stay as they are, and an arm counts with the mean over its seeds; only the test
    patients are resampled, REPEATS times. An AUC is the share of pairs (one image with the finding, one without) that
    are in order, so one table of pairs per class holds everything. Its size grows with N^2: no rows above MAX_TESTED
    images.
    """
    if len(labels) > MAX_TESTED:
        return []
    positive, negative = labels >= 0.5, labels < 0.5
    classes = np.flatnonzero(positive.any(axis=0) & negative.any(axis=0))
    weights = bootstrap_weights(groups, REPEATS)
    rows = []
    for arm, count in (key for key in scores if key[0] != baseline and (baseline, key[1]) in scores):
        drawn = []  # the difference in every draw, for each class
        for c in classes:
            present, absent = weights[:, positive[:, c]], weights[:, negative[:, c]]
            mine, others = (
                _in_order(scores[a, count][:, :, c], positive[:, c], negative[:, c]) for a in (arm, baseline)
            )
            pairs = present.sum(axis=1) * absent.sum(axis=1)
            gain = ((present @ (mine - others)) * absent).sum(axis=1)
            drawn.append(np.where(pairs > 0, gain / np.maximum(pairs, 1), np.nan))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a draw in which no class has both labels
            low, high = percentiles(np.nanmean(drawn, axis=0))
        rows.append({"arm": arm, "labels": count, "low": low, "high": high})
    return rows


def _in_order(scores: np.ndarray, positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """[P, Q]: the share of seeds in which each positive image scores above each negative one; a tie counts half.
    scores: [S, N]."""
    higher, lower = scores[:, positive, None], scores[:, None, negative]
    return ((higher > lower) + 0.5 * (higher == lower)).mean(axis=0)


def verdicts(
    rows: Sequence[Row],
    baseline: str,
    metric: str,
    patients: Sequence[Row] = (),
    undertrained: Mapping[tuple[str, int], str] | None = None,
) -> list[str]:
    """One sentence per arm and label count: whether the interval of its paired difference lies above zero.

    patients: of `over_patients`. If given, a difference is called better or worse only if both intervals, over draws of
    labels and over test patients, lie on the same side of zero. undertrained: of `cautions`; an arm is not called
    better than a baseline that was trained too briefly, nor worse if it was itself.
    """
    short = undertrained or {}
    resampled = {(p["arm"], p["labels"]): (100 * p["low"], 100 * p["high"]) for p in patients}
    sentences = []
    for row in rows:
        if row["metric"] != metric or row["arm"] == baseline:
            continue
        what = f"With {row['labels']:,} labels, {row['arm']} against {baseline}"
        if row["difference"] is None:
            sentences.append(f"{what}: no seed in common.")
            continue
        points = 100 * row["difference"]
        if row["difference_half"] is None:
            sentences.append(f"{what}: {points:+.1f} points on a single seed, which shows nothing.")
            continue
        half = 100 * row["difference_half"]
        intervals = [(points - half, points + half)]
        shown = f"95 % interval {intervals[0][0]:+.1f} to {intervals[0][1]:+.1f}"
        if (row["arm"], row["labels"]) in resampled:
            intervals.append(resampled[row["arm"], row["labels"]])
            shown += f"; over test patients {intervals[1][0]:+.1f} to {intervals[1][1]:+.1f}"
        loser = baseline if points > 0 else row["arm"]
        judged = _verdict(intervals)
        if judged.startswith(("better", "worse", "different")) and (loser, row["labels"]) in short:
            judged = f"not judged, as {loser} looks undertrained"
        sentences.append(f"{what}: {points:+.1f} points ({shown}): {judged}.")
    return sentences


def sharper(rows: Sequence[Row], baseline: str) -> dict[str, list[int]]:
    """For each other arm, the label counts at which its difference to the baseline is known better than either score:
    has a smaller interval than both. rows: of one metric."""
    half = {(row["arm"], row["labels"]): row["half"] for row in rows}
    found: dict[str, list[int]] = {}
    for row in rows:
        halves = half[row["arm"], row["labels"]], half.get((baseline, row["labels"]))
        if row["difference_half"] is not None and all(h is not None and row["difference_half"] < h for h in halves):
            found.setdefault(row["arm"], []).append(row["labels"])
    return found


def _verdict(intervals: Sequence[tuple[float, float]]) -> str:
    both = "both intervals lie" if len(intervals) > 1 else "the interval lies"
    if all(low > 0 for low, _ in intervals):
        return f"better, {both} above zero"
    if all(high < 0 for _, high in intervals):
        return f"worse, {both} below zero"
    if len(intervals) > 1 and not intervals[0][0] <= 0 <= intervals[0][1]:
        return (
            "different on these test images, which may not hold for other patients: the second interval includes zero"
        )
    return "no difference shown, the interval includes zero"


def write_results(path: Path, cells: Sequence[Cell]) -> None:
    """Writes results.csv, a row per cell."""
    chosen = sorted({k for c in cells for k in c["chosen"] if k != "trials"})
    numbers = [m for m in METRICS if m in cells[0]["scores"]]
    write_csv(
        path,
        [
            {"arm": c["arm"], "labels": c["labels"], "seed": c["seed"]}
            | {m: c["scores"].get(m) for m in numbers}
            | {k: c["chosen"].get(k) for k in chosen}
            for c in cells
        ],
    )


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    shown = [[f"{v:.6g}" if isinstance(v, float) else v for v in row.values()] for row in rows]
    files.write_csv(path, list(rows[0]), shown)


def table(rows: Sequence[Row], key: str, form: str, arms: Sequence[str]) -> str:
    """A Markdown table of the "mean" or "difference" of the rows of one metric, with intervals: a line per arm."""
    counts = sorted({r["labels"] for r in rows})
    cell = {(r["arm"], r["labels"]): r for r in rows}
    half = "half" if key == "mean" else "difference_half"
    values = [[arm, *(_shown(cell.get((arm, n), {}), key, half, form) for n in counts)] for arm in arms]
    return markdown(["arm", *(f"{n:,} labels" for n in counts)], values)


def class_table(gains: Sequence[Row], share: Mapping[str, float]) -> str:
    """A Markdown table of `class_gains`: a line per class, rarest first, with its share of the training images."""
    arms, counts = list(dict.fromkeys(g["arm"] for g in gains)), sorted({g["labels"] for g in gains})
    cell = {(g["arm"], g["labels"], g["class"]): g for g in gains}
    columns = [(a, n) for n in dict.fromkeys((counts[0], counts[-1])) for a in arms]
    lines = [
        [
            name,
            f"{100 * share[name]:.1f} %",
            *(_shown(cell.get((*c, name), {}), "gain", "half", "+.1f") for c in columns),
        ]
        for name in sorted(dict.fromkeys(g["class"] for g in gains), key=lambda name: share[name])
    ]
    return markdown(["class", "share", *(f"{a}, {n:,} labels" for a, n in columns)], lines)


def _shown(row: Mapping[str, Any], key: str, half: str, form: str) -> str:
    if row.get(key) is None:
        return "–"
    spread = row.get(half)
    return format(100 * row[key], form) + ("" if spread is None or math.isnan(spread) else f" ± {100 * spread:.1f}")


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table; every column but the first is right-aligned."""
    rows = [[cell.replace("|", "\\|") for cell in line] for line in (head, *lines)]
    rows.insert(1, ["---", *["---:"] * (len(head) - 1)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
