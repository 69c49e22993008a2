"""`ssl-jax compare`: runs beside each other: their options, curves, and scores on the same test images."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ssl_jax import files
from ssl_jax.errors import UserError
from ssl_jax.evaluate.uncertainty import bootstrap_by_group, class_aucs
from ssl_jax.report import plots, words
from ssl_jax.report.page import fold, note, page, table
from ssl_jax.report.record import RunRecord, read_run
from ssl_jax.report.reproduction import flat
from ssl_jax.run_folder import RunFolder, named_as_today

REPEATS = 1000  # of the bootstrap over test images
HEAD = ("run", "evaluation", "score of", "score", "difference (95 % interval)", "")
AGAIN = "its `ssl-jax evaluate` command makes it anew"


class Evaluated(NamedTuple):
    """One evaluation of a run. about: its .json file. scores [S, N, K] of S draws of labels; labels [N] or [N, K];
    groups [N]: patients, or the number of each image."""

    about: dict[str, Any]
    scores: np.ndarray
    labels: np.ndarray
    groups: np.ndarray
    images: str  # digest of the names and labels of the test images


class Row(NamedTuple):
    """The score of a run and its difference to the first run's, with the 95 % interval over the test images.

    of: the class, if it is the score of one; "" for all images. None for the first run, which has no difference, and
    where there is no such number.
    """

    run: str
    protocol: str
    labels: str
    metric: str
    of: str
    score: float | None
    difference: float | None
    low: float | None
    high: float | None


def compare(runs: Sequence[str], out: str = "compare.html") -> dict[str, Any]:
    """Prints the scores of runs beside each other and writes a page. Returns what the page's tables hold.

    Two evaluations belong together if they have the same protocol, number of labels, test images and labels. Raises
    UserError if there are fewer than two runs or none of their evaluations belong together.
    """
    if len(runs) < 2:
        raise UserError(f"compare: {len(runs)} run folder; write two or more: ssl-jax compare runs/a runs/b")
    if len(set(runs)) < len(runs):
        raise UserError("compare: a run is named twice; allowed: different ones")
    path = Path(out)
    if path.suffix != ".html":
        raise UserError(f"--out={out}: unknown ending {path.suffix!r}; allowed: .html")
    records = {name: read_run(RunFolder(name)) for name in runs}
    changed = differences({name: record.config for name, record in records.items()})
    evaluated = {name: _evaluations(RunFolder(name)) for name in runs}
    rows, apart = scores(evaluated)
    if not rows:
        raise UserError(
            f"compare: no evaluation on the same test images in two of the runs{f' ({apart[0]})' if apart else ''}; "
            "run ssl-jax evaluate with the same --protocol, --labels and --test for each of them"
        )
    text = _print(runs, changed, rows, apart)
    files.write_bytes(path, _page(records, changed, rows, apart).encode("utf-8", "backslashreplace"))
    print(f"{text}\npage: {path}")
    options = {key: dict(zip(runs, values, strict=True)) for key, values in changed.items()}
    return {"runs": list(runs), "options": options, "scores": [row._asdict() for row in rows], "left_out": apart}


def differences(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """Option -> its value in each run, as JSON, of the options that are not the same everywhere; "–": not there."""
    flats = [flat(config) for config in configs.values()]
    keys = dict.fromkeys(key for each in flats for key in each)
    values = {key: [each.get(key, "–") for each in flats] for key in keys}
    return {key: each for key, each in values.items() if len(set(each)) > 1}


def _evaluations(folder: RunFolder) -> list[Evaluated]:
    """Those of a run, sorted by name; the shortest first, which is that under the run's own conditions."""
    found = []
    for path in sorted(folder.evaluation.glob("*.json"), key=lambda p: (len(p.name), p.name)):
        arrays = path.with_suffix(".npz")
        if not arrays.is_file():
            continue
        about = named_as_today(files.read_json(path, AGAIN))
        try:
            with np.load(arrays, allow_pickle=False) as file:
                scores, labels, names = file["scores"], file["labels"], file["names"]
                groups = file["groups"] if "groups" in file.files else np.arange(len(labels))
        except Exception as error:  # numpy raises anything from KeyError to zlib.error on bad bytes
            raise UserError(f"{arrays}: damaged; {AGAIN}") from error
        digest = hashlib.sha256("\n".join([*names.tolist(), *about["classes"]]).encode("utf-8", "backslashreplace"))
        digest.update(np.ascontiguousarray(labels).tobytes())
        found.append(Evaluated(about, scores, labels, groups, digest.hexdigest()))
    return found


def scores(evaluated: Mapping[str, Sequence[Evaluated]]) -> tuple[list[Row], list[str]]:
    """(rows, sentences about what could not be compared). evaluated: run -> its evaluations, in order."""
    rows, apart = [], []
    kinds = dict.fromkeys((e.about["protocol"], str(e.about["labels"])) for each in evaluated.values() for e in each)
    for protocol, count in kinds:
        of_kind = {
            run: [e for e in each if (e.about["protocol"], str(e.about["labels"])) == (protocol, count)]
            for run, each in evaluated.items()
        }
        base: tuple[str, Evaluated] | None = None
        for run, each in of_kind.items():
            same = next((e for e in each if base is None or e.images == base[1].images), None)
            if same is not None:
                base = base or (run, same)
                rows += _rows(run, same, None if base[0] == run else base[1])
            elif base:
                why = "tested on other images" if each else "not there"
                apart.append(f"{run}: {protocol} with {count} labels is {why}, so it is left out")
        if base and not any(r.run != base[0] and (r.protocol, r.labels) == (protocol, count) for r in rows):
            rows = [row for row in rows if (row.protocol, row.labels) != (protocol, count)]
    return rows, apart


def _rows(run: str, evaluation: Evaluated, base: Evaluated | None) -> list[Row]:
    """The row of the metric that the evaluation is judged by, and those of the classes."""
    about, labels = evaluation.about, evaluation.labels
    classes, metric = about["classes"], about["metric"]
    every = np.arange(len(labels))
    own = _statistic(evaluation.scores, labels, metric, every)
    none = np.full(len(own), np.nan)
    difference, low, high = none, none, none
    if base is not None:

        def gain(index: np.ndarray) -> np.ndarray:
            mine, theirs = (_statistic(e.scores, labels, metric, index) for e in (evaluation, base))
            return mine - theirs

        difference = gain(every)
        low, high = bootstrap_by_group(gain, evaluation.groups, REPEATS)
    columns = [[None if np.isnan(v) else float(v) for v in values] for values in (own, difference, low, high)]
    names = ["", *classes]
    single = "auc" if metric == "macro_auc" else "recall"
    kinds = [metric, *[single] * len(classes)]
    key = run, about["protocol"], str(about["labels"])
    return [Row(*key, kind, name, *values) for kind, name, *values in zip(kinds, names, *columns, strict=True)]


def _statistic(scores: np.ndarray, labels: np.ndarray, metric: str, index: np.ndarray) -> np.ndarray:
    """The metric and the score of each class, float [1 + K], of scores [S, N, K] on the images `index`; means over S.

    The score of a class is its AUC if the metric is macro_auc, else its recall; nan where there is none.
    """
    chosen = labels[index]
    if chosen.ndim == 2:
        each = np.array([class_aucs(score[index], chosen) for score in scores])
        aucs = each.mean(axis=0)
        return np.append(aucs[~np.isnan(aucs)].mean() if not np.isnan(aucs).all() else np.nan, aucs)
    classes = scores.shape[2]
    total = np.bincount(chosen, minlength=classes)
    right = np.mean(scores[:, index].argmax(axis=2) == chosen, axis=0)
    hits = np.bincount(chosen, weights=right, minlength=classes)
    recall = np.divide(hits, total, out=np.full(classes, np.nan), where=total > 0)
    whole = hits.sum() / total.sum() if metric == "top1" else np.nanmean(recall)
    return np.append(whole, recall)


def judged(row: Row) -> str:
    """What the interval says, in words."""
    if row.low is None or row.high is None:
        return ""
    return "better" if row.low > 0 else "worse" if row.high < 0 else "unclear"


def _print(runs: Sequence[str], changed: Mapping[str, Sequence[str]], rows: Sequence[Row], apart: Sequence[str]) -> str:
    """Prints the tables; returns the lines below them."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

    console = Console()
    options = Table("option", *map(escape, runs), box=None, pad_edge=False)
    for key, values in changed.items():
        options.add_row(key, *map(escape, values))
    columns = [Column(head, no_wrap=head != "run", overflow="fold") for head in HEAD]
    found = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        if not row.of:
            found.add_row(*map(escape, _cells(row)))
    console.print(options if changed else "the configs are the same")
    console.print()
    console.print(found)
    text = f"difference: to {runs[0]}, or the first run that has such an evaluation, with its 95 % interval over the "
    lines = [*apart, f"{text}test images; the draws of labels are as they are"]
    for word in ("better", "worse"):
        told = [row for row in rows if row.of and judged(row) == word]
        if told:
            each = (f"{row.of} ({row.run}, {row.protocol}, {row.labels} labels)" for row in told)
            lines.append(f"classes that are clearly {word}: {', '.join(each)}")
    return "\n".join(lines)


def _cells(row: Row) -> list[str]:
    number = "–" if row.score is None else f"{row.score:.4f}"
    difference = "" if row.difference is None else f"{row.difference:+.4f}"
    if row.low is not None and row.high is not None:
        difference += f" ({row.low:+.4f} to {row.high:+.4f})"
    return [row.run, f"{row.protocol}, {row.labels}", row.of or row.metric, number, difference, judged(row)]


def _page(
    records: Mapping[str, RunRecord], changed: Mapping[str, Sequence[str]], rows: Sequence[Row], apart: Sequence[str]
) -> str:
    names = list(records)
    text = "Difference: to the first run that has such an evaluation, on the same test images; its 95 % interval is "
    text += f"from {REPEATS:,} draws of the test images, or of their patients, with replacement. The draws of labels "
    text += "are as they are: with few of them, other labels may turn a small difference around. Unclear: the interval "
    text += "holds zero."
    whole = table(HEAD, [_cells(row) for row in rows if not row.of], first_number=3)
    each = table(HEAD, [_cells(row) for row in rows if row.of], first_number=3)
    sections = [
        ("Scores", note(text) + whole + "".join(map(note, apart))),
        (
            "Classes",
            note("Recall of each class, or its AUC if an image can have several.") + fold("All classes", each, False),
        ),
        ("Options that differ", table(["option", *names], [[k, *v] for k, v in changed.items()]) or note("None.")),
        ("Training curves", _curves(records)),
    ]
    return page(" · ".join(names), "ssl-jax compare", "", sections, by="compare")


CURVES = ("loss", "knn_accuracy", "knn_auc", "embedding_std", "rank_me")


def _curves(records: Mapping[str, RunRecord]) -> str:
    """A chart for each metric that a run has logged, by epoch, with a line for each run."""
    charts = ""
    for metric in CURVES:
        series = {name: curve for name, record in records.items() if (curve := record.curve(metric))[0]}
        if series:
            word = words.of(metric)
            figure = f"<figcaption>{word.title}</figcaption>{plots.curves(series, word)}<small>{word.meaning}</small>"
            charts += f"<figure>{figure}</figure>"
    return f'<div class="charts">{charts}</div>' if charts else ""
