"""Pictures with captions in a grid, in HTML, for pages that show many images."""

from collections.abc import Iterable
from html import escape

import numpy as np

from ssl_jax.errors import visible
from ssl_jax.report.plots import thumbnail

SIDE = 150  # px of a picture
STYLE = """<style>
.grid, .pairs { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(130px, 1fr)); }
.pairs { grid-template-columns: repeat(auto-fill, minmax(270px, 1fr)); gap: 1.4rem 2rem; }
.pairs .grid { grid-template-columns: 1fr 1fr; gap: .5rem; }
.grid + .grid { border-top: 1px solid var(--line); margin-top: 1rem; padding-top: 1rem; }
.grid figcaption { font-size: .74rem; font-weight: 400; line-height: 1.25; overflow-wrap: anywhere; }
.grid small { display: block; font-size: .72rem; }
.grid img { width: 100%; aspect-ratio: 1; object-fit: contain; border: 2px solid var(--line); border-radius: 5px; }
.grid .query img { border-color: var(--accent); }
.pairs .grid + .grid { border: 0; margin: 0; padding: 0; }
</style>"""


def tile(image: np.ndarray, caption: str, small: str = "", kind: str = "") -> str:
    """A picture of image uint8 [H, W, C] with a caption and a smaller line. kind: "query" has a frame of its own."""
    text = escape(visible(caption))
    shown = f'<img alt="{text}" title="{text}" src="{thumbnail(image, SIDE)}">'
    below = f"<figcaption>{text}<small>{escape(visible(small))}</small></figcaption>"
    return f'<figure class="{kind}">{shown}{below}</figure>'


def grid(tiles: Iterable[str]) -> str:
    return f'<div class="grid">{"".join(tiles)}</div>'


def pairs(rows: Iterable[Iterable[str]]) -> str:
    """Two tiles each, side by side."""
    return f'<div class="pairs">{"".join(map(grid, rows))}</div>'
