"""One contract, kept by every method: those of this package, or those named in SSL_JAX_METHODS (see `__main__`).

Each method is compiled once for one device and once for all; the tests share the two programs.
"""

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax import checkpoint, train
from ssl_jax.config import default, method_module, method_names, resolve
from ssl_jax.errors import UserError
from ssl_jax.methods.base import Context, State
from ssl_jax.parallel import make_mesh, replicated
from ssl_jax.testing.tiny import Images, batch_of, set_up, tiny_config, views_of
from ssl_jax.train.hooks import COLLAPSE_PATIENCE
from ssl_jax.transforms import target_of

STEPS = 60
QUICK = ("moco", "swav", "mae")  # the other methods' are slow tests


class Tried:
    """A method at toy size: its config, its compiled steps, and the run that several tests look at."""

    def __init__(self, name: str):
        self.config = tiny_config(name, train__duration="200 steps")
        self.source = Images()
        self.setup = set_up(self.config, self.source)
        self.start = train.init_state(self.setup, self.config.train.seed)
        self.target = target_of(self.start.opt_state)
        self.batch = {**views_of(self.setup, self.source.images[:16]), "index": jnp.arange(16)}
        self.batch["label"] = np.asarray(self.source.labels)[:16]

    @functools.lru_cache  # noqa: B019  # lives as long as the tests of one method
    def step(self, devices: int):
        mesh = make_mesh(devices, self.config.train.batch)
        return jax.jit(train.make_step(self.setup, self.config, mesh)), mesh

    def run(self, first: int, last: int, state=None, source=None, devices: int = 1):
        """States and metrics after each of the steps first to last - 1."""
        step_fn, mesh = self.step(devices)
        source = source or self.source
        state = jax.device_put(self.start if state is None else state, replicated(mesh))
        states, metrics = [], []
        for step in range(first, last):
            state, values = step_fn(state, batch_of(self.config, source, step, mesh))
            states.append(state)
            metrics.append(jax.device_get(values))
        return states, metrics

    @functools.cached_property
    def whole(self):
        return self.run(0, STEPS)


def pytest_generate_tests(metafunc):
    if "name" in metafunc.fixturenames:
        chosen = [name for name in os.environ.get("SSL_JAX_METHODS", "").split(",") if name]
        names: list = chosen or method_names()
        if metafunc.function is test_jit_equals_no_jit and not chosen:  # without jit each operation is compiled alone
            names = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]
        metafunc.parametrize("name", names, scope="module")


@pytest.fixture(scope="module")
def tried(name):
    return Tried(name)


def types(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_finite_and_loss_falls_and_no_collapse_is_named(tried):
    states, metrics = tried.whole
    collapsed, in_a_row = tried.setup.method.collapsed, 0
    for values in metrics:
        in_a_row = in_a_row + 1 if collapsed({key: float(value) for key, value in values.items()}) else 0
        assert in_a_row < COLLAPSE_PATIENCE, collapsed(values)
    losses = [float(values["loss"]) for values in metrics]
    assert np.all(np.isfinite(losses))
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(states[-1]))
    # Against the random vectors that a queue starts with, a positive is found at once: these two steps do not count.
    begun = 2 if hasattr(tried.config.method, "queue") else 0
    assert np.mean(losses[-10:]) < np.mean(losses[begun : begun + 5]) - 0.01, losses


def computed(method, state, batch):
    """(loss, metrics), parameters and state after `post_update`: all that a method computes in a step, no gradient."""
    outputs, stats = method.forward(
        state.params, target_of(state.opt_state), state.model_state, batch, jax.random.split(jax.random.key(0), 16)
    )
    ctx = Context(jnp.int32(0), jax.random.key(1), state.params)
    loss = method.loss(outputs, state.model_state, {name: batch[name] for name in method.needs}, ctx)
    params, memory = method.post_update(outputs, state.model_state, ctx)
    return loss, params, State(stats, memory)


def test_jit_equals_no_jit(tried):
    """Of loss, metrics, statistics, and the parameters and memory that the method tidies up."""

    def run(state, batch):
        return computed(tried.setup.method, state, batch)

    args = tried.start, tried.batch
    for a, b in zip(jax.tree.leaves(jax.jit(run)(*args)), jax.tree.leaves(run(*args)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * max(1, np.abs(b).max()))


@pytest.mark.parametrize("devices", [4, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 8))])
def test_one_and_many_devices_agree(tried, devices):
    if devices > jax.device_count():
        pytest.skip("needs XLA_FLAGS=--xla_force_host_platform_device_count=8; make test-slow sets it")
    one, many = (
        [values["loss"] for values in metrics]
        for metrics in (tried.whole[1][:20], tried.run(0, 20, devices=devices)[1])
    )
    np.testing.assert_allclose(many, one, rtol=0, atol=1e-5)


def test_runs_are_bit_equal_and_resume_is_exact(tried, tmp_path):
    """Saved, restored into a fresh process' state and continued: every array as in a run that never stopped."""
    states, metrics = tried.whole
    stop = int(np.random.default_rng().integers(1, 12))
    again, _ = tried.run(0, stop)
    assert equal(again[-1], states[stop - 1])
    checkpoint.save(tmp_path, stop, again[-1], keep=1)
    blank = jax.device_put(jax.tree.map(np.zeros_like, again[-1]))
    restored = checkpoint.restore_latest(tmp_path, blank, pytest.fail)
    resumed, rest = tried.run(stop, 12, state=restored)
    assert equal(rest, metrics[stop:12]), f"stopped at {stop}"
    assert equal(resumed[-1], states[11]), f"stopped at {stop}"


def test_no_gradient_into_the_target(tried):
    method, state = tried.setup.method, tried.start
    if tried.target is None:
        assert "target" not in state.model_state.stats
        return
    keys = jax.random.split(jax.random.key(3), 16)

    def loss(params, target):
        outputs, _ = method.forward(params, target, state.model_state, tried.batch, keys)
        ctx = Context(jnp.int32(0), jax.random.key(4), params)
        needed = {name: tried.batch[name] for name in method.needs}
        return method.loss(outputs, state.model_state, needed, ctx)[0]

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))(state.params, tried.target)
    into_params, into_target = jax.device_get(gradients)
    assert any(np.any(g) for g in jax.tree.leaves(into_params))
    assert not any(np.any(g) for g in jax.tree.leaves(into_target))


def test_labels_reach_only_methods_that_declare_them(tried):
    """The online probe learns from labels; encoder, optimizer and statistics must not feel them."""
    shuffled = Images()
    shuffled.labels = np.random.default_rng(1).permutation(tried.source.labels).astype(np.int32)
    a, b = tried.whole[0][5], tried.run(0, 6, source=shuffled)[0][-1]
    assert equal(a._replace(probe=()), b._replace(probe=())) != ("label" in tried.setup.method.needs)
    assert not equal(a.probe, b.probe)


def test_needs_are_checked_before_compiling(tried):
    if "label" in tried.setup.method.needs:
        with pytest.raises(UserError, match="needs labels"):
            set_up(tried.config, Images(labels=False))


def test_odd_batches_and_channels_and_no_labels(tried, name):
    """Whatever would fail there fails while a step is traced. Labels are left out unless the method needs them."""
    odd, labels = {"train__batch": 13}, "label" in tried.setup.method.needs
    cases = [(odd, 5)]
    if hasattr(tried.config.method, "bn_groups"):
        cases = [({"train__batch": 10}, 2), ({**odd, "method__bn_groups": 1}, 5)]
    for changes, channels in cases:
        config, source = tiny_config(name, **changes), Images(channels=channels, labels=labels)
        setup, size = set_up(config, source), config.train.batch
        batch = {"image": source.images[:size], "index": np.arange(size, dtype=np.int32)}
        if labels:
            batch["label"] = source.labels[:size]
        state = jax.eval_shape(lambda setup=setup: train.init_state(setup, 0))
        after, _ = jax.eval_shape(train.make_step(setup, config, make_mesh(1, size)), state, batch)
        assert types(after) == types(state)


def test_bfloat16_computes_and_the_state_stays_float32(name):
    """Traced over a real network: every array of the state keeps its type, and the loss is float32."""
    setup = train.set_up(tiny_config(name, model__dtype="bfloat16"), Images())
    state = jax.eval_shape(lambda: train.init_state(setup, 0))

    def run(state):
        batch = {**views_of(setup, Images().images[:16]), "label": Images().labels[:16], "index": jnp.arange(16)}
        (loss, _), params, model_state = computed(setup.method, state, batch)
        return loss, params, model_state

    loss, params, model_state = jax.eval_shape(run, state)
    assert types((params, model_state)) == types((state.params, state.model_state))
    assert loss.dtype == jnp.float32


def test_documented_for_the_listing(name):
    """`ssl-jax methods` reads the docstring: one line, later the source; every field of Config has a default."""
    module = method_module(name)
    head, *paragraphs = str(module.__doc__).split("\n\n")
    assert len(head.splitlines()) == 1 and any(p.startswith("Source: ") and "https://" in p for p in paragraphs)
    assert resolve(default(name)).method == dataclasses.replace(module.Config())
