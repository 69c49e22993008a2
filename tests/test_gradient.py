"""The gradient in micro-batches is that of the batch, for every method: float64, and on several devices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax import train
from ssl_jax.augment import make_views
from ssl_jax.config import method_names
from ssl_jax.errors import UserError
from ssl_jax.methods.base import Context
from ssl_jax.parallel import batch_sharding, make_mesh, replicated
from ssl_jax.testing.tiny import Images, set_up, tiny_config
from ssl_jax.train.step import join_batch, make_gradient, split_batch
from ssl_jax.transforms import target_of

QUICK = ("simclr", "moco", "swav", "mae")  # the others are slow tests
NAMES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in method_names()]


def double(tree):
    return jax.tree.map(lambda x: np.float64(x) if x.dtype == jnp.float32 else x, tree)


@functools.cache
def draw(views, shares):
    return jax.jit(make_views(views, shares))(jax.random.key(2), Images(n=64).images)


@functools.cache
def given(name):
    """(method, its state, the views of 64 images and how they were drawn), in float64."""
    source = Images(n=64)
    config = tiny_config(name, train__batch=64, eval__online_probe=False)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="float64"))
    setup = set_up(config, source)
    # Drawn once: that those of a part are the same but for rounding in float32 is a test of its own.
    drawn = draw(setup.views, tuple(map(tuple, setup.method.shares)))
    return setup.method, *double((train.init_state(setup, 0), drawn))


@functools.cache
def gradients(name, *, micro_batch, bn_group):
    """(loss, metrics, statistics, gradients) of a step on 64 images, in float64."""
    source = Images(n=64)
    method, state, drawn = given(name)

    def gradient(drawn, *args):
        def augment(key, images, pairs, places):
            return jax.tree.map(lambda x: x[places], drawn)

        return make_gradient(method, augment, micro_batch=micro_batch, bn_group=bn_group)(*args)

    inputs = {"image": source.images, "label": source.labels, "index": np.arange(64)}
    ctx = Context(jnp.int32(5), jax.random.key(2), state.params)
    keys = tuple(jax.random.split(jax.random.key(1)))
    args = ctx, target_of(state.opt_state), state.model_state, inputs, keys
    (loss, (outputs, stats, metrics)), grads = jax.jit(gradient)(drawn, *args)
    made = {"loss": loss, "metrics": metrics, "stats": stats, "grads": grads, "embedding": outputs["embedding"]}
    return jax.device_get(made)


@pytest.mark.parametrize("name", NAMES)
def test_micro_batches_have_the_gradient_of_the_batch(name):
    with jax.enable_x64(True):
        whole = gradients(name, micro_batch=0, bn_group=8)
        parts = gradients(name, micro_batch=8, bn_group=8)
    assert max(np.abs(g).max() for g in jax.tree.leaves(whole["grads"])) > 1e-4
    for key in ("loss", "metrics", "stats", "grads", "embedding"):
        for a, b in zip(jax.tree.leaves(parts[key]), jax.tree.leaves(whole[key]), strict=True):
            # jax.nn.dot_product_attention takes its softmax in float32: for ViTs 1e-6 of the largest.
            least = 1e-6 * np.abs(b).max() if tiny_config(name).model.name.startswith("vit") else 0
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=max(1e-9, least))


def test_batch_norm_over_other_groups_is_another_gradient():
    """What micro-batches cannot do by themselves: without bn_group the statistics are those of fewer images."""
    with jax.enable_x64(True):
        whole, parts = (gradients("simclr", micro_batch=n, bn_group=0) for n in (0, 8))
    assert abs(float(whole["loss"] - parts["loss"])) > 1e-4


def test_views_of_a_part_are_those_of_the_batch():
    images = Images(n=12).images
    views = jax.jit(make_views(set_up(tiny_config("simclr"), Images()).views))
    key = jax.random.key(0)
    whole, parts = jax.device_get((views(key, images), views(key, images[2::3], None, np.arange(12)[2::3])))
    for a, b in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b[2::3], atol=1e-6)


def test_parts_are_strided_and_come_back_in_order():
    x = {"a": np.arange(12), "b": np.arange(24).reshape(12, 2)}
    assert split_batch(x, 3)["a"].tolist() == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]
    assert split_batch(x, 3, stretch=2)["a"].tolist() == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]
    for stretch in (1, 2, 4):
        assert all((join_batch(split_batch(x, 3, stretch), stretch)[key] == x[key]).all() for key in x)


def test_running_statistics_are_the_means_over_groups():
    with jax.enable_x64(True):
        grouped = gradients("simclr", micro_batch=0, bn_group=8)["stats"]
        method, state, (views, _) = given("simclr")
        forward = jax.jit(lambda views: method.forward(state.params, None, state.model_state, {"views": views}, None))
        each = [jax.device_get(forward([v[8 * i : 8 * i + 8] for v in views])[1]) for i in range(8)]
        mean = jax.tree.map(lambda *x: sum(x) / 8, *each)
    for a, b in zip(jax.tree.leaves(grouped), jax.tree.leaves(mean), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("devices", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_steps_in_micro_batches_on_devices(devices):
    """Losses of 20 steps are those of the whole batch on one device, when groups of BatchNorm are the same."""
    source, losses, start = Images(labels=False), {}, None
    for name, mesh_of, changes in (("whole", 1, {}), ("parts", devices, {"train__micro_batch": 4})):
        config = tiny_config("simclr", train__bn_group=4, **changes)
        setup, mesh = set_up(config, source), make_mesh(mesh_of, 16, 4)
        start = start or train.init_state(setup, 0)
        state = jax.device_put(start, replicated(mesh))
        step_fn = jax.jit(train.make_step(setup, config, mesh))
        losses[name] = []
        for step in range(20):
            index = np.arange(step * 16, step * 16 + 16) % 48
            batch = {"image": source.images[index], "index": index}
            state, metrics = step_fn(state, jax.device_put(batch, batch_sharding(mesh)))
            losses[name].append(float(metrics["loss"]))
    np.testing.assert_allclose(losses["parts"], losses["whole"], atol=1e-5)
    assert losses["parts"][-1] < losses["parts"][0]


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"train__micro_batch": 5}, "config.train.micro_batch=5: allowed: 0, or a divisor of config.train.batch=16"),
        ({"train__bn_group": 3}, "config.train.bn_group=3: allowed: 0, or a divisor of config.train.batch=16"),
        (
            {"train__micro_batch": 8, "train__bn_group": 16},
            "config.train.bn_group=16: allowed: 0, or a divisor of config.train.micro_batch=8",
        ),
    ],
)
def test_parts_that_do_not_divide(changes, message):
    with pytest.raises(UserError, match=message):
        set_up(tiny_config("simclr", **changes), Images())
    with pytest.raises(UserError, match="config.train.micro_batch=6: not divisible by the 4 devices"):
        make_mesh(4, 24, 6)
