"""The labelled images of a source, with labels numbered as in the training data."""

from typing import NamedTuple

import numpy as np

from ssl_jax.data.source import Source
from ssl_jax.errors import UserError


def labelled_indices(labels: np.ndarray) -> np.ndarray:
    """Indices of the images with a known label or, for multi-label data, with at least one known label."""
    labels = np.asarray(labels)
    return np.flatnonzero(labels >= 0 if labels.ndim == 1 else ~np.isnan(labels).all(axis=1))


class Labelled(NamedTuple):
    """A source of only labelled images, and their labels as indices or columns of the training data's classes."""

    source: Source
    labels: np.ndarray


def labelled_part(source: Source, like: Source, where: str) -> Labelled:
    """The images of `source` with a known label.

    Raises UserError if there are none, if only one of `source` and `like` is multi-label, or if training data
    (`source` is `like`) have images of a single class.
    """
    labels = source.labels_as(like.classes, where)
    if source.multilabel != like.multilabel:
        kinds = {True: "several labels per image", False: "one label per image"}
        raise UserError(
            f"{where}: {kinds[source.multilabel]}; allowed: {kinds[like.multilabel]}, as in the training data"
        )
    known = labelled_indices(labels)
    if not len(known):
        raise UserError(f"{where}: no image has a known label; allowed: at least one")
    if source is like and not source.multilabel and len(set(labels[known].tolist())) == 1:
        only = source.classes[labels[known[0]]]
        raise UserError(f"{where}: all labelled images are {only!r}; allowed: two classes or more, to tell them apart")
    return Labelled(source if len(known) == len(source) else source.take(known), labels[known])
