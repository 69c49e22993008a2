"""The report: a run or study folder as one HTML page that needs no network, no script and no other file.

Each section is a function that returns HTML: "" leaves the section out, and a note says why it is empty. All text
passes through `escape`, as file and class names come from the user's disk.
"""

import shlex
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ssl_jax.errors import UserError
from ssl_jax.files import read_csv, read_json, read_text, write_bytes
from ssl_jax.report import reproduction, training, words
from ssl_jax.report.evaluations import by_class, classifiers, confusion, evaluations
from ssl_jax.report.images import embedding_map, neighbours, read_sample
from ssl_jax.report.page import fold, markdown, note, number, page, percent, picture, table
from ssl_jax.report.record import RunRecord, read_run, sound
from ssl_jax.report.tables import METRICS
from ssl_jax.run_folder import RunFolder, StudyFolder

CURVE = "curve.png. Test score by number of labels; the metric is that of the table below."
GAINS = (
    "gain_by_class.png. Gain of each class, a panel for each number of labels. If some classes are much rarer than "
    "others, the rarest are at the bottom, and the first panel shows how frequent they are."
)
COLUMNS = (
    "Scores are shares of 1. mean: over the draws of labels (seeds); difference: to the baseline, on the same labels; "
    "half, difference half: half the width of their 95 % intervals; gain: difference in the score of a class; share: "
    "of the training images that have it."
)


def write_report(workdir: Path, out: Path | None = None) -> Path:
    """Writes the page of a run or study folder, or of a folder of such folders, to `out` (default: workdir/report.html)
    and returns its path.

    The nearest neighbours and the embedding map need the training images, of which at most 1,000 are read again. If
    the data are gone, only these two sections are missing. Raises UserError if the folder holds neither a run nor a
    study, at most two levels down.
    """
    study, run = StudyFolder(workdir), RunFolder(workdir)
    out = Path(out) if out else run.report
    if study.exists():
        text = _study_page(study)
    elif not run.config.is_file() and (found := _found(run.path)):
        text = _overview(run.path, found)
    else:
        text = _run_page(read_run(run))
    # A file name that is not UTF-8 must not break the report.
    write_bytes(out, text.encode("utf-8", "backslashreplace"))
    return out


def _run_page(run: RunRecord) -> str:
    """What the run is, a line of verdict, then pictures; numbers and what they mean follow."""
    sample, missing = None, ""
    if run.finished:
        try:
            sample = read_sample(run)
        except (UserError, OSError) as error:
            missing = note(f"Not shown, nor is the embedding map: {error}")
    newest = run.evaluations[-1] if run.evaluations else None
    command = f"ssl-jax evaluate --workdir={shlex.quote(str(run.folder.path))} --protocol=linear_quick"
    environment = sound(run.folder.environment, run.folder.again)
    judged = training.health(run, sample.shares if sample else None)
    sections = [
        ("Nearest neighbours", neighbours(sample) if sample else missing),
        ("Views", _views(run.folder)),
        ("Embedding map", embedding_map(sample) if sample else ""),
        ("Training", training.progress(run, judged)),
        ("Evaluation", evaluations([("", e) for e in run.evaluations], command)),
        ("Confusion", confusion(newest) if newest else ""),
        ("Classes", by_class(newest) if newest else ""),
        ("Classifiers", classifiers(_classifiers(run.folder.path))),
        ("Configuration", reproduction.configuration(run.config)),
        ("Environment", reproduction.environment(environment)),
        ("Commands", reproduction.commands(environment)),
    ]
    data = training.data_name(run.config["data"])
    title = f"{run.config['method']['name']} · {run.config['model']['name']} · {data}"
    what = training.summary(run, sample.total if sample else 0)
    return page(title, f"Run folder {run.folder.path.absolute().name}", _opening(what, judged), sections)


def _opening(what: str, judged: training.Health | None) -> str:
    return f"<p>{escape(what)}</p>{training.verdict(judged)}"


def _found(folder: Path) -> list[Path]:
    """The run and study folders at most two levels below `folder`; a study's own runs are part of the study."""
    paths = sorted(path.parent for depth in ("*", "*/*") for path in folder.glob(f"{depth}/config.json"))
    studies = [path for path in paths if StudyFolder(path).exists()]
    return [path for path in paths if not any(study in path.parents for study in studies)]


def _classifiers(folder: Path, runs: Sequence[Path] = ()) -> list[tuple[str, dict[str, Any]]]:
    """The classifiers at most two levels below `folder`, and below each of the runs in it."""
    paths = {path for top in (folder, *runs) for deep in ("*", "*/*") for path in top.glob(f"{deep}/classifier.json")}
    cure = "its `ssl-jax finetune` command makes it anew"
    return [(path.parent.relative_to(folder).as_posix(), made) for path in sorted(paths) if (made := sound(path, cure))]


def _overview(folder: Path, found: Sequence[Path]) -> str:
    """The page of a folder that holds runs and studies: a table of all, their evaluations and classifiers."""
    runs = {path.relative_to(folder).as_posix(): path for path in found}
    studies = [name for name, path in runs.items() if StudyFolder(path).exists()]
    records = {name: read_run(RunFolder(path)) for name, path in runs.items() if name not in studies}
    checks = {name: run.checks[-1] if run.checks else {} for name, run in records.items()}
    metrics = [m for m in ("knn_accuracy", "knn_auc") if any(m in check for check in checks.values())]
    rows = []
    for name, run in records.items():
        config, judged, last = run.config, training.health(run), run.steps[-1] if run.steps else {}
        numbers = [
            f"{last.get('epoch', 0):.4g}",
            number(last.get("loss")),
            *(percent(checks[name].get(m)) for m in metrics),
        ]
        state = "finished" if run.finished else "not finished"
        about = [config["method"]["name"], config["model"]["name"], training.data_name(config["data"])]
        rows.append([name, *about, *numbers, state, judged.state if judged else "–"])
    titles = [words.of(metric).title for metric in metrics]
    head = ["run", "method", "network", "data", "epochs", "loss", *titles, "", "embedding"]
    meaning = " ".join(f"{words.of(m).title}: {words.of(m).meaning}" for m in ("loss", *metrics))
    meaning += f" Embedding: {training.STATES}."
    scored = [(name, e) for name, run in records.items() for e in run.evaluations]
    sections = [("Runs", table(head, rows) + note(meaning) if rows else ""), ("Evaluation", evaluations(scored))]
    sections.append(("Classifiers", classifiers(_classifiers(folder, found))))
    for name in studies:
        summary = StudyFolder(runs[name]).summary_md
        body = markdown(summary.read_text()) if summary.is_file() else note("No results yet.")
        sections.append((f"Study {name}", picture(StudyFolder(runs[name]).curve, CURVE) + body))
    text = f"Runs: {len(records)}. Studies: {len(studies)}. For a report of each: ssl-jax report --workdir=..."
    return page(f"Runs in {folder.absolute().name}", f"Folder {folder.absolute().name}", note(text), sections)


def _study_page(folder: StudyFolder) -> str:
    environment, about = sound(folder.environment, folder.again), read_json(folder.about, folder.again)
    config, phantom = read_json(folder.config, folder.again), about.get("phantom")
    prefix = "Phantoms: " if phantom else ""
    unfinished = note("No results yet. Run the same command again to continue the study.")
    summary = read_text(folder.summary_md, folder.again) if folder.summary_md.is_file() else ""
    sections = [
        ("Score by number of labels", picture(folder.curve, prefix + CURVE)),
        ("Result", markdown(summary) if summary else unfinished),
        ("Gain by class", picture(folder.gain_by_class, prefix + GAINS)),
        ("All metrics", _all_metrics(folder)),
    ]
    cautions = sound(folder.cautions, folder.again).get("not_above_pixels", [])
    for pretraining in folder.pretrainings():
        run, name = read_run(pretraining), pretraining.path.name
        below = next((_below_in_study(c) for c in cautions if name in _run_names(c["arm"], about)), "")
        judged = training.health(run, below=below)
        body = _opening(training.summary(run), judged) + training.progress(run, judged)
        body += evaluations([("", e) for e in run.evaluations])
        sections.append((f"Pretraining of {name}", body))
    sections.append(("Classifiers", classifiers(_classifiers(folder.path))))
    sections.append(("Configuration", reproduction.configuration(config) if config else ""))
    sections += [
        ("Environment", reproduction.environment(environment)),
        ("Commands", reproduction.commands(environment)),
    ]
    title = f"Label-efficiency study{' on phantom images' if phantom else ''}"
    return page(title, f"Study folder {folder.path.absolute().name}", _design(config, about), sections)


def _all_metrics(folder: StudyFolder) -> str:
    files = {
        "summary.csv": folder.summary_csv,
        "references.csv: what costs nothing": folder.references_csv,
        "classes.csv": folder.classes,
    }
    tables = "".join(fold(title, _csv_table(path, folder.again)) for title, path in files.items())
    return tables and tables + note(COLUMNS) + note(words.footnote(METRICS))


def _run_names(arm: str, about: Mapping[str, Any]) -> list[str]:
    folder = StudyFolder("")
    return [folder.pretraining(arm, i).path.name for i in range(about.get("pretrainings", 1))]


def _below_in_study(caution: Mapping[str, Any]) -> str:
    text = f"Not better than raw pixels: with {caution['labels']:,} labels, the study has {percent(caution['score'])}"
    return f"{text}, raw pixels {percent(caution['pixels'])}."


def _design(config: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    """One sentence about what a study compares."""
    if not config:
        return ""
    study, data = config["study"], config["data"]
    test = study["test"]
    if not test["name"]:  # a part of the training data set
        test = {**data, "split": test["split"], "limit": test["limit"]}
    counts = ", ".join(f"{n:,}" for n in study["labels"])
    text = f"{', '.join(study['arms'])}: {study['protocol']} with {counts} labels of {training.data_name(data)}, "
    text += f"{study['seeds']} draw{'s' * (study['seeds'] > 1)} each, tested on {training.data_name(test)}."
    if about:
        text += f" {about['train_images']:,} training and {about['test_images']:,} test images."
    return f"<p>{escape(text)}</p>"


def _views(folder: RunFolder) -> str:
    text = "Training images as the method sees them. Each view is drawn at random from the image on its left."
    return picture(folder.views, text)


def _csv_table(path: Path, cure: str) -> str:
    if not path.is_file():
        return ""
    head, *rows = read_csv(path, cure)
    return table([h.replace("_", " ") for h in head], [[_short(v) for v in row] for row in rows])


def _short(text: str) -> str:
    """A number of a CSV with four decimals; other text as it is."""
    try:
        value = float(text)
    except ValueError:
        return text
    return text if value.is_integer() else f"{value:.4f}"
