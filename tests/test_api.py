"""Encoders and classifiers in the hands of their users: in Python, in scikit-learn, and from any checkpoint."""

import contextlib
import csv
import io
import pickle
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from toy_encoder import WIDTH, toy_encoder, toy_images

import ssl_jax
from ssl_jax import checkpoint, cli, commands, evaluation, load, train
from ssl_jax.config import Data, default, resolve, to_json
from ssl_jax.config_file import override
from ssl_jax.data import open_source
from ssl_jax.encoder import Encoder, export
from ssl_jax.errors import UserError
from ssl_jax.files import read_json, write_json
from ssl_jax.network import Network
from ssl_jax.report.evaluations import below_pixels, evaluations
from ssl_jax.run_folder import RunFolder
from ssl_jax.testing.tiny import Images, tiny_config
from ssl_jax.train import memory
from ssl_jax.train.step import encoder_of

IMAGES, LABELS = toy_images(20)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(a run as `fit` leaves it, the embeddings of IMAGES at the steps 4 and 6), without the training in between.

    Its data cannot be opened again as its config says: it says something else.
    """
    folder, seen = RunFolder(tmp_path_factory.mktemp("runs") / "run"), {}
    changes = {"model__name": "ssl_jax.testing.model", "train__duration": "6 steps", "train__keep": 2}
    config = tiny_config("moco", **changes)
    setup = train.set_up(config, Images())
    with contextlib.ExitStack() as stack:
        recorded = memory.decisions(config, Images())
        folder.enter(config, 6, stack, **recorded)
    for step in (4, 6):
        state = train.init_state(setup, step)._replace(step=jnp.int32(step))
        checkpoint.save(folder.checkpoints, step, state, keep=2)
        made = encoder_of(setup, config, state)
        seen[step] = made.embed(IMAGES)
    export(folder.encoder, made)
    return folder.path, seen


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A .npz file of IMAGES and LABELS, of which one is unknown."""
    path = tmp_path_factory.mktemp("data") / "labelled.npz"
    np.savez(path, images=IMAGES, labels=np.where(np.arange(20) == 3, -1, LABELS))
    return path


@pytest.fixture(scope="module")
def classifier(run, data):
    """(a folder that `ssl-jax finetune` wrote from step 4, what it printed)."""
    out, printed = run[0] / "classifier", io.StringIO()
    how = ["steps=10", "epochs=0", "batch=16", "lr=(0.01,)", "head=zero", "augment.preset=none"]
    flags = [f"--workdir={run[0]}", f"--data={data}", f"--out={out}", "--step=4"]
    with contextlib.redirect_stdout(printed):
        assert cli.main(["finetune", *flags, *(f"--config.finetune.{key}" for key in how)]) == 0
    return out, printed.getvalue()


# Images.


def same(images):
    return [
        images.astype(np.int64),
        images.astype(np.uint16),
        images[..., 0],
        jnp.asarray(images),
        images.tolist(),
        list(images),
        tuple(images[..., 0]),
        [Image.fromarray(image[..., 0]) for image in images],
        [Image.fromarray(images[0, ..., 0]).convert("RGB"), *images[1:].astype(int)],
    ]


@pytest.mark.parametrize("number", range(9))
def test_the_same_images_have_the_same_embeddings(number):
    wanted = toy_encoder().embed(IMAGES)
    assert wanted.shape == (20, WIDTH) and wanted.dtype == np.float32 and wanted.std() > 0
    np.testing.assert_array_equal(toy_encoder().embed(same(IMAGES)[number]), wanted)


def test_floats_are_from_0_to_1():
    wanted = toy_encoder().embed(IMAGES)
    for images in (IMAGES / 255, (IMAGES / 255).astype(np.float32), [IMAGES[0], *(IMAGES[1:] / 255)]):
        np.testing.assert_allclose(toy_encoder().embed(images), wanted, atol=1e-5)


def test_images_of_other_sizes_are_treated_like_files(tmp_path):
    rng = np.random.default_rng(0)
    large = [rng.integers(0, 256, (h, w, 1), np.uint8) for h, w in ((20, 14), (9, 30), (8, 8))]
    for i, image in enumerate(large):
        Image.fromarray(image[..., 0]).save(tmp_path / f"{i}.png")
    wanted = toy_encoder().embed(open_source(Data(name="folder", path=str(tmp_path), size=8, channels=1)).arrays())
    for images in (large, [image / 255 for image in large], [Image.open(tmp_path / f"{i}.png") for i in range(3)]):
        np.testing.assert_allclose(toy_encoder().embed(images), wanted, atol=1e-5)
    np.testing.assert_array_equal(toy_encoder().embed(np.stack([large[0]] * 2)), wanted[[0, 0]])
    clear = Image.fromarray(np.zeros((8, 8, 4), np.uint8))  # transparent
    np.testing.assert_array_equal(toy_encoder().embed([clear]), toy_encoder().embed(np.full((1, 8, 8, 1), 255)))


def test_no_images():
    for images in ([], np.zeros((0, 8, 8, 1), np.uint8), np.array([])):
        assert toy_encoder().embed(images).shape == (0, WIDTH)


BATCH = np.zeros((2, 8, 8, 3))
VALUES = "integers from 0 to 255 or floats from 0 to 1"


@pytest.mark.parametrize(
    ("images", "channels", "message"),
    [
        (BATCH.astype(int) + 256, 3, f"images: integers from 0 to 256; allowed: {VALUES}"),
        (BATCH.astype(int) - 1, 3, f"images: integers from -1 to 0; allowed: {VALUES}"),
        (BATCH + 255, 3, f"images: floats from 0 to 255; allowed: {VALUES}"),
        (BATCH + np.nan, 3, f"images: floats from nan to nan; allowed: {VALUES}"),
        (BATCH > 0, 3, f"images: bool; allowed: {VALUES}"),
        (BATCH[0], 3, "images: shape [8, 8, 3]; allowed: [N, H, W, 3]; write [image] for a single image"),
        (BATCH[0], 1, "images: shape [8, 8, 3]; allowed: [N, H, W, 1]; write [image] for a single image"),
        (BATCH[0, ..., 0], 1, "images: shape [8, 8]; allowed: [N, H, W, 1]"),
        (BATCH, 1, "images: 3 channels; allowed: 1, as in the encoder's training: [N, H, W, 1]"),
        (BATCH[..., :1], 3, "images: 1 channels; allowed: 3"),
        (
            BATCH.transpose(0, 3, 1, 2),
            3,
            "as in the encoder's training: [N, H, W, 3], not channels first",
        ),
        ([BATCH[0], BATCH[0, ..., :2]], 3, "images[1]: 2 channels; allowed: 3"),
        ([BATCH[0, ..., 0]], 3, "images[0]: shape [8, 8]; allowed: [H, W, 3]"),
        ([BATCH[0, ..., 0]] * 9 + [np.ones((8, 8), int) * 300], 1, "images[9]: integers from 0 to 300"),
        ([[[1, 2], [3]]], 1, "images[0]: setting an array element"),
        (["a.png"], 3, f"images[0]: str; allowed: arrays of {VALUES}, or Pillow images"),
        ([None], 3, "images[0]: NoneType"),
        (Image.new("RGB", (8, 8)), 3, "images: Image; allowed: an array [N, H, W, C], or a list such as [image]"),
        ([Image.new("RGB", (8, 8))], 2, "images[0]: a Pillow image; allowed: an array with 2 channels"),
    ],
)
def test_other_images_are_refused(images, channels, message):
    with pytest.raises(UserError) as caught:
        toy_encoder(channels=channels).embed(images, batch=4)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_few_images_cost_little():
    """Their number is padded to a power of two, so that few programs are compiled; more images need full batches."""
    shapes = []

    def apply(params, stats, x, *, train):
        shapes.append(len(x))
        return x.reshape(len(x), -1) * params, stats

    encoder = Encoder(Network(None, apply), np.float32(1), (), 2, 1, {})
    images = np.arange(40, dtype=np.uint8).reshape(10, 2, 2, 1)
    for count in (1, 2, 3, 4, 3, 6, 8, 9, 10):
        found = encoder.embed(images[:count], batch=6)
        np.testing.assert_allclose(found, images[:count].reshape(count, -1) / 255, atol=1e-6)
    assert shapes == [1, 2, 4, 6]
    encoder.embed(images[:1], batch=7, fixed=True)
    assert shapes == [1, 2, 4, 6, 7] and encoder.width == 4


# Checkpoints.


def test_an_encoder_from_any_checkpoint(run):
    folder, seen = run
    assert not np.allclose(seen[4], seen[6])
    for step, wanted in ((4, 4), (6, 6), ("latest", 6), (None, 6)):
        encoder = ssl_jax.load_encoder(folder, step)
        np.testing.assert_array_equal(encoder.embed(IMAGES), seen[wanted])
        assert encoder.about["step"] == wanted and encoder.about["method"] == "moco"
    with pytest.raises(UserError, match=r"^step=5: not in .*run; allowed: latest, 4, 6$"):
        ssl_jax.load_encoder(folder, 5)


def test_an_unfinished_run(run, tmp_path, monkeypatch):
    folder, seen = run[0], run[1]
    for name in ("checkpoints", "config.json", "environment.json"):
        (shutil.copytree if name == "checkpoints" else shutil.copy)(folder / name, tmp_path / name)
    writing = tmp_path / "checkpoints" / "000000008.orbax-checkpoint-tmp"  # by the run, meanwhile
    writing.mkdir()
    with pytest.raises(UserError, match=r"no encoder\.json; the run has not ended; .* step=latest, or step=4 or 6$"):
        ssl_jax.load_encoder(tmp_path)
    write_json(tmp_path / "config.json", {**read_json(tmp_path / "config.json"), "model": {"init": "/gone", **MODEL}})
    np.testing.assert_array_equal(ssl_jax.load_encoder(tmp_path, "latest").embed(IMAGES), seen[6])
    assert writing.is_dir()
    # A run that an earlier version began: its data are opened.
    write_json(tmp_path / "environment.json", {})
    monkeypatch.setattr(load, "open_source", lambda data: Images())
    np.testing.assert_array_equal(ssl_jax.load_encoder(tmp_path, 4).embed(IMAGES), seen[4])
    victim = max((tmp_path / "checkpoints" / "000000004").rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
    victim.write_bytes(b"\0" * victim.stat().st_size)
    with pytest.raises(UserError, match=r"000000004: damaged checkpoint \(.*\); allowed: another step"):
        ssl_jax.load_encoder(tmp_path, 4)
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(UserError, match=r"step=latest: not in .*; it has no checkpoints"):
        ssl_jax.load_encoder(tmp_path, "latest")


MODEL = {"name": "ssl_jax.testing.model"}


def test_an_evaluation_of_another_step_has_a_name_of_its_own(run, data, capsys, monkeypatch):
    folder, references = run[0], []

    def of(self, path, *args, **kwargs):
        references.append(path.name)
        return {name: {"top1": 0.1, "balanced_accuracy": 0.1} for name in ("majority class", "raw pixels, kNN")}

    monkeypatch.setattr(evaluation.References, "of", of)

    def evaluate(*more):
        flags = [f"--workdir={folder}", f"--data={data}", "--labels=12", "--config.eval.knn_k=3", *more]
        assert cli.main(["evaluate", *flags]) == 0
        return sorted(path.stem.rpartition("-")[2] for path in (folder / "evaluation").glob("*.json"))

    (own,) = evaluate("--step=latest")  # the finished run's
    (file,) = (folder / "evaluation").glob("*.json")
    before = file.read_bytes()
    assert evaluate("--step=4") == sorted([own, "step4"]) and file.read_bytes() == before
    other = read_json(next((folder / "evaluation").glob("*-step4.json")))
    assert other["step"] == 4 and other["conditions"]["step"] == 4 and "step" not in read_json(file)["conditions"]
    assert len(references) == 2 and len(set(references)) == 1  # they do not depend on the step
    assert "knn, step 4" in evaluations([("", other)])
    worse = {**other, "references": {"raw pixels, kNN": {"mean": {other["metric"]: 2.0}}}}
    assert below_pixels([worse]) == "" and below_pixels([{**worse, "conditions": {}}])
    capsys.readouterr()
    for step, told in (("5", "step=5: not in"), ("last", "--step=last: allowed: the step of a checkpoint, or latest")):
        assert cli.main(["evaluate", f"--workdir={folder}", f"--step={step}"]) == 2
        assert told in capsys.readouterr().err


# Classifiers.


def test_a_classifier_in_python_and_on_the_command_line(run, classifier, data, tmp_path):
    classifier, _ = classifier
    made = ssl_jax.load_classifier(str(classifier))
    features, shares = made.embed(IMAGES), made.predict(IMAGES)
    assert made.classes == ["0", "1", "2"] and shares.shape == (20, 3) and shares.dtype == np.float64
    np.testing.assert_allclose(shares.sum(axis=1), 1)
    logits = features @ made.params["head"]["w"] + made.params["head"]["b"]
    np.testing.assert_allclose(shares, np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True), rtol=1e-5)
    assert not np.allclose(features, run[1][4])  # it was fine-tuned
    np.testing.assert_array_equal(ssl_jax.load_encoder(classifier).embed(IMAGES), features)
    assert "classes" not in ssl_jax.load_encoder(classifier).about  # a classifier that starts here has its own
    commands.embed(str(classifier), str(data), str(tmp_path / "e.npz"))
    np.testing.assert_array_equal(np.load(tmp_path / "e.npz")["embeddings"], features)
    commands.predict(str(classifier), str(data), str(tmp_path / "p.csv"))
    with (tmp_path / "p.csv").open() as file:
        rows = list(csv.reader(file))[1:]
    np.testing.assert_allclose(np.array([row[2:] for row in rows], float), shares, rtol=1e-6)
    np.testing.assert_allclose(made.predict([IMAGES[0]]), shares[:1], rtol=1e-4)
    several = made._replace(multilabel=True)
    np.testing.assert_allclose(several.predict(IMAGES), 1 / (1 + np.exp(-logits.astype(float))), rtol=1e-5)


def test_finetune_says_that_training_was_too_short(classifier):
    """Where a longer one is judged otherwise: see test_baselines."""
    folder, printed = classifier
    about = read_json(folder / "classifier.json")
    assert about["step"] == 4 and len(about["loss"]) == 10
    reason = about["undertrained"]
    assert reason.startswith("its training loss still fell at the end, from ")
    assert f"\nit looks undertrained: {reason}; try more --config.finetune.steps, or " in printed


# scikit-learn.


def test_in_a_pipeline(run, data):
    from sklearn.base import clone
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_score
    from sklearn.pipeline import make_pipeline

    from ssl_jax.sklearn import SSLEncoder

    folder, seen = run
    images, labels = toy_images(60)
    pipeline = make_pipeline(SSLEncoder(str(folder)), LogisticRegression(max_iter=1000))
    scores = cross_val_score(pipeline, images, labels, cv=2)
    assert scores.mean() > 0.7
    np.testing.assert_array_equal(cross_val_score(pipeline, list(images), labels, cv=2), scores)
    encoder = pipeline[0]
    np.testing.assert_array_equal(encoder.fit_transform(IMAGES), seen[6])
    assert len(pickle.dumps(encoder)) < 1000
    for copy in (clone(encoder), pickle.loads(pickle.dumps(encoder)), SSLEncoder(folder, batch=8)):
        assert not hasattr(copy, "_encoder")
        np.testing.assert_allclose(copy.transform(IMAGES), seen[6], rtol=1e-4, atol=1e-5)
    assert encoder.get_feature_names_out().tolist() == [f"e{i}" for i in range(12)]
    assert SSLEncoder(folder).get_params() == {"path": folder, "step": None, "batch": 256}
    np.testing.assert_array_equal(SSLEncoder(folder, step=4).transform(IMAGES), seen[4])
    with pytest.raises(UserError, match="/no/such: no encoder.json"):
        SSLEncoder("/no/such").fit(images)


# Labels beside embeddings.


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_labels_beside_embeddings(run, data, tmp_path, capsys):
    import pyarrow.parquet

    names = ["0", "1", "2"]
    for ending in ("npz", "csv", "parquet"):
        commands.embed(str(run[0]), str(data), str(tmp_path / f"e.{ending}"))
    wanted = [None if i == 3 else names[label] for i, label in enumerate(LABELS)]
    packed = np.load(tmp_path / "e.npz")
    assert [names[label] if label >= 0 else None for label in packed["labels"]] == wanted
    assert packed["classes"].tolist() == names and packed["path"].tolist() == [str(i) for i in range(20)]
    rows = table(tmp_path / "e.csv")
    assert [row["label"] or None for row in rows] == wanted and list(rows[0])[:3] == ["path", "label", "e0"]
    assert pyarrow.parquet.read_table(tmp_path / "e.parquet")["label"].to_pylist() == wanted
    assert "labels of 3 classes" in capsys.readouterr().out


def test_several_labels_beside_embeddings(run, tmp_path, capsys):
    import pyarrow.parquet

    for i in range(3):
        Image.fromarray(IMAGES[i, ..., 0]).save(tmp_path / f"{i}.png")
    cells = [("0.png", "1", ""), ("1.png", "0", "1"), ("2.png", "", "0")]
    path = tmp_path / "table.csv"
    path.write_text("\n".join(["path,Mass,Edema", *map(",".join, cells)]) + "\n")
    columns = ["--config.data.labels=('Mass','Edema')"]
    for ending in ("npz", "csv", "parquet"):
        commands.embed(str(run[0]), str(path), str(tmp_path / f"e.{ending}"), overrides=columns)
    assert [(r["path"], r["Mass"], r["Edema"]) for r in table(tmp_path / "e.csv")] == cells
    packed = np.load(tmp_path / "e.npz")
    np.testing.assert_array_equal(packed["labels"], [[1, np.nan], [0, 1], [np.nan, 0]])
    assert packed["classes"].tolist() == ["Mass", "Edema"]
    assert pyarrow.parquet.read_table(tmp_path / "e.parquet")["Mass"].to_pylist() == [1, 0, None]
    # Without labels, and without the columns that the training data had.
    path.write_text("path\n0.png\n1.png\n")
    commands.embed(str(run[0]), str(path), str(tmp_path / "u.csv"))
    assert list(table(tmp_path / "u.csv")[0])[:2] == ["path", "e0"]
    capsys.readouterr()
    commands.embed(str(run[0]), str(path), str(tmp_path / "u.npz"), overrides=columns)
    assert "no labels: config.data.labels='Mass': unknown" in capsys.readouterr().out
    assert set(np.load(tmp_path / "u.npz")) == {"embeddings", "path"}


# The configuration.


def test_init_is_kept_as_an_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = resolve(override(default("simclr"), ["--config.model.init=runs/a"]))
    assert config.model.init == to_json(config)["model"]["init"] == str(tmp_path / "runs" / "a")
    for text in ("", "~/runs/a", "/runs/a"):
        assert resolve(override(default("simclr"), [f"--config.model.init={text}"])).model.init == text


def test_a_file_name_cannot_steer_the_terminal(monkeypatch, capsys):
    def fail(**_):
        raise PermissionError(13, "Permission denied", "runs/\x1b[2J\nssl-jax: all is well")

    monkeypatch.setattr(commands, "report", fail)
    assert cli.main(["report", "runs"]) == 2
    said = capsys.readouterr().err
    assert said == "ssl-jax: runs/\\x1b[2J\\nssl-jax: all is well: Permission denied\n"


def test_importing_the_package_alone_needs_no_jax():
    assert {"load_encoder", "load_classifier"} <= set(dir(ssl_jax))
    with pytest.raises(AttributeError, match="module 'ssl_jax' has no attribute 'nothing'"):
        ssl_jax.nothing  # noqa: B018
