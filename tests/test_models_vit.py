"""ViTs: the function of their weights in NumPy, positions, masks, sizes, weights under timm's names, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf, softmax

from ssl_jax.config import Model
from ssl_jax.errors import UserError
from ssl_jax.models import build_encoder, from_torch, patchify, to_torch
from ssl_jax.models.layers import gelu
from ssl_jax.models.vit import attention, build_vit, resized_grid

SMALL = {"name": "vit_tiny", "width": 1 / 8, "depth": 2, "patch": 4}  # 24 features, 3 heads


def images(batch, side=12, channels=3, seed=0):
    return np.random.default_rng(seed).random((batch, side, side, channels), np.float32)


def jitted(network):
    return network._replace(apply=jax.jit(network.apply, static_argnames=("train", "dense")))


def build(channels=3, size=12, **changes):
    return jitted(build_encoder(Model(**{**SMALL, **changes}), channels, size))


@functools.cache
def tiny(size=12, channels=3, **changes):
    network = build(channels, size, **changes)
    params, stats = jax.device_get(network.init(jax.random.key(0), images(1, size, channels)))
    # All biases and scales differ from their initial values, so that none can be forgotten unnoticed.
    params = jax.tree.map(lambda p: p + np.float32(0.1 * np.random.default_rng(p.size).normal(size=p.shape)), params)
    return network, params, stats


def apply(x, made, **kwargs):
    network, params, stats = made
    y = network.apply(params, stats, x, train=False, **kwargs)[0]
    return np.asarray(y[1] if kwargs.get("dense") else y)


def by_hand(weights, x, heads, depth, patch, positions):
    """The class token and the patches' tokens [B, 1 + N, D] in float64, from weights under timm's names."""
    w = {k: np.asarray(v, np.float64) for k, v in weights.items()}

    def norm(x, name):
        deviation = np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return (x - x.mean(-1, keepdims=True)) / deviation * w[f"{name}.weight"] + w[f"{name}.bias"]

    def dense(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    rows, columns = x.shape[1] // patch, x.shape[2] // patch
    tokens = []
    for i in range(rows):
        for j in range(columns):
            cut = x[:, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch].astype(np.float64)
            tokens.append(np.einsum("bhwc,dchw->bd", cut, w["patch_embed.proj.weight"]) + w["patch_embed.proj.bias"])
    x = np.stack([np.broadcast_to(w["cls_token"][0, 0], tokens[0].shape), *tokens], 1) + positions
    for i in range(depth):
        name = f"blocks.{i}"
        made = []
        for qkv in dense(norm(x, f"{name}.norm1"), f"{name}.attn.qkv"):
            q, k, v = np.split(qkv, 3, axis=-1)
            size = q.shape[-1] // heads
            parts = [slice(h * size, (h + 1) * size) for h in range(heads)]
            shares = [softmax(q[:, p] @ k[:, p].T / np.sqrt(size), axis=-1) @ v[:, p] for p in parts]
            made.append(np.concatenate(shares, -1))
        x = x + dense(np.stack(made), f"{name}.attn.proj")
        y = dense(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")
        x = x + dense(y * (1 + erf(y / np.sqrt(2))) / 2, f"{name}.mlp.fc2")
    return norm(x, "norm")


def sin_cos_by_hand(rows, columns, features):
    table = np.zeros((rows * columns, features))
    quarter = features // 4
    for i in range(rows):
        for j in range(columns):
            for f in range(quarter):
                angles = [p / 10000 ** (f / quarter) for p in (i, j)]
                for part, value in enumerate([g(a) for a in angles for g in (np.sin, np.cos)]):
                    table[i * columns + j, part * quarter + f] = value
    return table


@pytest.mark.parametrize("positions", ["fixed", "learned"])
def test_computes_what_its_definition_says(positions):
    x, made = images(3), tiny(positions=positions)
    weights = to_torch(*made[1:])
    if positions == "fixed":
        table = np.concatenate([np.zeros((1, 24)), sin_cos_by_hand(3, 3, 24)])
    else:
        table = weights["pos_embed"][0].astype(np.float64)
    normalised = (x - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    wanted = by_hand(weights, normalised, heads=3, depth=2, patch=4, positions=table)
    np.testing.assert_allclose(apply(x, made), wanted[:, 0], atol=2e-5)
    np.testing.assert_allclose(apply(x, made, dense=True), wanted[:, 1:].reshape(3, 3, 3, 24), atol=2e-5)
    mean = (build(positions=positions, pool="mean"), *made[1:])
    np.testing.assert_allclose(apply(x, mean), wanted[:, 1:].mean(1), atol=2e-5)


@pytest.mark.parametrize(
    ("name", "features", "count"),  # timm's vit_*_patch16_224 without head and without positions
    [
        ("vit_tiny", 192, 5_717_416 - 193_000 - 197 * 192),
        ("vit_small", 384, 22_050_664 - 385_000 - 197 * 384),
        ("vit_base", 768, 86_567_656 - 769_000 - 197 * 768),
    ],
)
def test_sizes(name, features, count):
    network = build_encoder(Model(name=name), 3, 224)
    x = np.zeros((2, 224, 224, 3), np.float32)
    params, stats = jax.eval_shape(network.init, jax.random.key(0), x)
    assert network.patch == 16 and stats == {}
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count
    network = build_encoder(Model(name=name, depth=1), 3, 224)
    y, _ = jax.eval_shape(lambda rng: network.apply(*network.init(rng, x), x, train=True), jax.random.key(0))
    assert (y.shape, y.dtype) == ((2, features), jnp.float32)


@pytest.mark.parametrize(("size", "patch"), [(28, 4), (32, 4), (48, 6), (64, 8), (13, 1), (96, 16), (224, 16)])
def test_patch_that_fits_the_images(size, patch):
    assert build_encoder(Model(name="vit_tiny"), 1, size).patch == patch


def test_patches_are_cut_row_by_row():
    x = images(2, 6)
    cut = np.asarray(jax.jit(patchify, static_argnums=1)(x, 2)).reshape(2, 3, 3, 2, 2, 3)
    for i in range(3):
        for j in range(3):
            np.testing.assert_array_equal(cut[:, i, j], x[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2])


def test_without_positions_the_order_of_patches_means_nothing():
    """Equivariance: tokens follow their patches around; with positions they do not."""
    x = images(1, 8)
    turned = x.reshape(1, 2, 4, 2, 4, 3)[:, ::-1, :, ::-1].reshape(x.shape)  # patches in reverse order
    network, params, stats = tiny(8, positions="learned")
    without = network, {**params, "pos_embed": np.zeros_like(params["pos_embed"])}, stats
    forth, back = (apply(view, without, dense=True).reshape(4, -1) for view in (x, turned))
    np.testing.assert_allclose(back, forth[::-1], atol=1e-5)
    with_positions = apply(turned, (network, params, stats), dense=True).reshape(4, -1)
    assert np.abs(with_positions - apply(x, (network, params, stats), dense=True).reshape(4, -1)[::-1]).max() > 1e-2


@pytest.mark.parametrize("positions", ["fixed", "learned"])
def test_images_of_another_size(positions):
    made = tiny(positions=positions)
    assert apply(images(2, 20), made).shape == (2, 24)
    assert apply(images(2, 20), made, dense=True).shape == (2, 5, 5, 24)
    with pytest.raises(UserError, match=r"config.model.patch=4: .* 14 px; allowed: 1, 2, 7, 14"):
        apply(images(2, 14), made)


def test_learned_positions_are_interpolated_as_an_image():
    """A table that is linear in row and column is the same plane at another size, away from its border."""
    slopes = np.linspace(-1, 1, 24)

    def tokens(side, centres):
        model = Model(**{**SMALL, "depth": 1}, positions="learned")
        network = jitted(build_vit(model, side, (0.5,) * 3, (0.25,) * 3))
        params, stats = network.init(jax.random.key(0), images(1, 16))
        params["blocks_0"] = jax.tree.map(np.zeros_like, params["blocks_0"])  # adds nothing to the tokens
        grid = (centres[:, None, None] + 2 * centres[:, None]) * slopes
        table = np.concatenate([np.zeros((1, 24)), grid.reshape(-1, 24)])
        params["pos_embed"] = np.float32(table[None])
        return apply(images(1, 32), (network, params, stats), dense=True)[:, 3:5, 3:5]

    at_32_px, from_16_px = tokens(32, (np.arange(8) + 0.5) / 2 - 0.5), tokens(16, np.arange(4.0))
    np.testing.assert_allclose(from_16_px, at_32_px, atol=1e-4)
    assert np.ptp(at_32_px, axis=(1, 2)).max() > 0.1


def test_visible_patches_alone_are_encoded():
    made, x = tiny(), images(2)
    order = np.array([[5, 0, 7], [2, 3, 1]])
    tokens = apply(x, made, visible=order)
    assert tokens.shape == (2, 4, 24)
    hidden = x.copy()  # what is not visible does not matter
    for image, kept in zip(hidden, order):
        for patch in set(range(9)) - set(kept):
            image[patch // 3 * 4 : patch // 3 * 4 + 4, patch % 3 * 4 : patch % 3 * 4 + 4] = 0.5
    np.testing.assert_array_equal(apply(hidden, made, visible=order), tokens)
    everything = apply(x, made, visible=np.tile(np.arange(9), (2, 1)))
    np.testing.assert_allclose(everything[:, 1:].reshape(2, 3, 3, 24), apply(x, made, dense=True), atol=1e-6)


def test_a_token_stands_for_masked_patches():
    made, x = tiny(), images(2)
    token, none = np.linspace(-1, 1, 24, dtype=np.float32), np.zeros((2, 9), bool)
    np.testing.assert_array_equal(apply(x, made, masked=(none, token)), apply(x, made))
    mask = none.copy()
    mask[0, 4] = True
    masked = apply(x, made, masked=(mask, token), dense=True)
    changed = x.copy()
    changed[0, 4:8, 4:8] = 0.3
    np.testing.assert_array_equal(apply(changed, made, masked=(mask, token), dense=True), masked)
    assert np.abs(masked[0] - apply(x, made, dense=True)[0]).max() > 1e-2
    np.testing.assert_array_equal(masked[1], apply(x, made, dense=True)[1])


def test_a_frozen_projection_is_no_parameter():
    network = build(freeze_patch=True)
    params, stats = network.init(jax.random.key(0), images(1))
    assert set(stats) == {"patch_embed_proj"} and "patch_embed_proj" not in params
    _, after = network.apply(params, stats, images(2), train=True)
    jax.tree.map(np.testing.assert_array_equal, after, stats)
    # Its weights have the names that they have in a network in which they learn.
    free = build()
    loaded = from_torch(to_torch(params, stats), *free.init(jax.random.key(1), images(1)))
    np.testing.assert_array_equal(apply(images(2), (free, *loaded)), apply(images(2), (network, params, stats)))


@pytest.mark.parametrize("positions", ["fixed", "learned"])
def test_weights_there_and_back_under_timm_s_names(positions):
    _, params, stats = tiny(positions=positions)
    weights = to_torch(params, stats)
    assert weights["patch_embed.proj.weight"].shape == (24, 3, 4, 4)
    assert weights["blocks.1.attn.qkv.weight"].shape == (72, 24)
    assert weights["blocks.0.mlp.fc1.weight"].shape == (96, 24) and weights["blocks.0.mlp.fc2.weight"].shape == (24, 96)
    assert {"blocks.0.norm1.weight", "blocks.1.norm2.bias", "blocks.1.attn.proj.bias", "norm.bias"} < set(weights)
    assert weights["cls_token"].shape == (1, 1, 24)
    assert weights["pos_embed"].shape == (1, 10, 24) if positions == "learned" else "pos_embed" not in weights
    weights |= {"head.weight": np.zeros((10, 24)), "head.bias": np.zeros(10)}
    blank = jax.tree.map(np.zeros_like, (params, stats))
    jax.tree.map(np.testing.assert_array_equal, from_torch(weights, *blank), (params, stats))


def test_bfloat16_computes_near_float32():
    x, made = images(4), tiny()
    half = (build(dtype="bfloat16"), *made[1:])
    y, y_half = apply(x, made), apply(x, half)
    assert y_half.dtype == np.float32
    assert 0 < np.abs(y_half - y).max() < 0.05 * np.abs(y).max()


@pytest.mark.slow
def test_jit_changes_nothing():
    network, params, stats = tiny()
    jitted = network.apply(params, stats, images(2), train=True)[0]
    with jax.disable_jit():
        plain = network.apply(params, stats, images(2), train=True)[0]
    np.testing.assert_allclose(jitted, plain, rtol=1e-4, atol=1e-5)


def test_initial_values():
    network = build_encoder(Model(name="vit_tiny", depth=1, positions="learned"), 3, 224)
    params, _ = jax.device_get(network.init(jax.random.key(0), images(1, 224)))
    for kernel in (params["patch_embed_proj"]["kernel"].reshape(768, 192), params["blocks_0"]["attn_qkv"]["kernel"]):
        limit = (6 / sum(kernel.shape)) ** 0.5  # xavier, uniform
        assert 0.99 * limit < np.abs(kernel).max() <= limit
        np.testing.assert_allclose(kernel.std(), limit / 3**0.5, rtol=0.02)
    np.testing.assert_allclose(params["pos_embed"].std(), 0.02, rtol=0.02)


def test_initial_values_of_moco_v3():
    """Queries, keys and values apart, and almost no class token; the projection as before (moco-v3, vits.py)."""
    network = build_encoder(Model(name="vit_tiny", depth=1, initial="xavier_qkv"), 3, 224)
    params, _ = jax.device_get(network.init(jax.random.key(0), images(1, 224)))
    limits = {"attn_qkv": (6 / (192 + 192)) ** 0.5, "attn_proj": (6 / 384) ** 0.5, "mlp_fc1": (6 / (192 + 768)) ** 0.5}
    for name, limit in limits.items():
        kernel = params["blocks_0"][name]["kernel"]
        assert 0.99 * limit < np.abs(kernel).max() <= limit, name
        np.testing.assert_allclose(kernel.std(), limit / 3**0.5, rtol=0.02)
    limit = (6 / (3 * 16 * 16 + 192)) ** 0.5
    assert 0.99 * limit < np.abs(params["patch_embed_proj"]["kernel"]).max() <= limit
    assert 5e-7 < params["cls_token"].std() < 2e-6


def test_initial_values_of_dino():
    """Normal with deviation 0.02, biases 0; the projection as PyTorch's convolution (dino, vision_transformer.py)."""
    model = Model(name="vit_tiny", depth=1, initial="normal", positions="learned")
    params, _ = jax.device_get(build_encoder(model, 3, 224).init(jax.random.key(0), images(1, 224)))
    for name in ("attn_qkv", "attn_proj", "mlp_fc1", "mlp_fc2"):
        np.testing.assert_allclose(params["blocks_0"][name]["kernel"].std(), 0.02, rtol=0.02)
        assert not params["blocks_0"][name]["bias"].any() and np.abs(params["blocks_0"][name]["kernel"]).max() > 0.06
    limit = (3 * 16 * 16) ** -0.5
    for values in params["patch_embed_proj"].values():
        assert 0.9 * limit < np.abs(values).max() <= limit
    np.testing.assert_allclose(params["pos_embed"].std(), 0.02, rtol=0.02)
    assert 0.015 < params["cls_token"].std() < 0.025


def test_positions_are_resized_as_dino_does():
    """Bicubic with a = -0.75, no antialiasing, the factor 6.1 / 14 for 6 patches: loops over F.interpolate's formula.

    PyTorch 2.13 gives the four numbers for the grid i * i + 3 * j.
    """

    def kernel(x):
        x, a = abs(x), -0.75
        near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * (x**3 - 5 * x**2 + 8 * x - 4)
        return near if x <= 1 else far if x < 2 else 0.0

    grid = np.random.default_rng(0).normal(size=(14, 14, 2))
    want = np.zeros((6, 6, 2))
    for r, c in np.ndindex(6, 6):
        y, x = ((n + 0.5) * 14 / 6.1 - 0.5 for n in (r, c))
        for i in range(int(np.floor(y)) - 1, int(np.floor(y)) + 3):
            for j in range(int(np.floor(x)) - 1, int(np.floor(x)) + 3):
                want[r, c] += kernel(y - i) * kernel(x - j) * grid[np.clip(i, 0, 13), np.clip(j, 0, 13)]
    np.testing.assert_allclose(resized_grid(jnp.float32(grid), 6, 6, "dino"), want, atol=1e-5)
    rows, columns = np.indices((14, 14))
    made = np.asarray(resized_grid(jnp.float32(rows**2 + 3 * columns)[..., None], 6, 6, "dino"))[..., 0]
    np.testing.assert_allclose(made[[0, 1, 3, 5], [0, 4, 2, 5]], (1.99246, 37.85572, 72.3517, 184.71765), rtol=1e-4)


def test_a_patch_must_divide_the_images():
    with pytest.raises(UserError, match=r"config.model.patch=16: .* 28 px; allowed: 1, 2, 4, 7, 14, 28"):
        build_encoder(Model(name="vit_tiny", patch=16), 1, 28)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 0.02)])
def test_attention_is_that_of_jax_with_its_gradients(dtype, tolerance):
    rng = np.random.default_rng(0)
    q, k, v, w = (jnp.asarray(3 * rng.standard_normal((2, 5, 3, 8)), dtype) for _ in range(4))

    def of(function, dtype):
        return jax.value_and_grad(lambda *x: jnp.sum(function(*x) * w.astype(dtype)), argnums=(0, 1, 2))(
            *(x.astype(dtype) for x in (q, k, v))
        )

    expected, found = of(jax.nn.dot_product_attention, "float32"), of(attention, dtype)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == dtype
        np.testing.assert_allclose(one.astype("float32"), other, atol=tolerance * float(jnp.abs(other).max()))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-7), ("bfloat16", 2**-8)])
def test_gelu_is_exact_with_its_gradient(dtype, tolerance):
    x = jnp.linspace(-8, 8, 1001).astype(dtype)
    z = np.asarray(x, np.float64)
    below = (1 + erf(z / np.sqrt(2))) / 2
    np.testing.assert_allclose(np.asarray(gelu(x), np.float64), z * below, rtol=tolerance, atol=8 * tolerance)
    slope = below + z * np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)
    np.testing.assert_allclose(np.asarray(jax.vmap(jax.grad(gelu))(x), np.float64), slope, atol=4 * tolerance)
