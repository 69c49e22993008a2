"""Each transform alone, at increasing strength: the views that both audits draw."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from ssl_jax.augment import draw, render
from ssl_jax.augment.views import Parameters
from ssl_jax.config import View


class Transform(NamedTuple):
    """A transform and the strengths to try, weakest first, as numbers of `config.augment`.

    changes:   strength -> the options that switch it on in a view without other transforms
    strength:  view -> the strength that the view uses; None if it is off
    key, unit: of the strength
    moves:     whether it moves pixels rather than changing their values
    colour:    whether it affects only images with three channels
    """

    key: str
    unit: str
    strengths: tuple[float, ...]
    changes: Callable[[float], dict[str, Any]]
    strength: Callable[[View], float | None]
    moves: bool = False
    colour: bool = False


def _colour(key: str, *strengths: float, colour: bool = False) -> Transform:
    def strength(view: View) -> float | None:
        return getattr(view, key) or None if view.jitter_prob else None

    return Transform(key, "", strengths, lambda s: {key: s, "jitter_prob": 1.0}, strength, colour=colour)


# The strengths range from hardly visible to beyond the presets.
TRANSFORMS: dict[str, Transform] = {
    "crop": Transform(
        "crop_scale",
        "smallest share of the area",
        (0.8, 0.6, 0.4, 0.2, 0.08),
        lambda s: {"crop_scale": (s, 1.0)},
        lambda v: v.crop_scale[0] if tuple(v.crop_scale) != (1, 1) else None,
        moves=True,
    ),
    "flip": Transform("flip", "", (1.0,), lambda s: {"flip": s}, lambda v: v.flip or None, moves=True),
    "rotate": Transform(
        "rotate", "degrees", (5.0, 10.0, 20.0, 45.0, 90.0), lambda s: {"rotate": s}, lambda v: v.rotate or None, True
    ),
    "shear": Transform(
        "shear", "degrees", (5.0, 10.0, 20.0, 30.0), lambda s: {"shear": s}, lambda v: v.shear or None, True
    ),
    "zoom": Transform(
        "zoom",
        "factor",
        (1.1, 1.25, 1.5, 2.0),
        lambda s: {"zoom": (1 / s, s)},
        lambda v: max(v.zoom[1], 1 / v.zoom[0]) if tuple(v.zoom) != (1, 1) else None,
        moves=True,
    ),
    "translate": Transform(
        "translate",
        "share of the side",
        (0.05, 0.1, 0.2, 0.3, 0.5),
        lambda s: {"translate": s},
        lambda v: v.translate or None,
        moves=True,
    ),
    "perspective": Transform(
        "perspective",
        "distortion scale",
        (0.1, 0.2, 0.4, 0.6, 0.8),
        lambda s: {"perspective": s, "perspective_prob": 1.0},
        lambda v: v.perspective or None if v.perspective_prob else None,
        moves=True,
    ),
    "brightness": _colour("brightness", 0.1, 0.2, 0.4, 0.8),
    "contrast": _colour("contrast", 0.1, 0.2, 0.4, 0.8),
    "saturation": _colour("saturation", 0.1, 0.2, 0.4, 0.8, colour=True),
    "hue": _colour("hue", 0.02, 0.05, 0.1, 0.2, 0.4, colour=True),
    "gray": Transform("gray", "", (1.0,), lambda s: {"gray": s}, lambda v: v.gray or None, colour=True),
    "blur": Transform(
        "blur_sigma",
        "largest sigma, px",
        (0.5, 1.0, 2.0, 4.0),
        lambda s: {"blur": 1.0, "blur_sigma": (min(0.1, s), s)},
        lambda v: v.blur_sigma[1] if v.blur else None,
    ),
    "solarize": Transform(
        "solarize_threshold",
        "threshold",
        (0.9, 0.7, 0.5, 0.3),
        lambda s: {"solarize": 1.0, "solarize_threshold": s},
        lambda v: v.solarize_threshold if v.solarize else None,
    ),
}


def transforms_for(channels: int) -> dict[str, Transform]:
    """The transforms that affect images with this many channels."""
    return {name: t for name, t in TRANSFORMS.items() if channels == 3 or not t.colour}


def alone(transform: Transform, strength: float, size: int) -> View:
    """A view of `size` px with this transform only."""
    return View(size=size, **transform.changes(strength))


def draw_many(view: View, count: int, seed: int, shape: tuple[int, int]) -> Parameters:
    """`count` independent draws of a view's parameters for images of shape (H, W); each array is [count, ...]."""
    keys = jax.random.split(jax.random.key(seed), count)
    return jax.vmap(lambda key: draw(key, view, *shape))(keys)


@functools.partial(jax.jit, static_argnums=2)
def render_each(images: jax.Array, parameters: Parameters, bare: View) -> jax.Array:
    """View i of image i, drawn with parameters[i]: float32 [N, s, s, C]. bare: `bare(view)`."""
    return jax.vmap(lambda image, drawn: render(image, drawn, bare))(images, parameters)


def bare(view: View) -> View:
    """A view with only what `render` reads of it, so that views which differ in the rest are compiled once."""
    return View(size=view.size, solarize_threshold=view.solarize_threshold)


def in_numbers(parameters: Parameters) -> np.ndarray:
    """Parameters as float [N, P], without the order of the colour operations."""
    rows = [np.asarray(v, np.float32) for k, v in sorted(parameters.items()) if k != "order"]
    return np.concatenate([row.reshape(len(row), -1) for row in rows], axis=1)
