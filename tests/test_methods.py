"""One contract, held by every method found in ssl_jax/methods."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import Images, tiny_config

from ssl_jax import checkpoint, trainer
from ssl_jax.augment import make_views
from ssl_jax.config import default, method_module, method_names, resolve
from ssl_jax.data import order
from ssl_jax.encoder import build
from ssl_jax.errors import UserError
from ssl_jax.parallel import batch_sharding, make_mesh, replicated
from ssl_jax.transforms import target_of

METHODS = method_names()
TARGETS = ["byol", "looc", "dino", "moco", "moco_v3", "tico"]


pytestmark = pytest.mark.usefixtures("small_networks")

STARTED = {}  # what was compiled once serves all tests of a method; the newest only, as programs take memory


def start(config, source, devices=1):
    """(initial state, jitted step, mesh)"""
    key = repr((config, source.images.shape, source.labels is None))
    if (key, devices) not in STARTED:
        setup = trainer.set_up(config, source)
        mesh = make_mesh(devices, config.train.batch)
        state = STARTED[key, 1][0] if (key, 1) in STARTED else trainer.init_state(setup, config.train.seed)
        state = jax.device_put(state, replicated(mesh))
        STARTED[key, devices] = state, jax.jit(trainer.make_step(setup, config, mesh)), mesh
        if len(STARTED) > 6:
            del STARTED[next(iter(STARTED))]
    return STARTED[key, devices]


def batch_of(config, source, step, mesh):
    index = order(config.train.seed, len(source), config.train.batch, step)
    batch = {"image": source.images[index], "index": index.astype(np.int32)}
    if source.labels is not None:
        batch["label"] = source.labels[index]
    return jax.device_put(batch, batch_sharding(mesh))


def views_of(setup, source):
    """What a method's forward gets of 16 images."""
    views, drawn = jax.jit(make_views(setup.views, setup.method.shares))(jax.random.key(1), source.images[:16])
    return {"views": views, "drawn": drawn, "label": source.labels[:16], "index": jnp.arange(16)}


def train(config, source, steps, devices=1, state=None, first=0):
    begun, step_fn, mesh = start(config, source, devices)
    state, losses = begun if state is None else state, []
    for step in range(first, steps):
        state, metrics = step_fn(state, batch_of(config, source, step, mesh))
        losses.append(float(metrics["loss"]))
    return state, losses


def as_float(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.parametrize("name", METHODS)
def test_finite_and_loss_falls_and_no_collapse_is_named(name):
    config, source = tiny_config(name, train__duration="200 steps"), Images()
    state, step_fn, mesh = start(config, source)
    collapsed, losses, in_a_row = trainer.set_up(config, source).method.collapsed, [], 0
    for step in range(60):
        state, metrics = step_fn(state, batch_of(config, source, step, mesh))
        metrics = {key: float(value) for key, value in metrics.items()}
        losses.append(metrics["loss"])
        in_a_row = in_a_row + 1 if collapsed(metrics) else 0
        assert in_a_row < trainer.COLLAPSED, collapsed(metrics)
    assert np.all(np.isfinite(losses))
    assert all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(state))
    # Against the random vectors that a queue starts with, a positive is found at once: these two steps do not count.
    begun = 2 if hasattr(config.method, "queue") else 0
    assert np.mean(losses[-10:]) < np.mean(losses[begun : begun + 5]) - 0.01, losses


@pytest.mark.parametrize("name", METHODS)
def test_jit_equals_no_jit(name):
    """Of all that a method computes: outputs, loss, metrics, and the parameters and state that it tidies up."""
    config, source = tiny_config(name), Images()
    setup, keys = trainer.set_up(config, source), jax.random.split(jax.random.key(0), 16)
    (state, *_), method = start(config, source), setup.method
    batch = views_of(setup, source)

    def run(params, target, extra, batch):
        outputs, after = method.forward(params, target, extra, batch, keys)
        made = {name: value for name, value in outputs.items() if name != "rng"}
        return made, method.loss(outputs, extra, batch), method.post_update(params, after, outputs, 0)

    args = state.params, target_of(state.opt_state), state.extra, batch
    jitted = jax.jit(run)(*args)
    plain = run(*args)
    for a, b in zip(jax.tree.leaves(jitted), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * max(1, float(jnp.abs(b).max())))


@pytest.mark.parametrize("devices", [4, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 8))])
@pytest.mark.parametrize("name", METHODS)
def test_one_and_many_devices_agree(name, devices):
    if devices > jax.device_count():
        pytest.skip("make test-slow runs this with TEST_DEVICES=8")
    # Smaller steps where rounding grows faster: MoCo v3's loss is four times an InfoNCE (2 T, two directions), TiCo's
    # covariance counts rho = 8 times.
    slower = name in ("moco_v3", "tico")
    config, source = tiny_config(name, **{"optim__lr": 0.0125} if slower else {}), Images()
    _, one = train(config, source, 20, devices=1)
    _, many = train(config, source, 20, devices=devices)
    np.testing.assert_allclose(many, one, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_runs_are_bit_equal_and_resume_is_exact(name, tmp_path):
    """Saved, restored into a fresh process' state and continued: every array as in a run that never stopped."""
    config, source = tiny_config(name), Images()
    whole, losses = train(config, source, 12)
    again, losses_again = train(config, source, 12)
    assert losses == losses_again and equal(whole, again)
    stop = int(np.random.default_rng().integers(1, 12))
    half, _ = train(config, source, stop)
    checkpoint.save(tmp_path, stop, half, keep=1)
    fresh = trainer.init_state(trainer.set_up(config, source), config.train.seed)
    restored = checkpoint.restore_latest(tmp_path, fresh, pytest.fail)
    resumed, rest = train(config, source, 12, state=restored, first=stop)
    assert rest == losses[stop:], f"stopped at {stop}"
    assert equal(whole, resumed), f"stopped at {stop}"


@pytest.mark.parametrize("name", METHODS)
def test_no_gradient_into_the_target(name):
    config, source = tiny_config(name), Images()
    setup = trainer.set_up(config, source)
    state, *_ = start(config, source)
    target = target_of(state.opt_state)
    assert (target is not None) == (name in TARGETS)
    if target is None:
        return
    batch = views_of(setup, source)

    def loss(params, target):
        outputs, _ = setup.method.forward(params, target, state.extra, batch, jax.random.split(jax.random.key(3), 16))
        return setup.method.loss(outputs, state.extra, batch)[0]

    into_params, into_target = jax.jit(jax.grad(loss, argnums=(0, 1)))(state.params, target)
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(into_params)) > 0
    assert all(jnp.all(g == 0) for g in jax.tree.leaves(into_target))


@pytest.mark.parametrize("name", TARGETS)
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
        expected = jax.tree.map(lambda old, new, t=tau: t * old + (1 - t) * new, expected, part)
    for a, b in zip(jax.tree.leaves(target_of(state.opt_state)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", METHODS)
def test_labels_reach_only_methods_that_declare_them(name):
    """The online probe learns from labels; encoder, optimizer and statistics must not feel them."""
    config, source, shuffled = tiny_config(name), Images(), Images()
    shuffled.labels = np.random.default_rng(1).permutation(source.labels).astype(np.int32)
    a, _ = train(config, source, 6)
    b, _ = train(config, shuffled, 6)
    declared = "label" in trainer.set_up(config, source).method.needs
    assert equal(a._replace(probe=()), b._replace(probe=())) != declared
    assert not equal(a.probe, b.probe)


@pytest.mark.parametrize("name", METHODS)
def test_needs_are_checked_before_compiling(name):
    config, source = tiny_config(name), Images(labels=False)
    if name in ("supervised", "sup_con"):
        with pytest.raises(UserError, match="needs labels"):
            trainer.set_up(config, source)
    else:
        traced(config, source)


@pytest.mark.parametrize("name", METHODS)
def test_odd_batches_and_channels(name):
    for batch, channels in ((10, 2), (13, 5)):
        extra = {"method__bn_groups": 1 if batch % 2 else 2} if name in ("moco", "looc") else {}
        config, source = tiny_config(name, train__batch=batch, **extra), Images(channels=channels)
        traced(config, source)


def traced(config, source):
    """(state before, state after, metrics) of one step, as shapes and types: what would fail while tracing fails."""
    setup, mesh = trainer.set_up(config, source), make_mesh(1, config.train.batch)
    state = jax.eval_shape(lambda: trainer.init_state(setup, 0))
    step = trainer.make_step(setup, config, mesh)
    return state, *jax.eval_shape(step, state, batch_of(config, source, 0, mesh))


@pytest.mark.parametrize("name", METHODS)
def test_bfloat16_computes_and_the_state_stays_float32(name, monkeypatch):
    """Traced over a real network: every array of the state keeps its type, and the loss is float32."""
    monkeypatch.setattr(trainer, "build", build)
    config, source = tiny_config(name, model__dtype="bfloat16"), Images()
    state, after, metrics = traced(config, source)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert metrics["loss"].dtype == jnp.float32


@pytest.mark.parametrize("name", METHODS)
def test_documented_for_the_listing(name):
    """`ssl-jax methods` reads the docstring: one line, then the source; every field of Config has a default."""
    module = method_module(name)
    head, rest = module.__doc__.split("\n\n")[:2]
    assert len(head.splitlines()) == 1 and rest.startswith("Source: ")
    assert resolve(default(name)).method == dataclasses.replace(module.Config())


def test_batch_larger_than_data_and_devices():
    with pytest.raises(UserError, match=r"config.train.batch=16: larger than the data set; allowed: 1 to 9"):
        trainer.set_up(tiny_config("simclr"), Images(n=9))
    with pytest.raises(UserError, match=r"config.train.batch=15: not divisible by the 4 devices.*12 or 16"):
        make_mesh(4, 15)
    with pytest.raises(UserError, match="only 4 found"):
        make_mesh(5, 20)


# MoCo's queue and its BatchNorm.


def test_queue_is_a_ring_in_order_of_age():
    """Keys of 7 a step into a queue of 24: after each push the newest lie behind each other, the oldest are gone."""
    config = tiny_config("moco", train__batch=7, method__bn_groups=1)
    method = trainer.set_up(config, Images()).method
    extra = {"queue": np.full((24, 8), -1.0), "oldest": np.int32(0)}
    remembered = []
    for push in range(11):
        keys = np.full((7, 8), push, float) + np.arange(7)[:, None] / 10
        remembered += list(keys[:, 0])
        _, extra = method.post_update({}, jax.tree.map(jnp.asarray, extra), {"key": jnp.asarray(keys)}, push)
        oldest = int(extra["oldest"])
        by_age = np.roll(np.asarray(extra["queue"])[:, 0], -oldest)
        want = ([-1.0] * 24 + remembered)[-24:]
        np.testing.assert_allclose(by_age, want, rtol=1e-6)


def test_batch_larger_than_the_queue_keeps_the_newest():
    config = tiny_config("moco", method__queue=5)
    method = trainer.set_up(config, Images()).method
    extra = {"queue": jnp.zeros((5, 8)), "oldest": jnp.int32(3)}
    _, extra = method.post_update({}, extra, {"key": jnp.arange(16.0)[:, None] * jnp.ones(8)}, 0)
    assert sorted(np.asarray(extra["queue"])[:, 0]) == [11, 12, 13, 14, 15]


def test_groups_must_divide_the_batch():
    config = tiny_config("moco", method__bn_groups=3)
    with pytest.raises(UserError, match="bn_groups"):
        train(config, Images(), 1)
