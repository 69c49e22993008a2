"""The protocol linear: against loops in NumPy, its grid, its choice, more devices, larger data, kills."""

import dataclasses
import signal
from pathlib import Path

import forked
import jax
import numpy as np
import pytest
from toy_encoder import toy_encoder, toy_images

from ssl_jax import commands, linear_protocol
from ssl_jax.config import Augment, Data, Model, default, resolve
from ssl_jax.data import Source, order
from ssl_jax.data.arrays import from_array
from ssl_jax.data.labelled import Labelled
from ssl_jax.data.source import LazyImages
from ssl_jax.encoder import random_encoder
from ssl_jax.errors import UserError
from ssl_jax.evaluate import saved
from ssl_jax.evaluate.scores import selection_score
from ssl_jax.evaluate.subsets import holdout
from ssl_jax.linear_protocol import run
from ssl_jax.run_folder import named_as_today

NAMES, IMAGES, LABELS = ["a", "b", "c"], *toy_images(90)
TEST = toy_images(30, seed=1)[0]
ENCODER = toy_encoder()
QUICK = {"epochs": 4, "batch": 20, "lr": (3.0,), "augment": Augment(preset="none")}
CONFIG = resolve(default("simclr"))


def config(devices=1, memory_gb=2.0, **changes):
    linear = dataclasses.replace(CONFIG.linear, **{**QUICK, **changes})
    parts = {"data": dataclasses.replace(CONFIG.data, memory_gb=memory_gb), "linear": linear}
    return dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, devices=devices), **parts)


def labelled(rows=slice(None), labels=LABELS):
    source = from_array(IMAGES[rows], labels[rows], NAMES, Data(name="npz"), "here")
    return Labelled(source, source.labels)


def train(folder, given=None, settings=None, encoder=ENCODER, seed=3, classes=3):
    options = {"classes": classes, "seed": seed, "path": Path(folder) / "linear-all", "inputs": {}}
    return linear_protocol.train(encoder, settings or config(), given or labelled(), **options)


def heads_of(trained):
    return jax.tree.map(np.asarray, trained.state["heads"])


def same(a, b, **how):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **how), heads_of(a), heads_of(b))


def by_hand(linear, seed=3):
    """Weights, biases and running statistics in float64, from one image's features and labels after another."""
    x = ENCODER.embed(IMAGES).astype(np.float64)
    heads = run.of_heads.init_state(12, 3, 1, run._spec(linear, 8, 90, linear.batch), seed)["heads"]
    w, b = (np.asarray(heads[name][0], np.float64) for name in "wb")
    moments, mean, var = [np.zeros_like(w), np.zeros_like(b)], np.zeros(12), np.ones(12)
    steps = linear.epochs * (90 // linear.batch)
    for step in range(steps):
        rows = order(seed, 90, linear.batch, step)
        seen = x[rows]
        if linear.batch_norm:
            mean, var = 0.9 * mean + 0.1 * seen.mean(0), 0.9 * var + 0.1 * seen.var(0, ddof=1)
            seen = (seen - seen.mean(0)) / np.sqrt(seen.var(0) + 1e-6)
        logits = seen @ w + b
        odds = np.exp(logits - logits.max(1, keepdims=True))
        wrong = odds / odds.sum(1, keepdims=True) - np.eye(3)[LABELS[rows]]
        grads = [seen.T @ wrong / len(rows), wrong.mean(0)]
        decay, rate = linear.weight_decay[0], linear.lr[0] * linear.batch / 256
        rate *= (1 + np.cos(np.pi * step / steps)) / 2
        if linear.optimizer == "lars":
            grads[0] += decay * w
            grads[0] *= 1e-3 * np.linalg.norm(w) / np.linalg.norm(grads[0])
        else:
            grads = [grads[0] + decay * w, grads[1] + decay * b]
        moments = [linear.momentum * m + g for m, g in zip(moments, grads)]
        used = [g + linear.momentum * m if linear.nesterov else m for g, m in zip(grads, moments)]
        w, b = w - rate * used[0], b - rate * used[1]
    return w, b, mean, var


@pytest.mark.parametrize(
    "changes",
    [
        {"weight_decay": (0.01,)},
        {"nesterov": True, "momentum": 0.8},
        {"optimizer": "lars", "lr": (100.0,), "weight_decay": (0.01,), "batch_norm": True},
    ],
    ids=["sgd", "nesterov", "lars"],
)
def test_it_equals_a_loop_in_numpy(changes, tmp_path):
    settings = config(**changes)
    trained = train(tmp_path, settings=settings)
    w, b, mean, var = by_hand(settings.linear)
    found = heads_of(trained)
    np.testing.assert_allclose(found["w"][0], w, atol=1e-5)
    np.testing.assert_allclose(found["b"][0], b, atol=1e-5)
    x = ENCODER.embed(TEST).astype(np.float64)
    x = (x - mean) / np.sqrt(var + 1e-6) if settings.linear.batch_norm else x
    np.testing.assert_allclose(trained.scores(TEST), x @ w + b, atol=2e-5)
    assert max(np.abs(w).max(), np.abs(b).max()) > 0.05 and trained.chosen == {
        "lr": settings.linear.lr[0],
        "weight_decay": settings.linear.weight_decay[0],
        "batch": 20,
    }


GRID = {"lr": (0.01, 10.0), "weight_decay": (0.0, 0.1), "augment": Augment(preset="crops")}


def test_all_of_a_grid_at_once_equal_each_alone_and_the_best_wins(tmp_path):
    together = train(tmp_path / "all", settings=config(**GRID))
    kept, held = holdout(LABELS, 0.1, 3)
    trials = together.chosen["trials"]
    assert [(t["lr"], t["weight_decay"]) for t in trials] == [(0.01, 0.0), (0.01, 0.1), (10.0, 0.0), (10.0, 0.1)]
    alone = []
    for trial in trials:
        one = config(**GRID | {"lr": (trial["lr"],), "weight_decay": (trial["weight_decay"],)})
        alone.append(train(tmp_path / str(len(alone)), labelled(kept), one))
    scores = [selection_score(each.scores(IMAGES[held]), LABELS[held]) for each in alone]
    np.testing.assert_allclose([t["validation"] for t in trials], [right for right, _ in scores])
    best = max(range(4), key=lambda i: scores[i])
    same(together, alone[best], atol=1e-6)
    assert together.chosen["lr"] == trials[best]["lr"] and together.chosen["validation"] == scores[best][0]
    assert together.chosen["trained_on"] == 81 and scores[best] > scores[0]
    worst = min(range(4), key=lambda i: scores[i])
    assert np.abs(heads_of(alone[best])["w"] - heads_of(alone[worst])["w"]).max() > 0.01


def test_devices_do_not_change_the_result(tmp_path):
    one, four = (train(tmp_path / str(d), settings=config(devices=d, **GRID, batch_norm=True)) for d in (1, 4))
    same(one, four, atol=1e-5)
    assert one.chosen == four.chosen
    np.testing.assert_allclose(one.scores(TEST), four.scores(TEST), atol=1e-4)


def test_a_batch_in_parts_is_the_same_batch(tmp_path, monkeypatch):
    whole = train(tmp_path / "a", settings=config(devices=4, **GRID))
    monkeypatch.setattr(run.of_heads, "PIXELS_ON_CPU", 8 * 8 * 4)  # four images of 8 px, one on each device
    run.of_heads.compiled_step.cache_clear()
    parts = train(tmp_path / "b", settings=config(devices=4, **GRID))
    run.of_heads.compiled_step.cache_clear()
    same(whole, parts, atol=1e-6)


def test_data_larger_than_memory_give_the_same_and_are_never_decoded_at_once(tmp_path, monkeypatch):
    small = train(tmp_path / "small", settings=config(**GRID))
    stored = {str(i): image for i, image in enumerate(IMAGES)}

    def refuse(self, progress=None):
        raise AssertionError("all images at once")

    monkeypatch.setattr(Source, "arrays", refuse)
    options = {"labels": LABELS, "classes": NAMES, "memory_gb": 0.0}
    source = Source(list(stored), (8, 8, 1), lambda i: stored[str(i)], **options)
    large = train(tmp_path / "large", Labelled(source, LABELS), config(memory_gb=0.0, **GRID))
    assert isinstance(source.all_images(), LazyImages)
    same(small, large, atol=0)
    assert small.chosen == large.chosen


def test_crops_of_files(tmp_path):
    """config.data.crops="file": the host cuts them. Without a crop, they are the images themselves."""
    cut = dataclasses.replace(config(), data=dataclasses.replace(CONFIG.data, crops="file"))
    same(train(tmp_path / "square"), train(tmp_path / "file", settings=cut), atol=1e-6)
    crops = dataclasses.replace(cut.linear, augment=Augment(preset="crops"))
    cropped = train(tmp_path / "crops", settings=dataclasses.replace(cut, linear=crops))
    assert not np.allclose(heads_of(cropped)["w"], heads_of(train(tmp_path / "square"))["w"], atol=1e-3)
    warped = dataclasses.replace(cut.linear, augment=Augment(preset="none", override={"rotate": 5.0}))
    with pytest.raises(UserError, match=r"^config.linear.augment.rotate=5.0: allowed with config.data.crops='file': 0"):
        train(tmp_path / "warped", settings=dataclasses.replace(cut, linear=warped))


def test_it_goes_on_after_an_error_bit_identical_and_begins_anew_for_other_labels(tmp_path, monkeypatch, capsys):
    settings = config(**GRID)
    whole = train(tmp_path / "whole", settings=settings)
    monkeypatch.setattr(saved, "SECONDS", 0.0)
    monkeypatch.setattr(saved, "SHARE", np.inf)

    def cut(*args, batches=run.batches):
        for number, batch in enumerate(batches(*args)):
            if number == 7:
                raise KeyboardInterrupt
            yield batch

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run, "batches", cut)
        train(tmp_path / "cut", settings=settings)
    capsys.readouterr()
    same(whole, train(tmp_path / "cut", settings=settings), atol=0)
    assert "linear: goes on after step 7 of 16" in capsys.readouterr().out
    same(whole, train(tmp_path / "cut", settings=settings), atol=0)  # of a later draw that was killed
    assert "after step 16 of 16" in capsys.readouterr().out
    train(tmp_path / "cut", labelled(labels=LABELS[::-1].copy()), settings)
    assert "goes on" not in capsys.readouterr().out
    (file,) = (tmp_path / "cut/heads").iterdir()
    file.write_bytes(file.read_bytes()[:1000])
    same(whole, train(tmp_path / "cut", settings=settings), atol=0)
    assert "damaged (not readable as .npz); training begins anew" in capsys.readouterr().out
    linear_protocol.finished(tmp_path / "cut/linear-all", 4)
    assert not list((tmp_path / "cut/heads").iterdir())


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
import test_linear_protocol as t
t.saved.SECONDS, t.saved.SHARE = 0.0, float("inf")
if sys.argv[3] == "kill":
    def cut(*args, batches=t.run.batches):
        for number, batch in enumerate(batches(*args)):
            if number == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch
    t.run.batches = cut
w = t.heads_of(t.train(sys.argv[1], settings=t.config(**t.GRID)))["w"]
print(w.tobytes().hex())
"""


def test_it_goes_on_after_a_kill(tmp_path):
    ended = []
    for folder, how in (("whole", "no"), ("killed", "kill"), ("killed", "no")):
        process = forked.Python(KILLED, tmp_path / folder, Path(__file__).parent, how)
        ended.append((*process.communicate(), process.returncode))
    whole, killed, again = ended
    assert killed[2] == -signal.SIGKILL and not killed[0] and whole[2] == again[2] == 0
    assert "goes on after step 5" in again[0] and whole[0].split()[-1] == again[0].split()[-1]


def test_features_are_those_of_the_last_blocks(tmp_path):
    encoder = random_encoder(Model(name="vit_tiny", depth=3, width=0.25, patch=4), 8, 1, 0)
    views = IMAGES[:5].astype(np.float32) / 255
    made = encoder.network.apply(encoder.params, encoder.stats, views, train=False, blocks=(0, 1, 2))[0]
    embedding, _, outputs = jax.tree.map(np.asarray, made)
    (_, _), (second, _), (third, patches) = outputs
    mean = patches.mean(axis=(1, 2))
    wanted = {
        (0, False): [embedding],
        (2, False): [second, third],
        (1, True): [third, mean],
        (0, True): [embedding, mean],
    }
    for (blocks, patch), parts in wanted.items():
        spec = run._spec(config(blocks=blocks, patches=patch).linear, 8, 90, 20)
        found = run.of_heads.features_of(encoder.network, encoder.params, encoder.stats, views, spec)
        np.testing.assert_allclose(found, np.concatenate(parts, axis=1), atol=1e-5)
    trained = train(tmp_path, settings=config(blocks=2, patches=True, epochs=1), encoder=encoder)
    assert trained.state["heads"]["w"].shape == (1, 3 * 48, 3)
    with pytest.raises(UserError, match=r"config.linear.blocks=4: the encoder has 3; allowed: 0 to 3"):
        train(tmp_path, settings=config(blocks=4), encoder=encoder)
    with pytest.raises(UserError, match=r"config.linear.patches=True: the encoder is no ViT; allowed: blocks=0"):
        train(tmp_path, settings=config(patches=True))


def test_several_labels_are_chosen_by_their_mean_auc(tmp_path):
    several = np.stack([LABELS == 0, LABELS >= 1], axis=1).astype(np.float32)
    several[::7, 1] = np.nan
    source = from_array(IMAGES, several, ["x", "y"], Data(name="npz"), "here")
    trained = train(tmp_path, Labelled(source, several), config(**GRID), classes=2)
    kept, held = holdout(several, 0.1, 3)
    score, _ = selection_score(trained.scores(IMAGES[held]), several[held])
    assert trained.chosen["validation"] == pytest.approx(score) and trained.chosen["trained_on"] == len(kept)
    assert score > 0.8 and {t["lr"] for t in trained.chosen["trials"]} == {0.01, 10.0}


def test_a_rate_that_diverges_loses_and_alone_is_one_line(tmp_path):
    assert train(tmp_path / "a", settings=config(weight_decay=(1e38, 0.0))).chosen["weight_decay"] == 0.0
    with pytest.raises(UserError, match=r"config.linear.lr=\(3.0,\): training diverged"):
        train(tmp_path / "b", settings=config(weight_decay=(1e38,)))


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"lr": ()}, "config.linear: lr or weight_decay is empty"),
        ({"warmup": "4 epochs"}, "config.linear.warmup='4 epochs': allowed: less than 4 epochs"),
    ],
)
def test_mistakes_are_one_line(changes, words, tmp_path):
    with pytest.raises(UserError, match=words):
        train(tmp_path, settings=config(**changes))


def test_few_labels_are_one_batch(tmp_path):
    trained = train(tmp_path, labelled(slice(0, 10)), config(devices=4))
    assert trained.chosen["batch"] == 8 and trained.scores(TEST[:3]).shape == (3, 3)
    assert train(tmp_path, labelled(slice(0, 3)), config(devices=4)).chosen["batch"] == 3


def test_other_names_and_images_are_one_line():
    with pytest.raises(UserError, match="--unlabelled=x: not with --protocol=linear; allowed: knn, linear_quick, prop"):
        commands.evaluate("nowhere", "linear", unlabelled="x")
    made = default("simclr")
    made.study.protocol = "linear"
    with pytest.raises(UserError, match="config.study.protocol='linear': is called linear_quick now; allowed: finet"):
        resolve(made)


def test_older_results_have_the_name_of_today():
    older = {"protocol": "linear", "conditions": {"settings": {}}}
    today = {"protocol": "linear", "conditions": {"settings": dataclasses.asdict(CONFIG.linear)}}
    assert [named_as_today(each)["protocol"] for each in (older, today)] == ["linear_quick", "linear"]
