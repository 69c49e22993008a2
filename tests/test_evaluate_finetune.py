"""Fine-tuning: it learns, repeats itself, compiles once and leaves alone what is frozen."""

import dataclasses

import jax
import numpy as np
import pytest
from toy_encoder import TRACES, WIDTH, toy_encoder, toy_images

from ssl_jax.config import Augment, Finetune
from ssl_jax.errors import UserError
from ssl_jax.evaluate import finetune, predict

SETTINGS = Finetune(steps=60, epochs=0, batch=32, lr=(0.01,), augment=Augment(preset="none", override={"flip": 0.5}))


def _leaves(classifier):
    return [np.asarray(x) for x in jax.tree.leaves((classifier.params, classifier.stats))]


def _accuracy(classifier, seed=7):
    images, labels = toy_images(300, seed=seed)
    return (predict(classifier, images).argmax(1) == labels).mean()


@pytest.mark.parametrize("head", ["probe", "zero"])
@pytest.mark.parametrize("count", [12, 90])  # fewer than a batch, and more
def test_it_learns(count, head):
    images, labels = toy_images(count)
    settings = dataclasses.replace(SETTINGS, head=head)
    made = finetune(toy_encoder(), images, labels, classes=3, settings=settings, seed=0)
    assert _accuracy(made) > 0.8
    assert made.params["head"]["w"].shape == (WIDTH, 3) and "validation" not in made.chosen
    start = toy_encoder()
    assert not np.allclose(start.params["w"], made.params["encoder"]["w"])  # the backbone moved
    assert not np.allclose(start.stats["mean"], made.stats["mean"])


def test_the_same_seed_gives_the_same_model_and_another_seed_another():
    images, labels = toy_images()
    a, b, c = (finetune(toy_encoder(), images, labels, classes=3, settings=SETTINGS, seed=s) for s in (1, 1, 2))
    assert all((x == y).all() for x, y in zip(_leaves(a), _leaves(b), strict=True))
    assert any((x != y).any() for x, y in zip(_leaves(a), _leaves(c), strict=True))


def test_frozen_batch_norm_keeps_its_statistics():
    images, labels = toy_images()
    settings = dataclasses.replace(SETTINGS, batch_norm="frozen")
    made = finetune(toy_encoder(), images, labels, classes=3, settings=settings, seed=0)
    for before, after in zip(jax.tree.leaves(toy_encoder().stats), jax.tree.leaves(made.stats), strict=True):
        np.testing.assert_array_equal(before, after)
    assert not np.allclose(toy_encoder().params["w"], made.params["encoder"]["w"])


def test_a_backbone_ratio_of_zero_trains_the_head_alone():
    images, labels = toy_images()
    settings = dataclasses.replace(SETTINGS, backbone_ratio=(0.0,), batch_norm="frozen", head="zero")
    made = finetune(toy_encoder(), images, labels, classes=3, settings=settings, seed=0)
    np.testing.assert_array_equal(toy_encoder().params["w"], made.params["encoder"]["w"])
    assert np.abs(made.params["head"]["w"]).max() > 0


def test_one_step_is_that_of_adamw():
    images, labels = toy_images(32)
    settings = dataclasses.replace(SETTINGS, steps=1, head="zero", weight_decay=0.5, augment=Augment(preset="none"))
    start = toy_encoder()
    made = finetune(start, images, labels, classes=3, settings=settings, seed=0)
    moved = made.params["encoder"]
    # The head is zero, so no gradient reaches the backbone: decay alone moves its matrix, and nothing its vector.
    np.testing.assert_allclose(moved["w"], start.params["w"] * (1 - 0.01 * 0.5), rtol=1e-6)
    np.testing.assert_array_equal(moved["scale"], start.params["scale"])
    # Adam's first step is the learning rate times the sign of the gradient.
    sizes = np.abs(made.params["head"]["w"])
    np.testing.assert_allclose(sizes[sizes > 1e-3], 0.01, rtol=1e-3)


def test_the_longer_of_steps_and_epochs():
    images, labels = toy_images(32)
    by_steps = dataclasses.replace(SETTINGS, steps=6, batch=16)
    by_epochs = dataclasses.replace(SETTINGS, steps=2, epochs=3, batch=16)  # 3 passes over 32 images: 6 steps of 16
    one, other = (finetune(toy_encoder(), images, labels, classes=3, settings=s, seed=0) for s in (by_steps, by_epochs))
    np.testing.assert_array_equal(one.params["encoder"]["w"], other.params["encoder"]["w"])


def test_hyper_parameters_are_chosen_on_held_out_labels():
    images, labels = toy_images()
    settings = dataclasses.replace(SETTINGS, lr=(1e-7, 0.01), backbone_ratio=(0.1, 1.0), head="zero")
    made = finetune(toy_encoder(), images, labels, classes=3, settings=settings, seed=0)
    assert made.chosen["lr"] == 0.01 and len(made.chosen["trials"]) == 4
    assert made.chosen["validation"] == max(t["validation"] for t in made.chosen["trials"])
    # The final model is the one trained on all labels with the chosen pair, as if nothing had been chosen.
    alone = dataclasses.replace(settings, lr=(0.01,), backbone_ratio=(made.chosen["backbone_ratio"],))
    again = finetune(toy_encoder(), images, labels, classes=3, settings=alone, seed=0)
    assert all((x == y).all() for x, y in zip(_leaves(made), _leaves(again), strict=True))


@pytest.mark.parametrize("head", ["probe", "zero"])
def test_everything_compiles_once(head):
    images, labels = toy_images()
    settings = dataclasses.replace(SETTINGS, steps=3, batch=16, head=head)  # a batch that no other test has
    finetune(toy_encoder(), images, labels, classes=3, settings=settings, seed=0)
    TRACES.clear()
    varied = dataclasses.replace(settings, lr=(0.1, 0.2), backbone_ratio=(0.1, 1.0), weight_decay=0.3, steps=5)
    for count, seed in ((5, 1), (12, 2), (70, 3)):
        made = finetune(toy_encoder(seed), images[:count], labels[:count], classes=3, settings=varied, seed=seed)
        predict(made, images[:count])
    assert TRACES == []


def test_mistakes_are_told():
    images, labels = toy_images(20)
    cases = [
        (images, labels[:5], SETTINGS, "5 for 20 images"),
        (images, labels - 1, SETTINGS, "labels: -1; allowed: 0 to 2"),
        (np.repeat(images, 3, axis=-1), labels, SETTINGS, "3 channels; allowed: 1"),
        (images, labels, dataclasses.replace(SETTINGS, lr=()), "lr or backbone_ratio is empty"),
        (images, labels, dataclasses.replace(SETTINGS, lr=(1e38, 1e37)), "training diverged"),
    ]
    for x, y, settings, message in cases:
        with pytest.raises(UserError, match=message):
            finetune(toy_encoder(), x, y, classes=3, settings=settings, seed=0)
