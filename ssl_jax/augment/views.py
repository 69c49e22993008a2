"""Random views in two steps: `draw` the parameters of a view, then `render` it.

In between, a method may read parameters (crop boxes, factors) or let two views share some. An operation that a `View`
turns off is neither drawn nor computed.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from itertools import accumulate

import jax
import jax.numpy as jnp

from ssl_jax import fields
from ssl_jax.augment import ops, randaugment
from ssl_jax.augment.presets import PRESETS, preset_of
from ssl_jax.config import Augment, View
from ssl_jax.errors import UserError, unknown

Parameters = dict[str, jax.Array]

COLOUR = ("brightness", "contrast", "saturation", "hue")
TRIES = 10  # crop boxes drawn, of which the first that fits into the image is used, as in torchvision
# Each parameter has its own slots in a row of uniform numbers. A single draw per image and view is fast, and turning
# one operation off leaves all others unchanged.
SLOTS = {
    "area": TRIES, "ratio": TRIES, "corner": 2, "flip": 1, "rotate": 1, "translate": 2, "perspective": 9,
    "jitter": 1, "order": 4, "brightness": 1, "contrast": 1, "saturation": 1, "hue": 1, "gray": 1, "blur": 2,
    "solarize": 1, "shear": 1, "zoom": 1,
}  # fmt: skip
# What a view can share with the first one (a method's `shares`), and the slots that belong to it.
FACTORS = {
    "crop": ("area", "ratio", "corner"), "flip": ("flip",), "rotate": ("rotate",), "shear": ("shear",),
    "zoom": ("zoom",), "translate": ("translate",), "perspective": ("perspective",),
    "colour": ("jitter", "order", *COLOUR, "gray"), "blur": ("blur",), "solarize": ("solarize",),
}  # fmt: skip
# These move pixels, or take them away ("erased").
GEOMETRY = (
    "angle", "shear", "zoom", "corners", "shift", "top", "left", "height", "width", "flip", "moved", "erased",
)  # fmt: skip
LOCAL = {"crop_scale": (0.05, 0.4)}  # DINO, arXiv 2104.14294, section 3.2; the size is 96 / 224 of a global view's


def resolve_views(augment: Augment, count: int, size: int, local: bool = False) -> tuple[View, ...]:
    """The `count` views of a config and then its local views, with sides of `size` px unless the config sets a size.

    From the third on, views are like the first. local: whether the method accepts local views, which are smaller.
    Raises UserError for an unknown preset or key, and for a value out of range.
    """
    preset = preset_of(augment.preset, size)
    if preset not in PRESETS:
        raise unknown("config.augment.preset", preset, ["auto", *PRESETS])
    options = [f.name for f in dataclasses.fields(View)]
    for path, changes in (("", augment.override), (".second", augment.second), (".local", augment.local)):
        for key in changes:
            if key not in options:
                raise unknown(f"config.augment{path}", key, options)
    if augment.local_views < 0 or augment.local_views and not local:
        raise UserError(f"config.augment.local_views={augment.local_views}: allowed: 0" + " or more" * local)
    views = []
    for v in range(count + augment.local_views):
        path, changes = "", {}
        if v == 1 and augment.second:
            path, changes = ".second", dict(augment.second)
        if v >= count:
            path, changes = ".local", {"size": round((augment.override.get("size") or size) * 96 / 224)}
            changes |= {**LOCAL, **augment.local}
        view = dataclasses.replace(PRESETS[preset][v == 1], **{**augment.override, **changes})
        view = dataclasses.replace(view, size=view.size or size)
        _check(view, f"config.augment{path}")
        views.append(view)
    return tuple(views)


def _check(view: View, path: str) -> None:
    def require(key: str, valid: bool, allowed: str) -> None:
        if not valid:
            raise UserError(f"{path}.{key}={getattr(view, key)!r}: allowed: {allowed}")

    fields.check(view, path)
    require("size", view.size >= 1, "1 or more")
    for key in ("crop_scale", "crop_ratio", "blur_sigma", "zoom"):
        value = getattr(view, key)
        limit = 1 if key == "crop_scale" else math.inf
        allowed = "two numbers, 0 < smallest <= largest" + (" <= 1" if limit == 1 else "")
        require(key, len(value) == 2 and 0 < value[0] <= value[1] <= limit, allowed)


def make_views(
    views: Sequence[View], shares: Sequence[Sequence[str]] = ()
) -> Callable[..., tuple[tuple[jax.Array, ...], tuple[Parameters, ...]]]:
    """A function (rng, images uint8 [B, H, W, C], pairs=None, positions=None) -> views, drawn.

    Args:
      views: the specification of each view.
      shares: for each view, the names in FACTORS for which it uses the random numbers of the first view.

    Arguments of the function:
      pairs: other images of the same objects, which every second view shows.
      positions: int [B], the positions of these images in the batch if they are a part of it; None: 0 to B - 1.

    Its results:
      views: one float32 [B, s, s, C] in [0, 1] per view.
      drawn: the parameters of each view, named as in `draw`. Crop box and flip are there even if they are turned off;
        "source" is the height and width of the image in px.

    View v of the image at position i is drawn from fold_in(fold_in(rng, i), v). It depends neither on the rest of the
    batch nor on the number of devices. Raises UserError for a value out of range.
    """
    for view in views:
        _check(view, "view")

    def one(key, *images):
        rendered, drawn = [], []
        for v, (view, row) in enumerate(zip(views, _rows(key, len(views), shares), strict=True)):
            image = images[v % len(images)]
            parameters = _parameters(row, view, *image.shape[:2])
            parameters |= _extra(jax.random.fold_in(key, v), view)
            rendered.append(render(image, parameters, view))
            drawn.append({**_identity(*image.shape[:2]), **parameters})
        return tuple(rendered), tuple(drawn)

    def apply(rng, images, pairs=None, positions=None):
        positions = jnp.arange(len(images)) if positions is None else positions
        keys = jax.vmap(lambda i: jax.random.fold_in(rng, i))(positions)
        return jax.vmap(one)(keys, images, *(() if pairs is None else (pairs,)))

    return apply


def finish_views(
    views: Sequence[View], shares: Sequence[Sequence[str]] = ()
) -> Callable[..., tuple[tuple[jax.Array, ...], tuple[Parameters, ...]]]:
    """Like `make_views`, for crops that the host has cut: (rng, crops, boxes, positions=None) -> views, drawn.

    crops: uint8 [B, s, s, C] of each view; boxes: float32 [B, V, 6], as of `data.crops.Cutter`, which `drawn` reports
    as crop box and "source". All other parameters are what `make_views` draws for the same rng.
    """

    def one(key, crops, boxes):
        rendered, drawn = [], []
        rows = _rows(key, len(views), shares)
        for v, (view, row, crop, box) in enumerate(zip(views, rows, crops, boxes, strict=True)):
            whole = dataclasses.replace(view, crop_scale=(1.0, 1.0))
            parameters = _parameters(row, whole, *crop.shape[:2])
            parameters |= _extra(jax.random.fold_in(key, v), view)
            rendered.append(render(crop, parameters, whole))
            cut = dict(zip(("top", "left", "height", "width"), box[:4], strict=True))
            source = jnp.round(box[4:]).astype(jnp.int32)
            drawn.append({**_identity(*crop.shape[:2]), **parameters, **cut, "source": source})
        return tuple(rendered), tuple(drawn)

    def apply(rng, crops, boxes, positions=None):
        positions = jnp.arange(len(boxes)) if positions is None else positions
        keys = jax.vmap(lambda i: jax.random.fold_in(rng, i))(positions)
        return jax.vmap(one)(keys, crops, boxes)

    return apply


def check_no_warp(views: Sequence[View], path: str = "config.augment") -> None:
    """Raises UserError if a view warps the whole image before its crop, which the host would have to do."""
    for view in views:
        for key in ("rotate", "translate", "perspective", "shear", "zoom"):
            if (value := getattr(view, key)) != getattr(View(), key):
                allowed = getattr(View(), key)
                raise UserError(f"{path}.{key}={value}: allowed with config.data.crops='file': {allowed}")


def _rows(key: jax.Array, count: int, shares: Sequence[Sequence[str]]) -> list[Parameters]:
    """The uniform numbers of each view of an image."""
    shared = [[slot for name in names for slot in FACTORS[name]] for names in shares] or [[]] * count
    rows = [_numbers(jax.random.fold_in(key, v)) for v in range(count)]
    return [{**row, **{slot: rows[0][slot] for slot in shared[v]}} for v, row in enumerate(rows)]


def _identity(height: int, width: int) -> Parameters:
    """The parameters of a view that is neither cropped nor flipped."""
    numbers = {"top": 0.0, "left": 0.0, "height": float(height), "width": float(width), "flip": False}
    return {"source": jnp.array([height, width]), **jax.tree.map(jnp.asarray, numbers)}


def center_view(images: jax.Array, size: int) -> jax.Array:
    """Images uint8 [B, H, W, C] as float32 [B, size, size, C] in [0, 1]: resized if necessary, not augmented."""
    return jax.vmap(lambda image: render(image, {}, View(size=size)))(images)


def draw(key: jax.Array, view: View, height: int, width: int) -> Parameters:
    """Random parameters of one view of an image of height x width px; only of operations that `view` turns on.

    top, left, height, width   the crop box in px of the image (whole numbers)
    flip, gray, solarize       whether to apply the operation
    angle                      degrees, counter-clockwise
    shear                      degrees, along the rows
    zoom                       factor; more than 1 enlarges
    shift [2]                  px right and down (whole numbers)
    corners [4, 2]             where the corners (x, y) go: upper left, upper right, lower right, lower left
    order [K]                  the order of the colour operations, as positions among those of COLOUR that are on
    brightness, contrast, saturation     factors; 1 changes nothing
    hue                        shift in turns; 0 changes nothing
    sigma                      of the blur in px; 0: no blur
    operation, amount, moved, erased, noise     see `randaugment.draw`
    """
    return {**_parameters(_numbers(key), view, height, width), **_extra(key, view)}


def _extra(key: jax.Array, view: View) -> Parameters:
    """What RandAugment and erasing draw, from a key of their own: so nothing else changes with them."""
    return randaugment.draw(jax.random.fold_in(key, 1), view) if view.randaugment or view.erase else {}


def _numbers(key: jax.Array) -> Parameters:
    """The uniform numbers of one view, split into its SLOTS."""
    numbers = jax.random.uniform(key, (sum(SLOTS.values()),))
    return dict(zip(SLOTS, jnp.split(numbers, list(accumulate(SLOTS.values()))[:-1]), strict=True))


def _parameters(u: Parameters, view: View, height: int, width: int) -> Parameters:
    drawn: Parameters = {}
    if tuple(view.crop_scale) != (1.0, 1.0):
        drawn |= _draw_box(u, view, height, width)
    for name in ("flip", "gray", "solarize"):
        if getattr(view, name):
            drawn[name] = u[name][0] < getattr(view, name)
    if view.rotate:
        drawn["angle"] = view.rotate * (2 * u["rotate"][0] - 1)
    if view.shear:
        drawn["shear"] = view.shear * (2 * u["shear"][0] - 1)
    if tuple(view.zoom) != (1.0, 1.0):
        low, high = view.zoom
        drawn["zoom"] = low + (high - low) * u["zoom"][0]
    if view.translate:
        drawn["shift"] = jnp.round(view.translate * jnp.array([width, height]) * (2 * u["translate"] - 1))
    if view.perspective and view.perspective_prob and min(height, width) > 1:
        drawn["corners"] = _draw_corners(u["perspective"], view, height, width)
    drawn |= _draw_jitter(u, view)
    if view.blur:
        low, high = view.blur_sigma
        drawn["sigma"] = jnp.where(u["blur"][0] < view.blur, low + (high - low) * u["blur"][1], 0)
    return drawn


def _draw_box(u: Parameters, view: View, height: int, width: int) -> Parameters:
    """The first of TRIES random boxes that fits, else a central one: area uniform, ratio log-uniform (torchvision)."""
    low, high = view.crop_scale
    area = height * width * (low + (high - low) * u["area"])
    low, high = map(math.log, view.crop_ratio)
    ratio = jnp.exp(low + (high - low) * u["ratio"])
    heights, widths = jnp.round(jnp.sqrt(area / ratio)), jnp.round(jnp.sqrt(area * ratio))
    fits = (heights >= 1) & (heights <= height) & (widths >= 1) & (widths <= width)
    first = jnp.argmax(fits)
    fallback = min(height, round(width / view.crop_ratio[0])), min(width, round(height * view.crop_ratio[1]))
    box_height = jnp.where(fits[first], heights[first], max(1, fallback[0]))
    box_width = jnp.where(fits[first], widths[first], max(1, fallback[1]))
    position = jnp.where(fits.any(), u["corner"], 0.5)
    top = jnp.floor(position[0] * (height - box_height + 1))
    left = jnp.floor(position[1] * (width - box_width + 1))
    return {"top": top, "left": left, "height": box_height, "width": box_width}


def _draw_corners(u: jax.Array, view: View, height: int, width: int) -> jax.Array:
    """Each corner moves inwards by up to perspective x half the side (torchvision's RandomPerspective).

    Beyond half of that, three corners may end on a line, or one inside the triangle of the others: no perspective shows
    a rectangle like this, and its matrix has no inverse. Such corners move a third as far, after which none can.
    """
    reach = jnp.array([math.floor(view.perspective * (side // 2)) + 1 for side in (width, height)])
    inwards = jnp.floor(u[1:].reshape(4, 2) * reach)
    start = _corners(height, width)

    def moved(by):
        return jnp.where(start > 0, start - by, by)

    corners = jnp.where(_convex(moved(inwards)), moved(inwards), moved(jnp.floor(inwards / 3)))
    return jnp.where(u[0] < view.perspective_prob, corners, start)


def _convex(corners: jax.Array) -> jax.Array:
    """Whether four corners [4, 2], clockwise in px, turn right at each of them."""
    ahead = jnp.roll(corners, -1, axis=0) - corners
    before = jnp.roll(ahead, 1, axis=0)
    return (before[:, 0] * ahead[:, 1] - before[:, 1] * ahead[:, 0] > 0).all()


def _corners(height: int | jax.Array, width: int | jax.Array) -> jax.Array:
    right, bottom = width - 1.0, height - 1.0
    return jnp.array([[0, 0], [right, 0], [right, bottom], [0, bottom]])


def _draw_jitter(u: Parameters, view: View) -> Parameters:
    strengths = {name: getattr(view, name) for name in COLOUR if getattr(view, name) and view.jitter_prob}
    drawn: Parameters = {}
    for name, strength in strengths.items():
        low, high, neutral = (-strength, strength, 0) if name == "hue" else (max(0, 1 - strength), 1 + strength, 1)
        drawn[name] = jnp.where(u["jitter"][0] < view.jitter_prob, low + (high - low) * u[name][0], neutral)
    if strengths:
        drawn["order"] = jnp.argsort(u["order"][jnp.array([COLOUR.index(name) for name in strengths])])
    return drawn


def render(image: jax.Array, parameters: Parameters, view: View) -> jax.Array:
    """One view float32 [s, s, C] in [0, 1] of an image [H, W, C], uint8 or float in [0, 1]; s = view.size.

    The order is warp (rotation, shear, zoom, perspective and shift in one resampling), crop, flip, RandAugment, colour
    jitter, gray (before it with view.gray_first), blur, solarize, erasing. Operations without parameters are skipped,
    and so are operations on colour unless C = 3.
    """
    height, width, channels = image.shape
    image = image.astype(jnp.float32) / 255 if image.dtype == jnp.uint8 else image
    matrix = _warp_matrix(parameters, height, width)
    image = image if matrix is None else ops.warp(image, matrix)
    if "top" in parameters or (height, width) != (view.size, view.size):
        box = {"top": 0, "left": 0, "height": height, "width": width}
        image = ops.resized_crop(image, **{k: parameters.get(k, whole) for k, whole in box.items()}, size=view.size)
    if "flip" in parameters:
        image = jnp.where(parameters["flip"], ops.horizontal_flip(image), image)
    if "operation" in parameters or "moved" in parameters:
        image = randaugment.randaugment(image, parameters)
    image = image if view.gray_first else _jitter(image, parameters)
    if "gray" in parameters and channels == 3:
        image = jnp.where(parameters["gray"], ops.to_grayscale(image), image)
    image = _jitter(image, parameters) if view.gray_first else image
    if "sigma" in parameters:
        image = ops.gaussian_blur(image, blur_kernel(view.size), parameters["sigma"])
    if "solarize" in parameters:
        image = jnp.where(parameters["solarize"], ops.solarize(image, view.solarize_threshold), image)
    if "erased" in parameters:
        image = randaugment.erase(image, parameters)
    return image


def geometry(parameters: Parameters) -> Parameters:
    """The parameters that move pixels. A mask rendered with them stays aligned with its image."""
    return {name: value for name, value in parameters.items() if name in GEOMETRY}


def appearance(parameters: Parameters) -> Parameters:
    """The parameters that change pixels without moving them."""
    return {name: value for name, value in parameters.items() if name not in GEOMETRY}


def origins(drawn: Parameters, rows: int, columns: int) -> jax.Array:
    """Where the centres of a view's rows x columns places come from, row by row: (x, y) in px of the image, [B, P, 2].

    drawn: the parameters of a view, each [B, ...], as `make_views` returns them.
    """

    def one(own: Parameters) -> jax.Array:
        y, x = jnp.divmod(jnp.arange(rows * columns), columns)
        x = jnp.where(own["flip"], columns - 1 - x, x)
        across = own["left"] + (x + 0.5) * own["width"] / columns
        down = own["top"] + (y + 0.5) * own["height"] / rows
        matrix = _warp_matrix(own, *own["source"])
        if matrix is not None:
            points = jnp.stack([across, down, jnp.ones_like(down)])
            across, down, depth = jnp.matmul(matrix, points, precision=ops.EXACT)
            across, down = across / depth, down / depth
        return jnp.stack([across, down], axis=-1)

    return jax.vmap(one)(drawn)


def blur_kernel(size: int) -> int:
    """The size of the blur kernel in px: a tenth of the view's side, odd, at least 3 (SimCLR, appendix A)."""
    return max(3, 2 * (size // 20) + 1)


def _warp_matrix(parameters: Parameters, height: int | jax.Array, width: int | jax.Array) -> jax.Array | None:
    """For `ops.warp`: all warps of a view in one; None if it has none."""
    matrices = []
    if "angle" in parameters:
        matrices.append(ops.rotation_matrix(height, width, parameters["angle"]))
    if "shear" in parameters:
        matrices.append(ops.shear_matrix(height, width, parameters["shear"]))
    if "zoom" in parameters:
        matrices.append(ops.zoom_matrix(height, width, parameters["zoom"]))
    if "corners" in parameters:
        matrices.append(ops.perspective_matrix(_corners(height, width), parameters["corners"]))
    if "shift" in parameters:
        matrices.append(ops.translation_matrix(*parameters["shift"]))
    return ops.compose(*matrices) if matrices else None


def _jitter(image: jax.Array, parameters: Parameters) -> jax.Array:
    """Applies the colour operations in the order that was drawn.

    Under vmap, a conditional runs all of its branches. Brightness, contrast and saturation each blend the image with
    another one, so each step selects that image and the factor, blends once, and shifts the hue once.
    """
    names = [name for name in COLOUR if name in parameters]
    rgb = image.shape[-1] == 3
    for step in range(len(names)):
        selected = {name: parameters["order"][step] == number for number, name in enumerate(names)}
        others = [("brightness", jnp.zeros(())), ("contrast", ops.mean_luma(image))]
        others += [("saturation", ops.luma(image))] if rgb else []
        other, factor = jnp.zeros(()), jnp.ones(())
        for name, candidate in others:
            if name in selected:
                other = jnp.where(selected[name], candidate, other)
                factor = jnp.where(selected[name], parameters[name], factor)
        blended = ops.blend(image, other, factor)
        if rgb and "hue" in selected:
            image = jnp.where(selected["hue"], ops.adjust_hue(image, parameters["hue"]), blended)
        else:
            image = blended
    return image
