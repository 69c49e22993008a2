import numpy as np
import pytest

from ssl_jax import commands
from ssl_jax import config as configs
from ssl_jax.augment import resolve_views
from ssl_jax.augment.sheet import LINE, describe_view, label, view_sheet
from ssl_jax.config import Augment
from ssl_jax.errors import UserError


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_sheet_shows_originals_and_views(tmp_path, channels):
    from PIL import Image

    images = np.full((2, 10, 8, channels), 60, np.uint8)
    images[1, ..., 0] = 200
    out = tmp_path / "new" / "views.png"
    view_sheet(images, resolve_views(Augment("none"), 1, 8), out, draws=2, names=["a$b$.png", "名\x1b" * 50])
    shown = np.asarray(Image.open(out).convert("RGB")).reshape(-1, 3)
    first = (60, 60, 60)
    second = (200, 200, 200) if channels == 1 else (200, 60, 60)
    for colour in (first, second):
        assert (shown == colour).all(1).mean() > 0.1


def test_views_of_a_folder_stand_beside_the_names_of_its_files(tmp_path, monkeypatch):
    from matplotlib.axes import Axes
    from PIL import Image

    for name in ("scan 1.png", "b$.png"):
        Image.new("L", (8, 8)).save(tmp_path / name)
    config = configs.default("simclr")
    config.data.name, config.data.path, config.data.size, config.augment.preset = "folder", str(tmp_path), 8, "none"
    shown, draw = [], Axes.text
    monkeypatch.setattr(Axes, "text", lambda self, x, y, s, **style: (shown.append(s), draw(self, x, y, s, **style)))
    commands.views(configs.resolve(config), str(tmp_path / "views.png"))
    assert {"scan 1.png", "b$.png"} <= set(shown)


def test_sheet_refuses_what_is_no_picture(tmp_path):
    views = resolve_views(Augment("none"), 1, 8)
    images = np.zeros((1, 8, 8, 1), np.uint8)
    with pytest.raises(UserError, match=r"is a folder; allowed: the path of a \.png file"):
        view_sheet(images, views, tmp_path)
    with pytest.raises(UserError, match="x.txt: not a .png file"):
        view_sheet(images, views, tmp_path / "x.txt")


@pytest.mark.parametrize("name", ["b" * 300, "part/" * 60 + "x.png", "two words " * 30, "a\n\x1b[2J\udcff.png"])
def test_odd_names_are_shortened_and_escaped(name):
    lines = label(name).split("\n")
    assert 1 <= len(lines) <= 6 and all(line.isprintable() and len(line) <= LINE for line in lines)
    assert (len(name) > 100) == ("…" in label(name)) and lines[-1].endswith(name[-4:].strip())


def test_description_holds_the_numbers_that_are_on():
    first, second = map(describe_view, resolve_views(Augment("natural", {"gray": 0.0}), 2, 64))
    assert "crop 0.08-1, flip 0.5, jitter 0.8 (brightness 0.4, contrast 0.4, saturation 0.2, hue 0.1)" in first
    assert "kernel 7 px" in first and "gray" not in first and "solarize" not in first
    assert "solarize 0.2 (from 0.5)" in second
