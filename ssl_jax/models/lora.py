"""Low-rank adapters: a pretrained network learns a small correction of its matrices, and nothing else.

Source: https://arxiv.org/abs/2106.09685, section 4.1. Every matrix W [in, out] of a transformer's blocks becomes
W + A B, with A [in, r] normal with variance 1 / r, and B [r, out] zero at first: the network starts as it was. The
factor alpha / r of the paper is 1.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from ssl_jax.errors import UserError
from ssl_jax.network import Network

BLOCKS = "blocks_"


def low_rank(network: Network, rank: int) -> Network:
    """`network` with adapters of this rank. Its params are the adapters alone; its stats are {"base": the params of
    `network`, which never change, "stats": its statistics}.

    Raises UserError if the network has no transformer blocks.
    """

    def init(rng, x):
        key, rng = jax.random.split(rng)
        base, stats = network.init(rng, x)
        matrices = [path for path, leaf in flatten_dict(base).items() if _adapted(path, leaf)]
        if not matrices:
            raise UserError(f"config.model.lora={rank}: adapts the blocks of a ViT; allowed for other networks: 0")
        flat, params = flatten_dict(base), {}
        for path, own in zip(matrices, jax.random.split(key, len(matrices)), strict=True):
            wide, out = flat[path].shape
            params[path] = {
                "a": jax.random.normal(own, (wide, rank)) / jnp.sqrt(rank),
                "b": jnp.zeros((rank, out)),
            }
        return unflatten_dict(params), {"base": base, "stats": stats}

    def apply(params, stats, x, *, train, **kwargs):
        full, inner = merge(params, stats)
        y, inner = network.apply(full, inner, x, train=train, **kwargs)
        return y, {"base": stats["base"], "stats": inner}

    return network._replace(init=init, apply=apply)


def merge(params: Any, stats: Any) -> tuple[Any, Any]:
    """The params and stats of the network itself, with the adapters added to its matrices."""
    base, adapters = flatten_dict(stats["base"]), flatten_dict(params)
    for *path, name in adapters:
        if name == "a":
            where = tuple(path)
            base[where] = base[where] + adapters[*where, "a"] @ adapters[*where, "b"]
    return unflatten_dict(base), stats["stats"]


def _adapted(path: tuple[str, ...], leaf: jax.Array) -> bool:
    return path[0].startswith(BLOCKS) and path[-1] == "kernel" and leaf.ndim == 2
