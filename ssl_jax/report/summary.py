"""Writes the tables, figures and text of a study folder from its cells."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssl_jax.files import read_json, read_npz, write_bytes, write_json
from ssl_jax.report import cautions, figures, tables, words
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


def write_tables(workdir: Path, cells: Sequence[Cell], baseline: str, references: Sequence[Cell] = ()) -> list[Row]:
    """Writes results.csv, summary.csv, references.csv, cautions.json and summary.md of the cells so far; returns the
    rows of summary.csv. references: cells whose arm is the name of a reference."""
    folder, cells = StudyFolder(workdir), _sorted(cells)
    rows = summarise(cells, baseline)
    write_results(folder.results, cells)
    write_csv(folder.summary_csv, rows)
    if references:
        write_csv(folder.references_csv, [_reference(row) for row in summarise(_sorted(references), "")])
    write_bytes(folder.summary_md, _summary(folder, cells, rows, baseline, references=references).encode())
    return rows


def _reference(row: Row) -> Row:
    return {"reference": row["arm"], **{key: row[key] for key in ("labels", "metric", "seeds", "mean", "half")}}


def write_all(workdir: Path, cells: Sequence[Cell], baseline: str, references: Sequence[Cell] = ()) -> list[Row]:
    """Writes the tables again, then what needs every cell: gains by class, differences over patients, figures."""
    folder, cells = StudyFolder(workdir), _sorted(cells)
    rows, metric = write_tables(workdir, cells, baseline, references), main_metric(cells)
    about = read_json(folder.about, folder.again)
    share, prefix = about["share"], "Phantoms: " if about["phantom"] else ""
    arms = list(dict.fromkeys(cell["arm"] for cell in cells))
    class_metric = tables.class_metric(metric)
    gains = class_gains(cells, baseline, class_metric)
    gains.sort(key=lambda gain: (arms.index(gain["arm"]), gain["labels"], about["classes"].index(gain["class"])))
    if gains:
        write_csv(folder.classes, [gain | {"share": share[gain["class"]]} for gain in gains])
    patients = _patients(folder, cells, baseline)
    if patients:
        write_csv(folder.patients, patients)
        write_bytes(folder.summary_md, _summary(folder, cells, rows, baseline, patients, references).encode())
    beside = summarise(_sorted(references), "")
    figures.curve(
        rows, folder.curve, baseline=baseline, metric=metric, prefix=prefix, references=beside, shared=_shared(about)
    )
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
    folder: StudyFolder,
    cells: Sequence[Cell],
    rows: Sequence[Row],
    baseline: str,
    patients: Sequence[Row] = (),
    references: Sequence[Cell] = (),
) -> str:
    """The text of summary.md. Writes cautions.json, too."""
    about, metric = read_json(folder.about, folder.again), main_metric(cells)
    rows_of_metric = [row for row in rows if row["metric"] == metric]
    arms = list(dict.fromkeys(row["arm"] for row in rows_of_metric))
    others, seeds = [arm for arm in arms if arm != baseline], sorted({row["seeds"] for row in rows_of_metric})
    parts = [f"# Label efficiency{' on phantom images' if about['phantom'] else ''}"]
    if about["phantom"]:
        parts.append(PHANTOM)
    text = f"{words.title(metric)} on the test set ({about['test_images']:,} images), in percent: mean over "
    text += f"{' or '.join(map(str, seeds))} seeds ± half the width of its 95 % interval (Student's t)."
    if left_out := cells[0]["scores"]["left_out"]:
        text += f" Left out, as the test images do not have both labels: {', '.join(left_out)}."
    beside = [row for row in summarise(_sorted(references), "") if row["metric"] == metric]
    names = list(dict.fromkeys(row["arm"] for row in beside))
    if names:
        text += f" Below the arms, from {names[0]} on: what costs nothing, on the same labels."
    parts += [text, table([*rows_of_metric, *beside], "mean", ".1f", [*arms, *names]), _figures(metric, others)]
    short, above = cautions.undertrained(cells, references, metric), cautions.margins(cells, references, metric)
    means = {(row["arm"], row["labels"]): row["mean"] for row in rows_of_metric}
    if others:
        parts += [
            f"Paired difference to {baseline}, in points. {_drawn(about)} " + _sharper(rows_of_metric, baseline),
            table(rows_of_metric, "difference", "+.1f", others),
            _list(verdicts(rows, baseline, metric, patients, short)),
        ]
    if told := cautions.sentences(short, above, means):
        parts += ["Before you trust these numbers:", _list(told)]
    write_json(folder.cautions, cautions.to_json(short, above, means))
    if others and "top1" not in cells[0]["scores"]:
        parts += _classes(cells, baseline, about["share"])
    return "\n\n".join([*parts, _what_varies(about, patients)]) + "\n"


def _figures(metric: str, others: Sequence[str]) -> str:
    """What the table's score means, and what the figures show."""
    word, by_class = words.SCORES[metric], words.SCORES[tables.class_metric(metric)]
    text = f"{word.title}: {word.meaning}. curve.png draws this score."
    if others:
        about = "about " if metric == "top1" else ""
        text += f" gain_by_class.png shows the gain in {by_class.title} of each class ({by_class.meaning}), "
        text += f"whose mean over classes is {about}the difference below."
    return text


def _shared(about: Mapping[str, Any]) -> bool:
    """Whether all arms have the same labels; an older study says nothing of its draws."""
    draws = set(about.get("draws", {}).values())
    return draws in (set(), {"stratified"}, {"random"})


def _drawn(about: Mapping[str, Any]) -> str:
    """How labels were drawn, in words."""
    draws = about.get("draws", {})
    if _shared(about):
        text = "All arms share the labels of a seed."
    else:
        ways = ", ".join(f"{arm} {draw}" for arm, draw in draws.items())
        text = f"All arms have as many labels in a seed, but not the same ones ({ways}). What is neither random nor "
        text += "stratified, an arm has chosen with its own encoder."
    if "stratified" not in draws.values():
        return text
    return f"{text} Stratified draws use labels that nobody has before labelling: scores are somewhat too good."


def _sharper(rows: Sequence[Row], baseline: str) -> str:
    """Whether sharing labels makes the difference more certain than the scores. Often it does, but not always."""
    known = {(row["arm"], row["labels"]) for row in rows if row["difference_half"] is not None}
    if not known:
        return "With a single seed, nothing is known about how certain it is."
    found = tables.sharper(rows, baseline)
    if sum(map(len, found.values())) == len(known):
        return "The difference is known better than either score."
    if not found:
        return "Here the difference is not known better than the scores."
    where = "; ".join(f"{arm} with {', '.join(f'{n:,}' for n in counts)} labels" for arm, counts in found.items())
    return f"The difference is known better than either score for {where}, and not for the others."


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
    if runs := about.get("from"):
        where = ", ".join(f"{arm} from {path}" for arm, path in runs.items())
        parts.append(f"Taken from finished runs, each with one encoder for all seeds: {where}.")
        if count > 1:
            parts.append("Their intervals do not cover the difference between pretraining runs.")
    if patients:
        parts.append(
            "The interval over test patients keeps the trained models and resamples the patients of the test set "
            "(bootstrap)."
        )
    return " ".join(parts)
