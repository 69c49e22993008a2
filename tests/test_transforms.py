import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ssl_jax.config import Optim
from ssl_jax.errors import UserError
from ssl_jax.transforms import by_name, cosine_momentum, frozen, lars, learning_rate, optimizer, target_of, track_target


def some_params(seed=0):
    keys = jax.random.split(jax.random.key(seed), 2)
    return {"w": jax.random.normal(keys[0], (4, 3)), "b": jax.random.normal(keys[1], (3,))}


def gradients(step):
    return some_params(100 + step)


@pytest.mark.parametrize("tau", [0.9, cosine_momentum(0.9, 10)])
def test_target_is_the_explicit_average_of_parameters_after_each_step(tau):
    tx = optax.chain(optax.adamw(1e-2), track_target(tau))
    params = target = some_params()
    state = tx.init(params)
    for step in range(10):
        updates, state = tx.update(gradients(step), state, params)
        params = optax.apply_updates(params, updates)
        t = tau(step) if callable(tau) else tau
        target = jax.tree.map(lambda old, new, t=t: t * old + (1 - t) * new, target, params)
    for got, want in zip(jax.tree.leaves(target_of(state)), jax.tree.leaves(target)):
        np.testing.assert_array_equal(got, want)


def test_target_is_float32_and_moves_under_bfloat16_parameters():
    params = {"w": jnp.ones(4, jnp.bfloat16)}
    tx = optax.chain(optax.sgd(1.0), track_target(0.996))
    state = tx.init(params)
    _, state = tx.update({"w": jnp.full(4, 0.5, jnp.bfloat16)}, state, params)
    target = target_of(state)["w"]
    assert target.dtype == jnp.float32
    np.testing.assert_allclose(target, 1 - 0.004 * 0.5, rtol=1e-6)


def test_target_ticks_once_a_step_inside_multisteps():
    tx = optax.MultiSteps(optax.chain(optax.sgd(0.1), track_target(0.5)), every_k_schedule=4)
    params = {"w": jnp.ones(2)}
    state = tx.init(params)
    for _ in range(8):
        updates, state = tx.update({"w": jnp.ones(2)}, state, params)
        params = optax.apply_updates(params, updates)
    assert int(optax.tree.get(state.inner_opt_state, "count")) == 2
    np.testing.assert_allclose(target_of(state)["w"], 0.5 * (0.5 * 1 + 0.5 * 0.9) + 0.5 * 0.8, rtol=1e-6)


def test_select_and_absence():
    tx = optax.chain(optax.sgd(0.1), track_target(0.9, lambda p: {"w": p["w"]}))
    assert set(target_of(tx.init(some_params()))) == {"w"}
    assert target_of(optax.sgd(0.1).init(some_params())) is None


def test_state_can_be_donated():
    params = some_params()
    state = track_target(0.9).init(params)
    jax.jit(lambda p, s: (p, s), donate_argnums=(0, 1))(params, state)  # one buffer twice would raise


def test_lars_equals_the_formula():
    """LARS by hand, as facebookresearch/moco-v3's optimizer.py computes it, over steps with a changing rate."""
    schedule = optax.linear_schedule(0.5, 0.1, 4)
    tx = lars(schedule, weight_decay=0.01, momentum=0.9, trust=0.001)
    params = {**some_params(), "zero": jnp.zeros((2, 2))}
    state = tx.init(params)
    hand = {k: np.asarray(v, np.float64) for k, v in params.items()}
    speed = {k: np.zeros_like(v) for k, v in hand.items()}
    for step in range(5):
        grads = {**gradients(step), "zero": jnp.ones((2, 2)) if step > 2 else jnp.zeros((2, 2))}
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for name, p in hand.items():
            g = np.asarray(grads[name], np.float64)
            if p.ndim > 1:
                g = g + 0.01 * p
                norms = np.linalg.norm(p), np.linalg.norm(g)
                g = g * (0.001 * norms[0] / norms[1] if all(norms) else 1.0)
            speed[name] = 0.9 * speed[name] + g
            hand[name] = p - float(schedule(step)) * speed[name]
    for name in hand:
        np.testing.assert_allclose(params[name], hand[name], rtol=2e-5)


def test_schedules():
    cosine = learning_rate(Optim(lr=0.1, lr_batch=256), batch=512, steps=100, warmup=10)
    assert float(cosine(0)) == 0 and float(cosine(10)) == pytest.approx(0.2) and float(cosine(100)) == pytest.approx(0)
    assert float(cosine(55)) == pytest.approx(0.1, rel=1e-5)
    steps = learning_rate(Optim(lr=1.0, lr_batch=0, schedule="step"), batch=7, steps=10, warmup=0)
    assert [round(float(steps(i)), 4) for i in (0, 5, 7, 9)] == [1.0, 1.0, 0.1, 0.01]
    ends = learning_rate(Optim(lr=1.0, lr_batch=0, lr_start=0.1, lr_end=0.001), batch=7, steps=100, warmup=10)
    for step, want in {0: 0.1, 5: 0.55, 10: 1.0, 55: 0.5005, 100: 0.001}.items():
        assert float(ends(step)) == pytest.approx(want, rel=1e-5), step
    # Shares of the whole run, as milestones in epochs are: 8, 16 and 24 of 40 steps, of which 4 are the warm-up.
    steps = learning_rate(
        Optim(lr=1.0, lr_batch=0, schedule="step", drops=(0.2, 0.4, 0.6)), batch=7, steps=40, warmup=4
    )
    assert [round(float(steps(i)), 6) for i in (2, 4, 7, 8, 15, 16, 23, 24, 39)] == [
        *(0.5, 1, 1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001)
    ]
    with pytest.raises(UserError, match="config.optim.warmup"):
        learning_rate(Optim(warmup="10 steps"), batch=7, steps=10, warmup=10)


def test_biases_are_not_decayed_unless_asked():
    zero = jax.tree.map(jnp.zeros_like, some_params())
    for everything in (False, True):
        tx = optimizer(Optim(weight_decay=0.1, decay_all=everything), lambda _: 1.0, optax.identity())
        updates, _ = tx.update(zero, tx.init(some_params()), some_params())
        assert bool(jnp.any(updates["b"] != 0)) == everything
        assert jnp.any(updates["w"] != 0)


def test_clipping():
    tx = optimizer(Optim(weight_decay=0.0, momentum=0.0, clip_norm=1.0), lambda _: 1.0, optax.identity())
    updates, _ = tx.update(jax.tree.map(lambda x: 100 * x, some_params()), tx.init(some_params()), some_params())
    assert float(optax.tree.norm(updates)) == pytest.approx(1, rel=1e-5)


def test_clipping_of_each_tensor_equals_the_formula():
    grads = {"w": jnp.full((2, 2), 3.0), "b": jnp.array([0.3, 0.4])}  # norms 6 and 0.5
    settings = Optim(weight_decay=0.0, momentum=0.0, clip_norm=2.0, clip_each=True)
    tx = optimizer(settings, lambda _: 1.0, optax.identity())
    updates, _ = tx.update(grads, tx.init(grads), grads)
    np.testing.assert_allclose(updates["w"], -3.0 * 2 / (6 + 1e-6), rtol=1e-6)
    np.testing.assert_allclose(updates["b"], -grads["b"], rtol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_frozen_parameters_start_as_if_the_run_began_when_they_thaw(name):
    """As in PyTorch, which leaves parameters without a gradient out of everything: momentum, decay, Adam's count."""
    settings = Optim(name=name, weight_decay=0.1)
    schedule = lambda step: 0.1 / (1 + step)  # noqa: E731
    tx = optimizer(settings, schedule, optax.identity(), first_frozen={"w": 3})
    params = start = some_params()
    state = tx.init(params)
    for step in range(3):
        updates, state = tx.update(gradients(step), state, params, step=step)
        params = optax.apply_updates(params, updates)
        np.testing.assert_array_equal(params["w"], start["w"])
    assert np.abs(params["b"] - start["b"]).max() > 1e-3
    w, m, v = np.float64(start["w"]), 0.0, 0.0
    for step in range(3, 8):
        updates, state = tx.update(gradients(step), state, params, step=step)
        params = optax.apply_updates(params, updates)
        g, n = np.float64(gradients(step)["w"]), step - 2
        if name == "sgd":
            m = 0.9 * m + g + 0.1 * w
            change = m
        else:
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            change = m / (1 - 0.9**n) / (np.sqrt(v / (1 - 0.999**n)) + 1e-8) + 0.1 * w
        w = w - 0.1 / (1 + step) * change
        np.testing.assert_allclose(params["w"], w, rtol=1e-5, atol=1e-6)


def test_the_step_of_a_run_comes_before_a_transformation_s_own_count():
    """Schedules, the target's momentum and freezing read `step`; without it each counts its own updates."""
    plain = lars(lambda step: 1.0 * (step == 7), momentum=0.0, mask=lambda p: jax.tree.map(lambda _: False, p))
    tx = optax.chain(
        by_name(lambda steps: frozen(plain, steps) if steps else plain, {"w": 5}),
        track_target(lambda step: jnp.where(step == 7, 0.25, 1.0)),
    )
    params = {"w": jnp.ones(2), "b": jnp.ones(2)}
    state = tx.init(params)
    updates, own = tx.update({"w": jnp.ones(2), "b": jnp.ones(2)}, state, params)
    assert all(jnp.all(u == 0) for u in updates.values()) and jnp.all(target_of(own)["w"] == 1)
    updates, told = tx.update({"w": jnp.ones(2), "b": jnp.ones(2)}, state, params, step=7)
    assert all(jnp.all(u == -1) for u in updates.values()) and jnp.all(target_of(told)["w"] == 0.25)
