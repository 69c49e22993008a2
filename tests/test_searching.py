"""`ssl-jax search`: the table holds the nearest images by an independent computation, the page shows them."""

import csv
import re

import numpy as np
import pytest
from PIL import Image
from planted import picture
from toy_encoder import toy_encoder

from ssl_jax import cli, load, searching

SIZE = 8


@pytest.fixture
def images(tmp_path, monkeypatch):
    """A folder of 12 pictures, and one that cannot be read."""
    monkeypatch.setattr(load, "load_encoder", lambda workdir, step: toy_encoder(size=SIZE))
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for i in range(12):
        picture(rng, i % 3).resize((SIZE, SIZE)).save(tmp_path / f"data/{i:02}.png")
    (tmp_path / "data/broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return tmp_path / "data"


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def embedded(folder):
    names = sorted(path.name for path in folder.glob("[0-9]*.png"))
    pixels = np.stack([np.asarray(Image.open(folder / name))[..., None] for name in names])
    features = toy_encoder(size=SIZE).embed(pixels)
    return names, features / np.linalg.norm(features, axis=1, keepdims=True)


def test_nearest_to_an_image_of_the_data(images):
    result = searching.search(".", str(images / "05.png"), str(images), out="found/near.html", k=4)
    names, features = embedded(images)
    cosine = features @ features[5]
    wanted = [i for i in np.argsort(-cosine) if i != 5][:4]  # it is not its own neighbour
    rows = rows_of(images.parent / "found/near.csv")
    assert [row["path"] for row in rows] == [names[i] for i in wanted]
    np.testing.assert_allclose([float(row["similarity"]) for row in rows], cosine[wanted], atol=1e-5)
    assert [row["rank"] for row in rows] == list("1234") and rows[0]["query"] == "05.png"
    assert rows[0]["file"] == str(images / names[wanted[0]])
    page = (images.parent / "found/near.html").read_text()
    shown = re.findall(r'<img alt="(\w+\.png)"', page)
    assert shown == ["05.png", *(names[i] for i in wanted)]
    assert not re.findall(r"<script|<link|(?:src|href)=\"(?!data:|#)", page)
    assert result == {"queries": 1, "images": 12, "page": "found/near.html", "table": "found/near.csv"}


def test_a_folder_of_queries_from_elsewhere(images, monkeypatch):
    monkeypatch.setattr(searching, "SHOWN", 2)
    others = images.parent / "queries"
    others.mkdir()
    for i in (3, 7, 9):
        Image.open(images / f"{i:02}.png").save(others / f"q{i}.png")
    assert cli.main(["search", ".", str(others), str(images), "--k=1", "--json"]) == 0
    rows = rows_of(images.parent / "neighbours.csv")
    assert [(row["query"], row["path"]) for row in rows] == [(f"q{i}.png", f"{i:02}.png") for i in (3, 7, 9)]
    page = (images.parent / "neighbours.html").read_text()
    assert "q7.png" in page and "q9.png" not in page and "The first 2 of 3 queries" in page


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere.png", "data"], "--query=nowhere.png: not found; allowed: a folder"),
        (["data/broken.png", "data"], "--query=data/broken.png: not an image"),
        (["data/01.png", "data", "--k=12"], "--k=12: there are 12 images; allowed: 1 to 11"),
        (["data/01.png", "data", "--out=a.png"], "--out=a.png: unknown ending '.png'; allowed: .html"),
        (["empty", "data"], "config.data.path='.*empty': no images; allowed: jpg"),
    ],
)
def test_mistakes_are_one_line(argv, message, images, capsys):
    (images.parent / "empty").mkdir()
    assert cli.main(["search", ".", *argv]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.match(f"ssl-jax: {message}", line), line
