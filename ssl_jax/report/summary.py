"""The tables, figures and words of a study folder, from its cells."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssl_jax.files import read_json, write_bytes
from ssl_jax.report import figures
from ssl_jax.report.tables import (
    Cell,
    Row,
    class_gains,
    class_table,
    main_metric,
    over_patients,
    rarity,
    summarise,
    table,
    verdicts,
    write_csv,
    write_results,
)

PHANTOM = (
    "The images are phantoms: drawn by a program, which knows nothing of disease. The numbers tell how the methods do "
    "on these drawings, and that the study runs; about patients they tell nothing."
)


def write_tables(workdir: Path, cells: Sequence[Cell], baseline: str) -> list[Row]:
    """results.csv, summary.csv and summary.md of the cells so far; returns the rows of summary.csv."""
    cells, rows = _sorted(cells), summarise(_sorted(cells), baseline)
    write_results(workdir / "results.csv", cells)
    write_csv(workdir / "summary.csv", rows)
    write_bytes(workdir / "summary.md", _in_words(workdir, cells, rows, baseline).encode())
    return rows


def write_all(workdir: Path, cells: Sequence[Cell], baseline: str) -> list[Row]:
    """The tables again, with those that need every cell: gains by class, differences over patients; the figures."""
    cells, about = _sorted(cells), read_json(workdir / "study.json")
    rows, metric, share = write_tables(workdir, cells, baseline), main_metric(cells), about["share"]
    arms = list(dict.fromkeys(c["arm"] for c in cells))
    prefix = "Phantoms: " if about["phantom"] else ""
    by_class = "recall" if metric == "top1" else "auc"
    gains, patients = class_gains(cells, baseline, by_class), _patients(workdir, cells, baseline)
    gains.sort(key=lambda g: (arms.index(g["arm"]), g["labels"], about["classes"].index(g["class"])))
    if gains:
        write_csv(workdir / "classes.csv", [g | {"share": share[g["class"]]} for g in gains])
    if patients:
        write_csv(workdir / "patients.csv", patients)
        words = _in_words(workdir, cells, rows, baseline, patients)
        write_bytes(workdir / "summary.md", words.encode())
    figures.curve(rows, workdir / "curve.png", baseline=baseline, metric=metric, prefix=prefix)
    path = workdir / "gain_by_class.png"
    figures.gain_by_class(gains, path, baseline=baseline, metric=by_class, share=share, prefix=prefix)
    return rows


def _sorted(cells: Sequence[Cell]) -> list[Cell]:
    order = {arm: i for i, arm in enumerate(dict.fromkeys(c["arm"] for c in cells))}
    return sorted(cells, key=lambda c: (order[c["arm"]], c["labels"], c["seed"]))


def _patients(workdir: Path, cells: Sequence[Cell], baseline: str) -> list[Row]:
    """Rows of `over_patients`, for multi-label data; groups of the test images, or each image by itself."""
    test = np.load(workdir / "test.npz")
    if test["labels"].ndim == 1:
        return []
    scores: dict[tuple[str, int], Any] = {}
    for cell in cells:
        path = workdir / "cells" / cell["arm"] / str(cell["labels"]) / f"{cell['seed']}.npz"
        scores.setdefault((cell["arm"], cell["labels"]), []).append(np.load(path)["scores"])
    stacked = {key: np.stack(each) for key, each in scores.items()}
    return over_patients(stacked, test["labels"], test["groups"], baseline)


def _in_words(
    workdir: Path, cells: Sequence[Cell], rows: Sequence[Row], baseline: str, patients: Sequence[Row] = ()
) -> str:
    about, metric = read_json(workdir / "study.json"), main_metric(cells)
    mine = [row for row in rows if row["metric"] == metric]
    arms = list(dict.fromkeys(r["arm"] for r in mine))
    others, seeds = [a for a in arms if a != baseline], sorted({r["seeds"] for r in mine})
    parts = [f"# Label efficiency{' on phantom images' if about['phantom'] else ''}"]
    if about["phantom"]:
        parts.append(PHANTOM)
    test = f"the test set ({about['test_images']:,} images)"
    left_out = cells[0]["scores"]["left_out"]
    parts += [
        f"{figures.METRIC_NAMES[metric]} on {test}, %: mean over seeds ± half of its 95 % interval (Student's t; "
        f"{' or '.join(map(str, seeds))} seeds)."
        + (f" Left out, as the test images do not have both labels: {', '.join(left_out)}." if left_out else ""),
        table(mine, "mean", ".1f", arms),
    ]
    if others:
        parts += [
            f"Paired difference to {baseline}, points. Arms share the labels of a seed, so the difference is known "
            "better than either score.",
            table(mine, "difference", "+.1f", others),
            "\n".join(verdicts(rows, baseline, metric, patients)),
        ]
    if others and "top1" not in cells[0]["scores"]:
        parts += _classes(cells, baseline, about["share"])
    return "\n\n".join([*parts, _what_varies(about, patients)]) + "\n"


def _classes(cells: Sequence[Cell], baseline: str, share: Mapping[str, float]) -> list[str]:
    gains = class_gains(cells, baseline, "auc")
    if not gains:
        return []
    parts = [
        f"Gain in ROC AUC by class over {baseline}, points. Share: of the training images whose label is known, those "
        "that have the finding.",
        class_table(gains, share),
    ]
    said = []
    for row in rarity(cells, baseline, share):
        low, high = np.clip((row["correlation"] - row["half"], row["correlation"] + row["half"]), -1, 1)
        what = f"With {row['labels']:,} labels, {row['arm']}: {row['correlation']:+.2f}"
        if np.isnan(low):
            verdict = ", on one seed"
        elif low <= 0 <= high:
            verdict = f" ({low:+.2f} to {high:+.2f}): no such tendency is shown"
        else:
            verdict = f" ({low:+.2f} to {high:+.2f}): {'rare' if high < 0 else 'frequent'} classes gain more"
        said.append(f"{what}{verdict}.")
    head = "Rank correlation of a class's gain with its share (Spearman; below zero: rare classes gain more), "
    head += f"mean over seeds with its 95 % interval, for these {len({g['class'] for g in gains})} classes."
    return [*parts, head, "\n".join(said)]


def _what_varies(about: Mapping[str, Any], patients: Sequence[Row]) -> str:
    words = (
        "A seed draws the labels, the validation split and the order and augmentation of training; from scratch, also "
        "the initial weights. "
    )
    count = about["pretrainings"]
    if count == 1:
        words += "A pretrained arm has one encoder for all seeds: how much another pretraining run would differ is not "
        words += "part of these intervals."
    else:
        words += f"A pretrained arm has {count} encoders, each from a pretraining of its own, and seeds take turns: "
        words += "how much these differ is part of the intervals"
        shared = "; seeds that share an encoder are counted as if independent, so with fewer pretrainings than seeds "
        words += f"{shared}the intervals are somewhat too narrow." if count < about["seeds"] else "."
    if patients:
        words += " The interval over test patients keeps the trained models and draws the patients of the test set "
        words += "anew (bootstrap)."
    return words
