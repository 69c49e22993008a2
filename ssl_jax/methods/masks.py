"""Which patches a ViT does not see: blocks, drawn for each image alone, of fixed shapes under jit."""

import math

import jax
import jax.numpy as jnp

FAILURES = 10  # in a row without a place for a block, after which a mask stays as it is (dinov2/data/masking.py)
ATTEMPTS = 40  # in all: ours, so that all random numbers are drawn at once, which compiles several times faster


def block_mask(key: jax.Array, side: int, count: jax.Array, *, least: int, most: int) -> jax.Array:
    """[B, side * side] bool of key [B]: rectangles that overlap or not, up to `count` [B] patches of an image.

    A rectangle has `least` to `most` patches and an aspect ratio of 0.3 to 1 / 0.3, and never more patches than are
    missing. Source: BEiT, algorithm 1, https://arxiv.org/abs/2106.08254; facebookresearch/dinov2,
    dinov2/data/masking.py.
    """
    place, widest = jnp.arange(side), -math.log(0.3)
    draws = jax.vmap(lambda k: jax.random.uniform(k, (ATTEMPTS, 4)))(key)

    def one(draws, count):
        def attempt(carry, u):
            mask, failed = carry
            missing = count - mask.sum()
            limit = jnp.minimum(missing, most)
            area, root = least + u[0] * (limit - least), jnp.exp(0.5 * widest * (2 * u[1] - 1))
            sides = jnp.round(jnp.sqrt(area) * jnp.stack([root, 1 / root]))
            starts = jnp.floor(u[2:] * jnp.maximum(1, side - sides + 1))
            rows, columns = ((place >= start) & (place < start + s) for start, s in zip(starts, sides))
            block = rows[:, None] & columns
            new = (block & ~mask).sum()
            fits = jnp.all(sides < side) & (new > 0) & (new <= limit) & (missing > 0) & (failed < FAILURES)
            return (mask | (block & fits), jnp.where(fits, 0, failed + 1)), None

        start = jnp.zeros((side, side), bool), jnp.zeros((), int)
        return jax.lax.scan(attempt, start, draws)[0][0].ravel()

    return jax.vmap(one)(draws, count)


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
    most = min(largest_block(int(patches * target_scale[1]), aspect), max(1, side - 1) ** 2)
    place = jnp.arange(side)
    draws = jax.vmap(lambda k: jax.random.uniform(k, (5 + 2 * targets + patches,)))(key)

    def rectangle(u, sides):
        starts = jnp.floor(u * jnp.maximum(1, side - sides))
        rows, columns = ((place >= start) & (place < start + s) for start, s in zip(starts, sides))
        return (rows[:, None] & columns).ravel()

    def size(share, ratio):
        area = jnp.floor(patches * share)
        return jnp.clip(jnp.round(jnp.sqrt(jnp.stack([area * ratio, area / ratio]))), 1, max(1, side - 1))

    def between(u, ends):
        return ends[0] + u * (ends[1] - ends[0])

    def one(u):
        block = size(between(u[0], target_scale), between(u[1], aspect))
        blocks = jax.vmap(lambda at: rectangle(at, block))(u[5 : 5 + 2 * targets].reshape(targets, 2))
        seen = rectangle(u[3:5], size(between(u[2], context_scale), 1.0)) & ~blocks.any(axis=0)
        order = jnp.argsort(jnp.where(seen, 0, 2) + u[5 + 2 * targets :])
        visible = order[jnp.arange(context) % jnp.clip(seen.sum(), 1, context)]
        return visible, *first_of(blocks, most)

    return jax.vmap(one)(draws)
