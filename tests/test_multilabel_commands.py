"""The commands on data with several labels per image, on sources that stand in for the readers."""

import csv
import dataclasses
import json

import jax
import numpy as np
import pytest
from scipy.special import expit
from sklearn.metrics import roc_auc_score
from toy_encoder import toy_encoder

from ssl_jax import cli, commands, parallel, train
from ssl_jax.config import default, method_module, resolve, to_json
from ssl_jax.data import Source
from ssl_jax.encoder import export, random_encoder
from ssl_jax.errors import UserError
from ssl_jax.files import write_json
from ssl_jax.methods.base import RunInfo
from ssl_jax.report.html import write_report
from ssl_jax.testing.tiny import set_up, tiny_config

CLASSES = ["top", "middle", "bottom", "never"]


def source(n, seed, classes=CLASSES, groups=True, labels=True):
    """Noise with bright bands, each one label; some are unknown, and nobody has the last one."""
    rng = np.random.default_rng(seed)
    y = (rng.uniform(size=(n, 4)) < [0.5, 0.3, 0.3, 0.0]).astype(np.float32)
    images = rng.integers(0, 120, (n, 18, 18, 1))
    for image, row in zip(images, y, strict=True):
        for c in np.flatnonzero(row):
            image[6 * c : 6 * c + 6] += 40
    y[rng.uniform(size=y.shape) < 0.1] = np.nan
    y[3] = np.nan
    return Source(
        [f"patient{i // 2:05d}/view {i % 2}, ü.jpg" for i in range(n)],
        (18, 18, 1),
        lambda i: images[i].astype(np.uint8),
        labels=y[:, [CLASSES.index(c) for c in classes]] if labels else None,
        classes=classes if labels else [],
        groups=np.arange(n) // 2 + 100 * seed if groups else None,
    )


@pytest.fixture
def opened(monkeypatch):
    """What `open_source` opened, as (data, split); it knows the sources by their path."""
    seen = []

    def open_fake(data, split=None):
        seen.append((data, split))
        part = {"train": (120, 0), "test": (60, 1), "all": (60, 1)}[split or data.split]
        return sources.get(data.path, source)(*part)

    sources = {}
    monkeypatch.setattr(commands, "open_source", open_fake)
    return seen, sources


@pytest.fixture
def encoder(tmp_path):
    config = resolve(default("simclr"))
    model = dataclasses.replace(config.model, name="ssl_jax.testing.model")
    export(tmp_path / "run" / "encoder", random_encoder(model, 18, 1, 0))
    data = dataclasses.replace(config.data, name="npz", path="images")
    write_json(tmp_path / "run" / "config.json", to_json(dataclasses.replace(config, data=data)))
    return tmp_path / "run"


def npz(tmp_path, name="data.npz"):
    """A path that `--data` accepts; the fake opens it."""
    np.savez(tmp_path / name, x=np.zeros(1))
    return str(tmp_path / name)


FAST = [f"--config.finetune.{key}" for key in ("steps=60", "epochs=0", "batch=32", "lr=(1e-4,3e-3)")]
FAST.append("--config.linear.epochs=20")


@pytest.mark.parametrize("protocol", ["knn", "linear", "linear_quick", "propagate", "finetune"])
def test_evaluate(encoder, opened, protocol, capsys):
    made = commands.evaluate(str(encoder), protocol, labels=60, seeds=2, overrides=FAST)
    (path,) = (encoder / "evaluation").glob(f"{protocol}-60*.npz")
    saved = np.load(path)
    test = source(60, 1)
    assert saved["names"].tolist() == [n for i, n in enumerate(test.names) if i != 3]  # of which nothing is known
    assert saved["groups"].tolist() == [g for i, g in enumerate(test.groups.tolist()) if i != 3]
    again = []
    for scores in saved["scores"]:
        known = ~np.isnan(saved["labels"])
        again.append([roc_auc_score(saved["labels"][k, c], scores[k, c]) for c, k in enumerate(known.T[:3])])
    assert made["mean"]["macro_auc"] == pytest.approx(np.mean(again)) and np.mean(again) > 0.75
    assert made["interval"]["brier"] > 0 and made["interval"]["macro_auc"] >= 0 and 0 < made["mean"]["brier"] < 0.25
    shown = capsys.readouterr().out
    assert "no image of never" in shown and "left out (cannot be scored on these test images): never" in shown
    assert json.loads(path.with_suffix(".json").read_text())["per_seed"][0]["left_out"] == ["never"]
    assert made["references"]["majority class"]["mean"]["macro_auc"] == 0.5
    assert made["references"]["raw pixels, linear"]["mean"]["macro_auc"] > 0.5


@pytest.mark.parametrize("protocol", ["knn", "linear_quick", "propagate"])
def test_evaluate_learns_from_other_images(protocol, encoder, opened, tmp_path):
    more = str(tmp_path / "more.npz")
    np.savez(more, images=source(30, 2).arrays())
    own, other = (
        commands.evaluate(str(encoder), protocol, labels=60, unlabelled=unlabelled) for unlabelled in ("", more)
    )
    assert "unlabelled" not in own["conditions"] and other["conditions"]["unlabelled"]["path"] == more
    assert own["mean"] != other["mean"] and other["mean"]["macro_auc"] > 0.7
    assert own["conditions"]["settings"] != other["conditions"]["settings"] or protocol == "propagate"
    if protocol == "linear_quick":  # the same as `propagate`, which takes all training images if no others are given
        assert other["mean"] == commands.evaluate(str(encoder), "propagate", labels=60, unlabelled=more)["mean"]


@pytest.mark.slow
def test_finetune_learns_from_images_without_a_label(encoder, opened, tmp_path, capsys):
    data, out = npz(tmp_path), tmp_path / "classifier"
    more = str(tmp_path / "more.npz")
    np.savez(more, images=source(30, 2).arrays())
    fast = [f"--config.finetune.{key}" for key in ("steps=20", "epochs=0", "batch=32", "lr=(1e-3,3e-3)")]
    flags = [f"--workdir={encoder}", f"--data={data}", f"--unlabelled={more}", f"--out={out}"]
    assert cli.main(["finetune", *flags, *fast]) == 0
    about, shown = json.loads((out / "classifier.json").read_text()), capsys.readouterr().out
    assert about["unlabelled"] == more and about["unlabelled_images"] == 30
    assert about["finetune"]["unlabelled"] == "all" and "student_validation" in about["chosen"]
    used = "the student is used" if about["chosen"]["student"] else "the teacher is used"
    assert "then on 30 images without a label" in shown and used in shown
    assert about["thresholds"]


def test_finetune_test_and_predict(encoder, opened, tmp_path, capsys):
    data, out = npz(tmp_path), tmp_path / "classifier"
    flags = [f"--workdir={encoder}", f"--data={data}", f"--test={data}", f"--out={out}"]
    assert cli.main(["finetune", *flags, *FAST, "--config.finetune.class_weights=balanced"]) == 0
    seen, sources = opened
    assert [split for _, split in seen] == [None, "test"]  # the same data: trained on one part, tested on the other
    shown = capsys.readouterr().out
    about = json.loads((out / "classifier.json").read_text())
    with (out / "test.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    test = source(60, 1)
    known = [i for i in range(60) if i != 3]
    assert list(rows[0]) == ["path", "patient", *CLASSES]
    assert [(r["path"], int(r["patient"])) for r in rows] == [(test.names[i], test.groups[i]) for i in known]
    for c, name in enumerate(CLASSES[:3]):
        y, odds = test.labels[known, c], np.array([float(r[name]) for r in rows])
        there = ~np.isnan(y)
        assert about["test"]["auc"][name] == pytest.approx(roc_auc_score(y[there], odds[there]))
        low, high = about["test"]["interval"]["auc"][name]
        assert low <= about["test"]["auc"][name] <= high and f"({low:.3f} to {high:.3f})" in shown
        chosen, at = about["thresholds"][name], about["test"]["at_threshold"][name]
        assert chosen["sensitivity"] >= 0.9 and chosen["positives"] > 0
        above = odds[there] >= chosen["threshold"]
        assert at["sensitivity"] == pytest.approx(above[y[there] == 1].mean())
        assert at["specificity"] == pytest.approx((~above)[y[there] == 0].mean())
    assert about["test"]["macro_auc"] > 0.9 and about["test"]["groups"] == 30
    assert "never" not in about["thresholds"] and about["multilabel"] and about["chosen"]["lr"] == 3e-3
    assert (out / "reliability.png").stat().st_size > 5000

    sources[data] = lambda *part: source(*part, labels=False)  # to predict, no label is needed
    assert cli.main(["predict", f"--workdir={out}", f"--data={data}", f"--out={tmp_path / 'p.csv'}"]) == 0
    with (tmp_path / "p.csv").open(encoding="utf-8") as file:
        predicted = list(csv.DictReader(file))
    assert len(predicted) == 60 and [predicted[i] for i in known] == rows
    sources[data] = lambda *part: source(*part, groups=False)
    commands.predict(str(out), data, str(tmp_path / "q.csv"), ["--config.data.labels=('study',)"])
    assert opened[0][-1][0].labels == ()  # nor any column that the training data had
    assert (tmp_path / "q.csv").read_text().splitlines()[0] == "path,top,middle,bottom,never"


def test_wrong_test_data_are_an_error_before_training(encoder, opened, tmp_path, capsys):
    data, held = npz(tmp_path), npz(tmp_path, "held.npz")
    flags = [str(encoder), data, str(tmp_path / "out"), held]

    def single(*part):
        made = source(*part)
        return Source(made.names, made.shape, made.load, labels=np.zeros(60, np.int32), classes=["top"])

    def unknown(*part):
        made = source(*part)
        return Source(made.names, made.shape, made.load, labels=np.full((60, 4), np.nan, np.float32), classes=CLASSES)

    cases = (
        (single, "one label per image; allowed: several labels per image"),
        (unknown, "no image has a known label"),
        (lambda *part: source(*part, labels=False), "has no labels"),
    )
    for made, message in cases:
        opened[1][held] = made
        with pytest.raises(UserError, match=message):
            commands.finetune(*flags)
    assert "fine-tuning" not in capsys.readouterr().out and not (tmp_path / "out").exists()


def test_test_images_on_which_no_class_can_be_scored(encoder, opened, tmp_path, capsys):
    held = npz(tmp_path, "held.npz")

    def absent(*part):
        made = source(*part)
        made.labels[:] = 0
        return made

    opened[1][held] = absent
    made = commands.evaluate(str(encoder), "knn", labels=40, test=held)
    assert "macro_auc" not in made["mean"] and "left out" in capsys.readouterr().out
    assert "held" in write_report(encoder).read_text()


def test_folders_are_told_apart_by_their_tables(tmp_path, encoder, opened):
    """The fake knows no folder: what counts is what it was asked for."""
    for name, table in (("chexpert", "Path,Sex,Age,Frontal/Lateral,AP/PA\n"), ("folder", "image_id,label\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.csv").write_text(table)
        commands.evaluate(str(encoder), "knn", test=str(tmp_path / name))
        asked, split = opened[0][-1]
        assert (asked.name, split) == (name, "test" if name == "chexpert" else "all")
        assert (asked.size, asked.channels) == (18, 1)


def test_labels_of_other_columns_come_in_the_order_of_the_training_data():
    made = source(20, 0, classes=["bottom", "top"]).labels_as(CLASSES, "here")
    np.testing.assert_array_equal(made[:, [0, 2]], source(20, 0).labels[:, [0, 2]])
    assert np.isnan(made[:, [1, 3]]).all()
    with pytest.raises(UserError, match="here: class='never': unknown"):
        source(20, 0).labels_as(["top", "middle", "bottom"], "here")


def test_supervised_is_trained_by_every_label_that_is_known():
    rng = np.random.default_rng(0)
    network = toy_encoder().network
    method = method_module("supervised").make(method_module("supervised").Config(), network, RunInfo(1, 1, 1, 3))
    views = [rng.uniform(size=(6, 8, 8, 1)).astype(np.float32)]
    labels = rng.choice([0, 1, np.nan], (6, 3)).astype(np.float32)
    params, state = method.init(jax.random.key(0), views)
    outputs, _ = method.forward(params, None, state, {"views": views}, jax.random.split(jax.random.key(1), 6))
    loss, metrics = method.loss(outputs, state, {"label": labels}, None)
    known, p = ~np.isnan(labels), expit(np.asarray(outputs["logits"]))
    assert loss == pytest.approx(-np.log(np.where(labels == 1, p, 1 - p)[known]).mean(), rel=1e-5)
    assert metrics["accuracy"] == pytest.approx(((p > 0.5) == (labels == 1))[known].mean())


@pytest.mark.parametrize("name, changes", [("sup_con", {}), ("triplet", {"method__mining": "hard"})])
def test_methods_for_one_label_per_image_say_so(name, changes):
    config, data = tiny_config(name, **changes), source(32, 0)
    step = train.make_step(set_up(config, data), config, parallel.make_mesh(1, 16))
    batch = {"image": data.arrays()[:16], "label": data.labels[:16], "index": np.arange(16)}
    state = jax.eval_shape(lambda: train.init_state(set_up(config, data), 0))
    with pytest.raises(UserError, match="needs one label per image, but the data have 4"):
        jax.eval_shape(step, state, batch)
