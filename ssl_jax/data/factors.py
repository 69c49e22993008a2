"""Coloured shapes with four independent labels, to find out which transform loses which label.

shape        of the object: disc, square, triangle, cross
colour       of the object: red, green, blue or none, at any brightness, so that a gray image does not reveal it
texture      of the object: plain, fine grain, coarse grain or stripes
orientation  of the waves in the background: 0, 45, 90 or 135 degrees

Everything else (position, size, brightness, the waves' length and phase, noise) is independent of all four. Each image
is a function of (seed, part, index).
"""

import re

import numpy as np

from ssl_jax.augment.ops import GRAY
from ssl_jax.config import Data
from ssl_jax.data.source import Source, pick_parts
from ssl_jax.errors import UserError, unknown

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": ("disc", "square", "triangle", "cross"),
    "colour": ("none", "red", "green", "blue"),
    "texture": ("plain", "fine", "coarse", "stripes"),
    "orientation": ("0", "45", "90", "135"),
}
DEFAULTS = {"label": "shape", "n": "1024", "test": "256", "seed": "0"}
ALLOWED = '"label=shape,n=1024,test=256,seed=0"'
# Red, green and blue without luma: added to a gray, they leave its brightness unchanged.
CHROMA = np.array([np.zeros(3), *(np.eye(3) - np.array(GRAY)[:, None] / sum(GRAY))])
CHROMA[1:] /= np.abs(CHROMA[1:]).max(axis=1, keepdims=True)


def read(data: Data) -> Source:
    """Generated images. data.path may set any of "label=shape,n=1024,test=256,seed=0": the attribute that is the label,
    and the numbers of training (n) and test images.

    Images have 32 px and 3 channels unless data.size and data.channels are set; with one channel they are gray.
    """
    options = _options(data.path)
    label, seed = options["label"], int(options["seed"])
    parts = {"train": (0, int(options["n"])), "test": (1, int(options["test"]))}
    keys = [(part, i) for part, n in pick_parts(parts, data.split, "factors") for i in range(n)][: data.limit or None]
    size, channels = data.size or 32, data.channels or 3
    if not keys:
        raise UserError(f"config.data.path={data.path!r}: no images in split {data.split!r}")
    column = list(ATTRIBUTES).index(label)
    return Source(
        [f"{'train' if part == 0 else 'test'}/{i}" for part, i in keys],
        (size, size, channels),
        lambda index: _draw(seed, *keys[index], size, channels),
        labels=lambda: np.array([_values(_rng(seed, *key))[column] for key in keys], np.int32),
        classes=ATTRIBUTES[label],
        workers=data.workers,
    )


def _options(text: str) -> dict[str, str]:
    options = dict(DEFAULTS)
    for item in filter(None, text.split(",")):
        match = re.fullmatch(r"\s*(\w+)\s*=\s*(\w+)\s*", item)
        if not match or match[1] not in options or (match[1] != "label" and not match[2].isdecimal()):
            raise UserError(f"config.data.path={text!r}: {item!r}; allowed: {ALLOWED}")
        options[match[1]] = match[2]
    if options["label"] not in ATTRIBUTES:
        raise unknown("config.data.path: label", options["label"], ATTRIBUTES)
    return options


def _rng(seed: int, part: int, index: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64([seed, part, index]))


def _values(rng: np.random.Generator) -> np.ndarray:
    """The value (0 to 3) of each attribute, drawn before everything else of an image."""
    return rng.integers(0, 4, len(ATTRIBUTES))


def _draw(seed: int, part: int, index: int, size: int, channels: int) -> np.ndarray:
    rng = _rng(seed, part, index)
    shape, colour, texture, orientation = _values(rng)
    radius, (cy, cx) = rng.uniform(0.2, 0.32), rng.uniform(0.35, 0.65, 2)
    y, x = np.mgrid[:size, :size].astype(np.float32) / size + 0.5 / size
    background = 0.35 + rng.uniform(-0.1, 0.1) + 0.1 * _waves(rng, np.pi / 4 * orientation, y, x)
    inside = _inside(ATTRIBUTES["shape"][shape], (y - cy) / radius, (x - cx) / radius)
    surface = rng.uniform(0.42, 0.62) + 0.14 * _texture(rng, ATTRIBUTES["texture"][texture], y, x)
    gray = np.where(inside, surface, background) + rng.normal(0, 0.015, (size, size))
    image = np.repeat(gray[..., None], channels, axis=2)
    if channels == 3:
        image += inside[..., None] * rng.uniform(0.12, 0.2) * CHROMA[colour]
    return (255 * image).clip(0, 255).astype(np.uint8)


def _waves(rng: np.random.Generator, angle: float, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    angle += rng.normal(0, 0.07)
    across = np.cos(angle) * x + np.sin(angle) * y
    return np.sin(2 * np.pi * (rng.uniform(4, 6) * across + rng.uniform()))


def _texture(rng: np.random.Generator, name: str, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Values with a standard deviation of about 1, in a random direction; 0 for "plain"."""
    size = len(y)
    if name == "plain":
        return np.zeros_like(y)
    if name == "stripes":
        angle = rng.uniform(0, np.pi)
        return np.sqrt(2) * np.sin(2 * np.pi * (8 * (np.cos(angle) * x + np.sin(angle) * y) + rng.uniform()))
    cells = size if name == "fine" else 10  # coarse: ten cells per side
    grain = rng.choice([-1.0, 1.0], (cells, cells))
    return grain[np.minimum((y * cells).astype(int), cells - 1), np.minimum((x * cells).astype(int), cells - 1)]


def _inside(shape: str, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    far, near = np.maximum(abs(x), abs(y)), np.minimum(abs(x), abs(y))
    return {
        "disc": np.hypot(x, y) < 1,
        "square": far < 0.88,
        "triangle": (y < 0.85) & (2 * abs(x) < y + 1.3),
        "cross": (far < 1.05) & (near < 0.45),
    }[shape]
