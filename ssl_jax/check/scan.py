"""One pass over the images of a data set: what each is like, how it looks in small, and its embedding."""

from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
from PIL import Image

from ssl_jax.config import Data
from ssl_jax.data import Source
from ssl_jax.data.decoding import header
from ssl_jax.data.exclude import key_of
from ssl_jax.encoder import Encoder
from ssl_jax.errors import UnreadableError

SMALL = 24  # px of the side at which images are kept, to compare their pixels
FLAT = 2  # levels of 255 within which an image counts as blank: compression may disturb a constant


class Scan(NamedTuple):
    """The N images of a data set that can be read. Memory is that of the embeddings and of N pictures of 24 px.

    places:  int64 [N], in the source            keys: what tells each from those of all other data (`data.exclude`)
    digests: of the pixels, as they are read     blank: bool [N], of one colour
    sizes:   int64 [N, 2], width and height of the file; those of the array if the images are no files; 0 if unknown
    kinds:   such as "gray" or "colour, transparent"
    small:   uint8 [N, 24, 24, C]
    features: embeddings float32 [N, D]; None without an encoder
    unreadable: name -> (key, reason), of the others
    """

    source: Source
    places: np.ndarray
    names: list[str]
    keys: list[str]
    digests: list[bytes]
    blank: np.ndarray
    sizes: np.ndarray
    kinds: list[str]
    small: np.ndarray
    features: np.ndarray | None
    unreadable: dict[str, tuple[str, str]]


class _Facts(NamedTuple):
    digest: bytes
    blank: bool
    size: tuple[int, int]
    kind: str
    small: np.ndarray


def scan(
    source: Source, data: Data, encoder: Encoder | None, progress: Callable[[int, int], None] = lambda done, total: None
) -> Scan:
    """data: what the source was opened with. progress: called with (done, total)."""
    indices, facts, features = list[int](), list[_Facts](), list[np.ndarray]()
    files = source.files
    for index, images in source.chunks():
        indices += index.tolist()
        facts += [_facts(image, files[i] if files else ()) for i, image in zip(index, images)]
        if encoder:
            features.append(encoder.embed(images))
        progress(int(index[-1]) + 1, len(source))
    names = [source.names[i] for i in indices]
    return Scan(
        source,
        np.array(indices, np.int64),
        names,
        [key_of(data, name, source.paths[i] if source.paths else "") for name, i in zip(names, indices, strict=True)],
        [each.digest for each in facts],
        np.array([each.blank for each in facts], bool),
        np.array([each.size for each in facts], np.int64).reshape(-1, 2),
        [each.kind for each in facts],
        np.array([each.small for each in facts], np.uint8).reshape(-1, SMALL, SMALL, source.shape[2]),
        np.concatenate(features) if features else None,
        {name: (key_of(data, name, path), why) for name, (path, why) in sorted(source.unreadable.items())},
    )


def _facts(image: np.ndarray, files: Sequence[str]) -> _Facts:
    """image: uint8 [H, W, C]."""
    height, width, channels = image.shape
    kind = "gray" if channels == 1 else "colour"
    if files:
        try:
            width, height, kind = header(files[0])
        except UnreadableError:  # it has just been read, and is gone
            width, height = 0, 0
    if channels == 3 and kind.startswith("colour") and (image == image[..., :1]).all():
        kind = kind.replace("colour", "gray")
    if channels not in (1, 3):
        kind = f"{channels} channels" + "".join(kind.partition(",")[1:])
    blank = bool((np.ptp(image, axis=(0, 1)) <= FLAT).all())
    return _Facts(blake2b(image.tobytes(), digest_size=16).digest(), blank, (width, height), kind, _small(image))


def _small(image: np.ndarray) -> np.ndarray:
    channels: Sequence[np.ndarray] = [image[..., c] for c in range(image.shape[2])]
    resized = [Image.fromarray(c).resize((SMALL, SMALL), Image.Resampling.BOX) for c in channels]
    return np.stack([np.asarray(each) for each in resized], axis=-1)
