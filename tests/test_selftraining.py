"""Self-training: its losses, no gradient into the teacher, and images without a label that help."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from scipy.special import expit, log_expit, log_softmax, logit, softmax
from toy_encoder import toy_encoder, toy_images
from toy_study import toy_config, toy_run, toy_sources

from ssl_jax import study as studies
from ssl_jax.config import Augment, Data, Finetune, default, resolve
from ssl_jax.data.arrays import from_array
from ssl_jax.data.source import LazyImages, Source
from ssl_jax.errors import UserError
from ssl_jax.evaluate import finetune, holdout, self_train, selftraining
from ssl_jax.evaluate.finetuning import trainings
from ssl_jax.evaluate.propagation import Neighbourhood
from ssl_jax.evaluate.selftraining import Unlabelled, train_classifier

FLIP = Augment(preset="none", override={"flip": 0.5})
STRONG = Augment(preset="none", override={"flip": 0.5, "jitter_prob": 1.0, "brightness": 0.4})
SETTINGS = Finetune(steps=60, epochs=0, batch=16, lr=(0.01,), augment=FLIP, unlabelled="all", strong=STRONG)


def soft_by_hand(student, teacher, temperature, several):
    s, t = student / temperature, teacher / temperature
    if several:
        return -np.mean([p * log_expit(z) + (1 - p) * log_expit(-z) for z, p in zip(s.ravel(), expit(t).ravel())])
    return np.mean([-(softmax(b) * log_softmax(a)).sum() for a, b in zip(s, t, strict=True)])


def agreement_by_hand(strong, weak, confidence, several):
    terms, limits = [], np.broadcast_to(confidence, strong.shape)
    if several:
        for z, p, limit in zip(strong.ravel(), expit(weak).ravel(), limits.ravel(), strict=True):
            terms.append(-log_expit(z) if p >= limit else -log_expit(-z) if 1 - p >= limit else 0)
    else:
        for z, p, limit in zip(strong, softmax(weak, axis=1), limits, strict=True):
            terms.append(-log_softmax(z)[p.argmax()] if p.max() >= limit[p.argmax()] else 0)
    return np.mean(terms)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize(
    ("loss", "by_hand", "number"),
    [
        (selftraining.distillation, soft_by_hand, 0.4),
        (selftraining.agreement, agreement_by_hand, 0.7),
        (selftraining.agreement, agreement_by_hand, np.array([0.95, 0.6, 0.7, 0.5])),
    ],
)
def test_value_and_gradient_equal_loops_and_nothing_reaches_the_teacher(loss, by_hand, number, several):
    student, teacher = np.random.default_rng(0).normal(size=(2, 6, 4)) * 2
    with jax.enable_x64(True):
        compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), static_argnums=3)
        value, (own, other) = compiled(student, teacher, number, several)
    np.testing.assert_allclose(value, by_hand(student, teacher, number, several), rtol=1e-12)
    np.testing.assert_array_equal(other, 0)
    step, numeric = 1e-5, np.zeros_like(student)
    for place in np.ndindex(student.shape):
        up, down = student.copy(), student.copy()
        up[place] += step
        down[place] -= step
        numeric[place] = (by_hand(up, teacher, number, several) - by_hand(down, teacher, number, several)) / (2 * step)
    np.testing.assert_allclose(own, numeric, rtol=1e-6, atol=1e-9)
    assert value > 0


def taught(settings, *, several=False, count=9, seed=1, pool=None):
    """(teacher, student) of 9 labelled images and 400 others."""
    images, labels = toy_images(count, seed=seed + 20)
    labels = np.eye(3, dtype=np.float32)[labels] if several else labels
    pool = toy_images(400, seed=5)[0] if pool is None else pool
    teacher = finetune(toy_encoder(), images, labels, classes=3, settings=settings, seed=seed)
    return teacher, self_train(teacher, toy_encoder(), images, labels, pool, classes=3, settings=settings, seed=seed)


def accuracy(classifier):
    images, labels = toy_images(300, seed=7)
    return (classifier.logits(images).argmax(axis=1) == labels).mean()


def same(a, b):
    leaves = (jax.tree.leaves((made.params, made.stats, made.losses)) for made in (a, b))
    return all(np.array_equal(x, y) for x, y in zip(*leaves, strict=True))


CONSISTENCY = {"consistency": True, "confidence": 0.8}


@pytest.mark.parametrize(
    ("changes", "several"),
    [
        ({}, False),
        (CONSISTENCY, True),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (({}, True), (CONSISTENCY, False))),
    ],
)
def test_images_without_a_label_help_and_a_student_repeats_itself(changes, several):
    settings = dataclasses.replace(SETTINGS, **changes)
    pairs = [taught(settings, several=several, seed=seed) for seed in (0, 1, 2)]
    before, after = np.array([[accuracy(made) for made in pair] for pair in pairs]).T
    assert (after > before).all() and (after - before).mean() > 0.01, (before, after)
    student = pairs[1][1]
    source = from_array(toy_images(400, seed=5)[0], None, [], Data(name="npz"), "here")
    assert same(student, taught(settings, several=several, pool=source)[1])  # decoded batch by batch, it is the same
    assert not same(student, taught(settings, several=several, pool=toy_images(400, seed=6)[0])[1])


def test_a_share_of_zero_is_no_self_training():
    settings = dataclasses.replace(SETTINGS, unlabelled_weight=0.0, batch_norm="frozen", augment=Augment(preset="none"))
    teacher, student = taught(settings)
    np.testing.assert_allclose(student.params["head"]["w"], teacher.params["head"]["w"], atol=1e-4)


def test_teacher_and_student_are_compared_on_the_labels_held_out(monkeypatch):
    settings = dataclasses.replace(SETTINGS, lr=(1e-3, 0.01))
    teacher, student = taught(settings, count=30)
    _, held = holdout(toy_images(30, seed=21)[1], settings.validation, 1)
    assert student.chosen["student"] and student.chosen["validation"] == student.chosen["student_validation"]
    assert student.chosen["teacher_validation"] == teacher.chosen["validation"]
    assert student.held_out[0].shape == (len(held), 3) and not np.array_equal(student.held_out[0], teacher.held_out[0])
    assert student.chosen["lr"] == teacher.chosen["lr"]
    # It stops where a student without these labels was best on them.
    assert len(student.losses) == round(student.chosen["stop"] * settings.steps)
    # Taught nonsense, the student is worse, and the teacher is kept.
    original = selftraining._lessons
    monkeypatch.setattr(selftraining, "_lessons", lambda targets, *more: original(-9 * targets, *more))
    teacher, kept = taught(dataclasses.replace(settings, unlabelled_weight=0.99), count=30)
    assert same(teacher, kept) and not kept.chosen["student"]
    np.testing.assert_array_equal(kept.held_out[0], teacher.held_out[0])


@pytest.mark.parametrize("several", [False, True])
def test_labels_spread_over_the_graph_teach_without_a_classifier(several, monkeypatch):
    """With learning rates to choose, there is a classifier to compare with; with one, none is trained."""
    settings = dataclasses.replace(SETTINGS, steps=6, teacher="propagated")
    (images, labels), (pool, _) = toy_images(9), toy_images(60, seed=5)
    labels = np.eye(3, dtype=np.float32)[labels] if several else labels
    embedded = [toy_encoder().embed(x) for x in (images, pool)]
    shares = np.clip(Neighbourhood(embedded[1]).spread(embedded[0], labels, 3), 1e-6, 1 - 1e-6)
    seen, original = [], selftraining._lessons
    monkeypatch.setattr(
        selftraining, "_lessons", lambda targets, *more: seen.append(targets) or original(targets, *more)
    )
    options = {"classes": 3, "settings": settings, "seed": 0}
    with monkeypatch.context() as patch:
        patch.setattr(selftraining, "finetune", None)
        student = train_classifier(toy_encoder(), images, labels, Unlabelled(pool), **options)
    np.testing.assert_allclose(seen[0], (logit if several else np.log)(shares), rtol=1e-3)
    assert student.chosen == {"lr": 0.01, "backbone_ratio": 1.0, "student": True} and len(seen) == 1
    options["settings"] = dataclasses.replace(settings, lr=(1e-3, 0.01))
    chosen = train_classifier(toy_encoder(), images, labels, Unlabelled(pool), **options).chosen
    assert {"teacher_validation", "student_validation", "trials"} <= set(chosen)
    assert len(seen) == (3 if chosen["student"] else 2)


@pytest.mark.parametrize("lr", [(0.01,), (1e-3, 0.01)])
@pytest.mark.parametrize("learning", [{"unlabelled": "none"}, {"teacher": "finetuned"}, {"teacher": "propagated"}])
def test_every_step_is_watched_and_trainings_are_counted(lr, learning, monkeypatch):
    settings = dataclasses.replace(SETTINGS, steps=4, lr=lr, **learning)
    monkeypatch.setattr(selftraining, "STOPS", (1.0,))
    monkeypatch.setattr(selftraining, "selection_score", lambda *_: (1.0, 0.0))  # so that every student is kept
    (images, labels), (pool, _), shares = toy_images(30), toy_images(40, seed=5), []
    options = {"classes": 3, "settings": settings, "seed": 1, "watch": shares.append}
    train_classifier(toy_encoder(), images, labels, Unlabelled(pool), **options)
    assert shares == [0.25, 0.5, 0.75, 1] * sum(trainings(settings))


def test_a_student_stops_where_it_was_best_on_the_labels_held_out(monkeypatch):
    settings = dataclasses.replace(SETTINGS, steps=8, lr=(1e-3, 0.01))
    images, labels = toy_images(30, seed=21)
    options = {"classes": 3, "settings": settings, "seed": 1}
    teacher = finetune(toy_encoder(), images, labels, **options)
    scores = iter([(0.2, 0.0), (0.3, 0.1), (0.3, 0.2), (0.3, 0.1), (0.1, 0.0)])  # of four students and of the teacher
    monkeypatch.setattr(selftraining, "selection_score", lambda *_: next(scores))
    student = self_train(teacher, toy_encoder(), images, labels, toy_images(40, seed=5)[0], **options)
    assert student.chosen["stop"] == 0.75 and len(student.losses) == 6
    assert (student.chosen["validation"], student.chosen["teacher_validation"]) == (0.3, 0.1)


def test_alignment_gives_classes_the_shares_of_the_labels():
    logits = np.random.default_rng(0).normal(size=(2000, 3)) + [2, 0, 0]
    labels = np.repeat([0, 1, 2], [10, 20, 70])
    aligned = softmax(logits + selftraining._alignment(logits, labels, True), axis=1).mean(axis=0)
    before = softmax(logits, axis=1).mean(axis=0)
    assert np.abs(aligned - [0.1, 0.2, 0.7]).sum() < 0.3 * np.abs(before - [0.1, 0.2, 0.7]).sum()
    # A class without a label is not answered; the others become equally frequent.
    equal = softmax(logits + selftraining._alignment(logits, labels[labels != 2], "equal"), axis=1).mean(axis=0)
    assert abs(equal[0] - equal[1]) < 0.4 * abs(before[0] - before[1]) and equal[2] < 1e-4
    with pytest.raises(UserError, match="align='equal': with several labels per image; allowed: False or True"):
        selftraining._alignment(logits, np.eye(3)[labels], "equal")
    several = (np.random.default_rng(1).random((100, 3)) < [0.1, 0.2, 0.7]).astype(float)
    aligned = expit(logits + selftraining._alignment(logits, several, True)).mean(axis=0)
    assert np.abs(aligned - several.mean(axis=0)).max() < 0.1


def test_less_is_asked_of_classes_of_which_the_teacher_is_seldom_sure():
    sure, unsure = 5 * np.eye(3), np.eye(3)  # probabilities of 0.987 and 0.576
    logits = np.concatenate([sure[[0] * 8 + [1] * 4], unsure[[0, 1, 2, 2]]])
    np.testing.assert_allclose(selftraining.thresholds(logits, 0.9, False), [0.9, 0.9 / 3, 0], rtol=1e-6)
    np.testing.assert_allclose(selftraining.thresholds(unsure, 0.9, False), 0.9, rtol=1e-6)  # equally seldom
    several = np.array([[9, -9, 0], [9, 0, 0], [-9, 0, 0], [-9, 9, 9]])
    np.testing.assert_allclose(selftraining.thresholds(several, 0.9, True), [0.9, 0.9 / 3, 0.9 / 7], rtol=1e-6)


def test_mistakes():
    images = toy_images(5)[0]
    for pool, message in (
        (images[:0], "config.finetune.unlabelled=all: there is no image without a label; allowed: at least one"),
        (images[:, :6], r"unlabelled images: height, width, channels \(6, 8, 1\); allowed: \(8, 8, 1\)"),
    ):
        with pytest.raises(UserError, match=message):
            taught(dataclasses.replace(SETTINGS, steps=1), pool=pool)


def test_an_arm_of_a_study_learns_from_all_training_images(tmp_path, monkeypatch):
    monkeypatch.setattr(studies, "_references", lambda *_: [])
    pools, original = [], selftraining._lessons
    monkeypatch.setattr(
        selftraining, "_lessons", lambda targets, *more: pools.append(len(targets)) or original(targets, *more)
    )
    good = {"train": {"seed": 1}}
    arms = {"scratch": {}, "good": good, "both": {**good, "finetune": {"unlabelled": "all"}, "select": "typical"}}
    tuning = {"steps": 3, "epochs": 0, "lr": (0.01,)}
    changes = {"arms": arms, "labels": (6, 30), "seeds": 1, "finetune": tuning}

    def lines(**other):
        return toy_run(toy_config(**{**changes, **other}), tmp_path, part=(1, 1), **sources)[1]

    sources = {}
    lines(arms={name: arms[name] for name in ("scratch", "good")})
    again = lines()
    assert [line.endswith("(reused)") for line in again] == ["both" not in line for line in again]  # keys are as before
    assert pools == [120, 120]
    chosen = json.loads((tmp_path / "cells/both/30/0.json").read_text())["chosen"]
    assert chosen["student"] and "teacher_validation" not in chosen  # a single pair: nothing was held out
    assert all("(reused)" in line for line in lines())
    # Another image in the place of one that was never drawn changes the cells of this arm, and no other.
    train, _ = toy_sources()
    drawn = [np.load(path)["indices"] for path in tmp_path.glob("cells/*/*/*.npz")]
    images = train.arrays().copy()
    images[np.setdiff1d(np.arange(120), np.concatenate(drawn))[0], 0, 0] += 1
    options = {"labels": train.labels, "classes": train.classes, "array": images}
    sources["train"] = Source(train.names, train.shape, images.__getitem__, **options)
    changed = [line for line in lines() if "(reused)" not in line]
    assert changed and all("both" in line for line in changed) and pools[2:] == [120, 120]


def test_the_finetune_command_finds_the_images(tmp_path):
    images, _ = toy_images(10)
    np.savez(tmp_path / "more.npz", images=images)
    config = dataclasses.replace(resolve(default("simclr")), data=Data())
    found = selftraining.unlabelled_of(toy_encoder(), config, str(tmp_path / "more.npz"))
    np.testing.assert_array_equal(found.images, images)
    source = from_array(images, None, [], Data(name="npz"), "here")
    source.memory_gb, source._array = 0, None
    on_disk = selftraining.Unlabelled(source)
    np.testing.assert_array_equal(on_disk.images[[0, 2]], images[[0, 2]])
    assert isinstance(on_disk.images, LazyImages)
    assert on_disk.digest != found.digest
    with pytest.raises(UserError, match="--unlabelled: missing; config.finetune.unlabelled=all needs it"):
        selftraining.unlabelled_of(toy_encoder(), config, "")
    with pytest.raises(UserError, match="--unlabelled=nowhere: not found"):
        selftraining.unlabelled_of(toy_encoder(), config, "nowhere")
