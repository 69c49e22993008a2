"""Coloured shapes on noise, to try things out without files. Each image is a function of (seed, part, index)."""

import re

import numpy as np

from ssl_jax.config import Data
from ssl_jax.data.source import Source, pick_parts
from ssl_jax.errors import UserError

SHAPES = ("disc", "square", "triangle", "cross", "ring", "bars", "diamond", "frame")
DEFAULTS = {"classes": 4, "n": 1024, "test": 256, "seed": 0}


def read(data: Data) -> Source:
    """Generated images. data.path may set any of "classes=4,n=1024,test=256,seed=0": up to 8 classes, and the numbers
    of training (n) and test images.

    Images have 32 px and 3 channels unless data.size and data.channels are set. The label of image i is i mod classes.
    """
    options = _options(data.path)
    parts = {"train": (0, options["n"]), "test": (1, options["test"])}
    keys = [(part, i) for part, n in pick_parts(parts, data.split, "synthetic") for i in range(n)][: data.limit or None]
    size, channels, classes = data.size or 32, data.channels or 3, options["classes"]
    if not keys:
        raise UserError(f"config.data.path={data.path!r}: no images in split {data.split!r}")
    return Source(
        [f"{'train' if part == 0 else 'test'}/{i}" for part, i in keys],
        (size, size, channels),
        lambda index: _draw(options["seed"], *keys[index], classes, size, channels),
        labels=np.array([i % classes for _, i in keys], np.int32),
        classes=SHAPES[:classes],
        workers=data.workers,
    )


def _options(text: str) -> dict[str, int]:
    options = dict(DEFAULTS)
    for item in filter(None, text.split(",")):
        match = re.fullmatch(r"\s*(\w+)\s*=\s*(\d+)\s*", item)
        if not match or match[1] not in options:
            raise UserError(f'config.data.path={text!r}: {item!r}; allowed: "classes=4,n=1024,test=256,seed=0"')
        options[match[1]] = int(match[2])
    if not 1 <= options["classes"] <= len(SHAPES):
        raise UserError(f"config.data.path={text!r}: allowed: classes from 1 to {len(SHAPES)}")
    return options


def _draw(seed: int, part: int, index: int, classes: int, size: int, channels: int) -> np.ndarray:
    rng = np.random.Generator(np.random.PCG64([seed, part, index]))
    radius, (cy, cx) = rng.uniform(0.2, 0.35), rng.uniform(0.35, 0.65, 2)
    y, x = np.mgrid[:size, :size].astype(np.float32) / size + 0.5 / size
    inside = _inside(SHAPES[index % classes], (y - cy) / radius, (x - cx) / radius)
    background, colour = rng.uniform(0, 110, channels), rng.uniform(140, 255, channels)
    image = np.where(inside[..., None], colour, background) + rng.normal(0, 12, (size, size, channels))
    return image.clip(0, 255).astype(np.uint8)


def _inside(shape: str, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    far, near, round_ = np.maximum(abs(x), abs(y)), np.minimum(abs(x), abs(y)), np.hypot(x, y)
    return {
        "disc": round_ < 1,
        "square": far < 0.9,
        "triangle": (y < 0.8) & (2 * abs(x) < y + 1.2),
        "cross": (far < 1) & (near < 0.35),
        "ring": (round_ < 1) & (round_ > 0.6),
        "bars": (far < 1) & (np.floor(y * 2.5) % 2 == 0),
        "diamond": abs(x) + abs(y) < 1.1,
        "frame": (far < 1) & (far > 0.6),
    }[shape]
