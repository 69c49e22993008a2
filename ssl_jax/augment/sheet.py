"""A picture of what the views do to images, to look at before training."""

import dataclasses
import re
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax.augment import finish_views, geometry, make_views, render
from ssl_jax.augment.views import blur_kernel
from ssl_jax.config import View
from ssl_jax.errors import UserError, visible
from ssl_jax.plotting import COLORS, save, shown, shown_in_words

GAP = 0.06  # between cells; a cell is 1 wide
LINE, LINES = 24, 4  # characters and lines of a name


def view_sheet(
    images: np.ndarray,
    views: Sequence[View],
    out: str | Path,
    seed: int = 0,
    draws: int = 4,
    names: Sequence[str] | None = None,
    outlines: Sequence[Mapping[str, np.ndarray]] | None = None,
    title: str = "",
    cuts: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Writes a PNG with a row per image: the original, then `draws` random draws of each view.

    images: uint8 [N, H, W, C]; of other than 1 and 3 channels, the title says which are shown
    views:  with their sizes, as `ssl_jax.augment.resolve_views` returns them
    names:  N labels for the rows, such as file names, beside the originals
    outlines: for each image, class -> mask [H, W] in [0, 1], whose outline is drawn in every picture
    cuts: "crops" and "boxes" of each draw, where crops are cut from the files (`data.crops.draws`)

    Raises UserError if `out` is a folder or not a .png.
    """
    from matplotlib.figure import Figure

    out = Path(out)
    if out.is_dir() or out.suffix.lower() != ".png":
        raise UserError(
            f"{out}: {'is a folder' if out.is_dir() else 'not a .png file'}; allowed: the path of a .png file"
        )
    keys = jax.random.split(jax.random.key(seed), len(cuts) or draws)
    make = jax.jit((finish_views if cuts else make_views)(views))
    seen: list[Any] = [(cut["crops"], cut["boxes"]) for cut in cuts] or [(images,)] * draws
    drawn = [make(key, *each) for key, each in zip(keys, seen, strict=True)]
    bare: Sequence[Mapping[str, np.ndarray]] = [{}] * len(images)
    blocks: list[tuple[str, list[Any]]] = [("original", [(images, outlines or bare)])]
    for v, view in enumerate(views):
        columns = [(made[v], _moved(outlines, parameters[v], view) or bare) for made, parameters in drawn]
        if images.shape[-1] != 3:  # operations on colour are skipped
            view = dataclasses.replace(view, saturation=0.0, hue=0.0, gray=0.0)
        blocks.append((f"view {v + 1}: {describe_view(view)}", columns))
    kinds = sorted({name for masks in outlines or () for name in masks})
    color = {name: COLORS[i % len(COLORS)] for i, name in enumerate(kinds)}

    figure = Figure(layout="constrained")
    axes = figure.add_subplot(aspect="equal")
    x = 0.0
    for heading, columns in blocks:
        wrapped = textwrap.fill(heading, max(8, 21 * len(columns)))
        axes.text(x, -0.1, wrapped, fontsize=9, va="bottom")
        for pictures, masks in columns:
            for row, image in enumerate(np.asarray(pictures)):
                _cell(axes, image, x, row * (1 + GAP))
                for name, mask in masks[row].items():
                    _outline(axes, mask, x, row * (1 + GAP), color[name])
            x += 1 + GAP
        x += 4 * GAP
    for row, name in enumerate(names or ()):
        place = -2 * GAP, row * (1 + GAP) + 0.5
        axes.text(*place, label(name), fontsize=8, ha="right", va="center", parse_math=False)
    height = len(images) * (1 + GAP)
    for number, name in enumerate(kinds):
        axes.text(
            1.7 * number, height + 0.1, name, color=color[name], fontsize=9, va="top", weight="bold", parse_math=False
        )
    if kinds:
        height += 0.4
    title = "; ".join(filter(None, [title, shown_in_words(images.shape[-1])]))
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    axes.set(xlim=(0, x), ylim=(height, 0))
    axes.axis("off")
    figure.set_size_inches(1.3 * x + (1.6 if names else 0.2), 1.3 * height + 1)
    with warnings.catch_warnings():
        # The font lacks some scripts, whose letters are drawn as boxes.
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
        save(figure, out, dpi=110, bbox_inches="tight", facecolor="white")


def label(name: str) -> str:
    """A file name in at most LINES lines: control characters as escapes, and of a very long one both ends.

    >>> print(label("train/patient00001/study1/view1_frontal.jpg"))
    train/patient00001/
    study1/view1_frontal.jpg
    """
    name = visible(name)
    if len(name) > LINE * LINES:
        name = f"{name[: LINE - 1]}…{name[-LINE * (LINES - 1) :]}"
    lines = [""]
    for part in re.split("(?<=/)", name):
        if len(lines[-1]) + len(part) <= LINE:
            lines[-1] += part
        else:
            lines += textwrap.wrap(part, LINE, break_on_hyphens=False)
    return "\n".join(filter(None, lines))


def _cell(axes, image: np.ndarray, x: float, y: float) -> None:
    """An image [H, W, C] in the unit square at (x, y), in its own proportions."""
    height, width, _ = image.shape
    scale = 1 / max(height, width)
    limits = {"vmin": 0, "vmax": 255 if image.dtype == np.uint8 else 1}
    box = (x, x + width * scale, y + height * scale, y)
    axes.imshow(shown(image), cmap="gray", extent=box, interpolation="nearest", **limits)


def _moved(
    outlines: Sequence[Mapping[str, np.ndarray]] | None, drawn: Mapping[str, jax.Array], view: View
) -> list[dict[str, np.ndarray]]:
    """The masks of each image, moved as its view was: drawn with the parameters [N, ...]."""
    moved = []
    for row, masks in enumerate(outlines or ()):
        parameters = geometry({name: value[row] for name, value in drawn.items()})
        shown = {name: render(jnp.asarray(mask)[..., None], parameters, view) for name, mask in masks.items()}
        moved.append({name: np.asarray(mask)[..., 0] for name, mask in shown.items()})
    return moved


def _outline(axes, mask: np.ndarray, x: float, y: float, color: str) -> None:
    """The outline of a mask [H, W] in the cell at (x, y)."""
    height, width = mask.shape
    scale = 1 / max(height, width)
    across, down = (x + (np.arange(width) + 0.5) * scale, y + (np.arange(height) + 0.5) * scale)
    if mask.min() < 0.5 < mask.max():
        axes.contour(across, down, mask, levels=[0.5], colors=[color], linewidths=1.2)


def describe_view(view: View) -> str:
    """The transforms of a view and their numbers, in one line.

    >>> describe_view(View(size=28, crop_scale=(0.25, 1.0), flip=0.5))
    '28 px, crop 0.25-1, flip 0.5'
    """
    parts = [f"{view.size} px"]
    if tuple(view.crop_scale) != (1, 1):
        parts.append(f"crop {view.crop_scale[0]:g}-{view.crop_scale[1]:g}")
    parts += [f"flip {view.flip:g}"] if view.flip else []
    parts += [f"rotate ±{view.rotate:g}°"] if view.rotate else []
    parts += [f"translate ±{view.translate:g}"] if view.translate else []
    if view.perspective and view.perspective_prob:
        parts.append(f"perspective {view.perspective_prob:g} (scale {view.perspective:g})")
    colour = [(k, getattr(view, k)) for k in ("brightness", "contrast", "saturation", "hue") if getattr(view, k)]
    if view.jitter_prob and colour:
        parts.append(f"jitter {view.jitter_prob:g} ({', '.join(f'{name} {value:g}' for name, value in colour)})")
    parts += [f"gray {view.gray:g}"] if view.gray else []
    if view.blur:
        low, high = view.blur_sigma
        parts.append(f"blur {view.blur:g} (sigma {low:g}-{high:g} px, kernel {blur_kernel(view.size)} px)")
    parts += [f"solarize {view.solarize:g} (from {view.solarize_threshold:g})"] if view.solarize else []
    if view.randaugment:
        magnitude = f"{view.randaugment_magnitude:g} ± {view.randaugment_std:g}"
        parts.append(f"RandAugment {view.randaugment} (magnitude {magnitude})")
    parts += [f"erase {view.erase:g}"] if view.erase else []
    return ", ".join(parts) if len(parts) > 1 else f"{parts[0]}, unchanged"
