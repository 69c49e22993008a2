"""A frozen encoder as the teacher: read from a run, never changed, and the same after a resume."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_losses import numeric_gradient, unit

from ssl_jax import encoder, train
from ssl_jax.config import Model, default, resolve
from ssl_jax.errors import UserError
from ssl_jax.methods.distill import distance
from ssl_jax.testing.tiny import Images, batch_of, start, tiny_config, views_of

MODEL = Model(name="vit_tiny", width=1 / 16, depth=1, patch=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher")
    encoder.export(path, encoder.random_encoder(MODEL, 8, 1, seed=3))
    return str(path)


def taught(folder, **changes):
    config = tiny_config("distill", **{"method__random_teacher": False, "method__teacher": folder, **changes})
    return dataclasses.replace(config, model=dataclasses.replace(config.model, name="resnet_thin"))


def distance_by_hand(p, t):
    mean = [sum(float(row[d]) for row in t) / len(t) for d in range(t.shape[1])]
    return sum(1 - float(unit(a) @ unit(b - np.array(mean))) for a, b in zip(p, t)) / len(p)


def test_the_loss_equals_loops_and_its_gradient_differences():
    generator = np.random.default_rng(0)
    p, t = generator.normal(size=(5, 4)), generator.normal(size=(5, 4)) + 3
    with jax.enable_x64(True):
        value, (into_p, into_t) = jax.jit(jax.value_and_grad(distance, argnums=(0, 1)))(p, t)
    np.testing.assert_allclose(value, distance_by_hand(p, t), rtol=1e-12)
    np.testing.assert_allclose(into_p, numeric_gradient(distance_by_hand, (p, t), 0), rtol=1e-6, atol=1e-9)
    assert not np.any(into_t)


def test_the_teacher_is_the_exported_encoder_and_stays_it(folder):
    config, source = taught(folder, method__patches=0.5), Images()
    state, step_fn, mesh = start(config, source, watch=True)
    before = jax.device_get(state.model_state.memory)
    jax.tree.map(np.testing.assert_array_equal, before["teacher"], encoder.load_encoder(folder).params)
    images = views_of(train.set_up(config, source), source.images[:16])["views"][0]
    found = encoder.load_encoder(folder)
    losses = []
    for step in range(12):
        state, metrics = step_fn(state, batch_of(config, source, step, mesh))
        losses.append(float(metrics["loss"]))
    whole, patches = metrics["outputs"]["whole"], metrics["outputs"]["patches"]
    assert whole[0].shape == whole[1].shape == (16, found.width) and patches[0].shape == patches[1].shape
    view = metrics["batch"]["views"][0]
    want, maps = found.network.apply(found.params, found.stats, view, train=False, dense=True)[0]
    np.testing.assert_allclose(whole[1], want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(patches[1].reshape(maps.shape), maps, rtol=1e-4, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state.model_state.memory))
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) and images.shape == view.shape


def test_the_teacher_gets_no_gradient_and_can_compute_in_bfloat16(folder):
    config = taught(folder, method__dtype="bfloat16")
    setup = train.set_up(config, Images())
    state = train.init_state(setup, 0)
    batch = views_of(setup, Images().images[:4])

    def loss(teacher):
        memory = {**state.model_state.memory, "teacher": teacher}
        outputs, _ = setup.method.forward(state.params, None, state.model_state._replace(memory=memory), batch, None)
        return setup.method.loss(outputs, state.model_state, {}, None)[0], outputs

    (value, outputs), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(state.model_state.memory["teacher"])
    assert np.isfinite(value) and not any(np.any(g) for g in jax.tree.leaves(gradient))
    found = encoder.load_encoder(folder)
    exact = found.network.apply(found.params, found.stats, batch["views"][0], train=False)[0]
    off = np.abs(np.asarray(outputs["whole"][1]) - np.asarray(exact)).max()
    assert 1e-5 < off < 0.2 and outputs["whole"][1].dtype == jnp.float32


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method__teacher": ""}, "config.method.teacher: has to be given"),
        ({"method__teacher": "/nowhere"}, "/nowhere: no encoder.json"),
        ({"method__random_teacher": True}, "not together with config.method.random_teacher"),
        ({"augment__size": 6}, "takes images of 8 px, the views have 6; .*config.augment.size=8"),
    ],
)
def test_mistakes_are_one_line(folder, changes, words):
    with pytest.raises(UserError, match=words) as error:
        train.init_state(train.set_up(taught(folder, **changes), Images()), 0)
    assert "\n" not in str(error.value)


def test_other_channels_are_named(folder):
    with pytest.raises(UserError, match="takes images of 1 channels, the views have 3"):
        train.init_state(train.set_up(taught(folder), Images(channels=3)), 0)


def test_a_relative_folder_becomes_absolute(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = default("distill")
    config.method.teacher = "runs/a"
    assert resolve(config).method.teacher == str(tmp_path / "runs/a")


def test_weights_in_a_file_teach_too(folder):
    file = taught(f"{folder}/encoder.safetensors")
    memory = [train.init_state(train.set_up(c, Images()), 0).model_state.memory for c in (file, taught(folder))]
    jax.tree.map(np.testing.assert_array_equal, *jax.device_get(memory))
