"""What an encoder does with images, in HTML: nearest neighbours, and the embedding map."""

from collections.abc import Mapping
from html import escape
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np

from ssl_jax import config as configs
from ssl_jax.collapse import rank_me
from ssl_jax.errors import visible
from ssl_jax.evaluate.references import PIXELS, RANDOM, pixels, untrained
from ssl_jax.neighbours import nearest_others, normalized
from ssl_jax.plotting import shown_in_words
from ssl_jax.report import plots
from ssl_jax.report.page import note
from ssl_jax.report.record import RunRecord
from ssl_jax.report.training import EMBEDDING

MAX_IMAGES = 1000  # embedded for the neighbours and the map
NEIGHBOURS, QUERIES = 6, 10
CHANCE = "chance"
MAX_COLORS = 20  # more could not be told apart
GRAY = "#8a8f98"
SHOWN = 96  # px of an image beside its point in the map


class Sample(NamedTuple):
    """Some training images and their embeddings. labels: None if there are none."""

    images: np.ndarray
    features: np.ndarray
    names: list[str]
    labels: np.ndarray | None
    classes: list[str]
    total: int  # images in the whole data set
    shares: Mapping[str, float] | None = None  # of the nearest neighbours that share the class, by what finds them


def read_sample(run: RunRecord) -> Sample:
    """The same images at every call; fewer if they are large, as a CPU embeds those slowly."""
    from ssl_jax.data import open_source
    from ssl_jax.encoder import load_encoder

    config = configs.resolve(configs.from_json(run.config))
    encoder = load_encoder(run.folder.path)
    source = open_source(encoder.data(config.data))
    count = min(len(source), max(MAX_IMAGES // 5, MAX_IMAGES * 64**2 // max(encoder.size, 64) ** 2))
    indices = np.sort(np.random.default_rng(0).permutation(len(source))[:count])
    images = source.load_many(indices)
    features = normalized(encoder.embed(images, batch=min(256, count)))
    labels = None if source.labels is None or source.multilabel else np.asarray(source.labels)[indices]
    shares = None
    if labels is not None and len(np.unique(labels[labels >= 0])) > 1 and count > NEIGHBOURS:
        found = {EMBEDDING: features, PIXELS: pixels(images), RANDOM: untrained(encoder).embed(images, min(256, count))}
        found[PIXELS] = found[PIXELS] - found[PIXELS].mean(axis=0)
        shares = {name: _same(nearest_others(values, NEIGHBOURS)[0], labels) for name, values in found.items()}
        shares[CHANCE] = float(np.square(np.bincount(labels[labels >= 0]) / (labels >= 0).sum()).sum())
    names = [source.names[i] for i in indices]
    return Sample(images, features, names, labels, list(source.classes), len(source), shares)


def _same(nearest: np.ndarray, labels: np.ndarray) -> float:
    """The share of neighbours that have the class of their query."""
    known = labels >= 0
    return float((labels[nearest] == labels[:, None])[known].mean())


def neighbours(sample: Sample) -> str:
    if len(sample.images) <= NEIGHBOURS:
        return note(f"Not shown: {len(sample.images)} images are too few.")
    nearest, similarity = nearest_others(sample.features, NEIGHBOURS)
    text = f"Each row: an image, and the {NEIGHBOURS} that the encoder finds most similar to it among "
    text += f"{len(sample.images):,} training images."
    if words := shown_in_words(sample.images.shape[-1]):
        text += f" Pictures show {words}."
    strips = "".join(_strip(sample, q, nearest[q], similarity[q]) for q in _queries(sample))
    after = "The number below an image is the cosine similarity of its embedding to that of the first image: 1 means "
    after += "the same direction, 0 nothing in common."
    if sample.labels is not None and (sample.labels >= 0).any():
        after += " Green frame: of the same class; red: of another."
        after += f" Over all images, {_same(nearest, sample.labels):.0%} of the neighbours are of the same class."
    if sample.shares:
        after += f" For comparison: {sample.shares[PIXELS]:.0%} if the raw pixels are compared, "
        after += f"{sample.shares[RANDOM]:.0%} with a random encoder (the same network, untrained), "
        after += f"{sample.shares[CHANCE]:.0%} by chance (neighbours drawn at random)."
    return f'{note(text)}<div class="strips">{strips}</div>{note(after)}'


def _queries(sample: Sample) -> list[int]:
    """The first image of each class, or evenly spaced images."""
    if sample.labels is not None:
        _, first = np.unique(np.where(sample.labels >= 0, sample.labels, -1), return_index=True)
        queries = [int(i) for i in first if sample.labels[i] >= 0][:QUERIES]
        if len(queries) > 1:
            return queries
    return [int(i) for i in np.linspace(0, len(sample.images) - 1, QUERIES - 2).astype(int)]


def _strip(sample: Sample, query: int, nearest: np.ndarray, similarity: np.ndarray) -> str:
    labels, cells = _groups(sample), ""
    scores = (f"{value:.2f}" for value in similarity)
    for i, score in [(query, ""), *zip(nearest, scores, strict=True)]:
        kind = "query" if i == query else "same" if labels[i] == labels[query] else "other"
        if min(labels[i], labels[query]) < 0:  # unknown
            kind = ""
        name = sample.classes[labels[i]] if labels[i] >= 0 else "query" if i == query else ""
        file = _escaped(sample.names[i])
        shown = f'<img alt="{file}" title="{file}" src="{plots.thumbnail(sample.images[i])}">'
        caption = f"<figcaption>{_escaped(name)}<small>{score}</small></figcaption>"
        cells += f'<figure class="{kind}">{shown}{caption}</figure>'
    return f'<div class="strip">{cells}</div>'


def _escaped(name: str) -> str:
    return escape(visible(name))


def embedding_map(sample: Sample) -> str:
    """Points whose image appears under the pointer, under a finger, or by the arrow keys: each is a radio button, so
    the page needs no script, and a map is one stop of the tab key."""
    if min(sample.features.shape) < 3:
        return note(
            f"Not shown: {len(sample.features)} embeddings of {sample.features.shape[1]} dimensions are too few."
        )
    import jax.numpy as jnp

    maps = _points(sample, "Principal components of the normalised embeddings", *plots.project(sample.features))
    if find_spec("umap"):
        import umap

        points = umap.UMAP(metric="cosine", random_state=0, n_jobs=1).fit_transform(sample.features)
        maps += _points(sample, "UMAP (cosine)", points, ("UMAP 1", "UMAP 2"))
    text = f"Each point is one of {len(sample.features):,} training images; the encoder finds near ones similar. "
    text += "Point at one, tap it, or use the arrow keys, to see its image."
    rank = float(rank_me(jnp.asarray(sample.features)))
    after = f"Effective rank (RankMe): the embeddings use about {rank:.1f} of {sample.features.shape[1]} dimensions. "
    after += "Two axes show only a part of that, so points that are near here may be far apart in the embedding."
    body = f'<style>{_picture_style(sample)}</style><div class="map">{maps}{_key(sample)}</div>'
    return note(text) + body + note(after)


def _picture_style(sample: Sample) -> str:
    """The image of a point is a part of one picture of all images; below it, a card for the name covers the rest."""
    width = SHOWN * min(plots.COLUMNS, len(sample.images))
    return (
        f".dots b {{ width: {SHOWN}px; padding-top: {SHOWN + 2}px; background-size: 100% 100%, {width}px auto; "
        f"background-position: 0 {SHOWN}px, var(--b); "
        f"background-image: linear-gradient(var(--card), var(--card)), url({plots.sprite(sample.images)}); }}"
    )


def _points(sample: Sample, title: str, points: np.ndarray, axes: tuple[str, str]) -> str:
    """A map of points [N, 2]: the points of a class follow each other from left to right, for the arrow keys."""
    low, high = points.min(axis=0), points.max(axis=0)
    place = 100 * (points - low) / np.maximum(high - low, 1e-12)
    group = _groups(sample)
    order = np.lexsort((place[:, 0], group))
    name = escape(title.partition(" ")[0])
    dots = "".join(_dot(sample, i, group[i], place[i, 0], place[i, 1], name) for i in order)
    none = f'<label class="none"><input type="radio" name="{name}" checked>no image</label>'
    labels = f"<small>↑ {escape(axes[1])}</small>", f"<small>→ {escape(axes[0])}</small>"
    body = f'{none}{labels[0]}<div class="dots">{dots}</div>{labels[1]}'
    return f"<figure><figcaption>{escape(title)}</figcaption>{body}</figure>"


def _dot(sample: Sample, i: int, group: int, x: float, y: float, name: str) -> str:
    column, row = i % plots.COLUMNS, i // plots.COLUMNS
    where = f"--x:{x:.1f};--y:{y:.1f};--k:{_color(group, sample)};--b:{-SHOWN * column}px {-SHOWN * row}px"
    names = [sample.classes[group], sample.names[i]] if group >= 0 else [sample.names[i]]
    text = "<br>".join(map(_escaped, names))
    side = ' class="low"' if y < 50 else ""
    return f'<label{side} style="{where}"><input type="radio" name="{name}"><b>{text}</b></label>'


def _groups(sample: Sample) -> np.ndarray:
    """The class of each image; -1 if it is unknown."""
    return np.full(len(sample.images), -1) if sample.labels is None else np.asarray(sample.labels)


def _color(group: int, sample: Sample) -> str:
    import matplotlib

    count = len(sample.classes)
    if sample.labels is None:
        return "var(--accent)"
    if group < 0 or count > MAX_COLORS:
        return GRAY
    colors = matplotlib.colormaps["tab10" if count <= 10 else "tab20"].colors  # type: ignore[attr-defined]
    return "#" + "".join(f"{round(255 * part):02x}" for part in colors[group])


def _key(sample: Sample) -> str:
    """Which colour is which class."""
    if sample.labels is None or len(sample.classes) > MAX_COLORS:
        return ""
    items = (
        f'<span style="--k:{_color(group, sample)}">{_escaped(sample.classes[group])}</span>'
        for group in np.unique(sample.labels[sample.labels >= 0])
    )
    return f'<p class="key">{"".join(items)}</p>'
