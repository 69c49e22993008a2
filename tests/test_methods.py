"""What some methods have beyond the contract (ssl_jax/testing/test_contract.py): targets, MoCo's queue, BatchNorm."""

import functools

import jax
import numpy as np
import pytest

from ssl_jax import train
from ssl_jax.errors import UserError
from ssl_jax.methods.base import Context, State
from ssl_jax.parallel import make_mesh
from ssl_jax.testing.tiny import Images, batch_of, set_up, start, tiny_config
from ssl_jax.transforms import target_of

SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("looc", "dino", "moco_v3", "tico")]


@pytest.mark.parametrize("name", ["byol", "moco", *SLOW])
def test_target_follows_the_explicit_formula(name):
    """Target <- tau target + (1 - tau) params, with the parameters after the step, at every step."""
    config, source = tiny_config(name), Images()
    state, step_fn, mesh = start(config, source)
    expected = target_of(state.opt_state)
    for step in range(5):
        state, _ = step_fn(state, batch_of(config, source, step, mesh))
        tau = config.method.momentum
        if name not in ("moco", "looc"):  # cosine to 1
            tau = 1 - (1 - tau) * (np.cos(np.pi * step / 20) + 1) / 2
        part = {key: state.params[key] for key in expected}
        expected = jax.tree.map(lambda old, new, t=tau: t * np.asarray(old) + (1 - t) * np.asarray(new), expected, part)
    for a, b in zip(jax.tree.leaves(target_of(state.opt_state)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def test_batch_larger_than_data_and_devices():
    with pytest.raises(UserError, match=r"config.train.batch=16: larger than the data set; allowed: 1 to 9"):
        set_up(tiny_config("simclr"), Images(n=9))
    with pytest.raises(UserError, match=r"config.train.batch=15: not divisible by the 4 devices.*12 or 16"):
        make_mesh(4, 15)
    with pytest.raises(UserError, match="only 4 found"):
        make_mesh(5, 20)


def test_state_of_another_structure_is_refused():
    """`forward` may change statistics alone, `post_update` the memory alone: anything else is named while tracing."""
    config, source = tiny_config("moco"), Images()
    setup, mesh = set_up(config, source), make_mesh(1, 16)
    method = setup.method
    state = jax.eval_shape(lambda: train.init_state(setup, 0))

    def forward(*args):
        outputs, stats = method.forward(*args)
        return outputs, {**stats, "queue": outputs["key"]}

    def post_update(outputs, state, ctx):
        return ctx.params, {**state.memory, "newest": outputs["key"]}

    for changed, words in (
        (method._replace(forward=forward), "forward must return statistics with the structure that init created"),
        (method._replace(post_update=post_update), "post_update must return a memory with the structure"),
    ):
        for micro_batch in (0, 8):
            parts = tiny_config("moco", train__micro_batch=micro_batch)
            step = train.make_step(setup._replace(method=changed), parts, mesh)
            with pytest.raises(TypeError, match=words):
                jax.eval_shape(step, state, batch_of(config, source, 0, mesh))


# MoCo's queue and its BatchNorm.


@functools.partial(jax.jit, static_argnums=0)
def pushed(method, memory, keys):
    return method.post_update({"key": keys}, State({}, memory), Context(np.int32(0), None, {}))[1]


def test_queue_is_a_ring_in_order_of_age():
    """Keys of 7 per step into a queue of 24: after each push the newest lie behind each other, the oldest are gone."""
    method = set_up(tiny_config("moco", train__batch=7, method__bn_groups=1), Images()).method
    memory = {"queue": np.full((24, 8), -1.0, np.float32), "oldest": np.int32(0)}
    remembered = []
    for push in range(11):
        keys = np.full((7, 8), push, float) + np.arange(7)[:, None] / 10
        remembered += list(keys[:, 0])
        memory = pushed(method, memory, keys)
        by_age = np.roll(np.asarray(memory["queue"])[:, 0], -int(memory["oldest"]))
        np.testing.assert_allclose(by_age, ([-1.0] * 24 + remembered)[-24:], rtol=1e-6)


def test_batch_larger_than_the_queue_keeps_the_newest():
    method = set_up(tiny_config("moco", method__queue=5), Images()).method
    memory = pushed(method, {"queue": np.zeros((5, 8)), "oldest": np.int32(3)}, np.arange(16.0)[:, None] * np.ones(8))
    assert sorted(np.asarray(memory["queue"])[:, 0]) == [11, 12, 13, 14, 15]


def test_groups_must_divide_the_batch():
    config, source, mesh = tiny_config("moco", method__bn_groups=3), Images(), make_mesh(1, 16)
    setup = set_up(config, source)
    state = jax.eval_shape(lambda: train.init_state(setup, 0))
    with pytest.raises(UserError, match="bn_groups"):
        jax.eval_shape(train.make_step(setup, config, mesh), state, batch_of(config, source, 0, mesh))


@pytest.mark.parametrize("name", ["moco", "looc"])
@pytest.mark.parametrize("key", ["micro_batch", "bn_group"])
def test_one_group_in_a_part_of_the_batch_would_give_positives_away(name, key):
    """Query and key of a micro-batch would be normalised over the same images, however the keys are shuffled."""
    with pytest.raises(UserError, match=r"config.method.bn_groups=1: .*gives the positive away; allowed: 2 or more"):
        set_up(tiny_config(name, method__bn_groups=1, **{f"train__{key}": 8}), Images())
    set_up(tiny_config(name, method__bn_groups=1, **{f"train__{key}": 16}), Images())  # the whole batch
    set_up(tiny_config(name, **{f"train__{key}": 8}), Images())
