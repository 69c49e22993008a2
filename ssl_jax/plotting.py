"""The look of all figures, and how they are saved: without a window, and without changing matplotlib's state."""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ssl_jax.files import write_bytes

BASELINE = "#6b7280"
# Okabe and Ito's palette, which colour-blind readers can tell apart; the baseline is gray.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
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


def save(figure: Any, path: Path, **options: Any) -> None:
    """Writes a PNG, atomically. options: of savefig."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", **options)
    write_bytes(path, buffer.getvalue())
