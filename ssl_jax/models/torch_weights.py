"""Weights of an encoder under torchvision's names and layouts (a ViT: timm's), both ways, without the classifier."""

import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from ssl_jax.errors import UserError

_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
# What training scripts put before the names, such as MoCo's "module.encoder_q.".
_PREFIX = re.compile(r"^((module|encoder_q|encoder|backbone|base_encoder|online_encoder|model|resnet)\.)+")
_IGNORED = re.compile(r"^(fc|head)\.|(^|\.)num_batches_tracked$")
# Where an underscore in a module's name stands for a dot: layer1_0, patch_embed_proj, but not patch_embed.
_DOT = re.compile(r"_(?=\d|qkv|proj|fc)")
# Dimensions of a kernel (of a convolution, of a linear layer) -> axes that make it torch's weight, and back.
_TO_TORCH, _FROM_TORCH = {4: (3, 2, 0, 1), 2: (1, 0)}, {4: (2, 3, 1, 0), 2: (1, 0)}


def _name(path: tuple[str, ...]) -> str:
    """("layer1_0", "downsample_0", "kernel") -> "layer1.0.downsample.0.weight"; ("cls_token",) stays as it is."""
    return ".".join([_DOT.sub(".", module) for module in path[:-1]] + [_LEAVES.get(path[-1], path[-1])])


def to_torch(params: Any, stats: Any) -> dict[str, np.ndarray]:
    """float32 arrays by torchvision's names ("layer1.0.conv1.weight" [D, C, k, k]) of an encoder's params and stats."""
    leaves = {**flatten_dict(params), **flatten_dict(stats)}
    arrays = {_name(path): np.asarray(leaf, np.float32) for path, leaf in leaves.items()}
    return {name: a.transpose(_TO_TORCH.get(a.ndim, range(a.ndim))) for name, a in arrays.items()}


def from_torch(weights: Mapping[str, Any], params: Any, stats: Any) -> tuple[Any, Any]:
    """(params, stats) with the structure of those given and the values of `weights` (arrays by torchvision's names).

    `fc.*`, `head.*` and `num_batches_tracked` are ignored, and so are prefixes such as "module." or "encoder_q.".
    Raises UserError if a weight is missing, has another shape or belongs to no layer.
    """
    given = {_PREFIX.sub("", name): value for name, value in weights.items()}
    given = {name: value for name, value in given.items() if not _IGNORED.search(name)}

    def fill(tree):
        return unflatten_dict({path: take(_name(path), leaf) for path, leaf in flatten_dict(tree).items()})

    def take(name, leaf):
        if name not in given:
            raise UserError(f"{name}: missing; checkpoint from another architecture")
        value = np.asarray(given.pop(name), np.float32)
        wanted = tuple(leaf.shape[i] for i in _TO_TORCH.get(leaf.ndim, range(leaf.ndim)))
        if value.shape != wanted:
            raise UserError(f"{name}: shape {value.shape}, allowed: {wanted}; checkpoint from another architecture")
        return jnp.asarray(value.transpose(_FROM_TORCH.get(value.ndim, range(value.ndim))))

    filled = fill(params), fill(stats)
    if given:
        raise UserError(f"{min(given)}: belongs to no layer of the encoder; checkpoint from another architecture")
    return filled
