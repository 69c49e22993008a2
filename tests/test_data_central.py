"""config.data.test_side: test images as torchvision reads them, wherever an image is read or a network is exported."""

import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from test_exporting import classifier_of, encoder_of, pictures

from ssl_jax.classifier import OF_ENCODER, READ
from ssl_jax.config import Data, default, resolve
from ssl_jax.data import open_source
from ssl_jax.data.central import central, region
from ssl_jax.data.images import as_images
from ssl_jax.encoder import encoder_metadata
from ssl_jax.errors import UnreadableError, UserError
from ssl_jax.evaluation import conditions
from ssl_jax.exporting import checking, command, inference, weights
from ssl_jax.exporting.command import Subject

REFERENCE = np.load(Path(__file__).parent / "reference" / "torchvision_test_images.npz")
CASES = sorted(key.removesuffix(".image") for key in REFERENCE.files if key.endswith(".image"))


def numbers_of(case):
    _, size, side = case.split("-")
    return int(size), int(side)


@pytest.mark.parametrize("case", CASES)
def test_it_equals_torchvision(case, tmp_path):
    """From files and arrays alike."""
    (size, side), image, wanted = numbers_of(case), REFERENCE[f"{case}.image"], REFERENCE[f"{case}.result"]
    np.testing.assert_array_equal(central(Image.fromarray(image), size, side), wanted)
    Image.fromarray(image).save(tmp_path / "a.png")
    np.savez(tmp_path / "a.npz", images=image[None])
    for name, path in (("folder", tmp_path), ("npz", tmp_path / "a.npz")):
        source = open_source(Data(name=name, path=str(path), size=size, test_side=side))
        np.testing.assert_array_equal(source.load(0), wanted)
        np.testing.assert_array_equal(source.arrays()[0], wanted)


def test_what_it_shows_of_an_image():
    assert region(60, 40, 24) == (0, 10, 40, 40)
    assert region(60, 40, 24, 32) == (5, 15, 30, 30)
    assert region(40, 60, 24, 24) == (10, 0, 40, 40)


def test_it_is_read_whole_even_if_a_jpeg_could_be_decoded_small(tmp_path):
    Image.fromarray(pictures(64, 80, 3)).save(tmp_path / "a.jpg", quality=95)
    source = open_source(Data(name="folder", path=str(tmp_path), size=8, test_side=10))
    np.testing.assert_array_equal(source.load(0), central(Image.open(tmp_path / "a.jpg"), 8, 10))


def test_it_has_a_cache_of_its_own(tmp_path):
    (tmp_path / "images").mkdir()
    Image.fromarray(pictures(40, 50, 3)).save(tmp_path / "images" / "a.png")
    options = {"name": "folder", "path": str(tmp_path / "images"), "size": 16, "cache": str(tmp_path / "cache")}
    plain, sided = open_source(Data(**options)), open_source(Data(**options, test_side=20))
    assert (plain.load(0) != sided.load(0)).any()
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize(("size", "side"), [(16, 15), (0, 223)])
def test_a_side_smaller_than_the_image_is_one_line(tmp_path, size, side):
    Image.fromarray(pictures(40, 50, 3)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=rf"config.data.test_side={side}: smaller than the images; allowed: 0, or"):
        open_source(Data(name="folder", path=str(tmp_path), size=size, test_side=side))


def test_arrays_that_keep_their_size_have_no_side(tmp_path):
    np.savez(tmp_path / "a.npz", images=pictures(2, 9, 9, 3))
    with pytest.raises(UserError, match="config.data.test_side=12: allowed with config.data.size=0: 0"):
        open_source(Data(name="npz", path=str(tmp_path / "a.npz"), test_side=12))


def test_an_image_too_long_for_its_side_is_unreadable():
    with pytest.raises(UnreadableError, match="1 x 60000 px, which take"):
        central(Image.new("L", (1, 60_000)), 224, 256)


# Whoever reads images later


@pytest.fixture(scope="module")
def vit():
    encoder = encoder_of(name="vit_tiny", depth=1, patch=8, width=0.25)
    return encoder._replace(about={**encoder.about, "read": {"test_side": 20}})


def test_encoders_and_classifiers_keep_it():
    assert "test_side" in READ and "read" in OF_ENCODER
    config = default("simclr")
    config.model.name = "resnet18"
    assert "read" not in encoder_metadata(resolve(config), 16, 3, 0)
    config.data.test_side = 20
    assert encoder_metadata(resolve(config), 16, 3, 0)["read"] == {"test_side": 20}


def test_it_is_a_condition_of_an_evaluation_and_crops_are_not():
    config = resolve(default("simclr"))
    told = [
        json.dumps(conditions(config, "knn", Data(name="synthetic", **more), None))
        for more in ({}, {"test_side": 300}, {"crops": "file"})
    ]
    assert told[0] == told[2] != told[1]


def test_images_of_another_size_are_embedded_as_their_files_are(vit, tmp_path):
    images = [pictures(30, 44, 3), pictures(50, 20, 3)]
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    source = open_source(Data(name="folder", path=str(tmp_path), size=16, test_side=20))
    wanted = vit.embed(source.arrays())
    np.testing.assert_array_equal(vit.embed(images), wanted)
    np.testing.assert_array_equal(vit.embed([Image.fromarray(image) for image in images]), wanted)
    np.testing.assert_array_equal(vit.embed([Image.fromarray(x) for x in source.arrays()]), wanted)  # as they are


def test_exported_programs_resize_as_pillow_does(vit):
    function = jax.jit(inference.resized, static_argnums=(1, 2))
    for height, width in ((35, 48), (17, 18), (16, 16), (41, 60), (48, 35), (20, 20)):
        images = pictures(4, height, width, 3)
        found, wanted = np.asarray(function(images, 16, 20)), as_images(list(images), slice(0, 4), 16, 3, 20)
        assert found.shape == (4, 16, 16, 3)
        assert np.abs(found - wanted).max() <= 2
        assert np.abs(found - wanted).mean() < (0.1 if width >= height else 0.4)


@pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="needs pip install '.[onnx]'")
def test_a_classifier_in_onnx_runtime_reads_images_as_this_library(vit, tmp_path):
    classifier = classifier_of(vit)
    subject = Subject(vit, classifier, None, None, classifier.about)
    facts, _, result = command._program(subject, "onnx", "cls", 18, tmp_path, pictures(3, 16, 16, 3))
    assert any("the shorter side of each image is resized to 20 px" in fact for fact in facts)
    assert result["differences"]["same_size"] < 1e-4
    images = pictures(2, 44, 30, 3)
    [found] = checking.run_onnx(tmp_path / "model.onnx", [images])
    assert checking.compare(found, {"probabilities": classifier.predict(list(images))}) < 0.05


def test_other_libraries_are_told(vit):
    prepared = inference.preprocessing(vit)
    assert prepared["size"] == 16 and prepared["test_side"] == 20
    config = weights.exported("timm", vit, prepared, None, []).files["config.json"]
    assert config["pretrained_cfg"]["crop_pct"] == 0.8
    files = weights.exported("huggingface", vit, prepared, None, []).files
    assert files["preprocessor_config.json"]["size"] == {"shortest_edge": 20}
    for size in range(8, 300, 7):
        for side in range(size, 300, 3):
            assert int(size / weights._share(size, side)) == side
