"""What SwAV, DINO, TiCo and VICRegL remember from step to step, and how they name their collapse."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ssl_jax import checkpoint, losses, train
from ssl_jax.augment import make_views, origins
from ssl_jax.methods.base import Context, State, entropies, entropy_collapse
from ssl_jax.parallel import make_mesh
from ssl_jax.testing.tiny import Images, batch_of, set_up, start, tiny_config
from ssl_jax.transforms import by_name, frozen, target_of, track_target

# One step for all tests of a method.
TICO = tiny_config("tico", method__beta=0.7)
DINO = tiny_config("dino", method__centre_momentum=0.8)
SWAV = tiny_config("swav", method__queue_start=0.0, method__freeze_steps=3)


def steps(config, count):
    """For each step: the state before and after it, its metrics, and what the method's forward gave."""
    source = Images()
    state, step_fn, mesh = start(config, source, watch=True)
    for step in range(count):
        before, (state, metrics) = state, step_fn(state, batch_of(config, source, step, mesh))
        yield before, state, metrics, metrics["outputs"]


@pytest.mark.parametrize("config", [TICO, DINO, SWAV], ids=lambda config: config.method_name)
def test_the_loss_sees_the_state_of_before_and_the_step_updates_it_after(config):
    """Covariance, centre and queue: the loss of a step is that of the old ones; the new ones hold this batch."""
    loss = jax.jit(set_up(config, Images()).method.loss)
    for before, after, metrics, outputs in steps(config, 3):
        ctx = Context(before.step, metrics["key"], before.params)
        np.testing.assert_allclose(metrics["loss"], loss(outputs, before.model_state, {}, ctx)[0], rtol=1e-4)
        jax.tree.map(np.testing.assert_array_equal, metrics["target"], target_of(before.opt_state))
        old, new = before.model_state.memory, after.model_state.memory
        if config.method_name == "tico":
            z = np.asarray(outputs["z"], np.float64)
            z /= np.linalg.norm(z, axis=1, keepdims=True)
            want = 0.7 * old["covariance"] + 0.3 * np.mean([np.outer(x, x) for x in z], axis=0)
            np.testing.assert_allclose(new["covariance"], want, rtol=1e-4, atol=1e-6)
        elif config.method_name == "dino":
            mean = sum(np.asarray(t, np.float64).mean(axis=0) for t in outputs["teacher"]) / 2
            want = 0.8 * np.asarray(old["centre"]) + 0.2 * mean
            np.testing.assert_allclose(new["centre"], want, rtol=1e-4, atol=1e-6)
        else:
            want = np.concatenate([outputs["z"][:2], old["queue"]], axis=1)[:, :24]
            np.testing.assert_allclose(new["queue"], want, rtol=1e-4, atol=1e-5)


def test_prototypes_have_norm_one_before_each_step_and_stay_while_frozen():
    first = None
    for step, (before, *_) in enumerate(steps(SWAV, 6)):
        prototypes = np.asarray(before.params["prototypes"])
        first = prototypes if first is None else first
        np.testing.assert_allclose(np.linalg.norm(prototypes, axis=1), 1, rtol=1e-6)
        moved = np.abs(prototypes - first).max()
        assert moved < 1e-6 if step <= 3 else moved > 1e-4, step


def test_swav_uses_the_queue_once_it_is_full_and_the_run_is_far_enough():
    """Queue of 24, batches of 10: full after 3 steps; with queue_start 0.5 of 20 steps it fills from step 10 on."""
    config = tiny_config("swav", method__queue_start=0.0, train__batch=10)
    late = tiny_config("swav", method__queue_start=0.5, train__batch=10)
    generator = np.random.default_rng(0)

    def unit(*shape):
        x = generator.normal(size=shape)
        return np.float32(x / np.linalg.norm(x, axis=-1, keepdims=True))

    prototypes, z, queue = unit(6, 8), unit(2, 10, 8), unit(2, 24, 8)

    @jax.jit
    def wanted():
        scores = [v @ prototypes.T for v in z]
        alone = [losses.sinkhorn(s, epsilon=0.05, iterations=3) for s in scores]
        shared = [
            losses.sinkhorn(jnp.concatenate([q @ prototypes.T, s]), epsilon=0.05, iterations=3)[24:]
            for q, s in zip(queue, scores)
        ]
        return tuple(losses.swav(scores, q, temperature=0.1) for q in (alone, shared))

    without, using = wanted()
    assert abs(without - using) > 1e-3
    for settings, cases in ((config, {2: without, 3: using}), (late, {3: without, 12: without, 13: using})):
        loss = jax.jit(set_up(settings, Images()).method.loss)
        for step, want in cases.items():
            ctx = Context(jnp.int32(step), None, {"prototypes": prototypes})
            value, _ = loss({"z": list(z)}, State({}, {"queue": queue}), {}, ctx)
            np.testing.assert_allclose(value, want, rtol=1e-5, err_msg=str(step))


def test_what_swav_and_dino_hold_at_first_has_no_momentum_yet():
    """main_swav.py and DINO's utils.py take its gradient away: the optimizer leaves it out altogether."""
    assert set_up(SWAV, Images()).method.frozen == {"prototypes": 3}
    for before, after, *_ in itertools.islice(steps(SWAV, 2), 2):
        states = [optax.tree.get_all_with_path(s.opt_state, "trace") for s in (before, after)]
        held = [value["prototypes"] for _, value in states[1] if hasattr(value.get("prototypes"), "shape")]
        moving = [jax.tree.leaves(value["projector"]) for _, value in states[1] if "projector" in value]
        assert held and not any(np.any(value) for value in held)
        assert any(np.any(leaf) for leaves in moving for leaf in leaves)


def test_byol_s_heads_end_without_a_bias():
    """deepmind-research, byol/utils/networks.py: the last Linear has with_bias=False."""
    setup = set_up(tiny_config("byol"), Images())
    views = [jnp.zeros((2, v.size, v.size, 1)) for v in setup.views]
    params, _ = jax.eval_shape(setup.method.init, jax.random.key(0), views)
    assert set(params["projector"]["linear2"]) == set(params["predictor"]["linear2"]) == {"kernel"}


def test_swav_fills_the_queue_from_its_start_on():
    """With queue_start 0.5 of 20 steps, nothing is remembered before step 10 (main_swav.py makes it in that epoch)."""
    method = set_up(tiny_config("swav", method__queue_start=0.5, train__batch=10), Images()).method
    queue, z = jnp.zeros((2, 24, 8)), np.random.default_rng(0).normal(size=(2, 10, 8)).astype(np.float32)
    after = jax.jit(method.post_update)
    for step in (0, 9, 10, 11):
        ctx = Context(jnp.int32(step), None, {"prototypes": jnp.ones((6, 8))})
        queue = after({"z": list(z + step)}, State({}, {"queue": queue}), ctx)[1]["queue"]
        want = [z + s for s in range(step, 9, -1)]
        rows = sum(len(w[0]) for w in want)
        np.testing.assert_array_equal(queue[:, rows:], 0)
        np.testing.assert_allclose(queue[:, :rows], np.concatenate(want, axis=1) if want else queue[:, :0])


def test_swav_without_a_queue_is_saved_and_assigns_each_batch_alone(tmp_path):
    config = tiny_config("swav", method__queue=0)
    ((before, after, metrics, outputs),) = steps(config, 1)

    @jax.jit
    def alone(z, prototypes):
        scores = [v @ prototypes.T for v in z]
        q = [losses.sinkhorn(s, epsilon=0.05, iterations=3) for s in scores[:2]]
        return losses.swav(scores, q, temperature=0.1)

    np.testing.assert_allclose(metrics["loss"], alone(outputs["z"], before.params["prototypes"]), rtol=1e-5)
    checkpoint.save(tmp_path, 1, after, keep=1)
    restored = checkpoint.restore_latest(tmp_path, before, pytest.fail)
    jax.tree.map(np.testing.assert_array_equal, restored, after)


def test_dino_exports_the_teacher_and_freezes_its_last_layer_for_an_epoch():
    """48 images in batches of 16: the epoch has 3 steps."""
    first = None
    for step, (before, state, *_) in enumerate(steps(DINO, 5)):
        first = np.asarray(before.params["last"]) if first is None else first
        assert np.array_equal(state.params["last"], first) == (step < 3), step
    method, target = set_up(DINO, Images()).method, target_of(state.opt_state)
    params, stats = method.encoder(state.params, target, state.model_state)
    assert params is target["encoder"] and stats is state.model_state.stats["target"]["encoder"]
    moved = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - b).max(), params, state.params["encoder"])
    assert max(jax.tree.leaves(moved)) > 0


def test_dino_teacher_temperature_warms_up():
    """Targets of one run at 0.01 to 0.05 over 10 of 20 steps: at steps 0, 5 and 30 those of 0.01, 0.03 and 0.05."""
    config = tiny_config("dino", method__warmup=0.5, method__warmup_temperature=0.01, method__teacher_temperature=0.05)
    method = set_up(config, Images()).method
    logits = [np.float32(np.random.default_rng(v).uniform(-0.1, 0.1, (4, 8))) for v in range(2)]
    outputs, centre = {"student": logits, "teacher": logits}, np.zeros(8, np.float32)
    loss, by_temperature = jax.jit(method.loss), jax.jit(functools.partial(losses.dino, temperature=0.1))
    for step, temperature in ((0, 0.01), (5, 0.03), (30, 0.05)):
        value, _ = loss(outputs, State({}, {"centre": centre}), {}, Context(jnp.int32(step), None, None))
        want = by_temperature(logits, logits, centre, teacher_temperature=temperature)
        np.testing.assert_allclose(value, want, rtol=1e-5)


def test_freeze_keeps_named_parameters_and_the_target_follows_what_remains():
    first = by_name(lambda steps: frozen(optax.sgd(0.1), steps) if steps else optax.sgd(0.1), {"a": 2})
    tx = optax.chain(first, track_target(0.5))
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    state = tx.init(params)
    seen = []

    @jax.jit
    def step(params, state):
        updates, state = tx.update({"a": jnp.ones(2), "b": jnp.ones(2)}, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(4):
        params, state = step(params, state)
        seen.append((float(params["a"][0]), float(params["b"][0])))
    np.testing.assert_allclose(seen, [(1, 0.9), (1, 0.8), (0.9, 0.7), (0.8, 0.6)], rtol=1e-6)
    assert target_of(state)["a"][0] == pytest.approx(0.5 * (0.5 + 0.5 * 0.9) + 0.5 * 0.8)


def test_vicregl_positions_equal_loops_on_boxes_with_a_flip():
    boxes = {
        "top": np.array([0.0, 10.0]),
        "left": np.array([0.0, 4.0]),
        "height": np.array([6.0, 12.0]),
        "width": np.array([8.0, 20.0]),
        "flip": np.array([False, True]),
        "source": np.array([[24, 24], [24, 24]]),
    }
    made = np.asarray(jax.jit(origins, static_argnums=(1, 2))(boxes, 3, 4))
    for b, r, c in itertools.product(range(2), range(3), range(4)):
        column = 3 - c if boxes["flip"][b] else c
        x = boxes["left"][b] + (column + 0.5) * boxes["width"][b] / 4
        y = boxes["top"][b] + (r + 0.5) * boxes["height"][b] / 3
        np.testing.assert_allclose(made[b, r * 4 + c], (x, y), rtol=1e-6)


def test_vicregl_positions_ignore_flips_if_asked():
    images = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), np.uint8)
    found = []
    for flips in (True, False):
        setup = set_up(tiny_config("vicregl", method__flips=flips, augment__flip=0.5), Images())
        views, drawn = make_views(setup.views, setup.method.shares)(jax.random.key(1), jnp.asarray(images))
        params, state = jax.jit(setup.method.init)(jax.random.key(0), views)
        batch = {"views": views, "drawn": drawn}
        outputs, _ = jax.jit(setup.method.forward)(params, None, state, batch, jax.random.split(jax.random.key(2), 8))
        found.append(np.asarray(outputs["positions"][0]))
    flipped = np.asarray(drawn[0]["flip"])
    assert flipped.any() and not flipped.all()
    np.testing.assert_array_equal(found[0][~flipped], found[1][~flipped])
    side = round(found[0].shape[1] ** 0.5)
    if side > 1:  # a row of places is read from the other end
        rows = [f[flipped].reshape(-1, side, side, 2) for f in found]
        np.testing.assert_allclose(rows[0], rows[1][:, :, ::-1], rtol=1e-5)
        assert not np.allclose(rows[0], rows[1])
    else:
        raise AssertionError("a feature map of one place cannot tell")


def test_settings_are_checked():
    from ssl_jax.errors import UserError

    with pytest.raises(
        UserError, match=r"config.method.matches=\(20,\): wrong type \(tuple\); allowed: 2 values, each int, 1 or more"
    ):
        set_up(tiny_config("vicregl", method__matches=(20,)), Images())
    for name in ("vicreg", "vicregl", "barlow_twins"):
        config, source, mesh = tiny_config(name, train__batch=1), Images(), make_mesh(1, 1)
        setup = set_up(config, source)
        state = jax.eval_shape(lambda s=setup: train.init_state(s, 0))
        with pytest.raises(UserError, match="gets one image at a time; allowed: 2 or more"):
            jax.eval_shape(train.make_step(setup, config, mesh), state, batch_of(config, source, 0, mesh))


def test_entropies_and_their_words():
    uniform, one, spread = np.full((4, 4), 0.25), np.tile(np.eye(4)[:1], (4, 1)), np.eye(4)
    measure = jax.jit(entropies)
    words = entropy_collapse(4, uniform="A", single="B")
    for p, image, mean, said in (
        (uniform, math.log(4), math.log(4), "A"),
        (one, 0, 0, "B"),
        (spread, 0, math.log(4), ""),
    ):
        metrics = {k: float(v) for k, v in measure([p]).items()}
        assert metrics == pytest.approx({"target_entropy": image, "mean_target_entropy": mean}, abs=1e-5)
        assert words(metrics).endswith(said) and bool(words(metrics)) == bool(said)
