"""Drop path: each image leaves out branches by a key of its own, in the student alone, in training alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax import train
from ssl_jax.config import Finetune, Model
from ssl_jax.encoder import random_encoder
from ssl_jax.errors import UserError
from ssl_jax.evaluate import finetune
from ssl_jax.models import build_encoder
from ssl_jax.models.layers import kept
from ssl_jax.network import KEYS, with_keys
from ssl_jax.testing.tiny import Images, set_up, tiny_config

VIT = {"name": "vit_tiny", "depth": 2, "width": 0.25, "patch": 4}
IMAGES = Images(n=24, size=8, channels=3)
PIXELS = jnp.asarray(np.random.default_rng(0).random((16, 8, 8, 3)), jnp.float32)


def built(rate, size=8, **changes):
    network = build_encoder(Model(**{**VIT, **changes}, drop_path=rate), 3, size)
    return network, *network.init(jax.random.key(0), jnp.zeros((1, size, size, 3)))


def test_a_branch_is_kept_with_its_probability_and_scaled_by_it():
    factors = np.asarray(kept(0.25, jax.random.split(jax.random.key(0), 20_000), 3))
    assert factors.shape == (20_000, 2) and set(np.unique(factors)) == {np.float32(0), np.float32(4 / 3)}
    np.testing.assert_allclose(factors.mean(axis=0), 1, atol=0.015)  # four deviations
    assert abs(np.corrcoef(factors.T)[0, 1]) < 0.03  # each branch on its own
    assert kept(0.0, jax.random.split(jax.random.key(0), 2), 0) is None and kept(0.5, None, 1) is None


def test_an_image_without_the_branches_of_a_block_is_what_it_was_before_the_block():
    network, params, stats = built(0.5)
    keys = jax.random.split(jax.random.key(1), 16)
    factors = np.asarray(kept(0.5, keys, 1))
    dropped, whole = (factors == 0).all(1), (factors > 0).all(1)
    assert dropped.any() and whole.any()
    y, _ = network.apply(params, stats, PIXELS, train=True, keys=keys)
    _, _, ((before, _),) = network.apply(params, stats, PIXELS, train=True, blocks=(0,))[0]
    np.testing.assert_allclose(y[dropped], before[dropped], rtol=1e-5, atol=1e-6)
    plain, _ = network.apply(params, stats, PIXELS, train=True)
    assert np.abs(np.asarray(y - plain))[whole].max() > 1e-3  # scaled up
    assert np.array_equal(plain, network.apply(params, stats, PIXELS, train=False)[0])


def test_keys_pass_through_the_statistics_of_a_student():
    network, params, stats = built(0.5)
    wrapped, keys = with_keys(network), jax.random.split(jax.random.key(1), 8)
    twice = jnp.repeat(PIXELS[:8], 2, axis=0)  # two equal views of each image

    def plain(train):
        return network.apply(params, stats, twice, train=train)[0]

    y, after = wrapped.apply(params, {**stats, KEYS: keys}, twice, train=True)
    assert np.abs(np.asarray(y[::2] - y[1::2])).max() > 1e-3  # each view leaves out its own
    again, _ = wrapped.apply(params, after, twice, train=True)
    assert after.keys() == {KEYS} and np.abs(np.asarray(again - y)).max() > 1e-3
    assert np.array_equal(
        wrapped.apply(params, stats, twice, train=True)[0], network.apply(params, stats, twice, train=True)[0]
    )
    still, after = wrapped.apply(params, {**stats, KEYS: keys}, twice, train=False)
    assert np.array_equal(still, plain(False)) and after.keys() == {KEYS}


def test_convnext_drops_too():
    network, params, stats = built(0.5, name="convnext_tiny", size=32, depth=0, width=1 / 16, patch=0)
    params = jax.tree.map_with_path(lambda path, p: jnp.ones_like(p) if "gamma" in str(path[-1]) else p, params)
    images, keys = jnp.repeat(PIXELS[:4], 4, axis=1).repeat(4, axis=2), jax.random.split(jax.random.key(1), 4)
    y, _ = network.apply(params, stats, images, train=True, keys=keys)
    assert (
        np.isfinite(y).all() and np.abs(np.asarray(y - network.apply(params, stats, images, train=True)[0])).max() > 0
    )


def fit(folder, **changes):
    options = {f"model__{key}": value for key, value in VIT.items()}
    config = tiny_config("mae", **{**options, "train__duration": "2 steps", "train__batch": 12, **changes})
    return train.fit(config, folder, IMAGES)


def largest(a, b):
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(np.abs(np.asarray(x) - np.asarray(y)).max()), a, b)))


@pytest.mark.parametrize("lora", [0, 2])
def test_micro_batches_drop_the_same_branches_as_the_batch(tmp_path, lora):
    options = {"model__drop_path": 0.5, "model__lora": lora, "optim__name": "sgd", "optim__lr": 0.1}
    whole = fit(tmp_path / "whole", **options)
    parts = fit(tmp_path / "parts", **options, train__micro_batch=4)
    without = fit(tmp_path / "without", **{**options, "model__drop_path": 0.0})
    assert largest(whole.params, parts.params) < 1e-6 < 1e-5 < largest(whole.params, without.params)
    assert whole.about["model"]["drop_path"] == 0.5


def test_fine_tuning_drops_as_the_encoder_was_trained():
    settings = Finetune(steps=3, batch=8, lr=(1e-3,), backbone_ratio=(1.0,))
    labels = np.arange(24) % 2
    heads = []
    for rate in (0.0, 0.5, 0.5):
        encoder = random_encoder(Model(**VIT, drop_path=rate), 8, 3, seed=0)
        heads.append(finetune(encoder, IMAGES.images, labels, classes=2, settings=settings, seed=0).params)
    assert largest(heads[0], heads[1]) > 1e-5 and largest(heads[1], heads[2]) == 0


def test_a_network_without_branches_to_drop_is_refused(tmp_path):
    config = tiny_config("simclr", model__drop_path=0.1)
    with pytest.raises(UserError, match=r"^config.model.drop_path=0.1: leaves out branches of a ViT or ConvNeXt"):
        set_up(config, Images(n=24))
