"""What long fine-tuning takes: layer decay, averages, clipping, drop path, lazy images; and that off is as before."""

import dataclasses
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_evaluate_finetune import SETTINGS
from toy_encoder import NETWORK, TRACES, toy_encoder, toy_images

from ssl_jax.augment import make_views, resolve_views
from ssl_jax.config import Finetune, Model
from ssl_jax.data import Source
from ssl_jax.data.feed import ahead
from ssl_jax.data.source import LazyImages
from ssl_jax.encoder import random_encoder
from ssl_jax.errors import UserError
from ssl_jax.evaluate import finetune, finetuning, saved
from ssl_jax.evaluate.finetuning import task_of
from ssl_jax.evaluate.selftraining import Unlabelled, train_classifier
from ssl_jax.evaluate.tuning_step import How, _adamw, rates, take_step
from ssl_jax.losses import cross_entropy
from ssl_jax.transforms import layers, matrices

EVERYTHING = dataclasses.replace(
    SETTINGS, layer_decay=0.7, warmup=0.2, clip_norm=1.0, label_smoothing=0.1, mixup=0.8, cutmix=1.0, ema=0.9
)
VIT = Model(name="vit_tiny", depth=2, width=0.25, patch=4)
COLOURED = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 3), dtype=np.uint8)


def leaves(classifier):
    return [np.asarray(x) for x in jax.tree.leaves((classifier.params, classifier.stats))]


def test_switched_off_it_is_what_it_was():
    """Against the loop as it was before there were these options: the same bits."""
    images, labels = toy_images(40)
    settings = dataclasses.replace(SETTINGS, steps=8, batch=16, head="zero", backbone_ratio=(0.3,))
    made = finetune(toy_encoder(), images, labels, classes=3, settings=settings, seed=4)
    views = make_views(resolve_views(settings.augment, 1, 8))

    def adamw(lr):
        parts = {"encoder": lr * np.float32(0.3), "head": lr}
        parts = {k: optax.adamw(v, weight_decay=np.float32(1e-2), mask=matrices) for k, v in parts.items()}
        return optax.partition(parts, {"encoder": "encoder", "head": "head"})

    @jax.jit
    def step(state, x, y, number, lr):
        params, stats, moments = state
        key = jax.random.fold_in(jax.random.key(4), number)

        def loss(params):
            y_hat, new = NETWORK.apply(params["encoder"], stats, views(key, x)[0][0], train=True)
            return cross_entropy(y_hat @ params["head"]["w"] + params["head"]["b"], y), new

        (_, new), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, moments = adamw(lr).update(grads, moments, params)
        return optax.apply_updates(params, updates), new, moments

    start = toy_encoder()
    params = {"encoder": start.params, "head": {"w": np.zeros((12, 3), np.float32), "b": np.zeros(3, np.float32)}}
    state = params, start.stats, adamw(0.0).init(params)
    rng = np.random.default_rng(4)
    order = np.concatenate([rng.permutation(40) for _ in range(4)])
    for number in range(8):
        rows = order[16 * number : 16 * number + 16]
        lr = np.float32(0.01 * 1.0 * (1 + np.cos(np.pi * number / 8)) / 2)
        state = step(state, images[rows], labels[rows], np.int32(number), lr)
    for want, found in zip(jax.tree.leaves(state[:2]), leaves(made), strict=True):
        np.testing.assert_array_equal(want, found)


def test_options_that_are_off_are_not_mentioned():
    assert not {"layer_decay", "ema", "mixup", "warmup", "drop_path", "pixels"} & set(Finetune().inputs())
    told = Finetune(ema=0.99, warmup=0.1).inputs()
    assert told["ema"] == 0.99 and told["warmup"] == 0.1 and "mixup" not in told


def test_one_compiled_step_serves_every_pair_with_everything_on():
    images, labels = toy_images()
    settings = dataclasses.replace(EVERYTHING, steps=3, batch=24)
    finetune(toy_encoder(), images, labels, classes=3, settings=settings, seed=0)
    TRACES.clear()
    varied = dataclasses.replace(settings, lr=(0.1, 0.2), backbone_ratio=(0.1, 1.0), weight_decay=0.3, steps=5)
    for count, seed in ((5, 1), (70, 3)):
        made = finetune(toy_encoder(seed), images[:count], labels[:count], classes=3, settings=varied, seed=seed)
        assert len(made.chosen["trials"]) == 4
    assert TRACES == []


def tuned(seed):
    images, labels = toy_images(32)
    settings = dataclasses.replace(EVERYTHING, steps=2, batch=8, head="zero")
    return leaves(finetune(toy_encoder(), images, labels, classes=3, settings=settings, seed=seed))


def test_the_seed_decides():
    once, twice, other = tuned(0), tuned(0), tuned(1)
    assert all((x == y).all() for x, y in zip(once, twice)) and any((x != y).any() for x, y in zip(once, other))


@pytest.mark.slow
def test_jit_changes_nothing():
    jitted = tuned(0)
    with jax.disable_jit():
        plain = tuned(0)
    for x, y in zip(jitted, plain, strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5)


@pytest.mark.parametrize("norm", ["train", "frozen"])
def test_the_average_is_that_of_a_loop(norm):
    images, labels = toy_images(32)
    settings = dataclasses.replace(SETTINGS, steps=9, batch=16, batch_norm=norm)
    options = {"classes": 3, "seed": 0}
    task = task_of(toy_encoder(), images, labels, settings=settings, **options)
    stops = [(k + 1) / 9 for k in range(9)]
    each = [leaves(made) for made in task.fit(task.everything, [(0.01, 1.0)], stops=stops)]
    head = task._initial_head(task.everything)
    start = toy_encoder()
    average = jax.tree.leaves(({"encoder": start.params, "head": head}, start.stats))
    average = [np.asarray(x, np.float64) for x in average]
    for step, model in enumerate(each):
        keep = min(0.4, (1 + step) / (10 + step))
        average = [keep * old + (1 - keep) * new for old, new in zip(average, model, strict=True)]
    made = finetune(toy_encoder(), images, labels, settings=dataclasses.replace(settings, ema=0.4), **options)
    for want, found in zip(average, leaves(made), strict=True):
        np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)
    assert any(np.abs(found - last).max() > 3e-5 for found, last in zip(leaves(made), each[-1]))


def test_layers_move_by_their_share():
    """Adam's first step is the learning rate times the sign of the gradient, whatever the gradient."""
    encoder = random_encoder(VIT, 8, 3, seed=0)
    settings = dataclasses.replace(SETTINGS, steps=1, batch=24, weight_decay=0.0, layer_decay=0.5, lr=(1e-3,))
    made = finetune(encoder, COLOURED, np.arange(24) % 2, classes=2, settings=settings, seed=0)
    places, last = layers(encoder.params)
    assert last == 3 and {places[name] for name in encoder.params} == {0, 1, 2, 3}
    for name, place in places.items():
        pairs = zip(jax.tree.leaves(encoder.params[name]), jax.tree.leaves(made.params["encoder"][name]))
        moved = np.concatenate([np.abs(np.asarray(b) - np.asarray(a)).ravel() for a, b in pairs])
        np.testing.assert_allclose(np.median(moved[moved > 0]), 1e-3 * 0.5 ** (3 - place), rtol=0.02)
    assert np.abs(made.params["head"]["b"]).max() > 0


def test_clipping_comes_before_adam():
    params = {"encoder": {"w": jnp.ones((2, 2))}, "head": {"w": jnp.ones((2, 3)), "b": jnp.zeros(3)}}
    rng = np.random.default_rng(0)
    clipped, plain = (_adamw(0.1, 1.0, 0.0, How(lambda: None, clip_norm=norm)) for norm in (1.0, 0.0))
    one, other = clipped.init(params), plain.init(params)
    for size in (10.0, 1.0, 0.1):
        grads = jax.tree.map(lambda p, size=size: (size * rng.normal(size=p.shape)).astype(np.float32), params)
        norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(grads)))
        ours, one = clipped.update(grads, one, params)
        theirs, other = plain.update(jax.tree.map(lambda g, n=norm: g / np.float32(max(n, 1.0)), grads), other, params)
        for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5)


def test_the_warm_up_lasts_for_its_share():
    made = rates(1.0, 100, 0.2)
    assert made.argmax() == 19 and made[9] == pytest.approx(0.5 * (1 + np.cos(np.pi * 0.09)) / 2)
    np.testing.assert_array_equal(rates(1.0, 100, 0.0), (1 + np.cos(np.pi * np.arange(100) / 100)).astype("f4") / 2)


def test_drop_path_is_chosen_for_fine_tuning():
    settings = Finetune(steps=2, batch=8, epochs=0, lr=(1e-3,))
    labels = np.arange(24) % 2

    def dropping(model, **how):
        encoder = random_encoder(model, 8, 3, seed=0)
        return finetune(encoder, COLOURED, labels, classes=2, settings=dataclasses.replace(settings, **how), seed=0)

    given, own = dropping(VIT, drop_path=0.5), dropping(dataclasses.replace(VIT, drop_path=0.5))
    assert all((x == y).all() for x, y in zip(leaves(given), leaves(own), strict=True))
    assert given.encoder.about["model"]["drop_path"] == 0  # it loads as the encoder did
    with pytest.raises(UserError, match=r"^config.finetune.drop_path=0.1: .* allowed for other networks: 0$"):
        dropping(Model(name="resnet_thin"), drop_path=0.1)
    with pytest.raises(UserError, match=r"^config.finetune.drop_path=0.1: batch_norm=frozen .* allowed with it: 0$"):
        dropping(VIT, drop_path=0.1, batch_norm="frozen")


def lazy(images, broken=-1):
    """(the images as LazyImages, (number of images, thread) of each time that a batch was asked for)."""

    def load(index):
        if index == broken:
            raise UserError("17.png: cannot be read")
        return images[index]

    asked = []

    class Watched(LazyImages):
        def __getitem__(self, rows):
            if isinstance(rows, np.ndarray):
                asked.append((len(rows), threading.current_thread()))
            return super().__getitem__(rows)

    return Watched(Source([str(i) for i in range(len(images))], images.shape[1:], load)), asked


@pytest.mark.parametrize("how", [{}, {"pixels": True, "lr": (1e-3, 1e-2)}])
def test_lazy_images_give_the_same_model(how):
    images, labels = toy_images()
    settings = dataclasses.replace(SETTINGS, steps=6, batch=16, **how)
    on_demand, asked = lazy(images)
    one, other = (finetune(toy_encoder(), x, labels, classes=3, settings=settings, seed=0) for x in (images, on_demand))
    assert all((x == y).all() for x, y in zip(leaves(one), leaves(other), strict=True)) and one.chosen == other.chosen
    elsewhere = [count for count, thread in asked if thread is not threading.main_thread()]
    assert elsewhere == [16] * (6 * (1 + 2 * bool(how)))  # the batches of training, decoded ahead


def test_a_lazy_image_that_cannot_be_read_ends_the_training():
    images, labels = toy_images()
    settings = dataclasses.replace(SETTINGS, steps=20, batch=16, head="zero")
    with pytest.raises(UserError, match=r"^17.png: cannot be read$"):
        finetune(toy_encoder(), lazy(images, broken=17)[0], labels, classes=3, settings=settings, seed=0)


def test_ahead_is_one_ahead():
    asked = []
    made = ahead(lambda step: asked.append(step) or step, 4)
    assert next(made) == 0
    while len(asked) < 2:
        pass
    assert asked == [0, 1] and list(made) == [1, 2, 3] and asked == [0, 1, 2, 3] and list(ahead(int, 0)) == []


@pytest.mark.parametrize(
    "settings",
    [
        EVERYTHING,
        dataclasses.replace(SETTINGS, unlabelled="all", unlabelled_batch=32, batch_norm="train"),
        dataclasses.replace(SETTINGS, unlabelled="all", unlabelled_batch=32, consistency=True, confidence=0.4),
    ],
    ids=["everything", "taught", "consistent"],
)
def test_four_devices_train_what_one_does(settings, monkeypatch):
    settings = dataclasses.replace(settings, steps=6, batch=16, lr=(1e-3,), backbone_ratio=(1.0,))
    (images, labels), (pool, _), used = toy_images(40), toy_images(64, seed=5), []
    options = {"classes": 3, "settings": settings, "seed": 4}

    def spied(state, data, *more):
        used.append({len(part.sharding.device_set) for part in data if isinstance(part, jax.Array)})
        return take_step(state, data, *more)

    monkeypatch.setattr(finetuning, "take_step", spied)
    made = []
    for share in (32, 4):
        monkeypatch.setattr(finetuning, "SHARE", share)
        classifier = train_classifier(toy_encoder(), images, labels, Unlabelled(pool), **options)
        made.append(classifier.logits(images))
    assert used[0] == set() and used[-1] == {4}
    np.testing.assert_allclose(made[0], made[1], atol=1e-4)


def test_a_killed_training_goes_on_bit_identically(tmp_path, monkeypatch, capsys):
    """With two learning rates: the training that had ended is not repeated, and no other labels go on from it."""
    monkeypatch.setattr(saved, "SECONDS", 0.0)
    monkeypatch.setattr(saved, "SHARE", np.inf)
    settings = dataclasses.replace(EVERYTHING, mixup=0.0, cutmix=0.0, steps=6, batch=16, lr=(1e-3, 1e-2))
    (images, labels), taken = toy_images(40), []
    options = {"classes": 3, "settings": settings, "seed": 4}
    whole = finetune(toy_encoder(), images, labels, **options)

    def counted(*args):
        taken.append(int(args[3]))
        if len(taken) == killed_at:
            raise KeyboardInterrupt
        return take_step(*args)

    monkeypatch.setattr(finetuning, "take_step", counted)
    killed_at = 10
    with pytest.raises(KeyboardInterrupt):
        finetune(toy_encoder(), images, labels, **options, saved=tmp_path)
    killed_at = 0
    again = finetune(toy_encoder(), images, labels, **options, saved=tmp_path)
    assert taken == [*range(6), *range(4), *range(3, 6), *range(6)]
    assert "fine-tuning goes on after step 3 of 6" in capsys.readouterr().out
    for want, found in zip(leaves(whole), leaves(again), strict=True):
        np.testing.assert_array_equal(want, found)
    np.testing.assert_array_equal(whole.losses, again.losses)
    assert whole.chosen == again.chosen
    taken.clear()
    finetune(toy_encoder(), images, labels[::-1].copy(), **options, saved=tmp_path)
    assert len(taken) == 18
