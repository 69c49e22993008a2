"""Images in memory as a source."""

from collections.abc import Sequence

import numpy as np

from ssl_jax.config import Data
from ssl_jax.data.central import check_side
from ssl_jax.data.decoding import convert
from ssl_jax.data.source import Source, same_object
from ssl_jax.errors import UserError


def from_array(
    images: np.ndarray,
    labels: np.ndarray | None,
    classes: Sequence[str],
    data: Data,
    where: str,
    objects: np.ndarray | None = None,
) -> Source:
    """A source of images uint8 [N,H,W] or [N,H,W,C] in memory. data.limit, data.size and data.channels are applied."""
    images = images[..., None] if images.ndim == 3 else images
    if labels is not None and len(labels) != len(images):
        raise UserError(f"{where}: {len(labels)} labels for {len(images)} images; allowed: one each")
    images, labels = images[: data.limit or None], None if labels is None else labels[: data.limit or None]
    if not len(images):
        raise UserError(f"{where}: no images")
    _, height, width, channels = images.shape
    new_channels = data.channels or channels
    if new_channels != channels and {new_channels, channels} != {1, 3}:
        raise UserError(f"config.data.channels={data.channels}: {where} has {channels}; allowed: 0 or {channels}")
    shape = (data.size or height, data.size or width, new_channels)
    check_side(data, data.size)
    unchanged = shape == images.shape[1:] and not data.test_side

    def load(index: int) -> np.ndarray:
        if unchanged:
            return images[index]
        return convert(images[index], data.size, new_channels, data.test_side)

    return Source(
        [str(i) for i in range(len(images))],
        shape,
        load,
        labels=None if labels is None else labels.astype(np.float32 if labels.ndim == 2 else np.int32),
        classes=classes,
        objects=None if objects is None else same_object(objects[: data.limit or None], where, data.pairs),
        array=images if unchanged else None,
        workers=data.workers,
        content=images.__getitem__,
    )
