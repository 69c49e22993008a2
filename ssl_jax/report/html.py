"""The report: a run or study folder as one HTML page that needs no network, no script and no other file.

Each section is a function that returns HTML: "" leaves the section out, and a note says why it is empty. All text
passes through `escape`, as file and class names come from the user's disk.
"""

import logging
import shlex
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ssl_jax import config as configs
from ssl_jax.collapse import STD_COLLAPSED, rank_me
from ssl_jax.errors import DamagedError, UserError
from ssl_jax.evaluate.references import PIXELS, RANDOM, pixels, untrained
from ssl_jax.files import read_csv, read_json, read_lines, read_text, write_bytes
from ssl_jax.report import plots, reproduction
from ssl_jax.report.evaluations import below_pixels, by_class, classifiers, confusion, evaluations
from ssl_jax.report.page import fold, markdown, note, number, page, percent, picture, table
from ssl_jax.run_folder import RunFolder, StudyFolder

log = logging.getLogger("ssl_jax")
NARROW = 0.1  # embedding std below which the report warns that the embedding uses few directions
# The metrics that all methods report.
COMMON = {"step", "epoch", "loss", "grad_norm", "embedding_std", "lr", "probe_accuracy", "probe_loss", "collapsed"}
COMPLETE = {"step", "epoch", "loss", "embedding_std"}  # what the report needs of a step
EMBEDDING = "embedding"
MAX_IMAGES = 1000  # embedded for the neighbours and the map
NEIGHBOURS, QUERIES = 6, 10


class RunRecord(NamedTuple):
    """What a run folder says. steps: metrics of the logged steps; checks: of the evaluations during training."""

    folder: RunFolder
    config: dict[str, Any]
    steps: list[dict[str, Any]]
    checks: list[dict[str, Any]]
    timing: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    finished: bool


class Sample(NamedTuple):
    """Some training images and their embeddings. labels: None if there are none."""

    images: np.ndarray
    features: np.ndarray
    names: list[str]
    labels: np.ndarray | None
    classes: list[str]
    total: int  # images in the whole data set
    shares: Mapping[str, float] | None = None  # of the nearest neighbours that share the class, by what finds them


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


def read_run(folder: RunFolder) -> RunRecord:
    """Raises UserError if there is no config.json."""
    config = folder.read_config()
    metrics = read_lines(folder.metrics)
    evaluations = sorted(folder.evaluation.glob("*.json"), key=lambda p: (p.stat().st_mtime, p.name))
    steps, finished = [line for line in metrics if line.keys() >= COMPLETE], False
    try:
        finished = folder.exported()
    except DamagedError as error:
        log.warning("%s", error)
    last = steps[-1]["step"] if steps else 0
    if finished and last < (total := read_json(folder.encoder / "encoder.json").get("step", 0)):
        log.warning("%s: ends at step %d of %d; what is missing is lost", folder.metrics, last, total)
    return RunRecord(
        folder,
        config,
        steps,
        [line for line in metrics if "loss" not in line],
        [line for line in read_lines(folder.timing) if "images_per_s" in line],
        [made for path in evaluations if (made := _sound(path, "its `ssl-jax evaluate` command makes it anew"))],
        finished,
    )


def _sound(path: Path, cure: str) -> dict[str, Any]:
    """The content of a JSON file; {} if there is none. A damaged one is left out of the report, with a warning."""
    try:
        return read_json(path, f"left out of the report; {cure}")
    except DamagedError as error:
        log.warning("%s", error)
        return {}


def _run_page(run: RunRecord) -> str:
    sample, missing = None, ""
    if run.finished:
        try:
            sample = _sample(run)
        except (UserError, OSError) as error:
            missing = note(f"Not shown, nor is the embedding map: {error}")
    newest = run.evaluations[-1] if run.evaluations else None
    command = f"ssl-jax evaluate --workdir={shlex.quote(str(run.folder.path))} --protocol=linear"
    environment = _sound(run.folder.environment, run.folder.again)
    sections = [
        ("Training curves", _curves(run) or note("No step has been logged yet.")),
        ("Views", _views(run.folder)),
        ("Evaluation", evaluations([("", e) for e in run.evaluations], command)),
        ("Confusion", confusion(newest) if newest else ""),
        ("Classes", by_class(newest) if newest else ""),
        ("Classifiers", classifiers(_classifiers(run.folder.path))),
        ("Nearest neighbours", _neighbours(sample) if sample else missing),
        ("Embedding map", _map(sample) if sample else ""),
        ("Configuration", reproduction.configuration(run.config)),
        ("Environment", reproduction.environment(environment)),
        ("Commands", reproduction.commands(environment)),
    ]
    title = f"{run.config['method']['name']} · {run.config['model']['name']} · {_data_name(run.config['data'])}"
    return page(title, f"Run folder {run.folder.path.absolute().name}", _verdict(run, sample), sections)


def _found(folder: Path) -> list[Path]:
    """The run and study folders at most two levels below `folder`; a study's own runs are part of the study."""
    paths = sorted(path.parent for depth in ("*", "*/*") for path in folder.glob(f"{depth}/config.json"))
    studies = [path for path in paths if StudyFolder(path).exists()]
    return [path for path in paths if not any(study in path.parents for study in studies)]


def _classifiers(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    paths = sorted(path for depth in ("*", "*/*") for path in folder.glob(f"{depth}/classifier.json"))
    cure = "its `ssl-jax finetune` command makes it anew"
    return [(path.parent.relative_to(folder).as_posix(), made) for path in paths if (made := _sound(path, cure))]


def _overview(folder: Path, found: Sequence[Path]) -> str:
    """The page of a folder that holds runs and studies: a table of all, their evaluations and classifiers."""
    runs = {path.relative_to(folder).as_posix(): path for path in found}
    studies = [name for name, path in runs.items() if StudyFolder(path).exists()]
    records = {name: read_run(RunFolder(path)) for name, path in runs.items() if name not in studies}
    rows = []
    for name, run in records.items():
        last, check = run.steps[-1] if run.steps else {}, run.checks[-1] if run.checks else {}
        data = _data_name(run.config["data"])
        numbers = [f"{last.get('epoch', 0):.4g}", number(last.get("loss")), number(check.get("knn_accuracy"))]
        state = "finished" if run.finished else "not finished"
        health = _health(last, below_pixels(run.evaluations))[0] if last else "–"
        rows.append([name, run.config["method"]["name"], run.config["model"]["name"], data, *numbers, state, health])
    head = ["run", "method", "network", "data", "epochs", "loss", "kNN accuracy", "", "embedding"]
    scored = [(name, e) for name, run in records.items() for e in run.evaluations]
    sections = [("Runs", table(head, rows) if rows else ""), ("Evaluation", evaluations(scored))]
    sections.append(("Classifiers", classifiers(_classifiers(folder))))
    for name in studies:
        summary = StudyFolder(runs[name]).summary_md
        body = markdown(summary.read_text()) if summary.is_file() else note("No results yet.")
        sections.append((f"Study {name}", body))
    text = f"Runs: {len(records)}. Studies: {len(studies)}. For a report of each: ssl-jax report --workdir=..."
    return page(f"Runs in {folder.absolute().name}", f"Folder {folder.absolute().name}", note(text), sections)


def _study_page(folder: StudyFolder) -> str:
    environment, about = _sound(folder.environment, folder.again), read_json(folder.about, folder.again)
    config, phantom = read_json(folder.config, folder.again), about.get("phantom")
    prefix = "Phantoms: " if phantom else ""
    unfinished = note("No results yet. Run the same command again to continue the study.")
    columns = "From left to right: how frequent each class is, and its gain at each number of labels"
    summary = read_text(folder.summary_md, folder.again) if folder.summary_md.is_file() else ""
    sections = [
        ("Result", markdown(summary) if summary else unfinished),
        ("Score by number of labels", picture(folder.curve, f"{prefix}Test score by number of labels.")),
        ("Gain by class", picture(folder.gain_by_class, f"{prefix}Gain of each class. {columns}.")),
        (
            "All metrics",
            fold("summary.csv", _csv_table(folder.summary_csv, folder.again))
            + fold("references.csv: what costs nothing", _csv_table(folder.references_csv, folder.again)),
        ),
        ("All classes", fold("classes.csv", _csv_table(folder.classes, folder.again))),
    ]
    cautions = _sound(folder.cautions, folder.again).get("not_above_pixels", [])
    for pretraining in folder.pretrainings():
        run, name = read_run(pretraining), pretraining.path.name
        below = next((_below_in_study(c) for c in cautions if name in _run_names(c["arm"], about)), "")
        body = _verdict(run, None, below) + _curves(run) + evaluations([("", e) for e in run.evaluations])
        sections.append((f"Pretraining of {name}", body))
    sections.append(("Classifiers", classifiers(_classifiers(folder.path))))
    sections.append(("Configuration", reproduction.configuration(config) if config else ""))
    sections += [
        ("Environment", reproduction.environment(environment)),
        ("Commands", reproduction.commands(environment)),
    ]
    title = f"Label-efficiency study{' on phantom images' if phantom else ''}"
    return page(title, f"Study folder {folder.path.absolute().name}", _design(config, about), sections)


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
    text = f"{', '.join(study['arms'])}: {study['protocol']} with {counts} labels of {_data_name(data)}, "
    text += f"{study['seeds']} draws each, tested on {_data_name(test)}."
    if about:
        text += f" {about['train_images']:,} training and {about['test_images']:,} test images."
    return f"<p>{escape(text)}</p>"


# What the run did, in words.


def _verdict(run: RunRecord, sample: Sample | None, below: str = "") -> str:
    """below: a sentence that says that the encoder does not beat raw pixels, if it is known from elsewhere."""
    config, last = run.config, run.steps[-1] if run.steps else None
    images = f"{sample.total:,} images of " if sample else ""
    subject = f"{config['method']['name']} with a {config['model']['name']} on {images}{_data_name(config['data'])}"
    if last is None:
        return f"<p>{escape(subject)}. No step has been logged yet.</p>"
    judged = below_pixels(run.evaluations) or below
    if not run.evaluations and sample and sample.shares and sample.shares[EMBEDDING] <= sample.shares[PIXELS]:
        mine, theirs = (percent(sample.shares[name]) for name in (EMBEDDING, PIXELS))
        judged = judged or f"Not better than raw pixels: {mine} of its neighbours share the class, of theirs {theirs}."
    state, health = _health(last, judged)
    text = f"{subject}, trained for {last['epoch']:.4g} epochs"
    text += f" ({last['step']:,} steps with a batch of {config['train']['batch']:,})."
    if not run.finished:
        duration = config["train"]["duration"]
        text += f" The run has not reached its {duration} yet; run the same command again to continue it."
    tiles = [("loss", number(last["loss"]), f"{number(run.steps[0]['loss'])} at the start")]
    check = run.checks[-1] if run.checks else {}
    if "knn_accuracy" in check:
        tiles.append(("kNN accuracy", percent(check["knn_accuracy"]), "on held-out training images"))
    if "knn_auc" in check:
        tiles.append(("kNN macro AUC", f"{check['knn_auc']:.3f}", "on held-out training images"))
    if "probe_accuracy" in last:
        tiles.append(("probe accuracy", percent(last["probe_accuracy"]), "online, on augmented batches"))
    tiles.append(("embedding std", number(last["embedding_std"]), state))
    if "rank_me" in check:
        tiles.append(("RankMe", number(check["rank_me"]), "effective rank of the embeddings"))
    if run.timing:
        tiles.append(("images / s", f"{np.median([t['images_per_s'] for t in run.timing]):,.0f}", "median"))
    boxes = "".join(f"<div><b>{escape(v)}</b>{escape(k)}<small>{escape(n)}</small></div>" for k, v, n in tiles)
    return f'<p>{escape(text)}</p><p class="verdict {state}">{escape(health)}</p><div class="tiles">{boxes}</div>'


def _health(last: Mapping[str, Any], below: str = "") -> tuple[str, str]:
    """(healthy, weak, narrow, collapsed or broken; a sentence that says so). below: why it is weak, if it is."""
    std = last["embedding_std"]
    if last["loss"] is None or std is None:
        return "broken", "The last loss is not a finite number. Lower the learning rate or clip the gradient."
    if last.get("collapsed"):
        return "collapsed", f"The run shows a collapse: {last['collapsed']}."
    spread = f"its standard deviation over a batch is {std:.2g}, where 0 means that all images look alike and about 1 "
    spread += "that every direction is used"
    if std < STD_COLLAPSED:
        causes = "a learning rate that is too high, a batch that is too small, no stop-gradient or predictor"
        return "collapsed", f"The embedding has collapsed: {spread}. Likely causes: {causes}."
    if std < NARROW:
        return "narrow", f"The embedding is narrow: {spread}. Training may have been too short, or may be collapsing."
    if below:
        return "weak", f"{below} The embedding has not collapsed: {spread}."
    return "healthy", f"The embedding is healthy: {spread}."


def _data_name(data: Mapping[str, Any]) -> str:
    limit = f", first {data['limit']:,}" if data["limit"] else ""
    return f"{data['path'] or data['name']} ({data['split']}{limit})"


def _curves(run: RunRecord) -> str:
    """Charts by epoch. Lines that have no epoch get theirs from the step."""
    if not run.steps:
        return ""
    per_step = run.steps[-1]["epoch"] / run.steps[-1]["step"]

    def series(lines, key):
        kept = [line for line in lines if key in line]
        return [line["step"] * per_step for line in kept], [line[key] for line in kept]

    accuracy = {
        "kNN": series(run.checks, "knn_accuracy"),
        "kNN, macro AUC": series(run.checks, "knn_auc"),
        "online probe": series(run.steps, "probe_accuracy"),
    }
    own = [key for key in run.steps[-1] if key not in COMMON]  # what only this method reports
    charts = {
        "Loss": {"loss": series(run.steps, "loss")},
        "Accuracy": {name: values for name, values in accuracy.items() if values[0]},
        "Online probe, loss": {"cross-entropy": series(run.steps, "probe_loss")},
        "Embedding std": {"std": series(run.steps, "embedding_std")},
        "RankMe": {"effective rank": series(run.checks, "rank_me")},
        **{key.replace("_", " ").capitalize(): {key: series(run.steps, key)} for key in own},
        "Gradient norm": {"norm": series(run.steps, "grad_norm")},
        "Learning rate": {"lr": series(run.steps, "lr")},
        "Images / s": {"images / s": series(run.timing, "images_per_s")},
    }
    drawn = {name: c for name, c in charts.items() if any(x for x, _ in c.values())}
    figures = (f"<figure><figcaption>{n}</figcaption>{plots.curves(c, n)}</figure>" for n, c in drawn.items())
    return f'<div class="charts">{"".join(figures)}</div>'


def _views(folder: RunFolder) -> str:
    text = "Training images as the method sees them. Each view is drawn at random from the image on its left."
    return picture(folder.views, text)


# What the encoder does with images.


def _sample(run: RunRecord) -> Sample:
    """The same images at every call; fewer if they are large, as a CPU embeds those slowly."""
    from ssl_jax.data import open_source
    from ssl_jax.encoder import load_encoder

    config = configs.resolve(configs.from_json(run.config))
    encoder = load_encoder(run.folder.path)
    source = open_source(encoder.data(config.data))
    count = min(len(source), max(MAX_IMAGES // 5, MAX_IMAGES * 64**2 // max(encoder.size, 64) ** 2))
    indices = np.sort(np.random.default_rng(0).permutation(len(source))[:count])
    images = source.load_many(indices)
    features = encoder.embed(images, batch=min(256, count))
    features = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    labels = None if source.labels is None or source.multilabel else np.asarray(source.labels)[indices]
    shares = None
    if labels is not None and len(np.unique(labels[labels >= 0])) > 1 and count > NEIGHBOURS:
        found = {EMBEDDING: features, PIXELS: pixels(images), RANDOM: untrained(encoder).embed(images, min(256, count))}
        found[PIXELS] = found[PIXELS] - found[PIXELS].mean(axis=0)
        shares = {name: _same(_nearest(values)[0], labels) for name, values in found.items()}
        shares["chance"] = float(np.square(np.bincount(labels[labels >= 0]) / (labels >= 0).sum()).sum())
    names = [source.names[i] for i in indices]
    return Sample(images, features, names, labels, list(source.classes), len(source), shares)


def _nearest(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(indices [N, NEIGHBOURS] of the most similar other images, cosine similarities [N, N])."""
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -np.inf)
    return np.argsort(-similarity, axis=1, kind="stable")[:, :NEIGHBOURS], similarity


def _same(nearest: np.ndarray, labels: np.ndarray) -> float:
    """The share of neighbours that have the class of their query."""
    known = labels >= 0
    return float((labels[nearest] == labels[:, None])[known].mean())


def _neighbours(sample: Sample) -> str:
    if len(sample.images) <= NEIGHBOURS:
        return note(f"Not shown: {len(sample.images)} images are too few.")
    nearest, similarity = _nearest(sample.features)
    text = f"Each row starts with a query image. The {NEIGHBOURS} images after it have the most similar embeddings "
    text += f"among {len(sample.images):,} training images; their cosine similarity is below each."
    if sample.labels is not None and (sample.labels >= 0).any():
        same = _same(nearest, sample.labels)
        text += f" Over all images, {same:.0%} of the neighbours share the class of their query (green frame)"
        others = [f"{name} {share:.0%}" for name, share in (sample.shares or {}).items() if name != EMBEDDING]
        text += f"; beside it: {', '.join(others)}." if others else "."
    strips = "".join(_strip(sample, q, nearest[q], similarity[q]) for q in _queries(sample))
    return f'{note(text)}<div class="strips">{strips}</div>'


def _queries(sample: Sample) -> list[int]:
    """The first image of each class, or evenly spaced images."""
    if sample.labels is not None:
        _, first = np.unique(np.where(sample.labels >= 0, sample.labels, -1), return_index=True)
        queries = [int(i) for i in first if sample.labels[i] >= 0][:QUERIES]
        if len(queries) > 1:
            return queries
    return [int(i) for i in np.linspace(0, len(sample.images) - 1, QUERIES - 2).astype(int)]


def _strip(sample: Sample, query: int, nearest: Iterable[int], similarity: np.ndarray) -> str:
    labels = np.full(len(sample.images), -1) if sample.labels is None else sample.labels
    cells = ""
    for i in (query, *nearest):
        kind, score = "query", ""
        if i != query:
            kind, score = "same" if labels[i] == labels[query] else "other", f"{similarity[i]:.2f}"
        if min(labels[i], labels[query]) < 0:  # unknown
            kind = ""
        name = sample.classes[labels[i]] if labels[i] >= 0 else "query" if i == query else ""
        file = escape(sample.names[i])
        shown = f'<img alt="{file}" title="{file}" src="{plots.thumbnail(sample.images[i])}">'
        caption = f"<figcaption>{escape(name)}<small>{score}</small></figcaption>"
        cells += f'<figure class="{kind}">{shown}{caption}</figure>'
    return f'<div class="strip">{cells}</div>'


def _map(sample: Sample) -> str:
    if min(sample.features.shape) < 3:
        return note(
            f"Not shown: {len(sample.features)} embeddings of {sample.features.shape[1]} dimensions are too few."
        )
    import jax.numpy as jnp

    def chart(title, points, axis_names):
        drawn = plots.scatter(points, sample.labels, sample.classes, axis_names)
        return f"<figure><figcaption>{title}</figcaption>{drawn}</figure>"

    charts = chart("Principal components of the normalised embeddings", *plots.project(sample.features))
    if find_spec("umap"):
        import umap

        points = umap.UMAP(metric="cosine", random_state=0, n_jobs=1).fit_transform(sample.features)
        charts += chart("UMAP (cosine)", points, ("UMAP 1", "UMAP 2"))
    rank = float(rank_me(jnp.asarray(sample.features)))
    text = f"{len(sample.features):,} training images{', coloured by class' if sample.labels is not None else ''}. "
    text += f"Effective rank (RankMe): {rank:.1f} of {sample.features.shape[1]} dimensions."
    return note(text) + f'<div class="map">{charts}</div>'


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
