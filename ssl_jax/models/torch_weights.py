"""Encoder weights with torchvision's names and layouts (timm's for a ViT), both ways, without the classifier."""

import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from ssl_jax.errors import UserError

_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
_LEAVES |= {"attn_q_bias": "attn.q_bias", "attn_v_bias": "attn.v_bias"}  # of a ViT without a bias for keys
# Prefixes that training scripts add to the names, such as MoCo's "module.encoder_q.".
_PREFIX = re.compile(r"^((module|encoder_q|encoder|backbone|base_encoder|online_encoder|model|resnet)\.)+")
_IGNORED = re.compile(r"^(fc|head)\.(?!norm\.)|(^|\.)num_batches_tracked$")
# Underscores in a module's name that stand for a dot: layer1_0, patch_embed_proj, head_norm, but not patch_embed.
_DOT = re.compile(r"_(?=\d|qkv|proj|fc|norm$)")
# Number of dimensions (4: convolution, 2: linear layer) -> axes that turn a kernel into torch's weight, and back.
_TO_TORCH, _FROM_TORCH = {4: (3, 2, 0, 1), 2: (1, 0)}, {4: (2, 3, 1, 0), 2: (1, 0)}


def _name(path: tuple[str, ...]) -> str:
    """("layer1_0", "downsample_0", "kernel") -> "layer1.0.downsample.0.weight"; ("cls_token",) is unchanged."""
    return ".".join([_DOT.sub(".", module) for module in path[:-1]] + [_LEAVES.get(path[-1], path[-1])])


def to_torch(params: Any, stats: Any) -> dict[str, np.ndarray]:
    """The params and stats of an encoder as float32 arrays by torchvision's names ("layer1.0.conv1.weight")."""
    leaves = {**flatten_dict(params), **flatten_dict(stats)}
    arrays = {_name(path): np.asarray(leaf, np.float32) for path, leaf in leaves.items()}
    return {name: a.transpose(_TO_TORCH.get(a.ndim, range(a.ndim))) for name, a in arrays.items()}


def from_torch(weights: Mapping[str, Any], params: Any, stats: Any) -> tuple[Any, Any]:
    """`params` and `stats` with their values replaced by `weights` (arrays under torchvision's names).

    `fc.*`, `head.*` and `num_batches_tracked` are ignored, and so are prefixes such as "module." or "encoder_q.".
    Raises UserError if a weight is missing, has another shape or belongs to no layer.
    """
    unused = {_PREFIX.sub("", name): value for name, value in weights.items()}
    unused = {name: value for name, value in unused.items() if not _IGNORED.search(name)}

    def fill(tree):
        return unflatten_dict({path: take(_name(path), leaf) for path, leaf in flatten_dict(tree).items()})

    def take(name, leaf):
        if name not in unused:
            raise UserError(f"{name}: missing; the weights are of another architecture")
        value = np.asarray(unused.pop(name), np.float32)
        shape = tuple(leaf.shape[i] for i in _TO_TORCH.get(leaf.ndim, range(leaf.ndim)))
        if value.shape != shape:
            raise UserError(f"{name}: shape {value.shape}; allowed: {shape}; the weights are of another architecture")
        return jnp.asarray(value.transpose(_FROM_TORCH.get(value.ndim, range(value.ndim))))

    filled = fill(params), fill(stats)
    if unused:
        raise UserError(f"{min(unused)}: belongs to no layer of the encoder; the weights are of another architecture")
    return filled
