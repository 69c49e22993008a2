"""The audit of invariance on encoders that are blind to something by construction, and its command."""

import csv

import jax.numpy as jnp
import numpy as np
import pytest
from toy_encoder import toy_images

from ssl_jax.audit.invariance import audit, between, distance, embed_transformed, read
from ssl_jax.audit.ladder import TRANSFORMS, alone, in_numbers
from ssl_jax.cli import main
from ssl_jax.config import View
from ssl_jax.encoder import Encoder, export, load_encoder, random_encoder
from ssl_jax.network import Network


def encoder(embed, size=8, channels=1):
    """An encoder without parameters that maps images [B, H, W, C] by `embed`."""
    network = Network(lambda rng, x: ({}, {}), lambda params, stats, x, **_: (embed(x), stats))
    return Encoder(network, {}, {}, size, channels, {})


def pixels(x):
    return x.reshape(len(x), -1)


def rows_summed(x):
    """Blind to left and right."""
    return jnp.concatenate([x.sum(axis=(2, 3)), (x**2).sum(axis=(2, 3))], axis=1)


IMAGES = toy_images(40)[0]


def test_distances_against_loops():
    features = np.random.default_rng(0).normal(1, 1, (7, 5))

    def cosine(a, b):
        return a @ b / np.sqrt(a @ a) / np.sqrt(b @ b)

    pairs = [1 - cosine(features[i], features[j]) for i in range(7) for j in range(7) if i != j]
    assert between(features) == pytest.approx(np.mean(pairs))
    np.testing.assert_allclose(distance(features[:3], features[3:6])[1], 1 - cosine(features[1], features[4]))
    assert between(np.ones((4, 3))) == 1e-9


def test_a_flip_moves_pixels_and_not_their_sums_over_rows():
    by_pixel, by_row = (audit(encoder(e), IMAGES, transforms=["flip"])[0] for e in (pixels, rows_summed))
    flat = IMAGES.reshape(40, -1) / 255.0
    flipped = IMAGES[:, :, ::-1].reshape(40, -1) / 255.0
    moved = distance(flat, flipped) / between(flat)
    assert by_pixel["moved"] == pytest.approx(moved.mean(), rel=1e-4) and moved.mean() > 0.3
    assert by_pixel["half"] == pytest.approx(1.96 * moved.std(ddof=1) / 40**0.5, rel=1e-3)
    assert by_row["moved"] == pytest.approx(0, abs=1e-6) and by_row["readable"] < 0.4


def test_brightness_is_ignored_by_a_direction_but_a_length_tells_it():
    """Cosines do not see a factor; a linear model on embeddings does: moved and readable are two things."""
    rows = audit(encoder(rows_summed), IMAGES, transforms=["brightness"])
    assert [r["strength"] for r in rows] == [0.1, 0.2, 0.4, 0.8]
    assert [r["moved"] for r in rows] == sorted(r["moved"] for r in rows)
    blind = audit(encoder(lambda x: rows_summed(x)[:, :8] / rows_summed(x)[:, :8].sum(axis=1, keepdims=True)), IMAGES,
                  transforms=["brightness"])  # fmt: skip
    assert rows[0]["readable"] > 0.8 > 0.5 > blind[0]["readable"]
    assert blind[0]["moved"] == pytest.approx(0, abs=1e-6)


def test_what_is_drawn_is_what_is_read():
    size = 8
    view = alone(TRANSFORMS["rotate"], 45.0, size)
    features, drawn = embed_transformed(encoder(pixels), IMAGES, view, seed=3)
    again, _ = embed_transformed(encoder(pixels), IMAGES, view, seed=3)
    np.testing.assert_array_equal(features, again)
    numbers = in_numbers(drawn)
    assert numbers.shape == (40, 1) and np.abs(numbers).max() <= 45 and numbers.std() > 10
    view = View(size=size, brightness=0.4, contrast=0.4, jitter_prob=1.0)
    assert in_numbers(embed_transformed(encoder(pixels), IMAGES, view, seed=3)[1]).shape == (40, 2)  # without the order


def test_reading_from_features_that_tell_and_that_do_not():
    rng = np.random.default_rng(0)
    targets, noise = rng.normal(size=(400, 2)), rng.normal(size=(400, 6))
    held = np.arange(400) >= 300
    mixed = np.concatenate([noise, targets @ rng.normal(size=(2, 3))], axis=1)
    assert read(mixed, targets, held, switch=False) > 0.99 and read(noise, targets, held, switch=False) < 0.1
    answer = (targets[:, :1] > 0).astype(np.float32)
    assert read(mixed, answer, held, switch=True) > 0.9 and read(noise, answer, held, switch=True) < 0.3
    assert read(mixed, np.ones((400, 1)), held, switch=True) == 0  # never switched: nothing to read


SMALL = [
    "--config=pretrain",
    "--config.data.name=synthetic",
    "--config.data.path=n=24",
    "--config.data.size=12",
    "--config.data.channels=1",
    "--config.model.name=ssl_jax.testing.model",
]


def test_command_on_random_on_imported_and_on_trained_weights(tmp_path, capsys, monkeypatch):
    """Three ways to one encoder, and the same numbers; of all transforms only two, for time's sake."""
    from ssl_jax.audit import ladder
    from ssl_jax.config import resolve
    from ssl_jax.config_file import load_config

    kept = {name: TRANSFORMS[name]._replace(strengths=TRANSFORMS[name].strengths[-1:]) for name in ("rotate", "flip")}
    monkeypatch.setattr(ladder, "TRANSFORMS", kept)
    flags = ["audit", "--invariance", "--images=9"]
    assert main([*flags, *SMALL, f"--out={tmp_path / 'random'}"]) == 0
    config = resolve(load_config(SMALL[0].split("=")[1], SMALL[1:]))
    made = random_encoder(config.model, 12, 1, config.train.seed)
    export(tmp_path / "run" / "encoder", made)
    weights = tmp_path / "run" / "encoder" / "encoder.safetensors"
    imported = [*SMALL, "--config.train.seed=5", f"--config.model.init={weights}"]
    assert main([*flags, *imported, f"--out={tmp_path / 'imported'}"]) == 0
    assert main([*flags, *SMALL, f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'trained'}"]) == 0
    tables = [(tmp_path / name / "invariance.csv").read_text() for name in ("random", "imported", "trained")]
    assert tables[0] == tables[1] == tables[2]
    rows = list(csv.DictReader(tables[0].splitlines()))
    assert [r["transform"] for r in rows] == ["rotate", "flip"] and all(0 <= float(r["readable"]) <= 1 for r in rows)
    assert (tmp_path / "trained" / "invariance.png").stat().st_size > 5000
    assert "scratch (run)" not in capsys.readouterr().err and load_encoder(tmp_path / "run").size == 12


MISTAKES = [
    (["--invariance"], "--workdir: missing; use a run folder, or --config"),
    (["--invariance", *SMALL, "--images=4"], "--images=4 of 24: allowed: 8 or more"),
    (["--invariance", "--workdir=/no/such"], "/no/such: no encoder.json"),
    (["--invariance", *SMALL, "--config.model.init=/no/such"], "config.model.init='/no/such': not found"),
    (["--invariance", "--data=/no/such", *SMALL], "--data=/no/such: not found"),
]


@pytest.mark.parametrize(("flags", "message"), MISTAKES)
def test_a_mistake_is_one_line(flags, message, capsys, tmp_path):
    assert main(["audit", *flags, f"--out={tmp_path}"]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1 and message in told[0], told
