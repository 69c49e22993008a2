"""Jigsaw puzzles: in which of many known orders are the nine tiles of an image?

The tiles must not give the answer away: gaps remove their common borders, normalising each tile on its own removes
brightness and contrast, and shifting the channels hides the lens' shift of colours.

Source: https://arxiv.org/abs/1603.09246; MehdiNoroozi/JigsawPuzzleSolver; recipe: facebookresearch/vissl.

Family: pretext tasks.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ssl_jax.errors import UserError
from ssl_jax.fields import option
from ssl_jax.methods.base import Method, init_network
from ssl_jax.models import mlp
from ssl_jax.network import siamese, stack


@dataclass(frozen=True)
class Config:
    # perm100.yaml; vissl has 2000 and 10,000 too
    permutations: int = option(100, "orders to tell apart", min=2, max=10_000)
    tile: float = option(0.75, "side of a tile, as a share of its cell's", min=0, max=1)  # 64 of 85 px
    # jps++/data_transformer.cpp
    channel_shift: int = option(2, "px by which a colour channel moves at most", min=0, max=100)
    hidden: int = 1024  # of the head over all tiles; the authors': 4096


# jigsaw_8gpu_resnet.yaml: two thirds of the images gray. A crop would only make the tiles smaller.
RECIPE = {
    "optim.lr": 0.1,
    "optim.weight_decay": 1e-4,
    "augment.preset": "light",
    "augment.crop_scale": (1.0, 1.0),
    "augment.gray": 0.66,
}
SMALLEST = 12  # px of a view: cells of 4, tiles of 3
TINY = {"augment.size": 12}  # for the contract test: cells of 4 px


def permutation_set(count: int, seed: int = 0) -> np.ndarray:
    """[count, 9]: permutations far apart in Hamming distance, chosen greedily from 20 times as many random ones.

    Next comes the candidate whose nearest one so far is the farthest, of several the one farthest on average. Going by
    the average alone, as the official sets do, lets some come close.
    """
    rng = np.random.default_rng(seed)
    candidates = rng.permuted(np.tile(np.arange(9, dtype=np.int8), (max(20 * count, 2000), 1)), axis=1)
    candidates = np.ascontiguousarray(np.unique(candidates, axis=0).T)  # [9, N]: sums over the first axis are fast
    chosen = [int(rng.integers(candidates.shape[1]))]
    nearest, total = np.full(candidates.shape[1], 9, np.int32), np.zeros(candidates.shape[1], np.int32)
    while len(chosen) < count:
        distance = (candidates != candidates[:, chosen[-1:]]).sum(axis=0, dtype=np.int8)
        nearest, total = np.minimum(nearest, distance), total + distance
        chosen.append(int(np.argmax(nearest * (9 * count) + total)))
    return candidates[:, chosen].T


def tiles_of(key, images, *, tile, channel_shift):
    """[B, s, s, C] -> nine tiles of each image, row by row [B, 9, t, t, C], each with mean 0.5 and deviation 0.25.

    A tile lies at random in its cell but for the last pixels on the right and below: between two tiles is always a gap.
    """
    _, side, _, channels = images.shape
    if side < SMALLEST:
        raise UserError(f"config.augment.size={side}: jigsaw cuts 3 x 3 tiles; allowed: {SMALLEST} px or more")
    cell = side // 3
    t = min(cell - 1, max(3, round(tile * cell)))
    slack = cell - 1 - t

    def draw(key):
        key_tile, key_channel = jax.random.split(key)
        inside = jax.random.randint(key_tile, (9, 1, 2), 0, slack + 1)
        return inside, jax.random.randint(key_channel, (9, channels, 2), 0, channel_shift + 1) * (channels == 3)

    inside, shift = jax.vmap(draw)(key)
    cells = (side - 3 * cell) // 2 + cell * jnp.indices((3, 3)).reshape(2, 9).T[:, None]  # [9, 1, 2]
    corners = cells + jnp.minimum(inside + shift, slack)  # [B, 9, C, 2]

    def cut(plane, corner):  # [s, s], [2]
        return jax.lax.dynamic_slice(plane, corner, (t, t))

    channelwise = jax.vmap(cut, in_axes=(2, 0), out_axes=2)
    made = jax.vmap(jax.vmap(channelwise, in_axes=(None, 0)))(images, corners)
    mean, deviation = made.mean((2, 3), keepdims=True), made.std((2, 3), keepdims=True)
    return 0.5 + 0.25 * (made - mean) / jnp.maximum(deviation, 1e-3)  # about what an encoder expects of an image


def make(config, encoder, run):
    del run
    orders = jnp.asarray(permutation_set(config.permutations))
    network = stack(encoder=siamese(encoder), head=mlp((config.hidden, config.permutations)))

    def cut(key, images):
        return tiles_of(key, images, tile=config.tile, channel_shift=config.channel_shift)

    def init(key, views):
        return init_network(network)(key, [cut(jax.random.split(key, len(views[0])), views[0])])

    def forward(params, target, state, batch, key):
        del target
        (images,) = batch["views"]
        key_tiles, key_order = jnp.moveaxis(jax.vmap(jax.random.split)(key), 1, 0)
        answer = jax.vmap(lambda key: jax.random.randint(key, (), 0, len(orders)))(key_order)
        tiles = cut(key_tiles, images)
        shuffled = jnp.take_along_axis(tiles, orders[answer][:, :, None, None, None], axis=1)
        y, stats = network.apply(params, state.stats, shuffled, train=True)
        embedding = y["encoder"].reshape(len(images), 9, -1).mean(axis=1)
        return {"embedding": embedding, "logits": y["head"], "answer": answer}, stats

    def loss(outputs, state, batch, ctx):
        del state, batch, ctx
        logits, answer = outputs["logits"], outputs["answer"]
        each = optax.softmax_cross_entropy_with_integer_labels(logits, answer)
        return each.mean(), {"accuracy": (logits.argmax(-1) == answer).mean()}

    return Method(init, forward, loss, views=1)
