"""The report: a run folder, or a study folder, as one HTML page that needs no network, no script and no other file.

Every section is a function from what it shows to HTML; one without input gives "" and is left out, or says in a line
why it is empty. All text passes `escape`: file and class names come from the user's disk.
"""

import csv
import json
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ssl_jax import config as configs
from ssl_jax.errors import UserError
from ssl_jax.report import plots
from ssl_jax.report.page import fold, markdown, note, number, page, percent, picture, table
from ssl_jax.run import read_config, read_json, read_lines, write_bytes

COLLAPSED, NARROW = 0.01, 0.1  # embedding std, up to about 1; below the first one training warns, too
# What all methods report.
COMMON = {"step", "epoch", "loss", "grad_norm", "embedding_std", "lr", "probe_accuracy", "probe_loss", "collapsed"}
MAX_IMAGES = 1000  # embedded for the neighbours and the map
NEIGHBOURS, QUERIES = 6, 10
MAX_CELLS = 20  # classes up to which the confusion matrix shows its numbers


class Run(NamedTuple):
    """What a run folder holds. lines: metrics of logged steps; tested: of evaluations on the way."""

    folder: Path
    config: dict[str, Any]
    lines: list[dict[str, Any]]
    tested: list[dict[str, Any]]
    timing: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    finished: bool


class Sample(NamedTuple):
    """Some images of the training data and what the encoder makes of them. labels: None without."""

    images: np.ndarray
    features: np.ndarray
    names: list[str]
    labels: np.ndarray | None
    classes: list[str]
    total: int  # images in the whole data set


def write_report(workdir: Path, out: Path | None = None) -> Path:
    """Writes the page of a run folder or of a study folder to `out` (default: workdir/report.html); returns its path.

    For nearest neighbours and the embedding map it reads the training images again, at most 1,000 of them; data that
    are gone cost these two sections only. Raises UserError if the folder is neither a run nor a study.
    """
    folder = Path(workdir)
    out = Path(out) if out else folder / "report.html"
    study = (folder / "study.json").is_file() or any((folder / "pretrain").glob("*/config.json"))
    made = _study_page(folder) if study else _run_page(read_run(folder))
    # A file name that is not UTF-8 must not cost the report.
    write_bytes(out, made.encode("utf-8", "backslashreplace"))
    return out


def read_run(folder: Path) -> Run:
    """Raises UserError if there is no config.json."""
    config = read_config(folder)
    metrics = read_lines(folder / "metrics.jsonl")
    found = sorted((folder / "evaluation").glob("*.json"), key=lambda p: (p.stat().st_mtime, p.name))
    return Run(
        folder,
        config,
        [m for m in metrics if "loss" in m],
        [m for m in metrics if "loss" not in m],
        read_lines(folder / "timing.jsonl"),
        [json.loads(path.read_text()) for path in found],
        (folder / "encoder" / "encoder.json").is_file(),
    )


def _run_page(run: Run) -> str:
    sample, missing = None, ""
    if run.finished:
        try:
            sample = _sample(run)
        except (UserError, OSError) as error:
            missing = note(f"Left out, as is the embedding map: {error}")
    newest = run.evaluations[-1] if run.evaluations else None
    sections = [
        ("Training curves", _curves(run) or note("No step has been logged yet.")),
        ("Views", _views(run.folder)),
        ("Evaluation", _evaluations(run)),
        ("Confusion", _confusion(newest) if newest else ""),
        ("Classes", _classes(newest) if newest else ""),
        ("Nearest neighbours", _neighbours(sample) if sample else missing),
        ("Embedding map", _map(sample) if sample else ""),
        ("Configuration", _configuration(run.config)),
        ("Environment", _environment(read_json(run.folder / "environment.json"))),
        ("Commands", _commands(read_json(run.folder / "environment.json"))),
    ]
    title = f"{run.config['method']['name']} · {run.config['model']['name']} · {_data_name(run.config['data'])}"
    return page(title, f"Run folder {run.folder.absolute().name}", _verdict(run, sample), sections)


def _study_page(folder: Path) -> str:
    environment, about = read_json(folder / "environment.json"), read_json(folder / "study.json")
    config, phantom = read_json(folder / "config.json"), about.get("phantom")
    summary, of = folder / "summary.md", "Phantoms: " if phantom else ""
    unfinished = note("No result yet: the study has not come so far; the same command continues it.")
    words = "from left to right: how frequent each class is, and its gain at each number of labels"
    sections = [
        ("Result", markdown(summary.read_text()) if summary.is_file() else unfinished),
        ("Score against labels", picture(folder / "curve.png", f"{of}Test score against the number of labels.")),
        ("Gain by class", picture(folder / "gain_by_class.png", f"{of}Gain of each class, {words}.")),
        ("All metrics", fold("summary.csv", _csv_table(folder / "summary.csv"))),
        ("All classes", fold("classes.csv", _csv_table(folder / "classes.csv"))),
    ]
    for path in sorted((folder / "pretrain").glob("*/config.json")):
        run = read_run(path.parent)
        sections.append((f"Pretraining of {path.parent.name}", _verdict(run, None) + _curves(run)))
    sections.append(("Configuration", _configuration(config) if config else ""))
    sections += [("Environment", _environment(environment)), ("Commands", _commands(environment))]
    title = f"Label-efficiency study{' on phantom images' if phantom else ''}"
    return page(title, f"Study folder {folder.absolute().name}", _design(config, about), sections)


def _design(config: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    if not config:
        return ""
    study = config["study"]
    test = (
        study["test"]
        if study["test"]["name"]
        else {**config["data"], **{k: study["test"][k] for k in ("split", "limit")}}
    )
    words = f"{', '.join(study['arms'])} on {_data_name(config['data'])}: {study['protocol']} with "
    words += f"{', '.join(f'{n:,}' for n in study['labels'])} labels, {study['seeds']} draws of each, tested on "
    counts = f" {about['train_images']:,} and {about['test_images']:,} images." if about else ""
    return f"<p>{escape(f'{words}{_data_name(test)}.{counts}')}</p>"


# What the run did, in words.


def _verdict(run: Run, sample: Sample | None) -> str:
    config, last = run.config, run.lines[-1] if run.lines else None
    images = f"{sample.total:,} images of " if sample else ""
    what = f"{config['method']['name']} on a {config['model']['name']}, {images}{_data_name(config['data'])}"
    if last is None:
        return f"<p>{escape(what)}. No step has been logged yet.</p>"
    state, health = _health(last)
    done = f"{last['epoch']:.4g} epochs ({last['step']:,} steps of batch {config['train']['batch']:,})"
    if not run.finished:
        done += f". The run is not finished ({config['train']['duration']}); the same command continues it"
    tiles = [("loss", number(last["loss"]), f"at first {number(run.lines[0]['loss'])}")]
    tested = run.tested[-1] if run.tested else {}
    if "knn_accuracy" in tested:
        tiles.append(("kNN accuracy", percent(tested["knn_accuracy"]), "training images held out"))
    if "knn_auc" in tested:
        tiles.append(("kNN macro AUC", f"{tested['knn_auc']:.3f}", "training images held out"))
    if "probe_accuracy" in last:
        tiles.append(("probe accuracy", percent(last["probe_accuracy"]), "online, on augmented batches"))
    tiles.append(("embedding std", number(last["embedding_std"]), state))
    if "rank_me" in tested:
        tiles.append(("RankMe", number(tested["rank_me"]), "directions that the embedding uses"))
    if run.timing:
        tiles.append(("images / s", f"{np.median([t['images_per_s'] for t in run.timing]):,.0f}", "median"))
    boxes = "".join(f"<div><b>{escape(v)}</b>{escape(k)}<small>{escape(n)}</small></div>" for k, v, n in tiles)
    return (
        f"<p>{escape(f'{what}: trained for {done}.')}</p>"
        f'<p class="verdict {state}">{escape(health)}</p><div class="tiles">{boxes}</div>'
    )


def _health(last: Mapping[str, Any]) -> tuple[str, str]:
    """(healthy, narrow, collapsed or broken; a sentence that says it)."""
    std = last["embedding_std"]
    if last["loss"] is None or std is None:
        return "broken", "The last loss is not a finite number: lower the learning rate or clip the gradient."
    size = f"its spread over a batch is {std:.2g}, from 0 (all images alike) to 1 (every direction used)"
    if last.get("collapsed"):
        return "collapsed", f"The run shows a collapse: {last['collapsed']}."
    if std < COLLAPSED:
        causes = "a learning rate too high, a batch too small, no stop-gradient or predictor"
        return (
            "collapsed",
            f"The embedding has collapsed: {size}. Likely causes: {causes}.",
        )
    if std < NARROW:
        return "narrow", f"The embedding is narrow: {size}. Training may have been short, or is about to collapse."
    return "healthy", f"The embedding is healthy: {size}."


def _data_name(data: Mapping[str, Any]) -> str:
    limit = f", first {data['limit']:,}" if data["limit"] else ""
    return f"{data['path'] or data['name']} ({data['split']}{limit})"


def _curves(run: Run) -> str:
    """Charts over the epoch, which lines without one get from their step."""
    if not run.lines:
        return ""
    per_step = run.lines[-1]["epoch"] / run.lines[-1]["step"]

    def series(lines, key):
        kept = [line for line in lines if key in line]
        return [line["step"] * per_step for line in kept], [line[key] for line in kept]

    accuracy = {
        "kNN": series(run.tested, "knn_accuracy"),
        "kNN, macro AUC": series(run.tested, "knn_auc"),
        "online probe": series(run.lines, "probe_accuracy"),
    }
    own = [key for key in run.lines[-1] if key not in COMMON]  # what only this method reports
    charts = {
        "Loss": {"loss": series(run.lines, "loss")},
        "Accuracy": {name: values for name, values in accuracy.items() if values[0]},
        "Online probe, loss": {"cross-entropy": series(run.lines, "probe_loss")},
        "Embedding std": {"std": series(run.lines, "embedding_std")},
        "RankMe": {"effective rank": series(run.tested, "rank_me")},
        **{key.replace("_", " ").capitalize(): {key: series(run.lines, key)} for key in own},
        "Gradient norm": {"norm": series(run.lines, "grad_norm")},
        "Learning rate": {"lr": series(run.lines, "lr")},
        "Images / s": {"images / s": series(run.timing, "images_per_s")},
    }
    drawn = {name: c for name, c in charts.items() if any(x for x, _ in c.values())}
    figures = (f"<figure><figcaption>{n}</figcaption>{plots.curves(c, n)}</figure>" for n, c in drawn.items())
    return f'<div class="charts">{"".join(figures)}</div>'


def _views(folder: Path) -> str:
    words = "Views of training images as the method sees them: each drawn at random from the image at its left."
    return picture(folder / "views.png", words)


# Evaluation.


def _evaluations(run: Run) -> str:
    if not run.evaluations:
        return note(f"None yet: ssl-jax evaluate --workdir={shlex.quote(str(run.folder))} --protocol=linear")
    metrics = sorted({name for e in run.evaluations for name in e["mean"]}, key=lambda m: (m != "top1", m))
    rows = []
    for e in sorted(run.evaluations, key=lambda e: (e["protocol"], math.inf if e["labels"] == "all" else e["labels"])):
        values = [_with_interval(e["mean"].get(m), e["interval"].get(m)) for m in metrics]
        rows.append([e["protocol"], str(e["labels"]), str(e["seeds"]), e["test"], *values])
    words = "Mean over the draws of labels (seeds) and half the width of its 95 % interval; the last epoch's encoder."
    heads = [m.replace("_", " ") for m in metrics]
    return note(words) + table(["protocol", "labels", "seeds", "tested on", *heads], rows, first_number=4)


def _with_interval(mean: float | None, half: float | None) -> str:
    return f"{mean:.4f}" + (f" ± {half:.4f}" if half is not None else "") if mean is not None else "–"


def _confusion(evaluation: Mapping[str, Any]) -> str:
    """Heat map and per-class table of an evaluation, its seeds added up."""
    classes, each = evaluation["classes"], evaluation["per_seed"]
    if not all("confusion" in seed for seed in each):
        return ""
    counts = np.sum([seed["confusion"] for seed in each], axis=0)
    truth, given, right = counts.sum(axis=1), counts.sum(axis=0), np.diag(counts)
    shares = counts / np.maximum(truth, 1)[:, None]
    wrong = shares - np.diag(np.diag(shares))
    rows = []
    for c, name in enumerate(classes):
        recall, precision = (right[c] / n[c] if n[c] else None for n in (truth, given))
        f1 = 2 * right[c] / (truth[c] + given[c]) if truth[c] else None
        aucs = [seed["auc"][name] for seed in each if name in seed.get("auc", {})]
        other = wrong[c].argmax()
        taken = f"{classes[other]} ({percent(wrong[c, other])})" if wrong[c, other] > 0 else "–"
        numbers = [f"{truth[c] // len(each):,}", *map(percent, (recall, precision, f1))]
        rows.append([name, *numbers, f"{np.mean(aucs):.4f}" if aucs else "–", taken])
    head = ["class", "test images", "recall", "precision", "F1", "AUC", "most often taken for"]
    by_class = table(head, rows, first_number=1)
    words = f"{evaluation['protocol']}, {evaluation['labels']} labels, {evaluation['test']}"
    words += f"; {len(each)} draws of labels together." if len(each) > 1 else "."
    words += " Each row: of the images of a class, the share that was given each class, in percent."
    return note(words) + _matrix(shares, classes) + fold("Per class", by_class, folded=len(classes) > MAX_CELLS)


def _classes(evaluation: Mapping[str, Any]) -> str:
    """Table of an evaluation on several labels an image: means over its seeds."""
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
    words = (
        f"{evaluation['protocol']}, {evaluation['labels']} labels, {evaluation['test']}; means over {len(each)} draws."
    )
    return note(words) + table(["class", "known", "positives", "AUC", "average precision"], rows, first_number=1)


def _matrix(shares: np.ndarray, classes: Sequence[str]) -> str:
    if len(classes) > MAX_CELLS:
        return f'<img class="heat" alt="confusion matrix, true class downwards" src="{plots.heat(shares)}">'
    heads = "".join(f'<th scope="col"><span>{escape(c)}</span></th>' for c in classes)
    body = ""
    for name, row in zip(classes, shares, strict=True):
        cells = "".join(
            f'<td{" class=deep" if v > 0.5 else ""} style="--v:{v:.3f}">{round(100 * v) or "·"}</td>' for v in row
        )
        body += f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>'
    return f'<div class="wide"><table class="matrix"><tr><th>true \\ given</th>{heads}</tr>{body}</table></div>'


# What the encoder makes of images.


def _sample(run: Run) -> Sample:
    """The same images at every call; fewer of large ones, which a CPU embeds slowly."""
    from ssl_jax.data import open_source
    from ssl_jax.encoder import load_encoder

    made = configs.resolve(configs.from_json(run.config))
    encoder = load_encoder(run.folder)
    source = open_source(encoder.data(made.data))
    count = min(len(source), max(MAX_IMAGES // 5, MAX_IMAGES * 64**2 // max(encoder.size, 64) ** 2))
    chosen = np.sort(np.random.default_rng(0).permutation(len(source))[:count])
    images = np.stack([source.load(int(i)) for i in chosen])
    features = encoder.embed(images, batch=min(256, count))
    features = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    labels = None if source.labels is None or source.multilabel else np.asarray(source.labels)[chosen]
    return Sample(images, features, [source.names[i] for i in chosen], labels, list(source.classes), len(source))


def _neighbours(sample: Sample) -> str:
    if len(sample.images) <= NEIGHBOURS:
        return note(f"Left out: {len(sample.images)} images, too few.")
    similarity = sample.features @ sample.features.T
    np.fill_diagonal(similarity, -np.inf)
    nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :NEIGHBOURS]
    words = (
        f"The first image of each row, and the {NEIGHBOURS} of {len(sample.images):,} training images whose embeddings "
    )
    words += "are most similar to its own (cosine, below each)."
    if sample.labels is not None and (known := sample.labels >= 0).any():
        same = (sample.labels[nearest] == sample.labels[:, None])[known].mean()
        words += f" Over all of them, {same:.0%} of the neighbours share the class of their query (framed green)."
    strips = "".join(_strip(sample, q, nearest[q], similarity[q]) for q in _queries(sample))
    return f'{note(words)}<div class="strips">{strips}</div>'


def _queries(sample: Sample) -> list[int]:
    """The first image of each class, or images spread evenly."""
    if sample.labels is not None:
        _, first = np.unique(np.where(sample.labels >= 0, sample.labels, -1), return_index=True)
        chosen = [int(i) for i in first if sample.labels[i] >= 0][:QUERIES]
        if len(chosen) > 1:
            return chosen
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
        words = sample.classes[labels[i]] if labels[i] >= 0 else "query" if i == query else ""
        file = escape(sample.names[i])
        shown = f'<img alt="{file}" title="{file}" src="{plots.thumbnail(sample.images[i])}">'
        caption = f"<figcaption>{escape(words)}<small>{score}</small></figcaption>"
        cells += f'<figure class="{kind}">{shown}{caption}</figure>'
    return f'<div class="strip">{cells}</div>'


def _map(sample: Sample) -> str:
    if min(sample.features.shape) < 3:
        return note(f"Left out: {len(sample.features)} embeddings of {sample.features.shape[1]} dimensions, too few.")
    import jax.numpy as jnp

    from ssl_jax.collapse import rank_me

    def chart(title, points, axis_names):
        drawn = plots.scatter(points, sample.labels, sample.classes, axis_names)
        return f"<figure><figcaption>{title}</figcaption>{drawn}</figure>"

    made = chart("Principal components of the normalised embeddings", *plots.project(sample.features))
    if find_spec("umap"):
        import umap

        points = umap.UMAP(metric="cosine", random_state=0, n_jobs=1).fit_transform(sample.features)
        made += chart("UMAP (cosine)", points, ("UMAP 1", "UMAP 2"))
    colours = "; colours: classes" if sample.labels is not None else ""
    rank = float(rank_me(jnp.asarray(sample.features)))
    words = f"effective rank {rank:.1f} of {sample.features.shape[1]} dimensions (RankMe)"
    return note(f"{len(sample.features):,} training images{colours}; {words}.") + f'<div class="map">{made}</div>'


# How it came about.


def _configuration(config: Mapping[str, Any]) -> str:
    try:
        usual = configs.to_json(configs.resolve(configs.default(config["method"]["name"])))
    except UserError as error:  # a method of another version of the library
        return note(f"Defaults unknown: {error}.") + table(["key", "value"], list(_flat(config).items()))
    values, defaults = _flat(config), _flat(usual)
    rows = [[key, value, defaults.get(key, "as in the preset")] for key, value in values.items()]
    changed = [row for row in rows if row[1] != row[2]]
    head = ["key", "value", "default"]
    words = f"Method {config['method']['name']}. {len(changed)} of {len(rows)} options differ from its defaults."
    full = table(head, rows, marked={row[0] for row in changed})
    return note(words) + (table(head, changed) if changed else "") + fold("All options", full)


def _flat(config: Mapping[str, Any], path: str = "config") -> dict[str, str]:
    """Each option under the name by which a flag sets it."""
    made: dict[str, str] = {}
    for key, value in config.items():
        # The views of an augmentation are set as keys of the section itself.
        name = path if key == "override" else f"{path}.{key}"
        made |= _flat(value, name) if isinstance(value, Mapping) else {name: json.dumps(value, ensure_ascii=False)}
    return made


def _environment(environment: Mapping[str, Any]) -> str:
    rows = [[k, _join(v)] for k, v in environment.items() if k not in ("commands", "packages")]
    rows += [[k, str(v)] for k, v in environment.get("packages", {}).items()]
    return table(["", "version or kind"], rows) if rows else ""


def _join(value: Any) -> str:
    if not isinstance(value, list):
        return str(value)
    return ", ".join(f"{value.count(v)} × {v}" if value.count(v) > 1 else str(v) for v in dict.fromkeys(value))


def _commands(environment: Mapping[str, Any]) -> str:
    lines = [f"{c['time'][:19]}  {_command(c['argv'])}" for c in environment.get("commands", []) if c.get("argv")]
    words = "Everything that was run in this folder (UTC). The same commands give the same weights on the same machine."
    return note(words) + f"<pre>{escape(chr(10).join(lines))}</pre>" if lines else ""


def _command(argv: Sequence[str]) -> str:
    program = Path(argv[0]).name
    return shlex.join([*(["python", argv[0]] if program.endswith(".py") else [program]), *argv[1:]])


def _csv_table(path: Path) -> str:
    if not path.is_file():
        return ""
    with path.open(newline="") as file:
        head, *rows = csv.reader(file)
    return table([h.replace("_", " ") for h in head], [[_short(v) for v in row] for row in rows])


def _short(text: str) -> str:
    """Numbers of a CSV with four digits; other text as it is."""
    try:
        value = float(text)
    except ValueError:
        return text
    return text if value.is_integer() else f"{value:.4f}"
