"""Encoders and heads: shapes, modes, groups of BatchNorm, precision, initial values, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax.config import Model
from ssl_jax.errors import UserError
from ssl_jax.models import build_encoder, linear, mlp, resolve_model
from ssl_jax.models.build import build
from ssl_jax.models.layers import network as network_of
from ssl_jax.models.resnet import ResNet, basic


def pictures(batch, seed=0):
    return np.random.default_rng(seed).random((batch, 15, 15, 1), np.float32)


def jitted(network):
    return network._replace(apply=jax.jit(network.apply, static_argnames=("train", "groups")))


@functools.cache
def tiny(**changes):
    """A network that compiles fast, of all kinds of layers; images 15x15x1."""
    shape = {
        "widths": (8, 12),
        "depths": (1, 1),
        "block": basic,
        "stem": (3, 1),
        "pool": True,
        "zero_init": False,
        "remat": "none",
    }
    given = {**shape, "mean": (0.5,), "std": (0.25,), "dtype": jnp.float32, "how": "native", **changes}
    made = network_of(ResNet(**given))
    made = jitted(made)
    return made, *made.init(jax.random.key(0), pictures(2))


def shapes(model, channels, size):
    """Shapes of the embedding of 2 images and of all params, without computing anything."""
    network = build_encoder(model, channels, size)
    x = jax.ShapeDtypeStruct((2, size, size, channels), jnp.float32)
    params, stats = jax.eval_shape(network.init, jax.random.key(0), x)
    y, after = jax.eval_shape(functools.partial(network.apply, train=True), params, stats, x)
    assert jax.tree.structure(after) == jax.tree.structure(stats)
    assert y.dtype == jnp.float32
    return y.shape, params


@pytest.mark.parametrize(
    ("name", "features", "size", "channels"),
    [
        ("resnet18", 512, 33, 1),
        ("resnet18", 512, 97, 4),
        ("resnet34", 512, 64, 3),
        ("resnet50", 2048, 65, 3),
        ("resnet_thin", 96, 28, 1),
        ("resnet_thin", 96, 97, 4),
    ],
)
def test_shapes(name, features, size, channels):
    shape, params = shapes(Model(name=name), channels, size)
    assert shape == (2, features)
    stem = (5, 5) if name == "resnet_thin" else (3, 3) if size <= 64 else (7, 7)
    assert params["conv1"]["kernel"].shape == (*stem, channels, 24 if name == "resnet_thin" else 64)


@pytest.mark.parametrize(
    ("name", "count"),  # torchvision's parameters less those of fc
    [("resnet18", 11_689_512 - 513_000), ("resnet34", 21_797_672 - 513_000), ("resnet50", 25_557_032 - 2_049_000)],
)
def test_as_many_parameters_as_torchvision(name, count):
    x = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    params, _ = jax.eval_shape(build_encoder(Model(name=name), 3, 224).init, jax.random.key(0), x)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count


def test_width_multiplies_channels():
    shape, params = shapes(Model(name="resnet50", width=0.5), 3, 224)
    assert shape == (2, 1024)
    assert params["layer1_0"]["conv1"]["kernel"].shape == (1, 1, 32, 32)


@pytest.mark.slow
def test_jit_changes_nothing():
    network, params, stats = tiny(widths=(8,), depths=(1,))
    x = pictures(4)
    jitted = network.apply(params, stats, x, train=True)
    with jax.disable_jit():
        plain = network.apply(params, stats, x, train=True)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(jitted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_statistics_move_only_in_training():
    network, params, stats = tiny()
    x = pictures(8)
    _, after = network.apply(params, stats, x, train=False)
    jax.tree.map(np.testing.assert_array_equal, after, stats)
    _, after = network.apply(params, stats, x, train=True)
    assert jax.tree.all(jax.tree.map(lambda a, b: np.any(a != np.asarray(b)), after, stats))


def test_an_example_stands_alone_in_evaluation():
    network, params, stats = tiny()
    x = pictures(8)
    alone = network.apply(params, stats, x[3:4], train=False)[0]
    np.testing.assert_allclose(network.apply(params, stats, x, train=False)[0][3:4], alone, rtol=1e-5, atol=1e-6)


def test_groups_have_statistics_of_their_own():
    network, params, stats = tiny()
    x = pictures(8)
    apply = network.apply
    y, after = apply(params, stats, x, train=True, groups=2)
    halves = [apply(params, stats, half, train=True) for half in (x[:4], x[4:])]
    np.testing.assert_allclose(y, np.concatenate([half[0] for half in halves]), rtol=1e-4, atol=1e-5)
    averaged = jax.tree.map(lambda a, b: (np.asarray(a) + b) / 2, halves[0][1], halves[1][1])
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), after, averaged)
    assert np.abs(y - apply(params, stats, x, train=True)[0]).max() > 1e-3
    # What is in one half does not reach the other.
    other = np.concatenate([x[:4], pictures(4, seed=1)])
    np.testing.assert_array_equal(apply(params, stats, other, train=True, groups=2)[0][:4], y[:4])


@pytest.mark.parametrize("groups", [0, 3])
def test_groups_must_divide_the_batch(groups):
    network, params, stats = tiny()
    with pytest.raises(UserError, match=rf"config.method.bn_groups={groups}: .* 8 images .*; allowed: 1, 2, 4, 8"):
        network.apply(params, stats, pictures(8), train=True, groups=groups)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_batch_norm_follows_torch_s_conventions(offset):
    """In float64 by hand: biased variance and eps 1e-5 normalise; running statistics move by 0.1, variance unbiased."""
    x = np.random.default_rng(0).normal(offset, 2.0, (64, 6)).astype(np.float32)
    network = jitted(mlp((6,), last_norm="affine", last_bias=False))
    params, stats = network.init(jax.random.key(0), x)
    params["linear1"]["kernel"] = np.eye(6, dtype=np.float32)
    exact, mean, var = x.astype(np.float64), np.zeros(6), np.ones(6)
    for _ in range(40):  # running means near the mean, which is what a large offset needs to be exact
        mean = 0.9 * mean + 0.1 * exact.mean(0)
        var = 0.9 * var + 0.1 * exact.var(0, ddof=1)
        y, stats = network.apply(params, stats, x, train=True)
    wanted = (exact - exact.mean(0)) / np.sqrt(exact.var(0) + 1e-5)
    np.testing.assert_allclose(y, wanted, atol=1e-6 * max(offset, 10))
    np.testing.assert_allclose(stats["bn1"]["mean"], mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(stats["bn1"]["var"], var, rtol=0.2 if offset else 1e-5)


def test_bfloat16_computes_near_float32():
    network, params, stats = tiny()
    half = tiny(dtype=jnp.bfloat16)[0]
    x = pictures(8)

    def loss(params, network):
        y, after = network.apply(params, stats, x, train=True)
        return jnp.square(y).mean(), (y, after)

    run = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    (grads, (y, after)), (grads_half, (y_half, after_half)) = run(params, network), run(params, half)
    assert {leaf.dtype for leaf in jax.tree.leaves((grads_half, y_half, after_half))} == {jnp.dtype("float32")}
    np.testing.assert_allclose(y_half, y, atol=0.05 * np.abs(y).max())
    assert np.abs(y_half - y).max() > 0
    for a, b in zip(jax.tree.leaves(after_half), jax.tree.leaves(after), strict=True):
        np.testing.assert_allclose(a, b, rtol=0.02, atol=0.02)
    flat, flat_half = (np.concatenate([np.ravel(g) for g in jax.tree.leaves(t)]) for t in (grads, grads_half))
    assert flat @ flat_half > 0.98 * np.linalg.norm(flat) * np.linalg.norm(flat_half)


def test_images_are_normalised_inside():
    x = pictures(8)
    network, params, stats = tiny()
    plain = tiny(mean=(0.0,), std=(1.0,))[0]
    same = plain.apply(params, stats, (x - 0.5) / 0.25, train=False)[0]
    np.testing.assert_allclose(network.apply(params, stats, x, train=False)[0], same, rtol=1e-4, atol=1e-6)


def test_initial_values():
    network = build(Model(name="resnet_thin", zero_init=True), 1, 28)
    params, stats = jax.device_get(network.init(jax.random.key(0), np.zeros((1, 28, 28, 1), np.float32)))
    for block in (params[f"layer{stage}_{i}"] for stage in (1, 2, 3) for i in (0, 1)):
        assert (block["bn1"]["scale"] == 1).all() and (block["bn2"]["scale"] == 0).all()
        kernel = block["conv2"]["kernel"]  # kaiming, fan out
        np.testing.assert_allclose(kernel.std(), (2 / (9 * kernel.shape[-1])) ** 0.5, rtol=0.05)
    assert (stats["bn1"]["mean"] == 0).all() and (stats["bn1"]["var"] == 1).all()


def test_two_steps_are_bit_equal():
    network, params, stats = tiny(how="patches")
    x = pictures(32)
    grad = jax.jit(jax.grad(lambda params: jnp.square(network.apply(params, stats, x, train=True)[0]).mean()))
    jax.tree.map(np.testing.assert_array_equal, grad(params), grad(params))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Model(name="resnet19"), r"config.model.name='resnet19': unknown; did you mean 'resnet1?8'\?"),
        (Model(stem="tiny"), "config.model.stem='tiny': unknown; .*imagenet"),
        (Model(dtype="float16"), "config.model.dtype='float16': unknown; .*bfloat16"),
        (Model(conv="fast"), "config.model.conv='fast': unknown; .*patches"),
        (Model(width=0.0), "config.model.width=0.0: allowed: more than 0"),
        (Model(mean=(0.5,)), r"config.model.mean=\(0.5,\): 1 values; allowed: 3"),
        (Model(std=(0.5, 0.2)), r"config.model.std=\(0.5, 0.2\): 2 values; allowed: 3"),
    ],
)
def test_errors_name_the_key(model, message):
    with pytest.raises(UserError, match=message) as raised:
        build_encoder(model, 3)
    assert "\n" not in str(raised.value)


def test_mlp_is_linear_norm_relu():
    x = np.random.default_rng(0).standard_normal((16, 8), np.float32)
    network = mlp((32, 4))
    params, stats = network.init(jax.random.key(0), x)
    assert {k: set(v) for k, v in params.items()} == {
        "linear1": {"kernel"},
        "bn1": {"scale", "bias"},
        "linear2": {"kernel", "bias"},
    }
    h = x @ np.asarray(params["linear1"]["kernel"])
    h = np.maximum((h - h.mean(0)) / np.sqrt(h.var(0) + 1e-5), 0)
    wanted = h @ np.asarray(params["linear2"]["kernel"]) + np.asarray(params["linear2"]["bias"])
    np.testing.assert_allclose(jitted(network).apply(params, stats, x, train=True)[0], wanted, rtol=1e-4, atol=1e-5)


def test_mlp_options():
    x = np.random.default_rng(0).standard_normal((16, 8), np.float32)
    params, stats = jax.eval_shape(mlp((32, 4), norm=False, bias=True).init, jax.random.key(0), x)
    assert set(params) == {"linear1", "linear2"} and set(params["linear1"]) == {"kernel", "bias"} and stats == {}
    for last_norm, keys in (("affine", {"scale", "bias"}), ("plain", set())):
        network = mlp((32, 4), last_norm=last_norm, last_bias=False)
        params, stats = network.init(jax.random.key(0), x)
        assert set(params.get("bn2", {})) == keys and set(params["linear2"]) == {"kernel"}
        y = np.asarray(jitted(network).apply(params, stats, x, train=True)[0])
        np.testing.assert_allclose(y.mean(0), 0, atol=1e-5)
        np.testing.assert_allclose(y.std(0), 1, rtol=1e-3)


def test_linear():
    x = np.random.default_rng(0).standard_normal((5, 400), np.float32)
    network = linear(300)
    params, stats = network.init(jax.random.key(0), x)
    y, after = jax.eval_shape(functools.partial(network.apply, train=True, groups=5), params, stats, x)
    assert y.shape == (5, 300) and stats == after == {}
    for leaf in jax.tree.leaves(jax.device_get(params)):  # uniform in +-1 / sqrt(400)
        assert 0.045 < np.abs(leaf).max() <= 0.05 and abs(np.mean(leaf)) < 0.01
    params, stats = linear(3, zero=True).init(jax.random.key(0), x)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(params))
    assert set(jax.eval_shape(linear(3, bias=False).init, jax.random.key(0), x)[0]["linear"]) == {"kernel"}


@pytest.mark.parametrize("name", [pytest.param("resnet18", marks=pytest.mark.slow), "vit_tiny"])
def test_blocks_made_again_for_the_gradient_give_the_same(name):
    def computed(remat):
        model = Model(name=name, width=0.25, depth=2, patch=4, dtype="float64", remat=remat)
        network = build_encoder(model, 1, 32)
        x = np.random.default_rng(0).random((8, 32, 32, 1))
        params, stats = jax.jit(network.init)(jax.random.key(0), x[:2])
        params = jax.tree.map(np.float64, params)

        def loss(params):
            y, after = network.apply(params, stats, x, train=True)
            return jnp.sin(3 * y).mean(), after  # not the mean square, which a norm holds at 1

        traced = jax.jit(jax.value_and_grad(loss, has_aux=True)).trace(params)
        return traced.lower().compile()(params), str(traced.jaxpr).count("prevent_cse")

    with jax.enable_x64(True):
        (kept, none), (again, blocks) = computed("none"), computed("blocks")
    assert none == 0 and blocks > 0
    assert jax.tree.structure(kept) == jax.tree.structure(again)
    for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12 * float(np.abs(a).max()))
    with pytest.raises(UserError, match="config.model.remat='all': unknown"):
        build_encoder(Model(name=name, remat="all"), 1, 32)


@pytest.mark.parametrize(
    ("size", "backend", "name"), [(28, "cpu", "resnet_thin"), (64, "cpu", "resnet18"), (28, "tpu", "resnet18")]
)
def test_images_and_machine_choose_a_model_where_none_is_named(size, backend, name):
    stem = "imagenet" if (size, backend) == (64, "cpu") else "auto"
    assert resolve_model(Model(), size, backend) == Model(name=name, stem=stem)
    assert resolve_model(Model(stem="small"), size, backend).stem == "small"
    assert resolve_model(Model(name="vit_tiny"), size, backend).name == "vit_tiny"
