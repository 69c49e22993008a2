"""The images of a source that have a label, counted as the training data count them."""

from typing import NamedTuple

import numpy as np

from ssl_jax.data.source import Source
from ssl_jax.errors import UserError


def labelled_indices(labels: np.ndarray) -> np.ndarray:
    """Indices of the images with a known label; with several labels per image, of those with at least one."""
    labels = np.asarray(labels)
    return np.flatnonzero(labels >= 0 if labels.ndim == 1 else ~np.isnan(labels).all(axis=1))


class Labelled(NamedTuple):
    """A source of labelled images alone, and their labels as numbers (or columns) of the training data's classes."""

    source: Source
    labels: np.ndarray


def labelled_part(source: Source, like: Source, where: str) -> Labelled:
    """`source` without images that have no known label. UserError if none has, or if they are not of `like`'s kind."""
    labels = source.labels_as(like.classes, where)
    if source.multilabel != like.multilabel:
        kinds = {True: "several labels an image", False: "one label an image"}
        raise UserError(
            f"{where}: {kinds[source.multilabel]}; allowed: {kinds[like.multilabel]}, as in the training data"
        )
    known = labelled_indices(labels)
    if not len(known):
        raise UserError(f"{where}: no image has a known label; allowed: at least one")
    return Labelled(source if len(known) == len(source) else source.take(known), labels[known])
