"""From raw uint8 images to random views, inside the compiled step: `ops`, `presets`, `views`."""

from ssl_jax.augment.presets import PRESETS
from ssl_jax.augment.views import FACTORS, center_view, draw, make_views, render, resolve

__all__ = ["FACTORS", "PRESETS", "center_view", "draw", "make_views", "render", "resolve"]
