"""Vision transformers with timm's structure, and the decoder of a masked autoencoder, built from the same blocks.

Source: https://arxiv.org/abs/2010.11929. By default pre-norm, LayerNorm with eps 1e-6, exact GELU, queries, keys and
values with bias; options of config.model make it the ViT of DINOv2, DINOv3 and others. Initial values as in
facebookresearch/mae: linear layers xavier uniform, tokens normal with deviation 0.02; others: `INITIAL`. Modules have
timm's names with _ for a dot (blocks_0, attn_qkv), from which `torch_weights` derives weight names.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax.config import Model
from ssl_jax.errors import UserError
from ssl_jax.models.layers import gelu, kept, network, rematerialized, uniform
from ssl_jax.network import Network

SMALL_UP_TO = 64  # px: the largest images for which patch=0 is not 16
xavier = nn.initializers.xavier_uniform()
token_init = nn.initializers.normal(0.02)


def xavier_qkv(rng, shape, dtype=jnp.float32):
    """Xavier of queries, keys and values [D, 3 * D] apart: each is a layer with D outputs."""
    bound = (6 / (shape[0] + shape[1] // 3)) ** 0.5
    return jax.random.uniform(rng, shape, dtype, -bound, bound)


Norm = functools.partial(nn.LayerNorm, epsilon=1e-6, use_fast_variance=False)


class Initial(NamedTuple):
    """Initial values of a ViT: of most matrices, of queries, keys and values, of the patches' projection, of the class
    token. Biases start at 0."""

    matrix: Any = xavier
    qkv: Any = xavier
    projection: Any = xavier
    token: Any = token_init


# config.model.initial. Sources: facebookresearch/mae, models_mae.py; moco-v3, vits.py; dino, vision_transformer.py,
# whose truncated normal is cut at 100 deviations, and whose projection, with its bias, is PyTorch's default.
INITIAL = {
    "xavier": Initial(),
    "xavier_qkv": Initial(qkv=xavier_qkv, token=nn.initializers.normal(1e-6)),
    "normal": Initial(token_init, token_init, uniform),
}

# name: (features, heads, blocks); giant is DINOv2's (https://arxiv.org/abs/2304.07193)
ARCHITECTURES = {
    "vit_tiny": (192, 3, 12),
    "vit_small": (384, 6, 12),
    "vit_base": (768, 12, 12),
    "vit_large": (1024, 16, 24),
    "vit_huge": (1280, 16, 32),
    "vit_giant": (1536, 24, 40),
}


def patchify(images: jax.Array, patch: int) -> jax.Array:
    """[B, H, W, C] -> [B, H / patch * W / patch, patch * patch * C], patches row by row from left to right."""
    batch, height, width, channels = images.shape
    cut = images.reshape(batch, height // patch, patch, width // patch, patch, channels)
    return cut.swapaxes(2, 3).reshape(batch, -1, patch * patch * channels)


def sin_cos(height: int, width: int, features: int) -> np.ndarray:
    """Fixed positions float32 [height * width, features]: sin(row), cos(row), sin(column), cos(column), a quarter each.

    Frequencies fall from 1 towards 1 / 10000. `features` is divisible by 4. Source: facebookresearch/moco-v3, vits.py.
    """
    frequency = 10000.0 ** -(np.arange(features // 4) / (features // 4))
    rows, columns = np.indices((height, width)).reshape(2, -1, 1) * frequency
    return np.concatenate([np.sin(rows), np.cos(rows), np.sin(columns), np.cos(columns)], 1).astype(np.float32)


def rotary(height: int, width: int, features: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines [height * width, features] by which the queries and keys of patches are turned.

    Positions are the centres of the patches, from -1 to 1 along each side; frequencies fall from 1 to 1 / 100 turns.
    `features`, of one head, is divisible by 4. Source: DINOv3, facebookresearch/dinov3, rope_position_encoding.py.
    """
    frequency = 100.0 ** -(np.arange(features // 4) / (features // 4))
    centres = [(np.arange(n) + 0.5) / n * 2 - 1 for n in (height, width)]
    places = np.stack(np.meshgrid(*centres, indexing="ij"), -1).reshape(-1, 2, 1)
    angles = np.tile((2 * np.pi * places * frequency).reshape(len(places), -1), 2)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def _turn(x, turns):
    """Tokens [B, T, heads, F] turned by (cosines, sines) [B or 1, T, 1, F]."""
    cosines, sines = turns
    first, second = jnp.split(x, 2, axis=-1)
    return (x * cosines + jnp.concatenate([-second, first], -1) * sines).astype(x.dtype)


def cubic(old: int, new: int, more: float = 0.0) -> np.ndarray:
    """The matrix [new, old] of torch's bicubic interpolation without antialiasing (a = -0.75, edges repeated).

    more: scale by (new + more) / old. DINO's is 0.1, against rounding (vision_transformer.py, issue 8).
    """
    at = (np.arange(new) + 0.5) * old / (new + more) - 0.5
    taps = np.floor(at)[:, None] + np.arange(-1, 3)
    distance, a = np.abs(at[:, None] - taps), -0.75
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = a * (((distance - 5) * distance + 8) * distance - 4)
    matrix = np.zeros((new, old), np.float32)
    rows = np.broadcast_to(np.arange(new)[:, None], taps.shape)
    np.add.at(matrix, (rows, np.clip(taps, 0, old - 1).astype(int)), np.where(distance <= 1, near, far))
    return matrix


def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(F)) v of arrays [B, T, heads, F]. JAX's own is fused on a GPU; on a CPU it takes two to five
    times as long as this formula, in which heads come before tokens and the sum divides last."""

    def on_cpu(q, k, v):
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        logits = q.shape[-1] ** -0.5 * jnp.einsum("bhtf,bhsf->bhts", q, k, preferred_element_type=wide)
        weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
        y = jnp.einsum("bhts,bhsf->bhtf", weights.astype(v.dtype), v, preferred_element_type=wide)
        return (y / weights.sum(-1, keepdims=True)).astype(v.dtype).swapaxes(1, 2)

    wide = jnp.promote_types(q.dtype, jnp.float32)

    return jax.lax.platform_dependent(q, k, v, cpu=on_cpu, default=jax.nn.dot_product_attention)


def resized_grid(grid: jax.Array, height: int, width: int, how: str) -> jax.Array:
    """Positions [height, width, D] of patches, from those [G, G, D] that were learned; how: config.model.resize."""
    side = len(grid)
    if (height, width) == (side, side):
        return grid
    if how == "antialias":
        return jax.image.resize(grid, (height, width, grid.shape[-1]), "bicubic")
    more = 0.1 if how == "dino" else 0.0
    return jnp.einsum("hi,wj,ijd->hwd", cubic(side, height, more), cubic(side, width, more), grid)


@dataclass(frozen=True)
class BlockOptions:
    """What the blocks of a network have in common."""

    heads: int
    dtype: Any
    hidden: int = 0  # features inside the MLP; 0: four times those outside
    swiglu: bool = False  # https://arxiv.org/abs/2002.05202
    qkv_bias: str = "all"  # "no_key": of queries and values alone; "none"
    layer_scale: float = 0.0  # initial factors of the branches; 0: none. https://arxiv.org/abs/2103.17239
    eps: float = 1e-6
    initial: str = "xavier"  # of the matrices, a key of INITIAL


class LayerScale(nn.Module):
    start: float

    @nn.compact
    def __call__(self, x):
        return x * self.param("gamma", nn.initializers.constant(self.start), x.shape[-1:])


class Block(nn.Module):
    """A pre-norm transformer block. The residual stream stays float32 or wider.

    turns: see `rotary`; keep: factors [B, 2] of the two branches, see `kept`.
    """

    options: BlockOptions

    @nn.compact
    def __call__(self, x, turns=None, keep=None):
        o = self.options
        batch, tokens, width = x.shape
        # As rows: XLA's gradients of products with a matrix take up to 1.6 times as long on a CPU with an axis more.
        x = x.reshape(-1, width)
        initial = INITIAL[o.initial]
        dense = functools.partial(nn.Dense, kernel_init=initial.matrix, dtype=o.dtype)
        norm = functools.partial(Norm, epsilon=o.eps, dtype=o.dtype)

        def branch(y, number):
            y = LayerScale(o.layer_scale, name=f"ls{number}")(y) if o.layer_scale else y
            return y if keep is None else y * jnp.repeat(keep[:, number - 1, None], tokens, axis=0).astype(y.dtype)

        y = dense(3 * width, use_bias=o.qkv_bias == "all", kernel_init=initial.qkv, name="attn_qkv")(
            norm(name="norm1")(x)
        )
        if o.qkv_bias == "no_key":
            bias = [self.param(f"attn_{name}_bias", nn.initializers.zeros, (width,)) for name in "qv"]
            y = y + jnp.concatenate([bias[0], jnp.zeros_like(bias[0]), bias[1]]).astype(y.dtype)
        q, k, v = jnp.moveaxis(y.reshape(batch, tokens, 3, o.heads, width // o.heads), 2, 0)
        if turns is not None:
            q, k = _turn(q, turns), _turn(k, turns)
        y = attention(q, k, v).reshape(x.shape)
        x = x + branch(dense(width, name="attn_proj")(y), 1)
        hidden = o.hidden or 4 * width
        y = dense(2 * hidden if o.swiglu else hidden, name="mlp_fc1")(norm(name="norm2")(x))
        y = nn.silu(y[..., :hidden]) * y[..., hidden:] if o.swiglu else gelu(y)
        x = x + branch(dense(width, name="mlp_fc2")(y), 2)
        return x.reshape(batch, tokens, width)


class Projection(nn.Module):
    """Patches to tokens. frozen: the initial values are fixed and not parameters: no gradient, decay or target.

    Source of freezing: MoCo v3, section 4.2, https://arxiv.org/abs/2104.02057.
    """

    features: int
    patch: int
    frozen: bool
    dtype: Any
    initial: str = "xavier"

    @nn.compact
    def __call__(self, x):
        shape = (self.patch, self.patch, x.shape[-1], self.features)

        bound = (self.patch * self.patch * x.shape[-1]) ** -0.5

        def kernel_init(rng):  # that of a linear layer; a convolution's would count positions as outputs
            rows = (self.patch * self.patch * x.shape[-1], self.features)
            return INITIAL[self.initial].projection(rng, rows).reshape(shape)

        def bias_init(rng, shape):
            small = bound if self.initial == "normal" else 0.0  # PyTorch's default for a convolution, or none
            return jax.random.uniform(rng, shape, minval=-small, maxval=small) if small else jnp.zeros(shape)

        if self.frozen:
            kernel = self.variable("batch_stats", "kernel", lambda: kernel_init(self.make_rng("params"))).value
            bias = self.variable("batch_stats", "bias", jnp.zeros, self.features).value
        else:
            kernel = self.param("kernel", kernel_init)
            bias = self.param("bias", bias_init, (self.features,))
        kernel = kernel.reshape(-1, self.features).astype(self.dtype)
        patches = patchify(x, self.patch).astype(self.dtype)
        rows = patches.reshape(-1, len(kernel)) @ kernel + bias  # as in `Block`
        return rows.reshape(*patches.shape[:2], self.features)


class ViT(nn.Module):
    """Images [B, H, W, C] in [0, 1] -> embeddings float32 [B, D]; N = H / patch * W / patch tokens and a class token.

    dense: also return the patches' tokens [B, H / patch, W / patch, D].
    blocks: also return, after these, the outputs of these blocks, such as (-2, -1), each as (class token [B, D],
        patches [B, H / patch, W / patch, D]) after the last LayerNorm.
    visible: indices [B, n] of the only patches to process; returns tokens [B, 1 + n, D] with the class token first.
    masked: (mask [B, N], token [D]): the token replaces masked patches; their positions are added to it.
    keys: [B], for drop path, whose rate grows from 0 in the first block to drop_path in the last.

    Registers come between the class token and the patches, and are never returned (https://arxiv.org/abs/2309.16588).
    """

    width: int
    depth: int
    patch: int
    grid: int  # patches along a side for which positions are learned; those of other sizes are interpolated
    positions: str
    resize: str
    freeze_patch: bool
    class_token: bool
    registers: int
    pool: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    block: BlockOptions
    remat: str
    drop_path: float

    @nn.compact
    def __call__(
        self, x, *, train: bool, groups: int = 1, dense: bool = False, blocks=(), visible=None, masked=None, keys=None
    ):
        del train, groups
        block, rates = rematerialized(Block, self.remat), np.linspace(0, self.drop_path, self.depth)
        check_patch(self.patch, x.shape[1:3])
        batch, height, width = len(x), x.shape[1] // self.patch, x.shape[2] // self.patch
        x = (x - jnp.array(self.mean)) / jnp.array(self.std)
        projection = functools.partial(Projection, self.width, self.patch, self.freeze_patch, self.block.dtype)
        x = projection(self.block.initial, name="patch_embed_proj")(x)
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if masked is not None:
            mask, token = masked
            x = jnp.where(mask[..., None], token, x)
        class_position, patch_positions = self._positions(height, width)
        x = x + patch_positions
        if visible is not None:
            x = jnp.take_along_axis(x, visible[..., None], axis=1)
        start = INITIAL[self.block.initial].token
        first = [self.param("cls_token", start, (1, 1, self.width)) + class_position] if self.class_token else []
        if self.registers:
            first.append(self.param("reg_token", token_init, (1, self.registers, self.width)))
        x = jnp.concatenate([*(jnp.broadcast_to(t, (batch, *t.shape[1:])) for t in first), x], axis=1)
        before = self.class_token + self.registers
        turns, norm = self._turns(height, width, before, visible), Norm(epsilon=self.block.eps, name="norm")
        chosen, after = {i % self.depth for i in blocks}, {}
        for i in range(self.depth):
            x = block(self.block, name=f"blocks_{i}")(x, turns, kept(rates[i], keys, i))
            if i in chosen:
                after[i] = norm(x)
        x = norm(x)
        if visible is not None:
            return jnp.concatenate([x[:, : int(self.class_token)], x[:, before:]], axis=1)

        def parts(x):
            patches = x[:, before:]
            class_token = x[:, 0] if self.class_token else patches.mean(1)
            return class_token, patches.reshape(batch, height, width, self.width)

        y = x[:, 0] if self.pool == "cls" else x[:, before:].mean(1)
        if blocks:
            return y, parts(x)[1], tuple(parts(after[i % self.depth]) for i in blocks)
        return (y, parts(x)[1]) if dense else y

    def _positions(self, height, width):
        """Positions of the class token [D] and of the patches [N, D], which are added to the tokens."""
        if self.positions == "rotary":
            return 0.0, 0.0
        if self.positions == "fixed":
            return 0.0, sin_cos(height, width, self.width)
        table = self.param("pos_embed", token_init, (1, self.class_token + self.grid**2, self.width))[0]
        grid = table[int(self.class_token) :].reshape(self.grid, self.grid, self.width)
        grid = resized_grid(grid, height, width, self.resize)
        return table[0] if self.class_token else 0.0, grid.reshape(-1, self.width)

    def _turns(self, height, width, before, visible):
        """By what queries and keys are turned: (cosines, sines) [B or 1, T, 1, F]; not the `before` other tokens."""
        if self.positions != "rotary":
            return None
        turns = []
        for table, still in zip(rotary(height, width, self.width // self.block.heads), (1.0, 0.0), strict=True):
            each = jnp.asarray(table)[None] if visible is None else jnp.asarray(table)[visible]
            turns.append(jnp.pad(each, ((0, 0), (before, 0), (0, 0)), constant_values=still)[:, :, None])
        return tuple(turns)


class Decoder(nn.Module):
    """Tokens [B, 1 + n, D] of a ViT's class token and visible patches -> pixels [B, N, out] of all patches.

    order: [B, N], all patches of a square image, starting with the n visible ones in the order of their tokens. None:
    all N patches are visible and in order.
    """

    width: int
    depth: int
    heads: int
    out: int

    @nn.compact
    def __call__(self, x, *, train: bool, groups: int = 1, order=None):
        del train, groups
        x = nn.Dense(self.width, kernel_init=xavier, name="embed")(x)
        token = self.param("token", token_init, (self.width,))
        class_token, x = x[:, :1], x[:, 1:]
        if order is not None:
            batch, patches = order.shape
            missing = jnp.broadcast_to(token, (batch, patches - x.shape[1], self.width))
            x = jnp.concatenate([x, missing], axis=1)
            x = jnp.take_along_axis(x, jnp.argsort(order, axis=1)[..., None], axis=1)
        side = round(x.shape[1] ** 0.5)
        x = jnp.concatenate([class_token, x + sin_cos(side, side, self.width)], axis=1)
        for i in range(self.depth):
            x = Block(BlockOptions(self.heads, x.dtype), name=f"blocks_{i}")(x)
        return nn.Dense(self.out, kernel_init=xavier, name="pixels")(Norm(name="norm")(x[:, 1:]))


def decoder(width: int, depth: int, heads: int, out: int) -> Network:
    """The `Decoder` of a masked autoencoder. Its apply accepts order=.

    Raises UserError if `width` is not divisible by 4 and by `heads`.
    """
    if width % 4 or width % heads:
        raise UserError(f"config.method.width={width}: allowed: multiples of 4 and of config.method.heads={heads}")
    return network(Decoder(width, depth, heads, out))


def check_patch(patch: int, sides: tuple[int, ...]) -> None:
    """Raises UserError if `patch` does not divide every one of `sides` (px)."""
    for side in sides:
        if side % patch:
            allowed = ", ".join(str(p) for p in range(1, side + 1) if side % p == 0)
            raise UserError(f"config.model.patch={patch}: does not divide images of {side} px; allowed: {allowed}")


def build_vit(model: Model, size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Network:
    """The ViT that `config.model` describes, for images of `size` px.

    Embeddings have the features of ARCHITECTURES, times model.width, which scales the features of each head.
    Raises UserError if the patch does not divide `size`, or if options do not fit each other.
    """
    features, heads, depth = ARCHITECTURES[model.name]
    heads = model.heads or heads
    patch = model.patch or 16
    if not model.patch and size <= SMALL_UP_TO:
        patch = next(p for p in range(max(1, size // 7), 0, -1) if size % p == 0)
    check_patch(patch, (size,))
    if not model.class_token and model.pool == "cls":
        raise UserError("config.model.pool='cls': there is no class token (config.model.class_token); allowed: mean")
    width = heads * 4 * max(1, round(features / heads / 4 * model.width))  # divisible by 4, which positions need
    swiglu = model.mlp == "swiglu"
    hidden = round(width * (model.mlp_ratio or 4))
    if swiglu and not model.mlp_ratio:  # DINOv2's: two thirds of 4 times the width, rounded up to a multiple of 8
        hidden = -(-(4 * width * 2 // 3) // 8) * 8
    vit = network(
        ViT(
            width=width,
            depth=model.depth or depth,
            patch=patch,
            grid=model.grid or size // patch,
            positions=model.positions,
            resize=model.resize,
            freeze_patch=model.freeze_patch,
            class_token=model.class_token,
            registers=model.registers,
            pool=model.pool,
            mean=mean,
            std=std,
            block=BlockOptions(
                heads,
                jnp.dtype(model.dtype),
                hidden,
                swiglu,
                model.qkv_bias,
                model.layer_scale,
                model.eps,
                model.initial,
            ),
            remat=model.remat,
            drop_path=model.drop_path,
        )
    )
    return vit._replace(patch=patch, drop_path=model.drop_path)
