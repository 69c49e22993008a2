"""finetune.pixels: a regression on raw pixels that votes beside the network."""

import dataclasses

import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from toy_encoder import toy_encoder, toy_images

from ssl_jax import classifier
from ssl_jax.config import Augment, Finetune, Model
from ssl_jax.encoder import random_encoder
from ssl_jax.errors import UserError
from ssl_jax.evaluate import finetune, pixels, self_train
from ssl_jax.evaluate.references import STRENGTHS
from ssl_jax.evaluation import _print

ALONE = Finetune(steps=20, epochs=0, batch=16, lr=(0.01,), augment=Augment(preset="none"))
BOTH = dataclasses.replace(ALONE, pixels=True)


def _made(settings, images, labels, classes=3, **options):
    return finetune(toy_encoder(), images, labels, classes=classes, settings=settings, seed=0, **options)


def test_logits_are_the_mean_of_the_network_and_a_regression_on_pixels():
    (images, labels), (test, _) = toy_images(60), toy_images(40, seed=1)
    alone, both = _made(ALONE, images, labels), _made(BOTH, images, labels)
    raw = 2 * both.logits(test) - alone.logits(test)
    assert both.pixels.strength in STRENGTHS
    x = images.reshape(60, -1) / 255
    mean, std = x.mean(axis=0), x.std(axis=0)
    model = LogisticRegression(C=both.pixels.strength, max_iter=1000).fit((x - mean) / std, labels)
    wanted = model.predict_proba((test.reshape(40, -1) / 255 - mean) / std)
    shares = np.exp(raw) / np.exp(raw).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(shares, wanted, atol=2e-3)


def test_it_helps_a_network_that_has_learnt_nothing():
    (images, labels), (test, truth) = toy_images(60), toy_images(300, seed=1)
    nothing = {"steps": 1, "lr": (1e-9,), "head": "zero"}
    alone, both = (_made(dataclasses.replace(s, **nothing), images, labels) for s in (ALONE, BOTH))
    hits = [(made.logits(test).argmax(1) == truth).mean() for made in (alone, both)]
    assert hits[0] < 0.6 and hits[1] > 0.8


def test_candidates_are_judged_together_with_it_and_it_never_sees_what_they_are_judged_by():
    images, labels = toy_images(60)
    several = dataclasses.replace(BOTH, lr=(1e-9, 0.01))
    made = _made(several, images, labels)
    logits, held = made.held_out
    alone = _made(dataclasses.replace(several, pixels=False), images, labels).held_out[0]
    assert len(held) == 12 and not np.allclose(logits, alone)
    final = made.logits(images)  # trained on all labels
    assert all(np.abs(final - row).max(axis=1).min() > 1e-4 for row in logits)


def test_several_labels_an_image_and_a_student():
    images, labels = toy_images(60)
    each = np.float32(labels[:, None] == np.arange(3))
    each[:5, 1] = np.nan
    teacher = _made(BOTH, images, each)
    assert teacher.multilabel and teacher.pixels.weights.shape == (64, 3)
    settings = dataclasses.replace(BOTH, unlabelled="all", unlabelled_batch=16)
    teacher = _made(settings, images, labels)
    student = self_train(teacher, toy_encoder(), images, labels, images, classes=3, settings=settings, seed=0)
    np.testing.assert_array_equal(student.pixels.weights, teacher.pixels.weights)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder, encoder = tmp_path_factory.mktemp("c"), random_encoder(Model(name="resnet_thin", width=0.1), 8, 1, 0)
    images, labels = toy_images(30)
    made = finetune(encoder, images, labels, classes=3, settings=dataclasses.replace(BOTH, steps=2), seed=0)
    classifier.save_weights(folder, made)
    classifier.save_about(folder, {**encoder.about, "classes": ["a", "b", "c"], "chosen": made.chosen})
    return folder, made


def test_it_is_saved_with_the_classifier(saved):
    folder, made = saved
    again, (images, _) = classifier.load_classifier(folder), toy_images(300, seed=2)
    np.testing.assert_allclose(again.logits(images), made.logits(images), rtol=1e-5, atol=1e-6)
    assert not np.allclose(again.logits(images), again._replace(pixels=None).logits(images))


def test_images_of_any_kind(saved):
    _, made = saved
    images, _ = toy_images(5, seed=3)
    wanted = made.logits(images)
    for same in (images / 255, [*images], [Image.fromarray(image[..., 0]) for image in images]):
        np.testing.assert_allclose(made.logits(same), wanted, rtol=1e-4, atol=1e-5)
    assert made.logits(images[:0]).shape == (0, 3)
    with pytest.raises(UserError, match="images"):
        made.logits(images.astype(float))
    floats = images.astype(np.float32) / 255
    np.testing.assert_allclose(pixels(floats), pixels(images), rtol=1e-6)


def test_a_classifier_without_it_is_known_again():
    assert "pixels" not in ALONE.inputs() and BOTH.inputs()["pixels"]


@pytest.mark.parametrize("score, pixels_vote, told", [(0.4, False, True), (0.4, True, False), (0.9, False, False)])
def test_evaluate_proposes_it_where_an_encoder_is_not_above_pixels(score, pixels_vote, told, capsys):
    each = [{"top1": score, "left_out": []}, {"top1": score + 0.01, "left_out": []}]
    beside = [{"raw pixels, linear": {"top1": 0.5}}, {"raw pixels, linear": {"top1": 0.51}}]
    conditions = {"data": {"path": "d", "name": ""}, "settings": {"pixels": True} if pixels_vote else {}}
    result = {"protocol": "finetune", "labels": 50, "seeds": 2, "test": "t", "metric": "top1", "loss": None}
    result |= {"mean": {"top1": score}, "interval": {"top1": 0.1}, "per_seed": each, "conditions": conditions}
    _print(result | {"references": {"raw pixels, linear": {"mean": {"top1": 0.505}}}}, beside)
    assert ("config.finetune.pixels=True" in capsys.readouterr().out) == told
