"""Do the transforms keep the lesions? For each transform and strength, and for the views of a config as a whole.

Two measures of how much of a lesion (a mask) a random view keeps:

area       the share of the lesion's pixels from which the view draws, for transforms that move pixels (crop, rotation,
           perspective)
contrast   the distance between the mean values inside the lesion and in a ring around it, relative to the original
           image, for transforms that change pixel values (jitter, blur, solarize). A factor for the whole image scales
           all contrasts and leaves the shape of the lesion visible; blur reduces the contrast of what is small.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax.audit.ladder import alone, bare, draw_many, transforms_for
from ssl_jax.audit.masks import Lesion
from ssl_jax.augment import appearance, geometry, render
from ssl_jax.augment.views import Parameters
from ssl_jax.config import View

ENOUGH = 0.5  # share of a lesion; a view that keeps less does not show it
ALLOWED = 0.05  # share of views that may lose the lesion, in the worst class, for a config to pass
MANY = 5  # lesions that a class needs to decide whether a config passes
AREA_DRAWS, CONTRAST_DRAWS = 256, 32  # of each view; all lesions see the same draws
FAINT = 5 / 255  # contrast below which a lesion cannot be told from its surroundings in the original image
RING = 3  # width of the ring, px; or a quarter of the lesion's diameter if that is larger
ALL = "all"
Row = dict[str, Any]
Measure = Callable[[View, int], np.ndarray]  # (view, seed) -> share kept of each lesion in each draw [L, draws]


def audit(
    images: np.ndarray,
    lesions: Sequence[Lesion],
    views: Sequence[View],
    seed: int = 0,
    log: Callable[[str], None] = lambda line: None,
    transforms: Sequence[str] = (),
) -> list[Row]:
    """What each transform alone, at each strength, and the pair `views` as a whole ("config") do to lesions.

    images: uint8 [L, H, W, C], the image of each of L lesions. views: two, as `augment.resolve_views` returns them.
    transforms: names in `ladder.TRANSFORMS`; (): all that do anything.

    Rows: transform, strength, configured (whether `views` use this strength), measure ("area", "contrast"), class (or
    "all"), lesions (how many could be measured), lost (share of views that keep less than half), disagree (share of
    pairs in which one view keeps half and the other does not), kept (mean share).
    """
    rows: list[Row] = []
    measures: dict[str, Measure] = {
        "area": functools.partial(_area, lesions),
        "contrast": _Contrast(images, lesions, views[0].size),
    }

    def measure(transform: str, strength: float | None, configured: bool, name: str, pair: Sequence[View]) -> None:
        kept = [measures[name](view, seed + v) for v, view in enumerate(pair)]
        about = {"transform": transform, "strength": strength, "configured": configured, "measure": name}
        rows.extend(about | row for row in by_class(kept, [lesion.name for lesion in lesions]))

    for name in measures:
        measure("config", None, True, name, views)
    available = transforms_for(images.shape[3])
    del available["flip"]  # it moves a lesion, but keeps all of it
    for name in transforms or available:
        log(name)
        transform = available[name]
        configured = {s for s in map(transform.strength, views) if s is not None}
        rising = transform.strengths[-1] > transform.strengths[0]
        for strength in sorted({*transform.strengths, *configured}, reverse=not rising):
            view = alone(transform, strength, views[0].size)
            measure(name, strength, strength in configured, "area" if transform.moves else "contrast", (view, view))
    return rows


def by_class(kept: Sequence[np.ndarray], names: Sequence[str]) -> list[Row]:
    """Rows of all lesions and of each class, from the shares kept [L, draws] in the first and the second view."""
    first, second = kept
    measured = np.isfinite(first).all(axis=1)
    rows = []
    for name in (ALL, *sorted(set(names))):
        of_class = measured & np.array([name in (ALL, n) for n in names])
        row: Row = {"class": name, "lesions": int(of_class.sum())}
        if of_class.any():
            a, b = first[of_class], second[of_class]
            row["lost"] = float(np.mean([(a < ENOUGH).mean(), (b < ENOUGH).mean()]))
            row["disagree"] = float(((a < ENOUGH) != (b < ENOUGH)).mean())
            row["kept"] = float(np.mean([a.mean(), b.mean()]))
            rows.append(row)
    return rows


def worst(rows: Sequence[Row]) -> Row:
    """The row with the largest share lost by the config as a whole, over measures and classes of MANY or more lesions.

    If no class has that many, over all classes.
    """
    of_config = [row for row in rows if row["transform"] == "config" and row["class"] != ALL]
    return max([row for row in of_config if row["lesions"] >= MANY] or of_config, key=lambda row: row["lost"])


def verdict(rows: Sequence[Row]) -> str:
    """One sentence: whether the config keeps the lesions."""
    row = worst(rows)
    result = "passes" if row["lost"] <= ALLOWED else "does not pass"
    loss = (
        f"{row['lost']:.1%} of the views lose more than half of the {row['measure']} of {row['class']}, the worst class"
    )
    return f"{result}: {loss}; allowed: {ALLOWED:.0%}"


# Area.


def _area(lesions: Sequence[Lesion], view: View, seed: int) -> np.ndarray:
    """Share of each lesion's area kept in each draw of `view`, float32 [L, AREA_DRAWS]."""
    shape = lesions[0].mask.shape
    drawn = geometry(draw_many(view, AREA_DRAWS, seed, (shape[0], shape[1])))
    if not drawn:
        return np.ones((len(lesions), AREA_DRAWS), np.float32)
    return kept_area(np.stack([lesion.mask for lesion in lesions]), drawn, view)


def kept_area(masks: np.ndarray, drawn: Parameters, view: View) -> np.ndarray:
    """Share float32 [L, N] of each mask [L, H, W] that N views show, drawn with `drawn` ([N, ...] each)."""
    seen = np.asarray(seen_pixels(drawn, bare(view), masks.shape[1:]), np.float32)
    flat = masks.reshape(len(masks), -1)
    return flat @ seen.reshape(len(seen), -1).T / flat.sum(axis=1, keepdims=True)


@functools.partial(jax.jit, static_argnums=(1, 2))
def seen_pixels(drawn: Parameters, view: View, shape: tuple[int, int]) -> jax.Array:
    """The pixels of an image of `shape` (H, W) from which each of N views draws, bool [N, H, W].

    A view that only moves pixels is linear in its image, so the gradient of its sum is the weight of each pixel in it.
    No second description of where pixels go is needed.
    """

    def weights(parameters):
        gray = jnp.full((*shape, 1), 0.5)  # away from 0 and 1, where clipping would hide weights
        return jax.grad(lambda image: render(image, parameters, view).sum())(gray)[..., 0]

    def seen(parameters):
        weight = weights(parameters)
        return weight > 1e-3 * weight.max()  # rounding leaves traces of neighbours

    return jax.lax.map(seen, drawn, batch_size=16)


# Contrast.


class _Contrast:
    """Share of each lesion's contrast kept in each draw of a view; nan for lesions that are faint or fill the image."""

    def __init__(self, images: np.ndarray, lesions: Sequence[Lesion], size: int):
        def resized(masks: Sequence[np.ndarray]) -> jax.Array:
            stack = np.stack(masks)[..., None].astype(np.float32)
            return jax.vmap(lambda mask: render(mask, {}, View(size=size)))(stack)[..., 0]

        self.images = jnp.asarray(images)
        self.inside = resized([lesion.mask for lesion in lesions])
        self.around = resized([ring(lesion.mask) for lesion in lesions])
        self.before = np.asarray(_contrasts(self.images, self.inside, self.around, {}, View(size=size)))[:, 0]

    def __call__(self, view: View, seed: int) -> np.ndarray:
        _, height, width, _ = self.images.shape
        drawn = appearance(draw_many(view, CONTRAST_DRAWS, seed, (height, width)))
        if drawn:
            after = np.asarray(_contrasts(self.images, self.inside, self.around, drawn, bare(view)))
        else:
            after = np.repeat(self.before[:, None], CONTRAST_DRAWS, axis=1)
        before = np.where(self.before >= FAINT, self.before, np.nan)[:, None]
        return after / before


def ring(mask: np.ndarray) -> np.ndarray:
    """The ring around a mask [H, W], RING px or a quarter of the lesion's diameter wide: bool [H, W]."""
    from scipy.ndimage import distance_transform_edt

    inside = mask > 0.5
    width = max(RING, np.sqrt(inside.sum() / np.pi) / 2)
    distance = distance_transform_edt(mask == 0)
    return (distance > 0) & (distance <= width)


@functools.partial(jax.jit, static_argnums=4)
def _contrasts(images: jax.Array, inside: jax.Array, around: jax.Array, drawn: Parameters, view: View) -> jax.Array:
    """Contrast float32 [L, N] of each lesion in N views of its image; without parameters, in the image as it is."""

    def one(image, inner, outer, parameters):
        shown = render(image, parameters, view)
        means = [jnp.einsum("hw,hwc->c", mask, shown) / mask.sum() for mask in (inner, outer)]
        return jnp.linalg.norm(means[0] - means[1]) / shown.shape[-1] ** 0.5

    def of_lesion(lesion):
        image, inner, outer = lesion
        if not drawn:
            return one(image, inner, outer, {})[None]
        return jax.vmap(lambda parameters: one(image, inner, outer, parameters))(drawn)

    return jax.lax.map(of_lesion, (images, inside, around))
