"""What SwAV, DINO, TiCo and VICRegL remember from step to step, and how they name their collapse."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ssl_jax import losses, train
from ssl_jax.augment import make_views, resolve_views
from ssl_jax.methods.base import Context, State, entropies, entropy_collapse
from ssl_jax.methods.vicregl import positions
from ssl_jax.testing.tiny import Images, batch_of, set_up, start, tiny_config, tiny_encoder
from ssl_jax.train.step import keys_at
from ssl_jax.transforms import freeze, target_of, track_target

FORWARD = {}  # what was compiled once


def outputs_of(config, state, step):
    """What the method's forward gives in this step of `make_step`, from the same random numbers, and its context."""
    source = Images()
    if repr(config) not in FORWARD:
        setup = set_up(config, source)
        FORWARD[repr(config)] = setup.method, jax.jit(make_views(setup.views)), jax.jit(setup.method.forward)
    method, augment, forward = FORWARD[repr(config)]
    key = jax.random.fold_in(jax.random.key(config.train.seed), step)
    key_views, key_forward, key_loss = jax.random.split(key, 3)
    batch = batch_of(config, source, step, start(config, source)[2])
    views, drawn = augment(key_views, batch["image"])
    inputs = {"views": views, "drawn": drawn}
    target = target_of(state.opt_state)
    rng = keys_at(key_forward, jnp.arange(16))
    ctx = Context(state.step, key_loss, state.params)
    return method, forward(state.params, target, state.model_state, inputs, rng)[0], ctx


@pytest.mark.parametrize("name", ["tico", "dino", "swav"])
def test_the_loss_sees_the_state_of_before_and_the_step_updates_it_after(name):
    """Covariance, centre and queue: the loss of a step is that of the old ones; the new ones hold this batch."""
    config = tiny_config(
        name, **{"tico": {"method__beta": 0.7}, "dino": {"method__centre_momentum": 0.8}}.get(name, {})
    )
    if name == "swav":
        config = tiny_config(name, method__queue_start=0.0)
    state, step_fn, mesh = start(config, Images())
    for step in range(3):
        method, outputs, ctx = outputs_of(config, state, step)
        before = state.model_state
        state, metrics = step_fn(state, batch_of(config, Images(), step, mesh))
        np.testing.assert_allclose(metrics["loss"], method.loss(outputs, before, {}, ctx)[0], rtol=1e-4)
        if name == "tico":
            z = np.asarray(losses.normalize(outputs["z"]), np.float64)
            want = 0.7 * before.memory["covariance"] + 0.3 * np.mean([np.outer(x, x) for x in z], axis=0)
            np.testing.assert_allclose(state.model_state.memory["covariance"], want, rtol=1e-4, atol=1e-6)
        elif name == "dino":
            mean = sum(np.asarray(t, np.float64).mean(axis=0) for t in outputs["teacher"]) / 2
            want = 0.8 * before.memory["centre"] + 0.2 * mean
            np.testing.assert_allclose(state.model_state.memory["centre"], want, rtol=1e-4, atol=1e-6)
        else:
            want = np.concatenate([outputs["z"][:2], before.memory["queue"]], axis=1)[:, :24]
            np.testing.assert_allclose(state.model_state.memory["queue"], want, rtol=1e-4, atol=1e-5)


def test_prototypes_have_norm_one_before_each_step_and_stay_while_frozen():
    config = tiny_config("swav", method__freeze_steps=3)
    state, step_fn, mesh = start(config, Images())
    first = np.asarray(state.params["prototypes"])
    for step in range(6):
        norms = jnp.linalg.norm(state.params["prototypes"], axis=1)
        np.testing.assert_allclose(norms, 1, rtol=1e-6)
        moved = np.abs(state.params["prototypes"] - first).max()
        assert moved < 1e-6 if step <= 3 else moved > 1e-4, step
        state, _ = step_fn(state, batch_of(config, Images(), step, mesh))


def test_swav_uses_the_queue_once_it_is_full_and_the_run_is_far_enough():
    """Queue of 24, batches of 10: full after 3 steps; with queue_start 0.5 of 20 steps, used from step 10 on."""
    config = tiny_config("swav", method__queue_start=0.0, train__batch=10)
    late = tiny_config("swav", method__queue_start=0.5, train__batch=10)
    generator = np.random.default_rng(0)

    def unit(*shape):
        return losses.normalize(jnp.asarray(generator.normal(size=shape), jnp.float32))

    prototypes, z, queue = unit(6, 8), unit(2, 10, 8), unit(2, 24, 8)
    outputs, scores = {"z": list(z)}, [v @ prototypes.T for v in z]
    alone = [losses.sinkhorn(s, epsilon=0.05, iterations=3) for s in scores]
    shared = [
        losses.sinkhorn(jnp.concatenate([q @ prototypes.T, s]), epsilon=0.05, iterations=3)[24:]
        for q, s in zip(queue, scores)
    ]
    without, using = (losses.swav(scores, q, temperature=0.1) for q in (alone, shared))
    assert abs(without - using) > 1e-3
    for settings, step, want in (
        (config, 2, without),
        (config, 3, using),
        (late, 3, without),
        (late, 9, without),
        (late, 10, using),
    ):
        method = set_up(settings, Images()).method
        ctx = Context(jnp.int32(step), None, {"prototypes": prototypes})
        value, _ = method.loss(outputs, State({}, {"queue": queue}), {}, ctx)
        np.testing.assert_allclose(value, want, rtol=1e-5, err_msg=str(step))


def test_swav_without_a_queue_is_saved_and_assigns_each_batch_alone(tmp_path):
    config = tiny_config("swav", method__queue=0, train__duration="6 steps", eval__every="0 steps")
    encoder = train.fit(config, tmp_path / "run", Images(), tiny_encoder())
    assert encoder.about["step"] == 6
    state, step_fn, mesh = start(config, Images())
    outputs = outputs_of(config, state, 0)[1]
    scores = [z @ state.params["prototypes"].T for z in outputs["z"]]
    q = [losses.sinkhorn(s, epsilon=0.05, iterations=3) for s in scores[:2]]
    loss = step_fn(state, batch_of(config, Images(), 0, mesh))[1]["loss"]
    np.testing.assert_allclose(loss, losses.swav(scores, q, temperature=0.1), rtol=1e-5)


def test_dino_exports_the_teacher_and_freezes_its_last_layer_for_an_epoch():
    """48 images in batches of 16: the epoch has 3 steps."""
    config = tiny_config("dino")
    state, step_fn, mesh = start(config, Images())
    first = np.asarray(state.params["last"])
    for step in range(5):
        state, _ = step_fn(state, batch_of(config, Images(), step, mesh))
        assert np.array_equal(state.params["last"], first) == (step < 3), step
    method, target = set_up(config, Images()).method, target_of(state.opt_state)
    params, stats = method.encoder(state.params, target, state.model_state)
    assert params is target["encoder"] and stats is state.model_state.stats["target"]["encoder"]
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), params, state.params["encoder"])
    assert max(jax.tree.leaves(moved)) > 0


def test_dino_teacher_temperature_warms_up():
    """Targets of one run at 0.01 to 0.05 over 10 of 20 steps: at steps 0, 5 and 30 those of 0.01, 0.03 and 0.05."""
    config = tiny_config("dino", method__warmup=0.5, method__warmup_temperature=0.01, method__teacher_temperature=0.05)
    method = set_up(config, Images()).method
    logits = [jnp.asarray(np.random.default_rng(v).uniform(-0.1, 0.1, (4, 8)), jnp.float32) for v in range(2)]
    outputs = {"student": logits, "teacher": logits}
    for step, temperature in ((0, 0.01), (5, 0.03), (30, 0.05)):
        ctx = Context(jnp.int32(step), None, None)
        value, _ = method.loss(outputs, State({}, {"centre": jnp.zeros(8)}), {}, ctx)
        want = losses.dino(logits, logits, jnp.zeros(8), temperature=0.1, teacher_temperature=temperature)
        np.testing.assert_allclose(value, want, rtol=1e-5)


def test_freeze_keeps_named_parameters_and_the_target_follows_what_remains():
    tx = optax.chain(optax.sgd(0.1), freeze({"a"}, 2), track_target(0.5))
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    state = tx.init(params)
    seen = []
    for _ in range(4):
        updates, state = tx.update({"a": jnp.ones(2), "b": jnp.ones(2)}, state, params)
        params = optax.apply_updates(params, updates)
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
    }
    made = positions({k: jnp.asarray(v) for k, v in boxes.items()}, 3, 4)
    for b, r, c in itertools.product(range(2), range(3), range(4)):
        column = 3 - c if boxes["flip"][b] else c
        x = boxes["left"][b] + (column + 0.5) * boxes["width"][b] / 4
        y = boxes["top"][b] + (r + 0.5) * boxes["height"][b] / 3
        np.testing.assert_allclose(made[b, r * 4 + c], (x, y), rtol=1e-6)


def test_vicregl_positions_are_where_the_pixels_come_from():
    """Each pixel of an image holds its own column; the column that a place shows is the x of its position."""
    size = 32
    image = np.broadcast_to(np.arange(size) * 7, (size, size)).astype(np.uint8)[None, :, :, None]
    view = tiny_config("vicregl", augment__brightness=0.0).augment
    views = resolve_views(view, 2, size, True)[:2]
    for seed in range(6):
        made, drawn = make_views(views)(jax.random.key(seed), image)
        for shown, box in zip(made, drawn):
            shown = np.asarray(shown[0, :, :, 0]).reshape(4, 8, 4, 8).mean((1, 3)) * 255 / 7 + 0.5
            where = np.asarray(positions(box, 4, 4))[0].reshape(4, 4, 2)
            # Not at the image's border, where there is less to interpolate from.
            np.testing.assert_allclose(shown[:, 1:3], where[:, 1:3, 0], atol=0.15)


def test_settings_are_checked():
    from ssl_jax.errors import UserError

    with pytest.raises(
        UserError, match=r"config.method.matches=\(20,\): wrong type \(tuple\); allowed: 2 values, each int, 1 or more"
    ):
        set_up(tiny_config("vicregl", method__matches=(20,)), Images())
    for name in ("vicreg", "vicregl", "barlow_twins"):
        config = tiny_config(name, train__batch=1)
        with pytest.raises(UserError, match="gets one image at a time; allowed: 2 or more"):
            state, step_fn, mesh = start(config, Images())
            step_fn(state, batch_of(config, Images(), 0, mesh))


def test_entropies_and_their_words():
    uniform, one, spread = jnp.full((4, 4), 0.25), jnp.tile(jnp.eye(4)[:1], (4, 1)), jnp.eye(4)
    words = entropy_collapse(4, uniform="A", single="B")
    for p, image, mean, said in (
        (uniform, math.log(4), math.log(4), "A"),
        (one, 0, 0, "B"),
        (spread, 0, math.log(4), ""),
    ):
        metrics = {k: float(v) for k, v in entropies([p]).items()}
        assert metrics == pytest.approx({"target_entropy": image, "mean_target_entropy": mean}, abs=1e-5)
        assert words(metrics).endswith(said) and bool(words(metrics)) == bool(said)
