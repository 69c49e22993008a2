"""Weights of an encoder under torchvision's names and in its layouts, both ways. Without the classifier `fc`."""

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
_IGNORED = re.compile(r"^fc\.|(^|\.)num_batches_tracked$")


def _name(path: tuple[str, ...]) -> str:
    """("layer1_0", "downsample_0", "kernel") -> "layer1.0.downsample.0.weight"."""
    return ".".join([module.replace("_", ".") for module in path[:-1]] + [_LEAVES[path[-1]]])


def to_torch(params: Any, stats: Any) -> dict[str, np.ndarray]:
    """float32 arrays by torchvision's names ("layer1.0.conv1.weight" [D, C, k, k]) of an encoder's params and stats."""
    leaves = {**flatten_dict(params), **flatten_dict(stats)}
    arrays = {_name(path): np.asarray(leaf, np.float32) for path, leaf in leaves.items()}
    return {name: a.transpose(3, 2, 0, 1) if a.ndim == 4 else a for name, a in arrays.items()}


def from_torch(weights: Mapping[str, Any], params: Any, stats: Any) -> tuple[Any, Any]:
    """(params, stats) with the structure of those given and the values of `weights` (arrays by torchvision's names).

    `fc.*` and `num_batches_tracked` are ignored, and so are prefixes such as "module." or "encoder_q.".
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
        wanted = tuple(leaf.shape[i] for i in (3, 2, 0, 1)) if leaf.ndim == 4 else leaf.shape
        if value.shape != wanted:
            raise UserError(f"{name}: shape {value.shape}, allowed: {wanted}; checkpoint from another architecture")
        return jnp.asarray(value.transpose(2, 3, 1, 0) if value.ndim == 4 else value)

    filled = fill(params), fill(stats)
    if given:
        raise UserError(f"{min(given)}: belongs to no layer of the encoder; checkpoint from another architecture")
    return filled
