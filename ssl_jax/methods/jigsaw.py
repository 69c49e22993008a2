"""Jigsaw puzzles: in which of many known orders are the nine tiles of an image?

Source: https://arxiv.org/abs/1603.09246; facebookresearch/vissl, configs/config/pretrain/jigsaw. What would give the
answer away is taken from the tiles: common borders by gaps, brightness and contrast by normalising each on its own,
the lens' shift of colours by shifting the channels.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ssl_jax.errors import UserError
from ssl_jax.methods.base import Method, init_of, siamese, stack
from ssl_jax.models import mlp


@dataclass(frozen=True)
class Config:
    permutations: int = 100  # orders to tell apart; vissl: 100 (perm100.yaml), 2000 or 10,000
    tile: float = 0.75  # side of a tile, share of its cell's; vissl: 64 of 85 px, the paper: 64 of 75
    channel_shift: int = 2  # px, largest shift of a colour channel either way (paper, section 4.2)
    hidden: int = 1024  # of the head over all tiles; the paper: 4096


# SGD of vissl; two thirds of the images gray. A crop would only make the tiles smaller.
RECIPE = {"optim.lr": 0.1, "augment.preset": "light", "augment.crop_scale": (1.0, 1.0), "augment.gray": 0.66}
SMALLEST = 12  # px of a view: cells of 4, tiles of 3


def permutation_set(count: int, seed: int = 0) -> np.ndarray:
    """[count, 9]: permutations far apart in Hamming distance, chosen greedily from 20 times as many random ones.

    Each is the candidate whose nearest one so far is the farthest, of several the one farthest on average. The paper
    goes by the average alone, which lets some come close.
    """
    rng = np.random.default_rng(seed)
    candidates = np.unique(rng.permuted(np.tile(np.arange(9), (max(20 * count, 2000), 1)), axis=1), axis=0)
    chosen = [int(rng.integers(len(candidates)))]
    nearest, total = np.full(len(candidates), 9), np.zeros(len(candidates), int)
    while len(chosen) < count:
        distance = (candidates != candidates[chosen[-1]]).sum(axis=1)
        nearest, total = np.minimum(nearest, distance), total + distance
        chosen.append(int(np.argmax(nearest * 9 * count + total)))
    return candidates[chosen]


def tiles_of(rng, images, *, tile, channel_shift):
    """[B, s, s, C] -> nine tiles of each image, row by row [B, 9, t, t, C], each with mean 0.5 and deviation 0.25.

    A tile lies at random in its cell but for the last pixels on the right and below: between two tiles is always a gap.
    """
    batch, side, _, channels = images.shape
    if side < SMALLEST:
        raise UserError(f"config.augment.size={side}: jigsaw cuts 3 x 3 tiles; allowed: {SMALLEST} px or more")
    cell = side // 3
    t = min(cell - 1, max(3, round(tile * cell)))
    slack = cell - 1 - t
    start = (side - 3 * cell) // 2
    rng_tile, rng_channel = jax.random.split(rng)
    inside = jax.random.randint(rng_tile, (batch, 9, 1, 2), 0, slack + 1)
    shift = jax.random.randint(rng_channel, (batch, 9, channels, 2), -channel_shift, channel_shift + 1)
    inside = jnp.clip(inside + (shift if channels == 3 else 0), 0, slack)  # [B, 9, C or 1, 2]
    corners = start + cell * jnp.indices((3, 3)).reshape(2, 9).T[:, None] + inside
    corners = jnp.broadcast_to(corners, (batch, 9, channels, 2))

    def cut(plane, corner):  # [s, s], [2]
        return jax.lax.dynamic_slice(plane, corner, (t, t))

    over_channels = jax.vmap(cut, in_axes=(2, 0), out_axes=2)
    made = jax.vmap(jax.vmap(over_channels, in_axes=(None, 0)))(images, corners)
    mean, deviation = made.mean((2, 3), keepdims=True), made.std((2, 3), keepdims=True)
    return 0.5 + 0.25 * (made - mean) / jnp.maximum(deviation, 1e-3)  # about what an encoder expects of an image


def make(config, encoder, run):
    del run
    if not 2 <= config.permutations <= 10_000:
        raise UserError(f"config.method.permutations={config.permutations}: allowed: 2 to 10000")
    if not 0 < config.tile <= 1:
        raise UserError(f"config.method.tile={config.tile}: allowed: more than 0, at most 1")
    if config.channel_shift < 0:
        raise UserError(f"config.method.channel_shift={config.channel_shift}: allowed: 0 or more")
    orders = jnp.asarray(permutation_set(config.permutations))
    network = stack(encoder=siamese(encoder), head=mlp((config.hidden, config.permutations)))

    def cut(rng, images):
        return tiles_of(rng, images, tile=config.tile, channel_shift=config.channel_shift)

    def init(rng, views):
        return init_of(network)(rng, [cut(rng, views[0])])

    def forward(params, target, extra, batch, rng):
        del target
        (images,) = batch["views"]
        rng_tiles, rng_order = jax.random.split(rng)
        answer = jax.random.randint(rng_order, (len(images),), 0, len(orders))
        tiles = cut(rng_tiles, images)
        shuffled = jnp.take_along_axis(tiles, orders[answer][:, :, None, None, None], axis=1)
        y, stats = network.apply(params, extra["stats"], shuffled, train=True)
        embedding = y["encoder"].reshape(len(images), 9, -1).mean(axis=1)
        return {"embedding": embedding, "logits": y["head"], "answer": answer}, {"stats": stats}

    def loss(outputs, extra, batch):
        del extra, batch
        logits, answer = outputs["logits"], outputs["answer"]
        each = optax.softmax_cross_entropy_with_integer_labels(logits, answer)
        return each.mean(), {"accuracy": (logits.argmax(-1) == answer).mean()}

    return Method(init, forward, loss, views=1)
