"""From raw uint8 images to random views, inside the compiled step: `ops`, `presets`, `views`."""

from ssl_jax.augment.presets import PRESETS, preset_of
from ssl_jax.augment.views import (
    FACTORS,
    appearance,
    center_view,
    check_no_warp,
    draw,
    finish_views,
    geometry,
    make_views,
    origins,
    render,
    resolve_views,
)

__all__ = [
    "FACTORS",
    "PRESETS",
    "appearance",
    "center_view",
    "check_no_warp",
    "draw",
    "finish_views",
    "geometry",
    "make_views",
    "origins",
    "preset_of",
    "render",
    "resolve_views",
]
