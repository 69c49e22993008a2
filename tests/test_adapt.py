"""Going on from given weights: adapters, layers that learn less or not at all, and what is forgotten."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from ssl_jax import train
from ssl_jax.config import Model, Optim
from ssl_jax.encoder import load_encoder
from ssl_jax.errors import UserError
from ssl_jax.models import build_encoder, low_rank, merge
from ssl_jax.network import hold
from ssl_jax.report.record import read_run
from ssl_jax.report.training import forgotten, health
from ssl_jax.run_folder import RunFolder
from ssl_jax.study import encoders_of_runs
from ssl_jax.testing.tiny import Images, tiny_config
from ssl_jax.transforms import layers, optimizer

VIT = {"model__name": "vit_tiny", "model__depth": 2, "model__width": 0.25, "model__patch": 4}
IMAGES = Images(n=24, size=8, channels=3)


def run(tmp_path, name, method="simclr", **changes):
    config = tiny_config(method, **{**VIT, "train__duration": "3 steps", "train__batch": 12, **changes})
    return train.fit(config, tmp_path / name, IMAGES)


def equal(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: bool((np.asarray(x) == np.asarray(y)).all()), a, b))


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """(folder of a run, its encoder), from whose weights others go on."""
    folder = tmp_path_factory.mktemp("adapt")
    return folder / "start", run(folder, "start")


def test_no_gradient_is_computed_for_layers_that_are_held():
    network, x = build_encoder(Model(name="vit_tiny", depth=3, width=0.25, patch=4), 3, 8), IMAGES.images[:4] / 255.0
    params, stats = network.init(jax.random.key(0), x)

    def gradient(network):
        function = jax.grad(lambda p: jnp.sin(network.apply(p, stats, x, train=True)[0]).sum())
        return function(params), jax.jit(function).lower(params).compile().cost_analysis()["flops"]

    whole, flops = gradient(network)
    held, fewer = gradient(hold(network, 3))
    for name, grads in held.items():
        same = name in ("blocks_2", "norm")
        assert equal(grads, whole[name]) if same else not any(np.any(leaf) for leaf in jax.tree.leaves(grads)), name
    assert fewer < 0.6 * flops  # the passes forward, and back through one block of three


def test_adapters_start_as_the_network_itself_and_only_they_have_a_gradient():
    network = build_encoder(Model(name="vit_tiny", depth=2, width=0.25, patch=4), 3, 8)
    adapted, x = low_rank(network, 3), jnp.asarray(np.random.default_rng(0).random((2, 8, 8, 3)), jnp.float32)
    params, stats = adapted.init(jax.random.key(0), x)
    full, inner = merge(params, stats)
    assert equal(full, stats["base"])
    y, after = adapted.apply(params, stats, x, train=True)
    np.testing.assert_array_equal(y, network.apply(full, inner, x, train=True)[0])
    assert equal(after, stats)
    shapes = {"/".join(path): leaf.shape for path, leaf in flatten_dict(params).items()}
    assert len(shapes) == 2 * 2 * 4 and shapes["blocks_1/mlp_fc1/kernel/a"] == (48, 3)
    assert shapes["blocks_1/mlp_fc1/kernel/b"] == (3, 192)
    # W + A B, by hand
    params["blocks_0"]["attn_proj"]["kernel"]["b"] += 0.1
    a = np.asarray(params["blocks_0"]["attn_proj"]["kernel"]["a"], np.float64)
    changed = np.asarray(merge(params, stats)[0]["blocks_0"]["attn_proj"]["kernel"])
    base = np.asarray(stats["base"]["blocks_0"]["attn_proj"]["kernel"])
    np.testing.assert_allclose(changed, base + a @ np.full((3, 48), 0.1), rtol=1e-5, atol=1e-6)
    with pytest.raises(
        UserError, match=r"config.model.lora=2: adapts the blocks of a ViT; allowed for other networks: 0"
    ):
        low_rank(build_encoder(Model(name="resnet_thin"), 3, 8), 2).init(jax.random.key(0), x)


@pytest.mark.parametrize("parts", [0, 4])  # three parts: a sum of three equal numbers, divided by three, may differ
def test_a_run_trains_the_adapters_and_exports_them_merged(parts, start, tmp_path):
    folder, before = start
    made = run(tmp_path, "lora", model__init=str(folder), model__lora=2, train__micro_batch=parts, optim__lr=1.0)
    flat, old = flatten_dict(made.params), flatten_dict(before.params)
    changed = {path for path in old if not (np.asarray(flat[path]) == np.asarray(old[path])).all()}
    assert changed and all(path[0].startswith("blocks_") and path[-1] == "kernel" for path in changed)
    for path in changed:
        singular = np.linalg.svd(np.asarray(flat[path], np.float64) - np.asarray(old[path]), compute_uv=False)
        assert singular[2] < 1e-5 * singular[0]
    images = IMAGES.load_many(range(5))
    again = load_encoder(tmp_path / "lora")
    np.testing.assert_allclose(again.embed(images), made.embed(images), atol=1e-6)
    assert again.about["model"]["lora"] == 2


def test_adapters_of_a_target_follow_and_a_killed_run_continues(start, tmp_path):
    folder, _ = start
    flags = {"model__init": str(folder), "model__lora": 2, "train__duration": "4 steps", "train__save_every": "2 steps"}
    flags |= {"train__keep": 9}
    whole = run(tmp_path, "run", "byol", **flags)
    shutil.rmtree(tmp_path / "run" / "encoder")
    folder = RunFolder(tmp_path / "run").checkpoints
    [last] = [path for path in folder.iterdir() if path.name.endswith("4")]
    shutil.rmtree(last)
    assert equal(run(tmp_path, "run", "byol", **flags).params, whole.params)


@pytest.mark.parametrize(
    ("model", "wanted", "count"),
    [
        (
            {"name": "vit_tiny", "depth": 3},
            {"cls_token": 0, "patch_embed_proj": 0, "blocks_0": 1, "blocks_2": 3, "norm": 4},
            4,
        ),
        ({"name": "resnet18"}, {"conv1": 0, "bn1": 0, "layer1_0": 1, "layer1_1": 2, "layer4_1": 8}, 9),
    ],
)
def test_layers_of_encoders(model, wanted, count):
    network = build_encoder(Model(**model), 3, 32)
    params, _ = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    found, last = layers(params)
    assert last == count and {name: found[name] for name in wanted} == wanted and set(found) == set(params)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_layer_decay_is_a_learning_rate_for_each_layer(name):
    rng = np.random.default_rng(0)
    modules = ["cls_token", "blocks_0", "blocks_1", "norm"]

    def draw():
        encoder = {module: {"w": jnp.asarray(rng.normal(size=(3, 2)))} for module in modules}
        return {"encoder": encoder, "head": {"w": jnp.ones((2, 2))}}

    params, grads = draw(), draw()
    optim = Optim(name=name, lr=0.1, lr_batch=0, weight_decay=0.05, layer_decay=0.5, schedule="constant")

    def after(optim, rate, steps=3):
        tx, now = optimizer(optim, lambda step: rate, optax.identity(), 10), params
        state = tx.init(now)
        for step in range(steps):
            updates, state = tx.update(grads, state, now, step=jnp.int32(step))
            now = optax.apply_updates(now, updates)
        return now

    found = after(optim, 0.1)
    for module, factor in {"cls_token": 0.125, "blocks_0": 0.25, "blocks_1": 0.5, "norm": 1.0}.items():
        alone = after(Optim(**{**vars(optim), "layer_decay": 1.0}), 0.1 * factor)
        np.testing.assert_allclose(found["encoder"][module]["w"], alone["encoder"][module]["w"], rtol=1e-6)
    np.testing.assert_allclose(
        found["head"]["w"], after(Optim(**{**vars(optim), "layer_decay": 1.0}), 0.1)["head"]["w"]
    )


def test_frozen_layers_keep_their_weights_and_the_rest_learns(start, tmp_path):
    folder, before = start
    made = run(tmp_path, "frozen", model__init=str(folder), optim__freeze=2, optim__lr=1.0)
    same = {name: equal(made.params[name], before.params[name]) for name in before.params}
    assert same == {"cls_token": True, "patch_embed_proj": True, "blocks_0": True, "blocks_1": False, "norm": False}
    # The encoder that comes back is free: fine-tuning trains all of it.
    gradient = jax.grad(
        lambda p: jnp.sin(made.network.apply(p, made.stats, IMAGES.images[:2] / 255, train=True)[0]).sum()
    )
    assert all(any(np.any(leaf) for leaf in jax.tree.leaves(g)) for g in gradient(made.params).values())
    with pytest.raises(UserError, match=r"config.optim.freeze=9: more layers than the encoder has; allowed: 0 to 3"):
        run(tmp_path, "too many", optim__freeze=9)


def test_what_the_loaded_weights_could_is_known_and_forgetting_is_said(start, tmp_path):
    folder, _ = start
    run(tmp_path, "on", model__init=str(folder), eval__every="1 steps")
    record = read_run(RunFolder(tmp_path / "on"))
    assert [check["step"] for check in record.checks] == [0, 1, 2, 3]
    first = {**record.checks[0], "knn_accuracy": 0.9}
    lost = record._replace(checks=[first, {**record.checks[-1], "knn_accuracy": 0.5}])
    assert "is 50.0 %, and was 90.0 % before the first step" in forgotten(lost)
    assert health(lost).line.startswith("The encoder has forgotten")
    assert not forgotten(record._replace(checks=[first, first]))
    lines = (tmp_path / "on" / "metrics.jsonl").read_text().splitlines()
    assert sum(json.loads(line)["step"] == 0 for line in lines) == 1


def test_an_arm_of_a_study_takes_weights_from_a_file(start):
    folder, before = start
    config, file = tiny_config("simclr"), folder / "encoder" / "encoder.safetensors"
    study = dataclasses.replace(config.study, arms={"loaded": {"from": str(file)}, "run": {"from": str(folder)}})
    found = encoders_of_runs(dataclasses.replace(config, study=study), IMAGES)
    images = IMAGES.load_many(range(4))
    for arm in ("loaded", "run"):
        np.testing.assert_allclose(found[arm].embed(images), before.embed(images), atol=1e-6)
