"""Data larger than memory: nothing is decoded at once, and nothing comes out differently."""

import collections
import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from toy_encoder import toy_encoder, toy_images
from toy_study import NAMES, toy_config, toy_run, toy_sources

from ssl_jax import evaluation, files, outputs
from ssl_jax.config import Augment, Data, Eval, Finetune, default, resolve
from ssl_jax.data import Source, open_source
from ssl_jax.data.labelled import Labelled
from ssl_jax.data.source import LazyImages, images_at
from ssl_jax.errors import UnreadableError, UserError
from ssl_jax.evaluate import finetuning, knn, references
from ssl_jax.evaluate.stored import StoredFeatures, embeddings

IMAGES, LABELS = toy_images(60)
CONFIG = resolve(default("simclr"))


def source(images=IMAGES, labels=LABELS, memory_gb=0.0, broken=(), loads=None, **more):
    def load(index):
        if loads is not None:
            loads[index] += 1
        if index in broken:
            raise UnreadableError("broken")
        return images[index]

    names = [f"{i}.png" for i in range(len(images))]
    options = {"labels": labels, "classes": NAMES, "memory_gb": memory_gb, "max_bad_share": 1.0, **more}
    return Source(names, images.shape[1:], load, **options)


@pytest.fixture
def never_at_once(monkeypatch):
    def refuse(self, progress=None):
        raise AssertionError("all images at once")

    monkeypatch.setattr(Source, "arrays", refuse)


def test_it_reads_like_an_array():
    images = source().all_images()
    assert (len(images), images.shape, images.dtype, images.ndim) == (60, (60, 8, 8, 1), np.uint8, 4)
    for rows in (slice(0, 7), slice(7, 14), slice(50, 99), slice(None, None, -9), slice(5, 5), [3, 1, -1], LABELS == 2):
        np.testing.assert_array_equal(images[rows], IMAGES[rows])
    np.testing.assert_array_equal(images[-2], IMAGES[-2])
    with pytest.raises(IndexError):
        images[np.array([60])]
    np.testing.assert_array_equal(images_at(images, np.array([4, 2]))[:], IMAGES[[4, 2]])
    assert images_at(images, np.arange(60)) is images


def test_the_next_slice_is_read_ahead_once():
    loads = collections.Counter()
    images = source(loads=loads, workers=3).all_images()
    for start in range(0, 60, 16):
        images[start : start + 16]
        [following.result() for following in images._ahead.values()]
        assert set(loads) == set(range(min(60, start + 32))) and set(loads.values()) == {1}
    images[20:30]  # out of order: nothing more
    assert not images._ahead and sum(loads.values()) == 70


def test_an_error_of_a_thread_is_that_of_the_slice():
    images = source(broken=range(60)).all_images()
    with pytest.raises(UserError, match="'0.png': unreadable, and no other image"):
        images[0:60]


def test_small_data_are_an_array_and_the_limit_is_memory_gb():
    assert isinstance(source(memory_gb=1.0).all_images(), np.ndarray)
    assert isinstance(source(array=IMAGES).all_images(), np.ndarray)  # in memory already
    assert isinstance(source().take([1, 2]).all_images(), LazyImages)
    data = Data(name="synthetic", path="n=8", memory_gb=0.0)
    assert isinstance(open_source(data).all_images(), LazyImages)
    assert isinstance(open_source(dataclasses.replace(data, engine="memory")).all_images(), np.ndarray)


def test_embeddings_and_classifiers_are_the_same(never_at_once):
    encoder, images = toy_encoder(), source().all_images()
    np.testing.assert_array_equal(encoder.embed(images), encoder.embed(IMAGES))
    settings = Finetune(steps=6, epochs=1, batch=16, lr=(1e-3, 1e-2), augment=Augment(preset="light"))
    options = {"classes": 3, "settings": settings, "seed": 0}
    small, large = (finetuning.finetune(encoder, each, LABELS, **options) for each in (IMAGES, images))
    jax.tree.map(np.testing.assert_array_equal, small.params, large.params)
    assert small.chosen == large.chosen
    np.testing.assert_array_equal(small.logits(IMAGES), large.logits(images))


@pytest.mark.parametrize("stored", [False, True])
def test_knn_takes_a_part_of_the_bank_at_a_time(stored, monkeypatch, tmp_path):
    rng = np.random.default_rng(0)
    bank, queries = rng.normal(size=(50, 6)).astype(np.float32), rng.normal(size=(23, 6)).astype(np.float32)
    bank[30:40] = bank[10:20]  # equally near
    several = np.where(rng.random((50, 3)) < 0.2, np.nan, rng.integers(0, 2, (50, 3)))
    whole = [knn.knn_predict(bank, y, queries, classes=3, k=13) for y in (LABELS[:50], several)]
    monkeypatch.setattr(knn, "BANK", 8)
    monkeypatch.setattr(knn, "QUERIES", 10)
    parts, nearer = [], knn._nearer

    def seen(near, index, part, count, start, queries, *, chunk):
        parts.append((len(part), *near.shape))
        return nearer(near, index, part, count, start, queries, chunk=chunk)

    monkeypatch.setattr(knn, "_nearer", seen)
    given = bank
    if stored:
        given = StoredFeatures(tmp_path, bank.shape)
        given.append(bank[:20])
        given.append(bank[20:])
        np.testing.assert_array_equal(given[[3, 30]], bank[[3, 30]])
    for labels, wanted in zip((LABELS[:50], several), whole, strict=True):
        np.testing.assert_allclose(knn.knn_predict(given, labels, queries, classes=3, k=13), wanted, atol=1e-6)
    assert set(parts) == {(8, 10, 13)}  # of the bank, of the queries, neighbours


def test_embeddings_beyond_the_limit_lie_in_a_file_without_a_name(tmp_path, never_at_once):
    encoder, images = toy_encoder(), source().all_images()
    kept = embeddings(encoder, images, 0.0, tmp_path)
    assert isinstance(kept, StoredFeatures) and kept.shape == (60, 12) and not list(tmp_path.iterdir())
    np.testing.assert_array_equal(kept[10:30], encoder.embed(IMAGES)[10:30])
    assert isinstance(embeddings(encoder, images, 1.0, tmp_path), np.ndarray)
    kept._file = Path("/dev/full").open("wb")  # noqa: SIM115 - it stays open, as the file does
    with pytest.raises(UserError, match="embeddings of 0.0 GB: not written"):
        kept.append(np.zeros((10**5, 12)))


def test_references_decode_no_more_than_they_learn_from(monkeypatch, tmp_path, never_at_once):
    monkeypatch.setattr(references, "MAX_LABELS", 20)
    loads, (tested, truth) = collections.Counter(), toy_images(30, seed=1)
    small = references.References({"r": toy_encoder()}, tested, truth, NAMES, Eval())
    wanted = small.of(tmp_path / "a.json", IMAGES, LABELS, seed=0)
    monkeypatch.setattr(references, "PIECE", 7)
    monkeypatch.setattr(references, "KEPT", 0)
    made = references.References({"r": toy_encoder()}, source(tested, truth).all_images(), truth, NAMES, Eval())
    found = made.of(tmp_path / "b.json", source(loads=loads).all_images(), LABELS, seed=0)
    assert not made.features and len(loads) == 20
    for name in wanted:
        assert found[name] == pytest.approx(wanted[name], abs=1e-6), name


@pytest.mark.parametrize("protocol", ["knn", "linear_quick", "linear", "finetune"])
def test_evaluations_are_the_same(protocol, tmp_path, monkeypatch):
    linear = dataclasses.replace(CONFIG.linear, epochs=2, lr=(1.0,))
    config = dataclasses.replace(CONFIG, linear=linear, finetune=Finetune(steps=4, epochs=0, lr=(1e-3,)))
    tested, truth = toy_images(30, seed=1)

    def scores(folder, memory_gb):
        settings = dataclasses.replace(config, data=dataclasses.replace(config.data, memory_gb=memory_gb))
        parts = [Labelled(source(x, y, memory_gb), y) for x, y in ((IMAGES, LABELS), (tested, truth))]
        about = {"test": "t", "conditions": evaluation.conditions(settings, protocol, settings.data, None)}
        about["conditions"]["data"] = {"path": "", "name": "x"}
        options = {"labels": 0, "seeds": 1, "about": about, "path": tmp_path / folder / f"{protocol}-all"}
        made = evaluation.evaluate(toy_encoder(), settings, protocol, *parts, **options)
        return np.load(tmp_path / folder / f"{protocol}-all.npz")["scores"], made

    small, told = scores("small", 1.0)
    monkeypatch.setattr(Source, "arrays", lambda self: pytest.fail("all images at once"))
    large, told_too = scores("large", 0.0)
    np.testing.assert_allclose(small, large, atol=1e-6)
    assert told["references"] == told_too["references"] and told.get("chosen") == told_too.get("chosen")
    assert sorted(p.name for p in (tmp_path / "large").iterdir() if p.is_file()) == [
        f"{protocol}-all.json",
        f"{protocol}-all.npz",
    ]


def test_a_study_is_the_same(tmp_path, monkeypatch):
    config = toy_config(protocol="linear_quick", labels=(30,), seeds=1)
    _, _, small = toy_run(config, tmp_path / "small")
    parts = [source(each.arrays(), each.labels) for each in toy_sources()]
    monkeypatch.setattr(Source, "arrays", lambda self: pytest.fail("all images at once"))
    _, _, large = toy_run(config, tmp_path / "large", train=parts[0], test=parts[1])
    assert len(small) == 6 and str(small) == str(large)


@pytest.mark.parametrize("memory_gb", [0.0, 1.0])
@pytest.mark.parametrize("ending", ["csv", "json"])
def test_predictions_are_written_as_they_come(ending, memory_gb, tmp_path, monkeypatch):
    monkeypatch.setattr(outputs, "PIECE", 16)
    head = {"w": np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32), "b": np.zeros(3, np.float32)}
    encoder = toy_encoder()
    params = {"encoder": encoder.params, "head": head}
    classifier = finetuning.Classifier(encoder, params, encoder.stats, {}, about={"classes": NAMES})
    given = source(memory_gb=memory_gb, broken=(5, 40), groups=np.arange(60) // 2)
    given.forget_labels()
    path = tmp_path / f"out.{ending}"
    assert outputs.write_predictions(path, given, outputs.predictions(classifier, given), NAMES, False) == 58
    kept = [i for i in range(60) if i not in (5, 40)]
    shares = classifier.predict(IMAGES[kept])
    if ending == "csv":
        rows = files.read_csv(path)
        assert rows[0] == ["path", "patient", "predicted", *NAMES]
        assert [row[:2] for row in rows[1:]] == [[f"{i}.png", str(i // 2)] for i in kept]
        assert [row[2] for row in rows[1:]] == [NAMES[i] for i in shares.argmax(axis=1)]
        np.testing.assert_allclose(np.array([row[3:] for row in rows[1:]], float), shares, atol=1e-6)
    else:
        text = path.read_text()
        rows = json.loads(text)
        assert text == json.dumps(rows, indent=1) + "\n" and [row["patient"] for row in rows] == [i // 2 for i in kept]
        np.testing.assert_allclose([list(row["probabilities"].values()) for row in rows], shares, atol=1e-6)


def test_rows_that_fail_in_the_middle_leave_no_file(tmp_path):
    def rows():
        yield ["a", 1]
        raise UserError("no more")

    with pytest.raises(UserError, match="no more"):
        files.write_csv(tmp_path / "table.csv", ["x", "y"], rows())
    assert not list(tmp_path.iterdir())
