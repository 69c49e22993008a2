"""`ssl-jax export`: what is written computes what the network computes, or nothing is written."""

import dataclasses
import importlib.util
import json
import sys

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax import cli, files
from ssl_jax.config import Model, View
from ssl_jax.data.images import as_images
from ssl_jax.embedding import features_of
from ssl_jax.encoder import Encoder, build, given_encoder, random_encoder
from ssl_jax.encoder import export as save
from ssl_jax.errors import UserError
from ssl_jax.evaluate.finetuning import Classifier
from ssl_jax.evaluate.linear import Probe
from ssl_jax.exporting import card, checking, command, inference, weights
from ssl_jax.files import read_json

RNG = np.random.default_rng(0)
needs_onnx = pytest.mark.skipif(
    importlib.util.find_spec("onnx") is None or importlib.util.find_spec("onnxruntime") is None,
    reason="needs pip install '.[onnx]'",
)


def encoder_of(size=16, channels=3, **model):
    """With random weights and statistics, drawn in NumPy: a network's own would take seconds to compile."""
    model = Model(**model)
    network, image = build(model, channels, size), jax.ShapeDtypeStruct((1, size, size, channels), np.float32)

    def draw(shape):
        scale = max(1, np.prod(shape.shape[:-1])) ** -0.5
        positive = len(shape.shape) == 1  # BatchNorm's variances, too
        return (RNG.uniform(0.5, 1, shape.shape) if positive else RNG.normal(0, scale, shape.shape)).astype(np.float32)

    params, stats = jax.tree.map(draw, jax.eval_shape(network.init, jax.random.key(0), image))
    about = {"model": dataclasses.asdict(model), "size": size, "channels": channels, "method": "scratch"}
    return Encoder(network, params, stats, size, channels, about)


@pytest.fixture(scope="module")
def vit():
    return encoder_of(name="vit_tiny", depth=1, patch=8, width=0.25)


@pytest.fixture(scope="module")
def resnet():
    return encoder_of(name="resnet18", width=0.0625, stem="imagenet", size=48, channels=1)


@pytest.fixture(scope="module")
def thin():
    return encoder_of(name="resnet_thin", width=0.125, size=24, channels=1)


@pytest.fixture(scope="module")
def folder(vit, tmp_path_factory):
    """A folder with an exported encoder, and no run around it."""
    path = tmp_path_factory.mktemp("encoder")
    save(path, vit)
    return path


def classifier_of(encoder, multilabel=False, pixels=False):
    """Of three classes, with a threshold for two of them."""
    head = {"w": RNG.normal(0, 1, (encoder.width, 3)).astype(np.float32), "b": np.float32([0, 0.1, -0.1])}
    values = min(32, encoder.size) ** 2 * encoder.channels
    probe = Probe(RNG.normal(0, 0.1, (values, 3)).astype(np.float32), np.float32([0.1, 0, 0]), 1.0, 0.0)
    about = {**encoder.about, "classes": ["a", "ü", "c"], "multilabel": multilabel, "chosen": {}, "data": "gone"}
    if multilabel:
        about["thresholds"] = {"a": {"threshold": 0.2}, "c": {"threshold": 0.7}}
    return Classifier(
        encoder,
        {"encoder": encoder.params, "head": head},
        encoder.stats,
        {},
        multilabel=multilabel,
        about=about,
        pixels=probe if pixels else None,
    )


def pictures(*shape):
    return RNG.integers(0, 256, shape).astype(np.uint8)


def test_images_are_resized_as_pillow_does():
    """Up, down, to and from sides that are not square, with crops at half a pixel; equal but for rounding, which Pillow
    13 does in another order for images that are higher than wide."""
    function = jax.jit(inference.resized, static_argnums=1)
    for height, width in ((35, 48), (17, 16), (16, 16), (48, 35)):
        images = pictures(4, height, width, 3)
        found, wanted = np.asarray(function(images, 16)), as_images(list(images), slice(0, 4), 16, 3)
        assert np.abs(found - wanted).max() <= 2
        assert np.abs(found - wanted).mean() < (0.02 if width >= height else 0.4)


@pytest.mark.parametrize("pixels", [False, True])
def test_probabilities_and_decisions_are_the_classifiers(vit, pixels):
    images = pictures(5, 16, 16, 3)
    for multilabel in (False, True):
        classifier = classifier_of(vit, multilabel, pixels)
        found = jax.jit(inference.of_classifier(classifier).function)(images)
        wanted = classifier.predict(images)
        np.testing.assert_allclose(found["probabilities"], wanted, atol=1e-5)
        decided = wanted >= [0.2, 0.5, 0.7] if multilabel else wanted.argmax(1)
        np.testing.assert_array_equal(found["predicted"], decided)


def test_a_program_runs_in_a_new_process_with_any_number_and_size_of_images(vit, tmp_path):
    made = inference.of_encoder(vit, "both")
    image = jax.ShapeDtypeStruct((*jax.export.symbolic_shape("N, H, W"), 3), np.uint8)
    path = tmp_path / "model.stablehlo"
    path.write_bytes(jax.export.export(jax.jit(made.function), platforms=command.PLATFORMS)(image).serialize())
    batches = [pictures(3, 16, 16, 3), pictures(1, 32, 16, 3)]
    for found, images in zip(checking.run_stablehlo(path, batches), batches, strict=True):
        assert checking.compare(found, features_of(vit, images, "both")) < 1e-5
    path.write_bytes(b"damaged")
    with pytest.raises(UserError, match="a new process cannot run the file"):
        checking.run_stablehlo(path, batches)


@needs_onnx
@pytest.mark.parametrize("which", ["vit", "thin"])
def test_onnx_runtime_computes_the_same(which, request, tmp_path):
    import onnx

    from ssl_jax.exporting import onnx_writer

    encoder = request.getfixturevalue(which)
    image = jax.ShapeDtypeStruct((*jax.export.symbolic_shape("N, H, W"), encoder.channels), np.uint8)
    model = onnx_writer.write(inference.of_encoder(encoder, "both").function, image, 18, {"size": "16"})
    onnx.checker.check_model(model, full_check=True)
    onnx.save_model(model, path := tmp_path / "model.onnx")
    size = encoder.size
    batches = [pictures(n, h, w, encoder.channels) for n, h, w in ((3, size, size), (1, 2 * size, size))]
    for found, images in zip(checking.run_onnx(path, batches), batches, strict=True):
        assert checking.compare(found, features_of(encoder, images, "both")) < 1e-4


@needs_onnx
def test_operations_of_onnx_are_those_of_jax(tmp_path):
    """Those that the two networks above lack, and what is broadcast; the number of rows is symbolic."""
    import flax.linen as nn
    import onnx

    from ssl_jax.exporting import onnx_writer

    kernel, row = RNG.normal(0, 1, (3, 3, 4, 6)).astype(np.float32), RNG.normal(0, 1, 4).astype(np.float32)

    def function(x):
        q = x.reshape(x.shape[0], 16, 2, 2)
        y = {"pool": nn.max_pool(x, (3, 3), (2, 2), [(1, 1), (1, 1)]), "row": x * row - row[:, None] @ row[None]}
        y["conv"] = jax.lax.conv_general_dilated(
            x, kernel, (2, 1), [(1, 1), (0, 1)], dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        y["attention"] = jax.nn.dot_product_attention(q, q * 2, q + 1)
        y["chosen"] = jnp.where(x > row, jnp.pad(x, ((0, 0), (1, 0), (0, 1), (0, 0)))[:, 1:, :-1], jnp.abs(x) ** 0.5)
        y["parts"] = jnp.concatenate([x[:, ::2], x[:, 1:3] ** 3], axis=1)
        y["least"] = x.min((1, 2)) + jnp.log1p(0.0) + jnp.tanh(x).max((1, 2))
        y["first"] = x.reshape(x.shape[0], -1).argmax(1)
        return y | {"gelu": nn.gelu(x, approximate=False), "silu": nn.silu(x), "both": (x >= 0) & (x != row)}

    image = jax.ShapeDtypeStruct((*jax.export.symbolic_shape("N"), 4, 4, 4), np.float32)
    model = onnx_writer.write(function, image, 18, {})
    onnx.checker.check_model(model, full_check=True)
    onnx.save_model(model, path := tmp_path / "model.onnx")
    batches = [RNG.normal(0, 1, (n, 4, 4, 4)).astype(np.float32) for n in (1, 3)]
    for found, x in zip(checking.run_onnx(path, batches), batches, strict=True):
        for name, wanted in function(x).items():
            np.testing.assert_allclose(found[name], wanted, rtol=1e-4, atol=1e-5, err_msg=name)


@needs_onnx
def test_onnx_says_what_it_cannot_write(tmp_path):
    from ssl_jax.exporting import onnx_writer

    image = jax.ShapeDtypeStruct((4, 4), np.float32)
    with pytest.raises(UserError, match="--format=onnx: sort: an operation that the ONNX writer does not know"):
        onnx_writer.write(lambda x: {"y": jnp.sort(x)}, image, 18, {})
    for opset in (11, 999):
        with pytest.raises(UserError, match=f"--opset={opset}: allowed: 18 to"):
            onnx_writer.write(lambda x: {"y": x}, image, opset, {})
    (tmp_path / "model.onnx").write_bytes(b"damaged")
    with pytest.raises(UserError, match="ONNX Runtime cannot run the file"):
        checking.run_onnx(tmp_path / "model.onnx", [])


def stub(monkeypatch, factor):
    """Instead of a new process: the network itself, times a factor."""
    monkeypatch.setattr(jax.export, "export", lambda *args, **kwargs: lambda image: Serialized())

    def run(path, batches):
        return [{k: v * np.float32(factor) for k, v in features_of(CURRENT[0], b, "cls").items()} for b in batches]

    monkeypatch.setattr(checking, "run_stablehlo", run)


class Serialized:
    def serialize(self):
        return b"program"


CURRENT: list = []


def test_what_computes_something_else_is_not_written(folder, vit, tmp_path, monkeypatch, capsys):
    CURRENT[:] = [vit]
    stub(monkeypatch, factor=1.001)
    flags = [f"--workdir={folder}", "--format=stablehlo", f"--out={tmp_path / 'out'}"]
    assert cli.main(["export", *flags]) == 2
    assert "not written: on images of the network's size" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    stub(monkeypatch, factor=1.00001)
    assert cli.main(["export", *flags]) == 0
    assert f"written: {tmp_path / 'out'}" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["README.md", "export.json", "model.stablehlo"]
    stored = read_json(tmp_path / "out" / "export.json")
    assert 0.5e-5 < stored["differences"]["same_size"] < 2e-5 and stored["images"] == "8 random images"
    assert cli.main(["export", *flags]) == 2
    assert "exists already; allowed: a new folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--format=onxx"], "--format='onxx': unknown; did you mean 'onnx'?"),
        (["--format=stablehlo", "--features=all"], "--features='all': unknown; available: both, cls, patch"),
        (["--format=timm", "--features=patch"], "--features=patch: with --format=onnx or stablehlo; timm holds"),
        pytest.param(
            ["--format=onnx", "--opset=11"], "--opset=11: allowed: 18 to 2", marks=needs_onnx, id="an old opset"
        ),
        (["--format=torchvision"], "--format=torchvision: model.name=vit_tiny has no counterpart in torchvision; use"),
    ],
)
def test_mistakes_are_one_line(flags, message, folder, tmp_path, capsys):
    assert cli.main(["export", str(folder), f"--out={tmp_path / 'out'}", *flags]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and told[0].startswith(f"ssl-jax: {message}"), told
    assert not (tmp_path / "out").exists()


def test_a_missing_extra_names_its_pip_line(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.main(["export", str(folder), "--format=onnx", f"--out={tmp_path / 'out'}"]) == 2
    told = capsys.readouterr().err.strip()
    assert told == "ssl-jax: --format=onnx: needs onnx and onnxruntime: pip install 'ssl_jax[onnx]'"


def test_weights_have_the_names_and_shapes_of_others(vit):
    """As timm 1.0.31 and transformers 5 name and shape a ViT; the fixed positions become a table."""
    prepared = inference.preprocessing(vit)
    head = np.ones((vit.width, 2), np.float32), np.zeros(2, np.float32)
    timm = weights.exported("timm", vit, prepared, head, ["a", "b"])
    about = timm.files["config.json"]
    assert about["architecture"].startswith("vit_") and about["model_args"]["num_heads"] == 3
    assert about["pretrained_cfg"]["mean"] == list(prepared["mean"]) and about["label_names"] == ["a", "b"]
    width = vit.width
    assert timm.weights["pos_embed"].shape == (1, 5, width) and not timm.weights["pos_embed"][0, 0].any()
    assert timm.weights["head.weight"].shape == (2, width)
    hugging = weights.exported("huggingface", vit, prepared, head, ["a", "b"])
    query = hugging.weights["vit.encoder.layer.0.attention.attention.query.weight"]
    np.testing.assert_array_equal(query, timm.weights["blocks.0.attn.qkv.weight"][:width])
    assert len(hugging.weights) == len(timm.weights) + 4  # one block's queries, keys and values are apart
    assert hugging.files["config.json"]["architectures"] == ["ViTForImageClassification"]
    assert json.dumps(hugging.files)


@pytest.mark.parametrize("kind", ["timm", "huggingface"])
@pytest.mark.parametrize(
    "options",
    [
        {"positions": "learned", "heads": 6},
        {"positions": "learned", "grid": 3, "layer_scale": 0.5},  # DINOv2's, whose positions are resized in each pass
        {"positions": "learned", "grid": 3, "resize": "plain", "registers": 2, "layer_scale": 0.5, "mlp_ratio": 2.0},
        {"registers": 1},  # fixed positions
    ],
)
def test_a_vit_under_the_names_of_others_is_read_back(tmp_path, kind, options):
    """`published` is held to timm and transformers in tests/test_weights.py."""
    encoder = encoder_of(name="vit_tiny", depth=2, patch=8, width=0.5, **options)
    made = weights.exported(kind, encoder, inference.preprocessing(encoder), None, [])
    files.write_weights(tmp_path / "model.safetensors", made.weights)
    config = made.files["config.json"]
    if kind == "timm":  # whose file does not say how many heads there are
        config = {**config, "num_attention_heads": config["model_args"]["num_heads"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    given = given_encoder(str(tmp_path), 16, 3)
    images = RNG.integers(0, 256, (3, 16, 16, 3), np.uint8)
    found, expected = (each.embed_dense(images) for each in (given, encoder))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-5)


def test_a_network_without_a_counterpart_is_refused(resnet):
    prepared = inference.preprocessing(resnet)
    with pytest.raises(UserError, match="--format=timm: resnet18 of model.width=0.0625; timm has none; use"):
        weights.exported("timm", resnet, prepared, None, [])
    with pytest.raises(UserError, match="images of 1 channels; torchvision's networks take 3"):
        weights.exported("torchvision", resnet, prepared, None, [])
    named = weights.exported("huggingface", resnet, prepared, None, [])
    assert "encoder.stages.1.layers.0.shortcut.convolution.weight" in named.weights
    assert named.files["config.json"]["hidden_sizes"] == [4, 8, 16, 32]
    assert "preprocessor_config.json" not in named.files  # its processors take colour images


@pytest.mark.parametrize(
    ("key", "value"), [("mlp", "swiglu"), ("positions", "rotary"), ("eps", 1e-5), ("class_token", False)]
)
def test_a_vit_that_computes_something_else_is_refused(key, value):
    more = {"pool": "mean"} if key == "class_token" else {}
    encoder = random_encoder(Model(name="vit_tiny", width=0.25, depth=1, patch=4, **{key: value}, **more), 8, 3, seed=0)
    with pytest.raises(UserError, match=r"--format=timm: .*; use --format=onnx or stablehlo"):
        weights.exported("timm", encoder, inference.preprocessing(encoder), None, [])


def test_a_table_of_differences_is_judged_by_its_limits():
    with pytest.raises(UserError, match=r"on images of the network's size .* is 2.0e-04; allowed: 0.0001"):
        checking.check({"same_size": 2e-4, "resized": 0}, "onnx")
    with pytest.raises(UserError, match="on images of other sizes"):
        checking.check({"same_size": 0, "resized": 0.06}, "onnx")
    with pytest.raises(UserError, match="on images of the network's size"):
        checking.check({"same_size": np.nan}, "onnx")
    with pytest.raises(UserError, match=r"y: \[0\]; expected \[2\]"):
        checking.compare({}, {"y": np.ones(2)})


def test_the_card_says_what_views_changed_and_how_it_scored(vit):
    assert card.changes(View()) == []
    told = card.changes(View(crop_scale=(0.25, 1.0), flip=0.5, brightness=0.4, jitter_prob=0.8, hue=0.0))
    assert told == ["place and scale (crops of 25% to 100% of the area)", "left and right", "brightness"]
    about = {**classifier_of(vit, multilabel=True).about, "data": "/home/me/labelled.csv", "test_data": "/x/test.csv"}
    about["test"] = {"macro_auc": 0.75, "interval": {"macro_auc": [0.7, 0.8]}}
    scored = {"protocol": "knn", "labels": 50, "seeds": 5, "test": "test split", "metric": "top1"}
    scored |= {"mean": {"top1": 0.5}, "interval": {"top1": 0.02}}
    text = card.card("onnx", about, ["a fact"], "code", None, 0, [scored])
    assert "0.7500 (95 % interval 0.7000 to 0.8000)" in text and "| 0.5000 ± 0.0200 |" in text
    assert "Licence: to be filled in" in text and "a: present from 0.2000 on" in text
    assert "/home/me" not in text and "/x/" not in text
