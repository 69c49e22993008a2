"""Pictures for the report's page: charts as inline SVG, photographs as data URIs."""

import base64
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from xml.sax.saxutils import quoteattr

import numpy as np

from ssl_jax.plotting import SCORE, limits, shown
from ssl_jax.report.words import Word

# matplotlib draws in these; the page replaces them by its own colours, which depend on a light or dark screen.
INK, FAINT = "#010203", "#010204"
MAX_POINTS = 400  # of a curve; longer curves are averaged in blocks
SPRITE, COLUMNS = 48, 32  # px of an image in a sprite, images in a row of it


def curve(x: Sequence[float], y: Sequence[float | None], word: Word) -> str:
    """Inline SVG of y by epoch; None in y is a gap. Shares, whose top is 100, are drawn in percent."""
    return curves({"": (x, y)}, word)


def curves(series: Mapping[str, tuple[Sequence[float], Sequence[float | None]]], word: Word) -> str:
    """The same of several (x, y), with their names if there is more than one."""
    scale, least = 100 if word.top == 100 else 1, word.top and word.top * SCORE / 100

    def draw(figure):
        axes = figure.subplots()
        thin = {name: _thin(*(np.asarray(v, float) for v in xy)) for name, xy in series.items()}
        for name, (x, y) in thin.items():
            axes.plot(x, scale * y, linewidth=1.6, marker="o" if len(x) <= 30 else "", markersize=3, label=name)
        axes.set_ylim(limits(scale * np.concatenate([y for _, y in thin.values()]), least, word.top or math.inf))
        if len(series) > 1:
            for text in axes.legend(frameon=False).get_texts():
                text.set_parse_math(False)  # a "$" in a name is a dollar
        axes.grid(axis="y")
        axes.set_xlabel("epoch")
        axes.set_ylabel("%" if scale == 100 else "")

    return _svg(4.4, 2.5, draw, word.title)


def thumbnail(image: np.ndarray, side: int = 96) -> str:
    """Data URI of an image uint8 [H, W, C], with its longer side at most `side` px (`plotting.shown`)."""
    picture = _picture(image)
    picture.thumbnail((side, side))
    return _encoded(picture, "JPEG" if max(picture.size) > 48 else "PNG", quality=85)


def sprite(images: Iterable[np.ndarray]) -> str:
    """Data URI of one picture of all images uint8 [H, W, C]: rows of COLUMNS squares of SPRITE px, images in order."""
    from PIL import Image, ImageOps

    tiles = [ImageOps.pad(_picture(image), (SPRITE, SPRITE)) for image in images]
    size = SPRITE * min(COLUMNS, len(tiles)), SPRITE * -(-len(tiles) // COLUMNS)
    sheet = Image.new(tiles[0].mode, size)
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (i % COLUMNS * SPRITE, i // COLUMNS * SPRITE))
    return _encoded(sheet, "JPEG", quality=70)


def _picture(image: np.ndarray) -> Any:
    from PIL import Image

    return Image.fromarray(np.ascontiguousarray(shown(image)))


def _encoded(picture: Any, kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return data_uri(buffer.getvalue(), kind.lower())


def heat(shares: np.ndarray) -> str:
    """Data URI of a matrix in [0, 1], one pixel per value: blue on a transparent background."""
    from PIL import Image

    pixels = np.empty((*shares.shape, 4), np.uint8)
    pixels[..., :3] = (37, 99, 235)
    pixels[..., 3] = np.round(255 * np.clip(shares, 0, 1))
    return _encoded(Image.fromarray(pixels), "PNG")


def data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def project(features: np.ndarray) -> tuple[np.ndarray, tuple[str, str]]:
    """The first two principal components of features [N, D], and the names of these axes."""
    centred = features - features.mean(axis=0)
    u, s, vt = np.linalg.svd(centred, full_matrices=False)
    signs = np.sign(vt[np.arange(2), np.abs(vt[:2]).argmax(axis=1)])  # the sign of a component is arbitrary
    share = s[:2] ** 2 / max((s**2).sum(), 1e-12)
    names = (f"component 1 ({share[0]:.0%} of the variance)", f"component 2 ({share[1]:.0%})")
    return u[:, :2] * s[:2] * signs, names


def _thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    block = -(-len(x) // MAX_POINTS)
    if block <= 1:
        return x, y
    starts = range(0, len(x), block)
    return np.array([x[i : i + block].mean() for i in starts]), np.array([y[i : i + block].mean() for i in starts])


def _svg(width: float, height: float, draw: Callable[[Any], None], label: str) -> str:
    """An inline SVG of width x height inches in the page's style."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    file = io.StringIO()
    with rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    text = file.getvalue()
    text = text[text.index("<svg") :].replace("<svg", f'<svg role="img" aria-label={quoteattr(label)}', 1)
    return text.replace(INK, "currentColor").replace(FAINT, "var(--line)")


_STYLE: Any = {
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": FAINT,
    "axes.formatter.useoffset": False,
    "svg.fonttype": "none",  # text stays text, in the page's font
    "svg.hashsalt": "ssl_jax",  # equal figures give equal bytes
}
