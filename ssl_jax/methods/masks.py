"""Which patches a ViT does not see: blocks, drawn for each image alone, of fixed shapes under jit."""

import math

import jax
import jax.numpy as jnp

ATTEMPTS = 10  # in a row without a place for a block, after which a mask stays as it is


def block_mask(key: jax.Array, side: int, count: jax.Array, *, least: int, most: int) -> jax.Array:
    """[B, side * side] bool of key [B]: rectangles that overlap or not, up to `count` [B] patches of an image.

    A rectangle has `least` to `most` patches and an aspect ratio of 0.3 to 1 / 0.3, and never more patches than are
    missing. Source: BEiT, algorithm 1, https://arxiv.org/abs/2106.08254; facebookresearch/dinov2,
    dinov2/data/masking.py.
    """
    ends = math.log(0.3), -math.log(0.3)
    place = jnp.arange(side)

    def one(key, count):
        def attempt(carry):
            key, mask, failed = carry
            key, *keys = jax.random.split(key, 5)
            limit = jnp.minimum(count - mask.sum(), most)
            area = least + jax.random.uniform(keys[0]) * (limit - least)
            aspect = jnp.exp(jax.random.uniform(keys[1], minval=ends[0], maxval=ends[1]))
            sides = jnp.round(jnp.sqrt(jnp.stack([area * aspect, area / aspect]))).astype(int)
            starts = [jax.random.randint(k, (), 0, jnp.maximum(1, side - s + 1)) for k, s in zip(keys[2:], sides)]
            rows, columns = ((place >= start) & (place < start + s) for start, s in zip(starts, sides))
            block = rows[:, None] & columns
            new = (block & ~mask).sum()
            fits = jnp.all(sides < side) & (new > 0) & (new <= limit)
            return key, mask | (block & fits), jnp.where(fits, 0, failed + 1)

        def missing(carry):
            return (carry[1].sum() < count) & (carry[2] < ATTEMPTS)

        return jax.lax.while_loop(missing, attempt, (key, jnp.zeros((side, side), bool), 0))[1].ravel()

    return jax.vmap(one)(key, count)


def first_of(mask: jax.Array, most: int) -> tuple[jax.Array, jax.Array]:
    """Indices [B, most] of the patches in mask [B, N], those of the others behind them, and which are in the mask."""
    index = jnp.argsort(~mask, axis=1, stable=True)[:, :most]
    return index, jnp.take_along_axis(mask, index, axis=1)


def largest_block(area: int, aspect: tuple[float, float]) -> int:
    """An upper bound of round(sqrt(area * a)) * round(sqrt(area / a)) for all a from aspect[0] to aspect[1]."""
    return int(area + 0.5 * max((a**0.5 + a**-0.5) for a in aspect) * area**0.5 + 0.25)


def multi_block(
    key: jax.Array,
    side: int,
    *,
    targets: int,
    target_scale: tuple[float, float],
    aspect: tuple[float, float],
    context_scale: tuple[float, float],
    context: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """I-JEPA's context and target blocks of key [B]: indices [B, context], [B, targets, m], and which of the m count.

    The target blocks of an image have one size, drawn from the ranges, and a place each. The context is a square
    without the target blocks: `context` patches of it, drawn at random. If there are fewer, some come more than once;
    if there is none, a single patch is seen, of a target or not. m is the size of the largest block.

    Source: I-JEPA, section 3, https://arxiv.org/abs/2301.08243; facebookresearch/ijepa, src/masks/multiblock.py, which
    draws sizes once for a batch and cuts all contexts to the smallest one of the batch.
    """
    patches = side * side
    area_of = [int(patches * scale) for scale in target_scale]
    most = min(largest_block(area_of[1], aspect), (side - 1) ** 2 if side > 1 else 1)
    place = jnp.arange(side)

    def rectangle(key, height, width):
        keys = jax.random.split(key)
        starts = [jax.random.randint(k, (), 0, jnp.maximum(1, side - s)) for k, s in zip(keys, (height, width))]
        rows, columns = ((place >= start) & (place < start + s) for start, s in zip(starts, (height, width)))
        return (rows[:, None] & columns).ravel()

    def size(keys, scale, aspect):
        area = jnp.floor(patches * jax.random.uniform(keys[0], minval=scale[0], maxval=scale[1]))
        ratio = jax.random.uniform(keys[1], minval=aspect[0], maxval=aspect[1])
        sides = (jnp.round(jnp.sqrt(a)).astype(int) for a in (area * ratio, area / ratio))
        return [jnp.clip(s, 1, max(1, side - 1)) for s in sides]

    def one(key):
        keys = jax.random.split(key, 7)
        block = size(keys[:2], target_scale, aspect)
        blocks = jax.vmap(lambda k: rectangle(k, *block))(jax.random.split(keys[2], targets))
        seen = rectangle(keys[3], *size(keys[4:6], context_scale, (1.0, 1.0))) & ~blocks.any(axis=0)
        order = jnp.argsort(jnp.where(seen, 0, 2) + jax.random.uniform(keys[6], (patches,)))
        visible = order[jnp.arange(context) % jnp.clip(seen.sum(), 1, context)]
        return visible, *first_of(blocks, most)

    return jax.vmap(one)(key)
