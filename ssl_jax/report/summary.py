"""Writes the tables, figures and text of a study folder from its cells."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssl_jax.files import read_json, read_npz, write_bytes
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
from ssl_jax.run_folder import StudyFolder

PHANTOM = (
    "The images are phantoms, drawn by a program that knows nothing of disease. The numbers show that the study runs "
    "and how the methods do on these drawings; they say nothing about patients."
)


def write_tables(workdir: Path, cells: Sequence[Cell], baseline: str) -> list[Row]:
    """Writes results.csv, summary.csv and summary.md of the cells so far; returns the rows of summary.csv."""
    folder, cells = StudyFolder(workdir), _sorted(cells)
    rows = summarise(cells, baseline)
    write_results(folder.results, cells)
    write_csv(folder.summary_csv, rows)
    write_bytes(folder.summary_md, _summary(folder, cells, rows, baseline).encode())
    return rows


def write_all(workdir: Path, cells: Sequence[Cell], baseline: str) -> list[Row]:
    """Writes the tables again, then what needs every cell: gains by class, differences over patients, figures."""
    folder, cells = StudyFolder(workdir), _sorted(cells)
    rows, metric = write_tables(workdir, cells, baseline), main_metric(cells)
    about = read_json(folder.about, folder.again)
    share, prefix = about["share"], "Phantoms: " if about["phantom"] else ""
    arms = list(dict.fromkeys(cell["arm"] for cell in cells))
    class_metric = "recall" if metric == "top1" else "auc"
    gains = class_gains(cells, baseline, class_metric)
    gains.sort(key=lambda gain: (arms.index(gain["arm"]), gain["labels"], about["classes"].index(gain["class"])))
    if gains:
        write_csv(folder.classes, [gain | {"share": share[gain["class"]]} for gain in gains])
    patients = _patients(folder, cells, baseline)
    if patients:
        write_csv(folder.patients, patients)
        write_bytes(folder.summary_md, _summary(folder, cells, rows, baseline, patients).encode())
    figures.curve(rows, folder.curve, baseline=baseline, metric=metric, prefix=prefix)
    options: Any = {"baseline": baseline, "metric": class_metric, "share": share, "prefix": prefix}
    figures.gain_by_class(gains, folder.gain_by_class, **options)
    return rows


def _sorted(cells: Sequence[Cell]) -> list[Cell]:
    order = {arm: i for i, arm in enumerate(dict.fromkeys(cell["arm"] for cell in cells))}
    return sorted(cells, key=lambda cell: (order[cell["arm"]], cell["labels"], cell["seed"]))


def _patients(folder: StudyFolder, cells: Sequence[Cell], baseline: str) -> list[Row]:
    """Rows of `over_patients` for multi-label data. An image without a group counts as a patient of its own."""
    test = read_npz(folder.test, ("labels", "groups"), folder.again)
    if test["labels"].ndim == 1:
        return []
    scores: dict[tuple[str, int], list[np.ndarray]] = {}
    for cell in cells:
        path = folder.cell(cell["arm"], cell["labels"], cell["seed"]).with_suffix(".npz")
        scores.setdefault((cell["arm"], cell["labels"]), []).append(read_npz(path, ["scores"], folder.again)["scores"])
    stacked = {key: np.stack(each) for key, each in scores.items()}
    return over_patients(stacked, test["labels"], test["groups"], baseline)


def _summary(
    folder: StudyFolder, cells: Sequence[Cell], rows: Sequence[Row], baseline: str, patients: Sequence[Row] = ()
) -> str:
    """The text of summary.md."""
    about, metric = read_json(folder.about, folder.again), main_metric(cells)
    rows_of_metric = [row for row in rows if row["metric"] == metric]
    arms = list(dict.fromkeys(row["arm"] for row in rows_of_metric))
    others, seeds = [arm for arm in arms if arm != baseline], sorted({row["seeds"] for row in rows_of_metric})
    parts = [f"# Label efficiency{' on phantom images' if about['phantom'] else ''}"]
    if about["phantom"]:
        parts.append(PHANTOM)
    text = f"{figures.METRIC_NAMES[metric]} on the test set ({about['test_images']:,} images), in percent: mean over "
    text += f"{' or '.join(map(str, seeds))} seeds ± half the width of its 95 % interval (Student's t)."
    if left_out := cells[0]["scores"]["left_out"]:
        text += f" Left out, as the test images do not have both labels: {', '.join(left_out)}."
    parts += [text, table(rows_of_metric, "mean", ".1f", arms)]
    if others:
        parts += [
            f"Paired difference to {baseline}, in points. All arms share the labels of a seed, so the difference is "
            "more precise than either score.",
            table(rows_of_metric, "difference", "+.1f", others),
            _list(verdicts(rows, baseline, metric, patients)),
        ]
    if others and "top1" not in cells[0]["scores"]:
        parts += _classes(cells, baseline, about["share"])
    return "\n\n".join([*parts, _what_varies(about, patients)]) + "\n"


def _classes(cells: Sequence[Cell], baseline: str, share: Mapping[str, float]) -> list[str]:
    gains = class_gains(cells, baseline, "auc")
    if not gains:
        return []
    tendencies = []
    for row in rarity(cells, baseline, share):
        low, high = np.clip((row["correlation"] - row["half"], row["correlation"] + row["half"]), -1, 1)
        text = f"With {row['labels']:,} labels, {row['arm']}: {row['correlation']:+.2f}"
        if np.isnan(low):
            text += " on a single seed"
        elif low <= 0 <= high:
            text += f" ({low:+.2f} to {high:+.2f}): no tendency shown"
        else:
            text += f" ({low:+.2f} to {high:+.2f}): {'rare' if high < 0 else 'frequent'} classes gain more"
        tendencies.append(f"{text}.")
    return [
        f"Gain in ROC AUC over {baseline} by class, in points. Share: the training images that have the finding, among "
        "those whose label is known.",
        class_table(gains, share),
        "Rank correlation (Spearman) between the gain of a class and its share; below zero, rare classes gain more. "
        f"Mean over seeds and 95 % interval, for these {len({gain['class'] for gain in gains})} classes.",
        _list(tendencies),
    ]


def _list(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _what_varies(about: Mapping[str, Any], patients: Sequence[Row]) -> str:
    count = about["pretrainings"]
    parts = [
        "What the intervals cover: a seed draws the labels, the validation split, and the order and augmentation of "
        "training; when training from scratch, also the initial weights."
    ]
    if count == 1:
        parts.append(
            "A pretrained arm uses one encoder for all seeds, so the intervals do not cover the difference between "
            "pretraining runs."
        )
    else:
        parts.append(
            f"A pretrained arm has {count} encoders from separate pretrainings, which seeds use in turn, so the "
            "intervals cover their differences."
        )
        if count < about["seeds"]:
            parts.append(
                "Seeds that share an encoder are counted as independent, which makes the intervals somewhat too narrow."
            )
    if patients:
        parts.append(
            "The interval over test patients keeps the trained models and resamples the patients of the test set "
            "(bootstrap)."
        )
    return " ".join(parts)
