"""What the trials of a sweep are judged by: labels at hand, the run's own kNN, or RankMe, which needs no labels."""

import math
from typing import Any

import numpy as np

from ssl_jax.config import Config, Data, to_steps
from ssl_jax.data import Source, open_source
from ssl_jax.data.labelled import labelled_indices, labelled_part
from ssl_jax.data.source import Images
from ssl_jax.encoder import Encoder
from ssl_jax.errors import UserError
from ssl_jax.evaluate.cross_validation import cross_validated, folds, mean_and_error
from ssl_jax.evaluate.references import digest, pixels
from ssl_jax.evaluate.subsets import nested_subset
from ssl_jax.files import read_lines
from ssl_jax.run_folder import RunFolder
from ssl_jax.settings import data_of

MAX_LABELS = 2000  # more hardly change an order of settings, and cost minutes for each trial
SCORES = ("score", "error", "pixels", "pixels_error")  # error: standard error; None where there is none
TITLES = {"knn_accuracy": "kNN accuracy", "knn_auc": "kNN macro AUC", "rank_me": "RankMe"}


class ByLabels:
    """By cross-validation on labelled images. title: of the score; meaning: in a sentence; inputs: what it depends
    on."""

    def __init__(self, labels: str, data: Data, seed: int):
        """Raises UserError if there are too few labels. No image is decoded yet."""
        self.where, self.seed = f"--labels={labels}", seed
        self.data = data_of(labels, "--labels", data)
        source, known, groups = self._open(self.data)
        self.kept = np.arange(len(known))
        if len(known) > MAX_LABELS:
            self.kept = nested_subset(known, MAX_LABELS, seed, groups)
        self.labels, self.groups = known[self.kept], None if groups is None else groups[self.kept]
        try:
            self.splits = folds(self.labels, seed, self.groups)
        except UserError as error:
            raise UserError(f"{self.where}: {error}") from error
        self.classes = len(source.classes)
        if self.labels.ndim == 2 and np.isnan(self._validated(np.zeros((len(self.labels), 1)))).all():
            raise UserError(f"{self.where}: no class has positive and negative images in a fold; label more of both")
        self.title = "top-1" if self.labels.ndim == 1 else "macro AUC"
        self.meaning = (
            f"{self.title} of a logistic regression on the embedding: mean over {len(self.splits)} folds of "
            f"{len(self.labels)} labelled images, ± its standard error over the folds"
        )
        names = np.array([source.names[i] for i in self.kept])
        arrays = [self.labels, names, *([] if self.groups is None else [self.groups])]
        self.inputs: list[Any] = [self.title, digest(*arrays), source.classes, seed]
        self.images: dict[tuple[int, int], tuple[Images, tuple[float, float]]] = {}  # by size and channels

    def _open(self, data: Data) -> tuple[Source, np.ndarray, np.ndarray | None]:
        source = open_source(data)
        part = labelled_part(source, source, self.where)
        return part.source, part.labels, part.source.groups

    def score(self, config: Config, run: RunFolder, encoder: Encoder) -> dict[str, float | None]:
        del config, run
        key = encoder.size, encoder.channels
        if key not in self.images:
            images = self._open(encoder.data(self.data))[0].take(self.kept).all_images()
            self.images[key] = images, mean_and_error(self._validated(pixels(images)))
        images, of_pixels = self.images[key]
        return _numbers(*mean_and_error(self._validated(encoder.embed(images))), *of_pixels)

    def _validated(self, features: np.ndarray) -> np.ndarray:
        options: Any = {"classes": self.classes, "seed": self.seed, "groups": self.groups}
        return cross_validated(features, self.labels, self.splits, **options)


class ByRun:
    """By what a run measures of itself at its end: kNN if the images have labels, else RankMe."""

    def __init__(self, source: Source):
        self.metric = "rank_me" if source.labels is None else "knn_auc" if source.multilabel else "knn_accuracy"
        self.known = 0 if source.labels is None else len(labelled_indices(source.labels))
        self.title, self.inputs = TITLES[self.metric], [self.metric]
        if self.metric == "rank_me":
            self.meaning = (
                "RankMe, the effective rank of the embeddings, without any label. It finds collapsed settings, but a "
                "higher rank need not be a better encoder, least of all across methods, views or widths: label a few "
                "images and give --labels"
            )
        else:
            error = ", ± its standard error over the images that are classified" * (self.metric == "knn_accuracy")
            self.meaning = (
                f"{self.title} as the run measures it at its end{error}. It takes the labels of all {self.known} "
                "labelled images; if you have only some of them, give these as --labels"
            )

    def check(self, config: Config, images: int) -> None:
        if not to_steps(config.eval.every, images, config.train.batch):
            raise UserError(
                f"config.eval.every={config.eval.every!r}: the runs measure nothing to judge them by; allowed: an "
                "interval of a step or more, or --labels"
            )

    def score(self, config: Config, run: RunFolder, encoder: Encoder) -> dict[str, float | None]:
        del encoder
        found = [line[self.metric] for line in read_lines(run.metrics) if self.metric in line]
        if not found:
            raise UserError(f"{run.metrics}: no {self.metric}, by which the trials are judged")
        error = math.nan
        if self.metric == "knn_accuracy":  # of a share of the images that are classified
            settings = config.eval
            asked = min(settings.knn_queries, min(self.known, settings.knn_bank + settings.knn_queries) // 2)
            error = math.sqrt(found[-1] * (1 - found[-1]) / asked)
        return _numbers(found[-1], error, math.nan, math.nan)


def _numbers(*values: float) -> dict[str, float | None]:
    return {name: None if math.isnan(value) else float(value) for name, value in zip(SCORES, values, strict=True)}
