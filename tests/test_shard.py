"""What lies on which device, and what travels between them; parameters split among devices (config.train.shard)."""

import functools

import jax
import numpy as np
import pytest

from ssl_jax import checkpoint, hlo, parallel, train
from ssl_jax.errors import UserError
from ssl_jax.testing.tiny import Images, set_up, tiny_config


def slow(name):
    return pytest.param(name, marks=pytest.mark.slow)


def losses_of(config, source, mesh, steps=20):
    setup = set_up(config, source)
    state = train.init_state(setup, 0, mesh)
    placed = (parallel.state_sharding(mesh, state), parallel.replicated(mesh))
    step_fn, losses = jax.jit(train.make_step(setup, config, mesh), out_shardings=placed), []
    for step in range(steps):
        index = np.arange(step * 16, step * 16 + 16) % 48
        batch = {"image": source.images[index], "index": index.astype(np.int32), "label": source.labels[index]}
        state, metrics = step_fn(state, jax.device_put(batch, parallel.batch_sharding(mesh)))
        losses.append(float(metrics["loss"]))
    return state, losses


@pytest.fixture
def small_parts(monkeypatch):
    """Arrays as small as those of the tests are split, too."""
    monkeypatch.setattr(parallel, "SMALL", 32)
    monkeypatch.setattr(parallel, "LARGE", 512)


@pytest.mark.parametrize("name", ["byol", "instance_discrimination", slow("moco"), slow("mae")])
def test_split_parameters_train_as_whole_ones(name, small_parts):
    """On 4 devices, parameters split in two and the largest arrays in four."""
    config, source = tiny_config(name), Images()
    _, wanted = losses_of(config, source, parallel.make_mesh(1, 16))
    state, losses = losses_of(config, source, parallel.make_mesh(4, 16, shard=2))
    np.testing.assert_allclose(losses, wanted, rtol=0, atol=1e-5)
    parts = {x.size // x.addressable_shards[0].data.size for x in jax.tree.leaves(state)}
    assert parts == {1, 2, 4}
    assert all(x.size <= 32 or x.addressable_shards[0].data.size < x.size for x in jax.tree.leaves(state.params))


@pytest.mark.parametrize("name", ["instance_discrimination", slow("byol"), slow("moco"), slow("mae")])
def test_what_is_split_is_saved_and_restored_on_one_device(name, small_parts, tmp_path):
    setup = set_up(tiny_config(name), Images())
    split = train.init_state(setup, 0, parallel.make_mesh(4, 16, shard=2))
    checkpoint.save(tmp_path, 20, split, 1)
    one = parallel.replicated(parallel.make_mesh(1, 16))
    like = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), one), split)
    restored = checkpoint.restore_latest(tmp_path, like, pytest.fail)
    for found, saved in zip(jax.tree.leaves(restored), jax.tree.leaves(split), strict=True):
        assert len(found.devices()) == 1 and len(saved.devices()) == 4
        np.testing.assert_array_equal(found, saved)


def test_a_part_that_is_no_divisor_is_one_line():
    with pytest.raises(UserError, match=r"config.train.shard=3: allowed: a divisor of the 4 devices"):
        parallel.make_mesh(4, 16, shard=3)


EMBEDDINGS = 16 * 8 * 4  # bytes: a batch of projections


def compiled(name, devices=4, **changes):
    """The program of a step on so many devices."""
    config, source, mesh = tiny_config(name, **changes), Images(), parallel.make_mesh(devices, 16)
    setup = set_up(config, source)
    shapes = jax.eval_shape(lambda: train.init_state(setup, 0))
    state = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        parallel.state_sharding(mesh, shapes),
    )
    batch = {"image": source.images[:16], "index": np.arange(16, dtype=np.int32), "label": source.labels[:16]}
    step = jax.jit(train.make_step(setup, config, mesh), out_shardings=parallel.replicated(mesh))
    return step.lower(state, jax.device_put(batch, parallel.batch_sharding(mesh))).compile()


@functools.cache
def travelling(name, **changes):
    """{kind: [bytes]} of the collectives in a step on 4 devices."""
    kinds = {}
    for kind, runs, size in hlo.collectives(hlo.parse(compiled(name, **changes).as_text())):
        kinds.setdefault(kind, []).extend([size] * runs)
    return kinds


@pytest.mark.parametrize("bn_group", [0, 4])
@pytest.mark.parametrize("name", ["moco", slow("looc")])
def test_shuffled_keys_are_embedded_once(name, bn_group):
    """Each device embeds its share of a shuffled batch: the products of the step are divided among the devices."""
    alone, share = (compiled(name, devices, train__bn_group=bn_group).cost_analysis()["flops"] for devices in (1, 4))
    assert share < 0.35 * alone


@pytest.mark.parametrize(
    ("name", "gathered"),
    [
        ("byol", []),
        pytest.param("dino", [], marks=pytest.mark.slow),
        ("rotation", []),
        ("simclr", [2 * EMBEDDINGS]),
        ("moco_v3", [EMBEDDINGS] * 2),
    ],
)
def test_images_stay_on_their_device(name, gathered):
    """Sums are all that is exchanged (gradients, statistics), and the embeddings that a loss compares, once."""
    kinds = {kind: sizes for kind, sizes in travelling(name).items() if kind != "all-reduce"}
    assert kinds == ({"all-gather": gathered} if gathered else {})


def test_groups_of_batch_norm_on_one_device_need_no_exchange():
    """What is left: gradients and running statistics, loss and metrics, the gradient of the gathered embeddings."""
    everywhere, here = travelling("simclr")["all-reduce"], travelling("simclr", train__bn_group=4)["all-reduce"]
    networks = 2 + 1  # layers with BatchNorm: the encoder's two, the projector's
    assert len(here) <= len(everywhere) - 2 * networks + 1, (here, everywhere)
