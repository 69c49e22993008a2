"""Do the transforms keep the lesions? For each transform and strength, and for the views of a config as a whole.

Two measures, each of a lesion (a mask) and a random view:

area       share of the lesion's pixels from which the view draws (crop, rotation, perspective: what moves pixels)
contrast   distance between the mean values inside the lesion and in a ring around it, divided by the same before
           (jitter, blur, solarize: what changes pixels in their places). A factor for the whole image scales all
           contrasts and leaves the lesion's shape to be seen; blur takes contrast from what is small.
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

ENOUGH = 0.5  # of a lesion: a view that keeps less does not show it
ALLOWED = 0.05  # share of views without the lesion, of the worst class, up to which a config passes
MANY = 5  # lesions of a class that can decide whether a config passes
AREA_DRAWS, CONTRAST_DRAWS = 256, 32  # of each view; all lesions are looked at in the same draws
FAINT = 5 / 255  # contrast below which a lesion can't be told from its surroundings to begin with
RING = 3  # width of the ring, px; or a quarter of the lesion's diameter, if that is more
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

    Rows: transform, strength, configured (whether `views` have it at this strength), measure ("area", "contrast"),
    class (or "all"), lesions (how many could be measured), lost (share of views that keep less than half), disagree
    (share of pairs of which one view keeps half and the other does not), kept (mean share).
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
    wanted = transforms_for(images.shape[3])
    del wanted["flip"]  # it moves a lesion and keeps all of it
    for name in transforms or wanted:
        log(name)
        transform = wanted[name]
        chosen = {s for s in map(transform.strength, views) if s is not None}
        rising = transform.strengths[-1] > transform.strengths[0]
        for strength in sorted({*transform.strengths, *chosen}, reverse=not rising):
            view = alone(transform, strength, views[0].size)
            measure(name, strength, strength in chosen, "area" if transform.moves else "contrast", (view, view))
    return rows


def by_class(kept: Sequence[np.ndarray], names: Sequence[str]) -> list[Row]:
    """Rows of all lesions and of each class, from the shares kept [L, draws] in the first and in the second view."""
    first, second = kept
    measured = np.isfinite(first).all(axis=1)
    rows = []
    for name in (ALL, *sorted(set(names))):
        chosen = measured & (np.array([name in (ALL, n) for n in names]))
        row: Row = {"class": name, "lesions": int(chosen.sum())}
        if chosen.any():
            a, b = first[chosen], second[chosen]
            row["lost"] = float(np.mean([(a < ENOUGH).mean(), (b < ENOUGH).mean()]))
            row["disagree"] = float(((a < ENOUGH) != (b < ENOUGH)).mean())
            row["kept"] = float(np.mean([a.mean(), b.mean()]))
            rows.append(row)
    return rows


def worst(rows: Sequence[Row]) -> Row:
    """The row of the config as a whole with the largest share lost, over measures and classes of MANY or more lesions.

    Where no class has so many, over all.
    """
    given = [row for row in rows if row["transform"] == "config" and row["class"] != ALL]
    return max([row for row in given if row["lesions"] >= MANY] or given, key=lambda row: row["lost"])


def verdict(rows: Sequence[Row]) -> str:
    """One sentence: whether the config keeps the lesions."""
    row = worst(rows)
    what = "show less than half of it" if row["measure"] == "area" else "show it at less than half of its contrast"
    word = "passes" if row["lost"] <= ALLOWED else "does not pass"
    suffers = f"of the class that suffers most ({row['class']}), {row['lost']:.1%} of the views {what}"
    return f"{word}: {suffers}; allowed: {ALLOWED:.0%}"


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
    """From which pixels of an image of `shape` (H, W) does each of N views draw? bool [N, H, W].

    A view is linear in its image as long as pixels are only moved, so the gradient of the view's sum is the weight of
    each pixel in it: no second description of where pixels go.
    """

    def weights(parameters):
        gray = jnp.full((*shape, 1), 0.5)  # away from 0 and 1, where clipping would hide a weight
        return jax.grad(lambda image: render(image, parameters, view).sum())(gray)[..., 0]

    def seen(parameters):
        weight = weights(parameters)
        return weight > 1e-3 * weight.max()  # rounding leaves traces of a neighbour

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
    """The surroundings of a mask [H, W]: RING px wide or a quarter of the lesion's diameter, bool [H, W]."""
    from scipy.ndimage import distance_transform_edt

    inside = mask > 0.5
    width = max(RING, np.sqrt(inside.sum() / np.pi) / 2)
    distance = distance_transform_edt(mask == 0)
    return (distance > 0) & (distance <= width)


@functools.partial(jax.jit, static_argnums=4)
def _contrasts(images: jax.Array, inside: jax.Array, around: jax.Array, drawn: Parameters, view: View) -> jax.Array:
    """Contrast float32 [L, N] of each lesion in the N views of its image; of the image as it is without parameters."""

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
