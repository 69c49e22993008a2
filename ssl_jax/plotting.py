"""The look of all figures, and how they are saved: without a window, and without changing matplotlib's state."""

import contextlib
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssl_jax.files import write_bytes

BASELINE = "#6b7280"
# Okabe and Ito's palette, which colour-blind readers can tell apart; the baseline is gray.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
SCORE, GAIN = 20.0, 10.0  # points that an axis of scores or of their differences spans at least
STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e5e7eb",
    "axes.axisbelow": True,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "savefig.dpi": 150,
}


def shown(image: np.ndarray) -> np.ndarray:
    """What a picture shows of an image [H, W, C]: its first three channels, or only the first, [H, W], of fewer."""
    return image[..., :3] if image.shape[-1] >= 3 else image[..., 0]


def shown_in_words(channels: int) -> str:
    """What `shown` leaves of so many channels; "" for gray and colour."""
    if channels in (1, 3):
        return ""
    return "channel 1 of 2" if channels == 2 else f"channels 1, 2, 3 of {channels} as red, green, blue"


@contextlib.contextmanager
def panels(
    columns: int, rows: int = 1, *, width: float, height: float, share_y: Any = False, **options: Any
) -> Iterator[tuple[Any, Any]]:
    """(figure, flat array of rows x columns axes) in our style. width, height: of the whole figure, inches."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.subplots(rows, columns, squeeze=False, sharey=share_y, **options).ravel()


def limits(values: Iterable[float], least: float | None = None, top: float = math.inf) -> tuple[float, float]:
    """The ends of an axis that holds all values and on which a small change looks small.

    It is at least `least` long, by default half of the largest absolute value. Only to reach that length, it goes
    neither below 0, if all values are positive, nor above `top`, the largest value that there can be.

    >>> limits([20.5, 18.5], least=20, top=100)
    (8.5, 30.5)
    """
    finite = np.array([value for value in values if np.isfinite(value)])
    if not len(finite):
        return 0.0, 1.0
    low, high = float(finite.min()), float(finite.max())
    length = max(high - low, max(-low, high) / 2 if least is None else least) or 1.0
    start = max((low + high - length) / 2, 0 if low >= 0 else -math.inf)
    start = min(start, max(top, high) - length)
    margin = 0.05 * length  # a line on the edge would be cut in half
    return start - margin, start + length + margin


def legend_below(figure: Any, axes: Sequence[Any]) -> None:
    """One legend for all axes, below them, where it hides nothing; in as many columns as fit."""
    entries: dict[str, Any] = {}
    for each in axes:
        entries |= {name: line for line, name in zip(*each.get_legend_handles_labels(), strict=True)}
    if not entries:
        return
    columns = int(figure.get_figwidth() * 11 / (max(map(len, entries)) + 6))  # about 11 characters an inch
    figure.legend(
        list(entries.values()),
        [plain(name) for name in entries],
        loc="outside lower left",
        ncols=min(max(columns, 1), len(entries)),
        frameon=False,
    )


def plain(text: str) -> str:
    """Text as it is: matplotlib would read what stands between two dollars as a formula."""
    return text.replace("$", r"\$")


def save(figure: Any, path: Path, **options: Any) -> None:
    """Writes a PNG, atomically. options: of savefig."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", **options)
    write_bytes(path, buffer.getvalue())
