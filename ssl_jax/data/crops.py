"""Crops cut from the files' own pixels (config.data.crops="file"): which ones, and how files are decoded for them.

Where a crop lies is a function of (seed, step, position in the batch, view) and of the image's height and width. An
image is decoded once for all of its views. Each crop is cut out first and resized then, as torchvision's
RandomResizedCrop does with Pillow's images; the rest of the view happens in the compiled step.
"""

import contextlib
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image

from ssl_jax.augment import check_no_warp
from ssl_jax.augment.views import TRIES
from ssl_jax.config import Config, Data, View
from ssl_jax.data.central import central, region
from ssl_jax.data.channels import choose
from ssl_jax.data.decoding import convert, decode, open_image, plain, read_image, reason_of
from ssl_jax.data.dicom import is_dicom
from ssl_jax.data.feed import Batch
from ssl_jax.data.source import Content, Source, reading
from ssl_jax.errors import UnreadableError, UserError

NUMBERS = 2 * TRIES + 2  # uniform numbers of a crop: areas, ratios, and the corner
SCALES = (8, 4, 2)  # parts of its sides at which libjpeg decodes in a fraction of the time
TURNS = {  # the EXIF orientation of a file, and what puts it upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Box(NamedTuple):
    """px of the upright image; whole numbers unless it is that of a view without a crop."""

    top: float
    left: float
    height: float
    width: float


class Cutter:
    """Cuts the views of images from their own pixels.

    data: how they are read; views: with their sizes; shares: for each view, what it has in common with the first
    (`augment.make_views`); channels: of the images; size: their side (config.data.size).
    """

    def __init__(
        self, data: Data, views: Sequence[View], shares: Sequence[Sequence[str]], seed: int, channels: int, size: int
    ):
        self.data, self.views, self.seed, self.channels = data, list(views), seed, channels
        self.as_first = [v for v, names in enumerate(shares) if "crop" in names]
        # The shorter side of the whole image, of which a view without a crop shows the centre; 0: its largest square.
        self.sides = [round(data.test_side * view.size / size) for view in self.views]

    def empty(self, count: int) -> Batch:
        """crops: uint8 [n, s, s, C] of each view. boxes: float32 [n, V, 6]: top, left, height and width of each crop,
        and the height and width of the upright image that it is cut from, in px."""
        crops = tuple(np.empty((count, view.size, view.size, self.channels), np.uint8) for view in self.views)
        return {"crops": crops, "boxes": np.empty((count, len(self.views), 6), np.float32)}

    def fill(self, out: Batch, row: int, source: Source, step: int, position: int, images: Sequence[int]) -> None:
        """Cuts the views of the image at a position of the batch: row `row` of `out`. images: its index, or those of
        two images, of which the second is the one that every second view shows."""
        content, numbers = content_of(source, self.data), self.numbers(step, position)
        for first, image in enumerate(images):
            which = range(first, len(self.views), len(images))
            found = source.first_readable(image, lambda i: self.cut(content(i), numbers, which))  # noqa: B023
            for v, (crop, box) in zip(which, found, strict=True):
                out["crops"][v][row], out["boxes"][row, v] = crop, box

    def numbers(self, step: int, position: int) -> np.ndarray:
        """Uniform numbers [V, NUMBERS], one row for each view of the image at this position."""
        # Philox is a function of key and counter: streams whose counters differ above the first word never meet.
        key, counter = np.array([self.seed % 2**64, step], np.uint64), np.array([0, 0, 0, position], np.uint64)
        drawn = np.random.Generator(np.random.Philox(key=key, counter=counter)).random((len(self.views), NUMBERS))
        drawn[self.as_first] = drawn[0]
        return drawn

    def cut(
        self, content: Content, numbers: np.ndarray, which: Sequence[int]
    ) -> list[tuple[np.ndarray, tuple[float, ...]]]:
        """(crop, box) of each of the views `which` of one image. Raises UnreadableError."""
        if isinstance(content, str | tuple):
            files = (content,) if isinstance(content, str) else content
            with reading(files[0]):
                if self.data.bands:
                    return self.cut(read_image(files, 0, self.channels, self.data), numbers, which)
                return self.cut(Path(files[0]).read_bytes(), numbers, which)
        if isinstance(content, bytes):
            if self.channels in (1, 3) and not is_dicom(content[:132]):
                return self._cut_file(content, numbers, which)
            content = decode(content, 0, self.channels, self.data.window, self.data.background)
        array = convert(np.atleast_3d(content), 0, self.channels)
        parts = [array] if array.shape[-1] == 3 else [array[..., c] for c in range(array.shape[-1])]
        planes = [Image.fromarray(part) for part in parts]
        height, width = array.shape[:2]
        boxes = [self._box(v, numbers[v], height, width) for v in which]
        return [(self._shown(planes, v, box), (*box, height, width)) for v, box in zip(which, boxes, strict=True)]

    def _cut_file(
        self, content: bytes, numbers: np.ndarray, which: Sequence[int]
    ) -> list[tuple[np.ndarray, tuple[float, ...]]]:
        """`cut` for what Pillow decodes to one picture, which may be a JPEG that is decoded small."""
        try:
            with open_image(io.BytesIO(content), 0, self.channels) as image:
                if len(choose(image, self.channels)) > 1:
                    return self.cut(decode(content, 0, self.channels, self.data.window), numbers, which)
                orientation = 1
                with contextlib.suppress(Exception):  # a damaged EXIF block
                    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
                width, height = image.size[::-1] if orientation in (5, 6, 7, 8) else image.size
                boxes = [self._box(v, numbers[v], height, width) for v in which]
                scale = self._scale(which, boxes)
                if scale > 1 and image.draft(None, (image.width // scale, image.height // scale)) is None:
                    scale = 1  # no JPEG
                image.load()
                upright: Image.Image = image
                if orientation in TURNS:
                    upright = image.transpose(TURNS[orientation])
                planes = [plain(upright, self.channels, self.data.window, self.data.background)]
                # Of a length that is no multiple of the scale, the file's last pixels are wider than what they show.
                x = upright.width - width / scale if orientation in (2, 3, 6, 7) else 0  # where they come first
                y = upright.height - height / scale if orientation in (3, 4, 7, 8) else 0
                found = [self._shown(planes, v, box, scale, x, y) for v, box in zip(which, boxes, strict=True)]
                return [(crop, (*box, height, width)) for crop, box in zip(found, boxes, strict=True)]
        except (MemoryError, UnreadableError):
            raise
        except Exception as error:  # on bad bytes, Pillow raises anything from OSError to struct.error
            raise UnreadableError(reason_of(error)) from error

    def _box(self, v: int, numbers: np.ndarray, height: int, width: int) -> Box:
        view = self.views[v]
        if tuple(view.crop_scale) == (1.0, 1.0):
            return Box(*region(width, height, view.size, self.sides[v]))
        return draw_box(numbers, view, height, width)

    def _scale(self, which: Sequence[int], boxes: Sequence[Box]) -> int:
        """The largest of SCALES at which every crop still has the pixels of its view, so none is enlarged; else 1."""
        if any(tuple(self.views[v].crop_scale) == (1.0, 1.0) for v in which):
            return 1  # the test image
        pixels = min(min(box.height, box.width) / self.views[v].size for v, box in zip(which, boxes, strict=True))
        return next((scale for scale in SCALES if scale <= pixels), 1)

    def _shown(
        self, planes: Sequence[Image.Image], v: int, box: Box, scale: int = 1, x: float = 0, y: float = 0
    ) -> np.ndarray:
        """View v, uint8 [s, s, C], of an image in one or more planes, decoded at 1 / scale of its size.

        x, y: px of the planes where the image begins
        """
        view = self.views[v]
        if tuple(view.crop_scale) == (1.0, 1.0):
            shown = [np.asarray(central(plane, view.size, self.sides[v])) for plane in planes]
        else:
            left, top = x + box.left / scale, y + box.top / scale
            right, bottom = left + box.width / scale, top + box.height / scale
            outer = math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom)
            inner = left - outer[0], top - outer[1], right - outer[0], bottom - outer[1]
            size, bilinear = (view.size, view.size), Image.Resampling.BILINEAR
            shown = [np.asarray(plane.crop(outer).resize(size, bilinear, box=inner)) for plane in planes]
        return np.atleast_3d(shown[0]) if len(shown) == 1 else np.stack(shown, axis=-1)


def draw_box(numbers: np.ndarray, view: View, height: int, width: int) -> Box:
    """The crop that these uniform numbers [NUMBERS] mean in an image of this size.

    As in torchvision's RandomResizedCrop: the first of TRIES boxes that fits, with a uniform area and a log-uniform
    ratio; else the central one that is as large as the ratios allow.
    """
    low, high = view.crop_scale
    log_low, log_high = map(math.log, view.crop_ratio)
    u = numbers.tolist()
    for n in range(TRIES):
        area = height * width * (low + (high - low) * u[n])
        ratio = math.exp(log_low + (log_high - log_low) * u[TRIES + n])
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return Box(int(u[-2] * (height - h + 1)), int(u[-1] * (width - w + 1)), h, w)
    h = max(1, min(height, round(width / view.crop_ratio[0])))
    w = max(1, min(width, round(height * view.crop_ratio[1])))
    return Box((height - h) // 2, (width - w) // 2, h, w)


def draws(
    config: Config, source: Source, views: Sequence[View], indices: Sequence[int] | np.ndarray, count: int = 4
) -> list[Batch]:
    """What `augment.sheet.view_sheet` shows of these images: `count` random draws of their views; [] unless crops are
    cut from files."""
    if config.data.crops != "file":
        return []
    check_no_warp(views)
    cutter = Cutter(config.data, views, (), config.train.seed, source.shape[2], min(source.shape[:2]))
    made = [cutter.empty(len(indices)) for _ in range(count)]
    for step, out in enumerate(made):
        for row, index in enumerate(indices):
            cutter.fill(out, row, source, step, row, [int(index)])
    return made


def content_of(source: Source, data: Data) -> Callable[[int], Content]:
    """`source.content`. UserError if the source has nothing that crops could be cut from."""
    if source.content is None:
        raise UserError(f"config.data.crops='file': images of {data.name!r} are made at data.size; allowed: square")
    return source.content
