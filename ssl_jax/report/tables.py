"""What the cells of a study say together: means, paired differences, gains by class, and all of it in words.

    results.csv   one row a cell             summary.csv, summary.md   means and differences
    classes.csv   gains by class             patients.csv              differences, the test patients drawn anew

A cell is a mapping with "arm", "labels", "seed", "chosen" and "scores", what `evaluate.metrics` returns.
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
MAX_TESTED = 3000  # test images up to which there is one
Cell = dict[str, Any]
Row = dict[str, Any]


def main_metric(cells: Sequence[Cell]) -> str:
    """macro_auc for multi-label data; top1 where every class is about equally frequent in the test set, else
    balanced_accuracy."""
    scores = cells[0]["scores"]
    if "top1" not in scores:
        return "macro_auc"
    support = [n for n in scores["support"].values() if n]
    return "top1" if max(support) <= 1.5 * min(support) else "balanced_accuracy"


def summarise(cells: Sequence[Cell], baseline: str) -> list[Row]:
    """Rows of arm x labels x metric, in the order of the cells: seeds, mean, half, difference, difference_half.

    half: half width of the 95 % interval of the mean over seeds. difference: mean of the paired differences to
    `baseline` on the seeds that both have, with the half width of its interval. None where there is no such number.
    """
    found: dict[tuple[str, int], dict[int, Cell]] = {}
    for cell in cells:
        found.setdefault((cell["arm"], cell["labels"]), {})[cell["seed"]] = cell["scores"]
    arms, counts = list(dict.fromkeys(a for a, _ in found)), sorted({n for _, n in found})
    rows = []
    for arm, count, name in ((a, n, m) for a in arms for n in counts for m in METRICS):
        mine = {seed: s[name] for seed, s in found.get((arm, count), {}).items() if name in s}
        if not mine:
            continue
        base = {seed: s[name] for seed, s in found.get((baseline, count), {}).items() if name in s}
        both = sorted(mine.keys() & base.keys())
        row = {"arm": arm, "labels": count, "metric": name, "seeds": len(mine)}
        row |= dict(zip(("mean", "half"), interval(list(mine.values())), strict=True))
        if arm != baseline and both:
            gain = paired([mine[s] for s in both], [base[s] for s in both])
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
    """Rows of arm x labels: Spearman's rank correlation of a class's gain in AUC with its share, the mean over seeds,
    and its half. Negative: rare classes gain more."""
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
    """(arm, labels, [(the arm's score, the baseline's) for each seed that both have])."""
    found = {(c["arm"], c["labels"], c["seed"]): c["scores"][metric] for c in cells}
    arms = [a for a in dict.fromkeys(c["arm"] for c in cells) if a != baseline]
    seeds = sorted({c["seed"] for c in cells})
    made = []
    for arm, count in ((a, n) for a in arms for n in sorted({c["labels"] for c in cells})):
        both = [s for s in seeds if (arm, count, s) in found and (baseline, count, s) in found]
        made.append((arm, count, [(found[arm, count, s], found[baseline, count, s]) for s in both]))
    return [entry for entry in made if entry[2]]


def over_patients(
    scores: Mapping[tuple[str, int], np.ndarray], labels: np.ndarray, groups: np.ndarray, baseline: str
) -> list[Row]:
    """Rows of arm x labels: low and high of the difference to `baseline` in macro AUC, the test patients drawn anew.

    scores: (arm, label count) -> logits [S, N, K] of S seeds; labels float [N, K], NaN: not known; groups int [N]:
    patients. The trainings stay as they are, of each arm the mean over its seeds counts: what varies is the test
    images alone, REPEATS times. An AUC is the share of pairs, one image with the finding and one without, that are in
    order; so all of it can be read from one table of pairs a class. It grows with N^2: none above MAX_TESTED images.
    """
    if len(labels) > MAX_TESTED:
        return []
    positive, negative = labels >= 0.5, labels < 0.5
    classes = np.flatnonzero(positive.any(axis=0) & negative.any(axis=0))
    weights = bootstrap_weights(groups, REPEATS)
    rows = []
    for arm, count in (key for key in scores if key[0] != baseline and (baseline, key[1]) in scores):
        drawn = []  # of each class the difference in every draw
        for c in classes:
            present, absent = weights[:, positive[:, c]], weights[:, negative[:, c]]
            mine, others = (
                _in_order(scores[a, count][:, :, c], positive[:, c], negative[:, c]) for a in (arm, baseline)
            )
            pairs = present.sum(axis=1) * absent.sum(axis=1)
            gain = ((present @ (mine - others)) * absent).sum(axis=1)
            drawn.append(np.where(pairs > 0, gain / np.maximum(pairs, 1), np.nan))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a draw that says nothing of any class
            low, high = percentiles(np.nanmean(drawn, axis=0))
        rows.append({"arm": arm, "labels": count, "low": low, "high": high})
    return rows


def _in_order(scores: np.ndarray, positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """[P, Q]: in what share of the seeds each positive image scores above each negative one; a tie is half a seed.
    scores [S, N]."""
    higher, lower = scores[:, positive, None], scores[:, None, negative]
    return ((higher > lower) + 0.5 * (higher == lower)).mean(axis=0)


def verdicts(rows: Sequence[Row], baseline: str, metric: str, patients: Sequence[Row] = ()) -> list[str]:
    """One sentence an arm and label count: whether the interval of its paired difference lies above zero.

    patients: of `over_patients`. Where they are given, a difference is called better or worse only if both intervals,
    over draws of labels and over test patients, lie on one side of zero.
    """
    tested = {(p["arm"], p["labels"]): (100 * p["low"], 100 * p["high"]) for p in patients}
    said = []
    for row in rows:
        if row["metric"] != metric or row["arm"] == baseline:
            continue
        what = f"With {row['labels']:,} labels, {row['arm']} against {baseline}"
        if row["difference"] is None:
            said.append(f"{what}: nothing to pair.")
            continue
        points = 100 * row["difference"]
        if row["difference_half"] is None:
            said.append(f"{what}: {points:+.1f} points on one seed, which supports nothing.")
            continue
        half = 100 * row["difference_half"]
        over = [(points - half, points + half)]
        shown = f"95 % interval {over[0][0]:+.1f} to {over[0][1]:+.1f}"
        if (row["arm"], row["labels"]) in tested:
            over.append(tested[row["arm"], row["labels"]])
            shown += f"; over test patients {over[1][0]:+.1f} to {over[1][1]:+.1f}"
        said.append(f"{what}: {points:+.1f} points ({shown}): {_verdict(over)}.")
    return said


def _verdict(over: Sequence[tuple[float, float]]) -> str:
    both = "both intervals lie" if len(over) > 1 else "the interval lies"
    if all(low > 0 for low, _ in over):
        return f"better, {both} above zero"
    if all(high < 0 for _, high in over):
        return f"worse, {both} below zero"
    if len(over) > 1 and not over[0][0] <= 0 <= over[0][1]:
        return "a difference on these test images, which other patients may not repeat: the second interval holds zero"
    return "no difference shown, the interval holds zero"


def write_results(path: Path, cells: Sequence[Cell]) -> None:
    """results.csv: a row a cell."""
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
    """A Markdown table of "mean" or "difference" of summary rows of one metric: an arm a line, with its interval."""
    counts = sorted({r["labels"] for r in rows})
    cell = {(r["arm"], r["labels"]): r for r in rows}
    half = "half" if key == "mean" else "difference_half"
    values = [[arm, *(_shown(cell.get((arm, n), {}), key, half, form) for n in counts)] for arm in arms]
    return markdown(["arm", *(f"{n:,} labels" for n in counts)], values)


def class_table(gains: Sequence[Row], share: Mapping[str, float]) -> str:
    """A Markdown table of `class_gains`: a class a line, rarest first, with its share of the training images."""
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
