"""Fine-tuning: it learns, repeats itself, compiles once and leaves alone what is frozen."""

import dataclasses

import jax
import numpy as np
import pytest
from toy_encoder import TRACES, WIDTH, toy_encoder, toy_images

from ssl_jax.config import Augment, Finetune
from ssl_jax.errors import UserError
from ssl_jax.evaluate import finetune, holdout, metrics
from ssl_jax.evaluate.finetuning import balance

SETTINGS = Finetune(steps=60, epochs=0, batch=32, lr=(0.01,), augment=Augment(preset="none", override={"flip": 0.5}))


def _leaves(classifier):
    return [np.asarray(x) for x in jax.tree.leaves((classifier.params, classifier.stats))]


def _accuracy(classifier, seed=7):
    images, labels = toy_images(300, seed=seed)
    return (classifier.logits(images).argmax(1) == labels).mean()


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
        made.logits(images[:count], fixed=True)
    assert TRACES == []


def several(n=90, seed=0):
    """The toy images with each class as a label of its own, two more of which nothing and little is known."""
    images, labels = toy_images(n, seed=seed)
    found = (labels[:, None] == np.arange(5)).astype(np.float32)
    found[np.random.default_rng(seed).uniform(size=found.shape) < 0.1] = np.nan
    found[:, 3] = np.nan
    return images, found


def test_several_labels_are_learnt_from_what_is_known():
    images, labels = several()
    settings = dataclasses.replace(SETTINGS, lr=(1e-7, 0.01), head="zero")
    groups = np.arange(90) // 3
    made = finetune(toy_encoder(), images, labels, classes=5, settings=settings, seed=1, groups=groups)
    test_images, test_labels = several(seed=7)
    assert metrics(made.logits(test_images), test_labels, list("abcde"))["macro_auc"] > 0.9
    assert made.params["head"]["w"].shape == (WIDTH, 5) and not made.params["head"]["w"][:, 3].any()
    # Chosen by mean AUC on whole patients.
    held = holdout(labels, 0.2, 1, groups)[1]
    np.testing.assert_array_equal(made.held_out[1], labels[held])
    assert len(groups[held]) == 3 * len(set(groups[held])) and made.chosen["lr"] == 0.01
    judged = metrics(*made.held_out, list("abcde"))["macro_auc"]
    assert made.chosen["validation"] == pytest.approx(judged)


def test_images_of_which_nothing_is_known_change_nothing():
    images, labels = several(32)
    more = np.concatenate([images, images[:5]]), np.concatenate([labels, np.full((5, 5), np.nan, np.float32)])
    how = {"steps": 3, "head": "zero", "batch_norm": "frozen", "augment": Augment(preset="none")}
    made = [
        finetune(toy_encoder(), *data, classes=5, seed=0, settings=dataclasses.replace(SETTINGS, batch=n, **how))
        for n, data in ((32, (images, labels)), (37, more))  # each step sees them all
    ]
    for x, y in zip(*map(_leaves, made), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_balanced_weights_by_hand_and_in_training():
    labels = np.array([[1, 0, np.nan], [0, 0, np.nan], [0, np.nan, np.nan], [0, 0.5, np.nan]], np.float32)
    want = [[4 / 6, 3 / 5, 1], [4 / 2, 3 / 1, 1]]  # known / (2 x absent or present)
    np.testing.assert_allclose(balance(labels, 3), want, rtol=1e-6)
    np.testing.assert_allclose(balance(np.array([0, 0, 2, 0]), 4), [4 / 6, 1, 4 / 2, 1], rtol=1e-6)
    images, one = toy_images(96, weights=[0.8, 0.1, 0.1])
    each = (one[:, None] == np.arange(3)).astype(np.float32)
    settings = dataclasses.replace(SETTINGS, steps=200, head="zero", backbone_ratio=(0.0,), batch_norm="frozen")
    for labels in (one, each):
        rates = []
        for weights in ("none", "balanced"):
            how = dataclasses.replace(settings, class_weights=weights)
            logits = finetune(toy_encoder(), images, labels, classes=3, settings=how, seed=0).logits(images)
            rates.append((logits - logits[:, :1] if labels is one else logits)[:, 1:].mean())
        assert rates[1] > rates[0] + 0.5  # the rare ones are believed sooner


def test_errors():
    images, labels = toy_images(20)
    cases = [
        (images, labels[:5], SETTINGS, "5 for 20 images"),
        (images, labels - 1, SETTINGS, "labels: -1; allowed: 0 to 2"),
        (images, np.full((20, 3), 1.5), SETTINGS, "labels: 1.5; allowed: 0 to 1"),
        (images, np.full((20, 3), np.nan), SETTINGS, "3 columns with at least one known label"),
        (images, np.ones((20, 2)), SETTINGS, "20, 2.; allowed: 3 columns"),
        (np.repeat(images, 3, axis=-1), labels, SETTINGS, "3 channels; allowed: 1"),
        (images, labels, dataclasses.replace(SETTINGS, lr=()), "lr or backbone_ratio is empty"),
        (images, labels, dataclasses.replace(SETTINGS, lr=(1e38, 1e37)), "training diverged"),
    ]
    for x, y, settings, message in cases:
        with pytest.raises(UserError, match=message):
            finetune(toy_encoder(), x, y, classes=3, settings=settings, seed=0)
