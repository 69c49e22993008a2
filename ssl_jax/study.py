"""The label-efficiency study: arms x label counts x seeds, every arm on the same draw of labels.

    cells/<arm>/<labels>/<seed>.json   scores, choices, key          ... .npz   test scores, indices of the labels
    config.json, study.json            options; classes and their frequencies       test.npz   labels of the test images
    results.csv   one row a cell                                     summary.csv, summary.md   means and differences
    curve.png     score against label count                          gain_by_class.png

A cell that is finished stays finished until something that it depends on changes: its `key` is a hash of all of that.
"""

import csv
import dataclasses
import hashlib
import io
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from ssl_jax.config import Config, Finetune, merge, to_json
from ssl_jax.errors import UserError, unknown
from ssl_jax.evaluate.finetune import finetune, predict
from ssl_jax.evaluate.linear import linear_probe
from ssl_jax.evaluate.metrics import interval, metrics, paired
from ssl_jax.evaluate.subsets import nested_subset
from ssl_jax.run import write_bytes, write_json, write_npz

if TYPE_CHECKING:
    from ssl_jax.data.source import Source
    from ssl_jax.encoder import Encoder

METRICS = ("top1", "balanced_accuracy", "macro_auc", "top5")
VERSION = 1  # of what a cell does; raise it when a change to the code changes its numbers
Cell = dict[str, Any]
Row = dict[str, Any]


def from_scratch(changes: Mapping[str, Any]) -> bool:
    """Whether an arm starts from random initialisation: it changes nothing, or nothing but how it is fine-tuned."""
    return set(changes) <= {"finetune"}


def run_study(
    config: Config,
    workdir: Path,
    *,
    get_encoder: Callable[[str, Config, int], "Encoder"],
    train: "Source",
    test: "Source",
    log: Callable[[str], None],
) -> list[Row]:
    """Runs every cell of config.study that is not finished in `workdir`, and returns the rows of summary.csv.

    get_encoder(arm, config of the arm, seed): called once for an arm that pretrains, and once a seed for one that
    starts from scratch. train and test: sources with labels; labels are drawn from train, scores are on all of test.
    log: receives a line a cell.

    Seeds are the outermost loop, so that paired differences of all arms are there early; tables are written after
    each seed, figures at the end. A study that is killed and started again writes the same tables, byte for byte.
    """
    study, workdir = config.study, Path(workdir)
    if (workdir / "checkpoints").exists():
        raise UserError(f"--workdir={workdir}: holds a pretraining run; allowed: a new folder, or that of a study")
    arms = {arm: merge(config, changes) for arm, changes in study.arms.items()}
    if study.baseline not in arms:
        raise unknown("config.study.baseline", study.baseline, arms)
    train.labels_as(train.classes, "config.data")
    test, test_labels = _labelled(train, test)
    draws = _draw(train, study.labels, study.seeds)
    used = np.unique(np.concatenate(list(draws.values())))
    images, labels = train.take(used).arrays(), np.asarray(train.labels)[used]
    test_images = test.arrays()
    _write_about(config, workdir, train, test_labels)

    pretrained = {a: get_encoder(a, c, 0) for a, c in arms.items() if not from_scratch(study.arms[a])}
    same = {"test": _digest(test_images, test_labels), "classes": train.classes, "protocol": study.protocol}
    features = _Features(test_images)
    cells: list[Cell] = []
    clock = _Clock(len(arms) * len(study.labels) * study.seeds)
    for seed in range(study.seeds):
        fresh = {a: get_encoder(a, c, seed) for a, c in arms.items() if from_scratch(study.arms[a])}
        digests = {arm: _encoder_digest(encoder) for arm, encoder in {**pretrained, **fresh}.items()}
        for count in study.labels:
            at = np.searchsorted(used, draws[count, seed])
            drawn = {"labels": _digest(draws[count, seed], images[at], labels[at])}
            for arm, arm_config in arms.items():
                settings = _settings(arm_config, from_scratch(study.arms[arm]))
                how = None if study.protocol == "linear" else dataclasses.asdict(settings)
                key = _key({**same, **drawn, "seed": seed, "settings": how, "encoder": digests[arm]})
                path = workdir / "cells" / arm / str(count) / f"{seed}.json"
                cell = _finished(path, key)
                note = "reused"
                if cell is None:
                    began = time.monotonic()
                    encoder = pretrained.get(arm) or fresh[arm]
                    given = (encoder, images[at], labels[at], len(train.classes), seed)
                    if study.protocol == "linear":
                        scores, chosen = _linear(*given, features.of(digests[arm], encoder))
                    else:
                        scores, chosen = _finetune(*given, settings, test_images)
                    cell = {"arm": arm, "labels": count, "seed": seed, "key": key, "chosen": chosen}
                    cell |= {"scores": metrics(scores, test_labels, train.classes)}
                    cell |= {"seconds": round(time.monotonic() - began, 1)}
                    _save(path, cell, scores, draws[count, seed])
                    note = clock.tick(cell["seconds"])
                else:
                    clock.skip()
                cells.append(cell)
                log(f"{clock}  {arm}, {count} labels, seed {seed}: top-1 {cell['scores']['top1']:.4f}  ({note})")
        rows = write_tables(workdir, cells, study.baseline)
    write_figures(workdir, cells, rows, study.baseline)
    return rows


def _settings(config: Config, scratch: bool) -> Finetune:
    """A random encoder has neither features to probe nor statistics to freeze."""
    return dataclasses.replace(config.finetune, head="zero", batch_norm="train") if scratch else config.finetune


def _finetune(encoder, images, labels, classes, seed, settings, test_images):
    made = finetune(encoder, images, labels, classes=classes, settings=settings, seed=seed)
    return predict(made, test_images), made.chosen


def _linear(encoder, images, labels, classes, seed, test_features):
    probe = linear_probe(encoder.embed(images), labels, classes=classes, seed=seed)
    return probe.scores(test_features), {"strength": probe.strength, "validation": probe.validation}


class _Features:
    """Embeddings of the test images, computed once an encoder."""

    def __init__(self, images: np.ndarray):
        self.images, self.known = images, dict[str, np.ndarray]()

    def of(self, digest: str, encoder: "Encoder") -> np.ndarray:
        if digest not in self.known:
            self.known[digest] = encoder.embed(self.images)
        return self.known[digest]


class _Clock:
    """How far the study is: "[12/40]", and from the cells made so far when it will end."""

    def __init__(self, total: int):
        self.total, self.done, self.made, self.seconds = total, 0, 0, 0.0

    def __str__(self) -> str:
        return f"[{self.done}/{self.total}]"

    def skip(self) -> None:
        self.done += 1

    def tick(self, seconds: float) -> str:
        self.done, self.made, self.seconds = self.done + 1, self.made + 1, self.seconds + seconds
        left = self.seconds / self.made * (self.total - self.done)
        return f"{seconds:.0f} s; left {time.strftime('%H:%M:%S', time.gmtime(left))}"


# What a cell depends on.


def _draw(train: "Source", counts: Sequence[int], seeds: int) -> dict[tuple[int, int], np.ndarray]:
    if not counts:
        raise UserError("config.study.labels: empty; allowed: at least one label count")
    most = int((np.asarray(train.labels) >= 0).sum())
    if not 1 <= min(counts) <= max(counts) <= most:
        raise UserError(f"config.study.labels={tuple(counts)}: allowed: 1 to {most}, the labelled images there are")
    return {(n, seed): nested_subset(np.asarray(train.labels), n, seed) for n in counts for seed in range(seeds)}


def _labelled(train: "Source", test: "Source") -> tuple["Source", np.ndarray]:
    """The test images that have a label, and these labels as numbers of train's classes."""
    labels = test.labels_as(train.classes, "config.study.test")
    known = np.flatnonzero(labels >= 0)
    return test.take(known), labels[known]


def _digest(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        array = np.ascontiguousarray(array)
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(array)
    return digest.hexdigest()


def _encoder_digest(encoder: "Encoder") -> str:
    leaves, structure = jax.tree.flatten((encoder.params, encoder.stats))
    # As JSON, in which an encoder loaded from disk says the same of itself as one just trained.
    about = json.dumps([str(structure), encoder.size, encoder.channels, encoder.about.get("model")], sort_keys=True)
    return hashlib.sha256((about + _digest(*map(np.asarray, leaves))).encode()).hexdigest()


def _key(parts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps({"version": VERSION, **parts}, sort_keys=True).encode()).hexdigest()


def _finished(path: Path, key: str) -> Cell | None:
    """The cell at `path` if its inputs were those of `key`."""
    try:
        cell = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return cell if cell.get("key") == key and path.with_suffix(".npz").exists() else None


def _save(path: Path, cell: Cell, scores: np.ndarray, indices: np.ndarray) -> None:
    """The .json is written last: where it is, the cell is complete."""
    path.unlink(missing_ok=True)
    write_npz(path.with_suffix(".npz"), scores=scores.astype(np.float32), indices=indices)
    write_json(path, cell)


def _write_about(config: Config, workdir: Path, train: "Source", test_labels: np.ndarray) -> None:
    known = np.asarray(train.labels)
    count = len(train.classes)
    write_npz(workdir / "test.npz", labels=test_labels, classes=np.array(train.classes))
    about = {"classes": train.classes}
    about |= {"train_counts": np.bincount(known[known >= 0], minlength=count).tolist()}
    about |= {"test_counts": np.bincount(test_labels, minlength=count).tolist()}
    write_json(workdir / "config.json", to_json(config))
    write_json(workdir / "study.json", about)


# What the cells say together.


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


def main_metric(cells: Sequence[Cell]) -> str:
    """top1 where every class is about equally frequent in the test set, else balanced_accuracy."""
    support = [n for n in cells[0]["scores"]["support"].values() if n]
    return "top1" if max(support) <= 1.5 * min(support) else "balanced_accuracy"


def verdicts(rows: Sequence[Row], baseline: str, metric: str) -> list[str]:
    """One sentence an arm and label count: whether the interval of its paired difference lies above zero."""
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
        low, high = points - 100 * row["difference_half"], points + 100 * row["difference_half"]
        if low > 0:
            verdict = "better, the interval lies above zero"
        elif high < 0:
            verdict = "worse, the interval lies below zero"
        else:
            verdict = "no difference shown, the interval holds zero"
        said.append(f"{what}: {points:+.1f} points (95 % interval {low:+.1f} to {high:+.1f}): {verdict}.")
    return said


def write_tables(workdir: Path, cells: Sequence[Cell], baseline: str) -> list[Row]:
    """results.csv, summary.csv and summary.md; returns the rows of summary.csv."""
    order = {arm: i for i, arm in enumerate(dict.fromkeys(c["arm"] for c in cells))}
    cells = sorted(cells, key=lambda c: (order[c["arm"]], c["labels"], c["seed"]))
    chosen = sorted({k for c in cells for k in c["chosen"] if k != "trials"})
    numbers = [m for m in METRICS if m in cells[0]["scores"]]
    table = [
        [c["arm"], c["labels"], c["seed"], *(c["scores"][m] for m in numbers), *(c["chosen"].get(k) for k in chosen)]
        for c in cells
    ]
    _write_csv(workdir / "results.csv", ["arm", "labels", "seed", *numbers, *chosen], table)
    rows = summarise(cells, baseline)
    _write_csv(workdir / "summary.csv", list(rows[0]), [list(row.values()) for row in rows])
    write_bytes(workdir / "summary.md", _in_words(rows, baseline, main_metric(cells)).encode())
    return rows


def _write_csv(path: Path, header: list[str], table: list[list[Any]]) -> None:
    text = io.StringIO()
    shown = [[f"{v:.6g}" if isinstance(v, float) else v for v in row] for row in table]
    csv.writer(text, lineterminator="\n").writerows([header, *shown])
    write_bytes(path, text.getvalue().encode())


def _in_words(rows: Sequence[Row], baseline: str, metric: str) -> str:
    from ssl_jax.report.figures import METRIC_NAMES

    mine = [row for row in rows if row["metric"] == metric]
    arms, counts = list(dict.fromkeys(r["arm"] for r in mine)), sorted({r["labels"] for r in mine})
    cell = {(r["arm"], r["labels"]): r for r in mine}

    def shown(mean, half, form):
        if mean is None:
            return "–"
        return format(100 * mean, form) + (f" ± {100 * half:.1f}" if half is not None else "")

    def table(key, form, wanted):
        lines = [f"| arm | {' | '.join(f'{n:,} labels' for n in counts)} |", "|---" * (len(counts) + 1) + "|"]
        for arm in wanted:
            values = [cell.get((arm, n), {}) for n in counts]
            half = "half" if key == "mean" else "difference_half"
            lines.append(f"| {arm} | {' | '.join(shown(v.get(key), v.get(half), form) for v in values)} |")
        return "\n".join(lines)

    others = [a for a in arms if a != baseline]
    seeds = sorted({r["seeds"] for r in mine})
    parts = [
        "# Label efficiency",
        f"{METRIC_NAMES[metric]} on the test set, %: mean over seeds ± half of its 95 % interval (Student's t; "
        f"{' or '.join(map(str, seeds))} seeds).",
        table("mean", ".1f", arms),
    ]
    if others:
        parts += [
            f"Paired difference to {baseline}, points. Arms share the labels of a seed, so the difference is known "
            "better than either score.",
            table("difference", "+.1f", others),
            "\n".join(verdicts(rows, baseline, metric)),
        ]
    parts.append(
        "A seed draws the labels, the validation split and the order and augmentation of training; from scratch, also "
        "the initial weights. A pretrained arm has one encoder for all seeds: how much another pretraining run would "
        "differ is not part of these intervals."
    )
    return "\n\n".join(parts) + "\n"


def write_figures(workdir: Path, cells: Sequence[Cell], rows: Sequence[Row], baseline: str) -> None:
    """curve.png and gain_by_class.png."""
    from ssl_jax.report.figures import curve, gain_by_class

    about = json.loads((workdir / "study.json").read_text())
    metric = main_metric(cells)
    curve(rows, workdir / "curve.png", baseline=baseline, metric=metric)
    frequency = dict(zip(about["classes"], about["train_counts"], strict=True))
    by_class = "recall" if metric == "top1" else "auc"
    gains = class_gains(cells, baseline, by_class)
    gain_by_class(gains, workdir / "gain_by_class.png", baseline=baseline, metric=by_class, frequency=frequency)


def class_gains(cells: Sequence[Cell], baseline: str, metric: str) -> list[Row]:
    """Rows of arm x labels x class: gain (paired difference to `baseline` in a class's recall or auc) and its half."""
    found = {(c["arm"], c["labels"], c["seed"]): c["scores"][metric] for c in cells}
    arms = [a for a in dict.fromkeys(c["arm"] for c in cells) if a != baseline]
    rows = []
    for arm, count in ((a, n) for a in arms for n in sorted({c["labels"] for c in cells})):
        pairs = [
            (found[arm, count, seed], found[baseline, count, seed])
            for seed in sorted({c["seed"] for c in cells})
            if (arm, count, seed) in found and (baseline, count, seed) in found
        ]
        for name in pairs[0][0] if pairs else ():
            gain, half = paired([a[name] for a, _ in pairs], [b[name] for _, b in pairs])
            rows.append({"arm": arm, "labels": count, "class": name, "gain": gain, "half": half})
    return rows
