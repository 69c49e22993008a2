"""Pictures for the report's page: charts as inline SVG, photographs as data URIs."""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from xml.sax.saxutils import quoteattr

import numpy as np

# matplotlib draws in these; the page replaces them by its own colours, which depend on a light or dark screen.
INK, FAINT = "#010203", "#010204"
MAX_POINTS = 400  # of a curve; longer curves are averaged in blocks
MAX_GROUPS = 20  # with a colour each; more could not be told apart


def curves(series: Mapping[str, tuple[Sequence[float], Sequence[float | None]]], label: str) -> str:
    """Inline SVG of y by epoch for each name; None in y is a gap. A single series has no legend."""

    def draw(figure):
        axes = figure.subplots()
        for name, xy in series.items():
            x, y = _thin(*(np.asarray(v, float) for v in xy))
            axes.plot(x, y, label=name, linewidth=1.6, marker="o" if len(x) <= 30 else "", markersize=3)
        axes.grid(axis="y")
        axes.set_xlabel("epoch")
        if len(series) > 1:
            axes.legend(frameon=False)

    return _svg(4.4, 2.5, draw, label)


def scatter(points: np.ndarray, groups: np.ndarray | None, names: Sequence[str], axis_names: tuple[str, str]) -> str:
    """Inline SVG of points [N, 2], coloured by group [N], an index into names, or -1 for none."""
    import matplotlib

    visible = groups if groups is not None and len(names) <= MAX_GROUPS else np.full(len(points), -1)
    colors = matplotlib.colormaps["tab10" if len(names) <= 10 else "tab20"].colors  # type: ignore[attr-defined]

    def draw(figure):
        axes = figure.subplots()
        style = {"linestyle": "", "marker": "o", "markersize": 3.4, "markeredgewidth": 0, "alpha": 0.75}
        axes.plot(*points[visible < 0].T, color=colors[0] if groups is None else "#8a8f98", **style)
        for group in np.unique(visible[visible >= 0]):
            axes.plot(*points[visible == group].T, color=colors[group], label=names[group], **style)
        axes.set_xlabel(axis_names[0])
        axes.set_ylabel(axis_names[1])
        axes.tick_params(labelbottom=False, labelleft=False, length=0)
        if (visible >= 0).any():
            legend = axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), markerscale=1.8)
            for text in legend.get_texts():
                text.set_parse_math(False)  # a "$" in a class name is a dollar

    return _svg(7.2, 4.6, draw, f"{len(points)} embeddings: {', '.join(axis_names)}")


def thumbnail(image: np.ndarray, side: int = 96) -> str:
    """Data URI of an image uint8 [H, W, C], with its longer side at most `side` px; without 3 channels, the first."""
    from PIL import Image

    picture = Image.fromarray(image if image.shape[2] == 3 else image[..., 0])
    picture.thumbnail((side, side))
    buffer = io.BytesIO()
    if max(picture.size) > 48:
        picture.save(buffer, "JPEG", quality=85)
        return data_uri(buffer.getvalue(), "jpeg")
    picture.save(buffer, "PNG")
    return data_uri(buffer.getvalue(), "png")


def heat(shares: np.ndarray) -> str:
    """Data URI of a matrix in [0, 1], one pixel per value: blue on a transparent background."""
    from PIL import Image

    pixels = np.empty((*shares.shape, 4), np.uint8)
    pixels[..., :3] = (37, 99, 235)
    pixels[..., 3] = np.round(255 * np.clip(shares, 0, 1))
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return data_uri(buffer.getvalue(), "png")


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
