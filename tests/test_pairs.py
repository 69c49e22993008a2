"""Given views: images of the same object as positives (config.data.pairs)."""

import numpy as np
import pytest
from PIL import Image

from ssl_jax import train
from ssl_jax.config import Data
from ssl_jax.data import Partners, batches, open_source, order
from ssl_jax.errors import UserError
from ssl_jax.testing.tiny import tiny_config, tiny_encoder
from ssl_jax.train import hooks


@pytest.fixture
def photos(tmp_path):
    """Objects a (3 images), b (2) and c (1), in a folder each; a table says the same."""
    rows = ["path,patient"]
    for number, (name, count) in enumerate({"a": 3, "b": 2, "c": 1}.items()):
        for i in range(count):
            path = tmp_path / "images" / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), 40 * number + 10 * i).save(path)
            rows.append(f"images/{name}/{i}.png,{name if name != 'c' else ''}")
    (tmp_path / "table.csv").write_text("\n".join(rows))
    images = np.stack(
        [np.full((8, 8), 40 * n + 10 * i, np.uint8) for n, c in ((0, 3), (1, 2), (2, 1)) for i in range(c)]
    )
    np.savez(tmp_path / "a.npz", images=images, patient=np.array([7, 7, 7, 3, 3, 9]))
    return tmp_path


def source(photos, kind):
    path, pairs = {
        "folder": ("images", "folder"),
        "csv": ("table.csv", "Patient"),
        "npz": ("a.npz", "patient"),
    }[kind]
    return open_source(Data(name=kind, path=str(photos / path), pairs=pairs, size=8, channels=1))


@pytest.mark.parametrize("kind", ["folder", "csv", "npz"])
def test_partners_show_the_same_object(photos, kind):
    opened = source(photos, kind)
    found = {tuple(np.flatnonzero(opened.objects == o)) for o in opened.objects}
    assert found == {(0, 1, 2), (3, 4), (5,)}
    partners, everything = Partners(opened.objects), np.arange(6)
    drawn = np.array([partners(0, everything, step) for step in range(200)])
    assert (opened.objects[drawn] == opened.objects).all()
    assert (drawn[:, :5] != everything[:5]).all() and (drawn[:, 5] == 5).all()  # another image, unless it is alone
    assert 70 < (drawn[:, 0] == 1).sum() < 130  # the two others of a, about equally often
    np.testing.assert_array_equal(partners(0, everything, 3), drawn[3])
    assert (np.array([partners(1, everything, s) for s in range(200)]) != drawn).any()


def test_disk_and_memory_give_the_same_pairs(photos):
    opened = source(photos, "folder")
    images, partners = opened.arrays(), Partners(opened.objects)
    for step, batch in enumerate(batches(opened, batch=4, seed=5, start=0, stop=4, workers=2)):
        index = order(5, 6, 4, step)
        np.testing.assert_array_equal(batch["image"], images[index])
        np.testing.assert_array_equal(batch["pair"], images[partners(5, index, step)])
    rows = np.array([1, 3])
    for step, batch in enumerate(batches(opened, batch=4, seed=5, start=0, stop=4, rows=rows, decode=False)):
        index = order(5, 6, 4, step)
        assert batch.keys() == {"index", "partner"}
        np.testing.assert_array_equal(batch["index"], index[rows])
        np.testing.assert_array_equal(batch["partner"], partners(5, index, step)[rows])


@pytest.mark.parametrize("engine", ["memory", "disk"])
@pytest.mark.parametrize("method", ["simclr", pytest.param("byol", marks=pytest.mark.slow)])
def test_two_view_methods_train_on_pairs(photos, method, engine, tmp_path, monkeypatch):
    monkeypatch.setattr(hooks, "write_views", lambda *_: None)  # half of the time of so short a run
    config = tiny_config(method, data__engine=engine, train__batch=4, train__duration="3 steps", eval__every="0 steps")
    train.fit(config, tmp_path / "run", source(photos, "folder"), tiny_encoder())
    assert (tmp_path / "run" / "encoder" / "encoder.json").exists()


def test_every_second_view_is_of_the_pair():
    import jax

    from ssl_jax.augment import make_views
    from ssl_jax.config import View

    images, pairs = np.full((3, 4, 4, 1), 51, np.uint8), np.full((3, 4, 4, 1), 204, np.uint8)
    views, _ = make_views([View(size=4)] * 3)(jax.random.key(0), images, pairs)
    assert [round(float(v.mean()), 2) for v in views] == [0.2, 0.8, 0.2]


def test_mistakes(photos):
    def fails(words, **changes):
        with pytest.raises(UserError, match=words):
            open_source(Data(**changes))

    fails(
        "config.data.pairs='patients': unknown; did you mean 'patient'",
        name="csv",
        path=str(photos / "table.csv"),
        pairs="patients",
    )
    fails(
        "config.data.pairs='patients': unknown; did you mean 'patient'",
        name="npz",
        path=str(photos / "a.npz"),
        pairs="patients",
    )
    fails("config.data.pairs='deep': allowed with folder: folder", name="folder", path=str(photos), pairs="deep")
    fails("has no two images of one object", name="csv", path=str(photos / "table.csv"), pairs="path")
    fails("synthetic does not say which images show one object", name="synthetic", pairs="object")
