"""What a score has to beat: references that cost nothing, on the same labels and the same test images.

    majority class              every image is said to belong to the most frequent class; an AUC of 0.5
    raw pixels, linear or kNN   the images themselves, reduced to at most SIDE px, in the place of the embedding
    random encoder, the same    an encoder of the same network that has learnt nothing

An encoder that does not beat raw pixels has not helped.
"""

import contextlib
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax.augment import center_view
from ssl_jax.config import Eval
from ssl_jax.data.source import Images, LazyImages
from ssl_jax.encoder import Encoder, model_of, random_encoder
from ssl_jax.errors import DamagedError
from ssl_jax.evaluate.knn import log_odds
from ssl_jax.evaluate.linear import Probe, linear_probe
from ssl_jax.evaluate.scores import log_frequencies, metrics, paired
from ssl_jax.files import read_json, write_json

MAJORITY, PIXELS, RANDOM = "majority class", "raw pixels", "random encoder"
SIDE = 32  # px
MAX_LABELS = 10_000  # labelled images that a reference learns from: more hardly change it and cost minutes
PIECE = 1_024  # test images that are decoded at a time
KEPT = 10**9  # bytes of features of the test images that are kept for the next draw of labels
STRENGTHS, MAX_ITER = (1e-3, 1e-2, 1e-1), 100  # of the logistic regressions
VERSION = 1  # of the computation; raise it when a change to the code changes the numbers
Scores = dict[str, dict[str, float]]  # reference -> metric -> value


def pixels(images: Images) -> np.ndarray:
    """Pixels float32 [N, D] in [0, 1] of images [N, H, W, C], uint8 or float32 in [0, 1]; larger ones are first reduced
    to SIDE px a side."""
    side = min(SIDE, *images.shape[1:3])
    parts = [np.asarray(_reduced(images[i : i + 256], side)) for i in range(0, len(images), 256)]
    return np.concatenate(parts).reshape(len(images), -1)


def _reduced(images: np.ndarray, side: int) -> np.ndarray:
    if images.shape[1:3] == (side, side):
        return images.astype(np.float32) / (255 if images.dtype == np.uint8 else 1)
    padded = np.pad(images, [(0, 256 - len(images)), (0, 0), (0, 0), (0, 0)])  # one shape, one compilation
    return np.asarray(_center(padded, side))[: len(images)]


_center = jax.jit(center_view, static_argnums=1)


def regression(features: np.ndarray, labels: np.ndarray, **options: Any) -> Probe:
    """The logistic regression of the references: `linear_probe` with three strengths and few iterations."""
    return linear_probe(features, labels, grid=STRENGTHS, max_iter=MAX_ITER, **options)


def untrained(encoder: Encoder) -> Encoder:
    """An encoder of the same network with random weights."""
    if encoder.about.get("model", {}).get("init"):  # this network starts from weights that were trained
        return random_encoder(model_of(encoder.about), encoder.size, encoder.channels, seed=0)
    shape = (1, encoder.size, encoder.size, encoder.channels)
    params, stats = jax.jit(encoder.network.init)(jax.random.key(0), jnp.zeros(shape))
    return encoder._replace(params=params, stats=stats)


class References:
    """The references for one set of test images uint8 [M, H, W, C], with labels [M] or [M, K].

    encoders: each network that is compared, under the name of its reference ("random encoder"). Nothing is computed
    before it is needed, so references that are all on disk cost nothing. Of the images to learn from at most MAX_LABELS
    are decoded, and the features of the test images are only kept if they take at most KEPT bytes.
    """

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        images: Images,
        labels: np.ndarray,
        classes: Sequence[str],
        settings: Eval,
    ):
        self.encoders, self.images, self.labels, self.classes, self.settings = (
            encoders,
            images,
            labels,
            classes,
            settings,
        )
        self.features: dict[str, list[np.ndarray]] = {}  # of the test images, in pieces
        self.networks: dict[str, Callable[[Images], np.ndarray]] = {PIXELS: pixels}
        networks = {name: [e.about.get("model"), e.size, e.channels] for name, e in encoders.items()}
        self.inputs = [
            VERSION,
            digest(images, labels),
            list(classes),
            networks,
            settings.knn_k,
            settings.knn_temperature,
        ]

    def of(
        self, path: Path, images: Images, labels: np.ndarray, *, seed: int, groups: np.ndarray | None = None
    ) -> Scores:
        """The numbers of `metrics` for each reference that learns from these labelled images; kept in a file."""
        inputs = [*self.inputs, digest(images, labels, *([] if groups is None else [groups])), seed]
        key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
        saved: dict[str, Any] = {}
        with contextlib.suppress(DamagedError):  # computed again
            saved = read_json(path)
        if saved.get("key") != key:
            saved = {"key": key, "scores": self._compute(images, labels, seed, groups)}
            write_json(path, saved)
        names = [MAJORITY, *(f"{name}, {how}" for name in (PIXELS, *self.encoders) for how in ("linear", "kNN"))]
        return {name: saved["scores"][name] for name in names}

    def _compute(self, images: Images, labels: np.ndarray, seed: int, groups: np.ndarray | None) -> Scores:
        if len(labels) > MAX_LABELS:
            kept = np.sort(np.random.default_rng(seed).choice(len(labels), MAX_LABELS, replace=False))
            images, labels, groups = images[kept], labels[kept], None if groups is None else groups[kept]
        classes, k = len(self.classes), min(self.settings.knn_k, len(labels))
        scores = {MAJORITY: np.tile(log_frequencies(labels, classes), (len(self.labels), 1))}
        for name in (PIXELS, *self.encoders):
            features = self._network(name)(images)
            options: Any = {"classes": classes, "seed": seed, "groups": groups}
            probe = regression(features, labels, **options)
            # All pixels are positive: without their mean, all images point the same way.
            centre = features.mean(axis=0) if name == PIXELS else 0
            bank, settings = features - centre, (labels, classes, k, self.settings.knn_temperature)
            both = [(probe.scores(test), _votes(bank, test - centre, *settings)) for test in self._tested(name)]
            scores[f"{name}, linear"], scores[f"{name}, kNN"] = map(np.concatenate, zip(*both, strict=True))
        each = {name: metrics(s, self.labels, self.classes) for name, s in scores.items()}
        return {name: {m: v for m, v in values.items() if isinstance(v, float)} for name, values in each.items()}

    def _network(self, name: str) -> Callable[[Images], np.ndarray]:
        """A function that embeds images."""
        if name not in self.networks:
            self.networks[name] = functools.partial(untrained(self.encoders[name]).embed, fixed=True)
        return self.networks[name]

    def _tested(self, name: str) -> Iterable[np.ndarray]:
        """The embedded test images, in pieces."""
        if name not in self.features:
            embed, starts = self._network(name), range(0, len(self.labels), PIECE)
            pieces = (embed(self.images[i : i + PIECE]) for i in starts)
            first = next(pieces)
            if first.nbytes * len(starts) > KEPT:
                return itertools.chain([first], pieces)
            self.features[name] = [first, *pieces]
        return self.features[name]


def _votes(
    bank: np.ndarray, queries: np.ndarray, labels: np.ndarray, classes: int, k: int, temperature: float
) -> np.ndarray:
    """`knn.knn_scores`, for banks of many small sizes, each of which XLA would have to compile."""
    from scipy.special import softmax
    from sklearn.neighbors import NearestNeighbors

    values = np.eye(classes)[labels] if labels.ndim == 1 else labels
    known, positive = ~np.isnan(values), np.nan_to_num(values)
    distance, index = NearestNeighbors(n_neighbors=k, metric="cosine").fit(bank).kneighbors(queries)
    votes, voters = np.zeros((2, len(queries), classes))
    for weight, nearest in zip(softmax(-distance / temperature, axis=1).T, index.T, strict=True):
        votes += weight[:, None] * positive[nearest]
        voters += weight[:, None] * known[nearest]
    if labels.ndim == 1:
        return votes
    count = known.sum(axis=0)
    unknown = np.where(count > 0, positive.sum(axis=0) / np.maximum(count, 1), 0.5)
    return log_odds(np.where(voters > 0, votes / np.maximum(voters, 1e-12), unknown))


class Margin(NamedTuple):
    """How far a score lies above raw pixels: their better name and mean score, the mean of the paired differences over
    draws of labels, and half the width of its 95 % interval (nan for a single draw)."""

    name: str
    score: float
    difference: float
    half: float

    @property
    def words(self) -> str:
        if self.difference <= 0:
            return f"not above {PIXELS}"
        return f"not shown to be above {PIXELS}" if self.difference - self.half <= 0 else f"above {PIXELS}"


def over_pixels(scores: Sequence[float], references: Sequence[Mapping[str, float]]) -> Margin:
    """Scores of an encoder on several draws of labels against the better of linear and kNN on raw pixels.

    references: for each draw, reference -> score.
    """
    names = [name for name in references[0] if name.startswith(PIXELS)]
    name = max(names, key=lambda name: np.mean([each[name] for each in references]))
    theirs = [each[name] for each in references]
    return Margin(name, float(np.mean(theirs)), *paired(scores, theirs))


def digest(*arrays: Images) -> str:
    """A hash of the arrays: values, shapes and types; of `LazyImages`, their names and shape."""
    total = hashlib.sha256()
    for array in arrays:
        if isinstance(array, LazyImages):
            total.update(array.digest().encode())
            continue
        array = np.ascontiguousarray(array)
        total.update(f"{array.dtype}{array.shape}".encode())
        total.update(array)
    return total.hexdigest()


def weights_digest(encoder: Encoder) -> str:
    """A hash of an encoder's weights, statistics and architecture."""
    leaves, structure = jax.tree.flatten((encoder.params, encoder.stats))
    # As JSON, in which the metadata of a loaded encoder and of one just trained are equal.
    metadata = json.dumps([str(structure), encoder.size, encoder.channels, encoder.about.get("model")], sort_keys=True)
    return hashlib.sha256((metadata + digest(*map(np.asarray, leaves))).encode()).hexdigest()
