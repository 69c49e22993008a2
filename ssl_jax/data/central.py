"""The central part of an image, at the side that a network sees: what evaluation and prediction show of it."""

from PIL import Image

from ssl_jax.config import Data
from ssl_jax.data.source import check_memory
from ssl_jax.errors import UserError


def central(image: Image.Image, size: int, side: int = 0) -> Image.Image:
    """The central part of an image at size x size px, bilinear with antialias.

    side: the shorter side to which the whole image is resized before its central square is cut out, as by torchvision's
    Resize(side) and CenterCrop(size); 0: as much of it as a square can have. Raises UnreadableError if the image is so
    long that it would take too much memory at this side.
    """
    width, height = image.size
    short = min(width, height)
    if not side:
        left, top = (width - short) / 2, (height - short) / 2
        whole = image.size == (size, size)
        box = (left, top, left + short, top + short)
        return image if whole else image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    scaled = int(side * width / short), int(side * height / short)
    check_memory(width, height, 4 * scaled[0] * scaled[1])
    if scaled != image.size:
        image = image.resize(scaled, Image.Resampling.BILINEAR)
    left, top = (round((length - size) / 2) for length in scaled)
    return image.crop((left, top, left + size, top + size))


def region(width: int, height: int, size: int, side: int = 0) -> tuple[float, float, float, float]:
    """(top, left, height, width) of what `central` shows of an image of width x height px."""
    short = min(width, height)
    shown = short * size / side if side else float(short)
    return (height - shown) / 2, (width - shown) / 2, shown, shown


def check_side(data: Data, size: int) -> None:
    """Raises UserError unless data.test_side leaves enough of an image for its central size x size px."""
    if data.test_side and not size:
        raise UserError(f"config.data.test_side={data.test_side}: allowed with config.data.size=0: 0")
    if 0 < data.test_side < size:
        raise UserError(
            f"config.data.test_side={data.test_side}: smaller than the images; allowed: 0, or {size} (config.data.size)"
            " or more"
        )
