"""How a run went, in HTML: what it did, whether its encoder is healthy, its numbers and curves."""

from collections.abc import Mapping
from html import escape
from typing import Any, NamedTuple

import numpy as np

from ssl_jax.collapse import STD_COLLAPSED
from ssl_jax.evaluate.references import PIXELS
from ssl_jax.report import plots, words
from ssl_jax.report.evaluations import below_pixels
from ssl_jax.report.page import note, number, percent
from ssl_jax.report.record import RunRecord

NARROW = 0.1  # embedding std below which the report warns that the embedding uses few directions
EMBEDDING = "embedding"  # what finds neighbours, beside the references
STATES = (
    "healthy: images spread over the directions of the embedding; weak: not better than raw pixels, or than the "
    "weights it started from; narrow: few directions are used; collapsed: all images look alike; broken: the loss is "
    "not a number"
)
FORGOTTEN = 0.02  # accuracy or AUC by which the first weights may have been better
NO_CURVE = ("step", "epoch", "collapsed")  # of a logged step, what is no curve


class Health(NamedTuple):
    """state: healthy, weak, narrow, collapsed or broken. line: says so. detail: why, and what to do."""

    state: str
    line: str
    detail: str


def summary(run: RunRecord, images: int = 0) -> str:
    """What was trained, in a sentence. images: in the data set, if known."""
    config = run.config
    count = f"{images:,} images of " if images else ""
    text = f"{config['method']['name']} with a {config['model']['name']} on {count}{data_name(config['data'])}"
    if not run.steps:
        return f"{text}. No step has been logged yet."
    last = run.steps[-1]
    text += f", trained for {last['epoch']:.4g} epochs ({last['step']:,} steps with a batch of "
    text += f"{config['train']['batch']:,})."
    if not run.finished:
        duration = config["train"]["duration"]
        text += f" The run has not reached its {duration} yet; run the same command again to continue it."
    return text


def data_name(data: Mapping[str, Any]) -> str:
    limit = f", first {data['limit']:,}" if data["limit"] else ""
    return f"{data['path'] or data['name']} ({data['split']}{limit})"


def health(run: RunRecord, shares: Mapping[str, float] | None = None, below: str = "") -> Health | None:
    """None before the first step. shares: see `images.Sample`. below: a sentence that says that the encoder does not
    beat raw pixels, if it is known from elsewhere."""
    if not run.steps:
        return None
    last = run.steps[-1]
    std = last["embedding_std"]
    if last["loss"] is None or std is None:
        line = "The last loss is not a finite number."
        return Health("broken", line, "Lower the learning rate or clip the gradient.")
    spread = f"The standard deviation of the embedding over a batch is {std:.2g}, where 0 means that all images look "
    spread += "alike and about 1 that every direction is used."
    if last.get("collapsed") or std < STD_COLLAPSED:
        detail = (
            f"{spread} Likely causes: a learning rate that is too high, a batch that is too small, no stop-gradient "
        )
        detail += "or predictor."
        if last.get("collapsed"):
            detail = f"The run shows a collapse: {last['collapsed']}."
        line = "The embedding has collapsed: different images look alike to the encoder."
        return Health("collapsed", line, detail)
    if std < NARROW:
        detail = f"{spread} Training may have been too short, or may be collapsing."
        return Health("narrow", "The embedding is narrow: it uses few of its directions.", detail)
    if lost := forgotten(run):
        return Health("weak", "The encoder has forgotten: the weights that it started from were better.", lost)
    below = below_pixels(run.evaluations) or below
    if not run.evaluations and not below and shares and shares[EMBEDDING] <= shares[PIXELS]:
        mine, theirs = (percent(shares[name]) for name in (EMBEDDING, PIXELS))
        below = f"Not better than raw pixels: {mine} of its neighbours share the class, of theirs {theirs}."
    if below:
        line = "The encoder has not helped yet: it does not beat raw pixels."
        return Health("weak", line, f"{below} The embedding has not collapsed. {spread}")
    return Health("healthy", "The embedding is healthy: images spread over its directions.", spread)


def forgotten(run: RunRecord) -> str:
    """What to do, if the loaded weights classified better before the first step than now."""
    for metric in ("knn_accuracy", "knn_auc"):
        values = [check[metric] for check in run.checks if metric in check]
        if values and run.checks[0]["step"] == 0 and values[-1] < values[0] - FORGOTTEN:
            show = percent if metric == "knn_accuracy" else "{:.3f}".format
            return (
                f"{words.of(metric).title} is {show(values[-1])}, and was {show(values[0])} before the first step. A "
                "lower learning rate, config.optim.layer_decay=0.8, config.optim.freeze or config.model.lora keep more."
            )
    return ""


def verdict(judged: Health | None) -> str:
    return f'<p class="verdict {judged.state}">{escape(judged.line)}</p>' if judged else ""


def progress(run: RunRecord, judged: Health | None) -> str:
    """Last numbers and curves, each with what it means."""
    if not run.steps or judged is None:
        return note("No step has been logged yet.")
    return note(judged.detail) + _tiles(run) + _curves(run)


def _tiles(run: RunRecord) -> str:
    last, check = run.steps[-1], run.checks[-1] if run.checks else {}
    tiles = [("loss", number(last["loss"]), f"{number(run.steps[0]['loss'])} at the start")]
    if "knn_accuracy" in check:
        tiles.append(("kNN accuracy", percent(check["knn_accuracy"]), "of held-out training images"))
    if "knn_auc" in check:
        tiles.append(("kNN, macro AUC", f"{check['knn_auc']:.3f}", "on held-out training images; 0.5 is guessing"))
    if "probe_accuracy" in last:
        tiles.append(("linear probe accuracy", percent(last["probe_accuracy"]), "of the last, augmented batch"))
    tiles.append(("embedding std", number(last["embedding_std"]), "0: collapsed; about 1: spread"))
    if "rank_me" in check:
        tiles.append(("RankMe", number(check["rank_me"]), "directions that the embeddings use"))
    if run.timing:
        tiles.append(("images / s", f"{np.median([t['images_per_s'] for t in run.timing]):,.0f}", "median"))
    boxes = "".join(f"<div><b>{escape(v)}</b>{escape(k)}<small>{escape(n)}</small></div>" for k, v, n in tiles)
    return f'<div class="tiles">{boxes}</div>'


def _curves(run: RunRecord) -> str:
    """A chart for each metric, by epoch."""
    common = list(words.COMMON)
    own = [key for key in run.steps[-1] if key not in (*common, *NO_CURVE)]  # what only this method reports
    place = common.index("grad_norm")
    charts = (_chart(run, metric) for metric in [*common[:place], *own, *common[place:]])
    return f'<div class="charts">{"".join(charts)}</div>'


def _chart(run: RunRecord, metric: str) -> str:
    epochs, values = run.curve(metric)
    if not epochs:
        return ""
    word = words.of(metric)
    curve = plots.curve(epochs, values, word)
    return f"<figure><figcaption>{escape(word.title)}</figcaption>{curve}<small>{escape(word.meaning)}</small></figure>"
