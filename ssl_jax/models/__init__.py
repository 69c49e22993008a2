"""Encoders and heads as `Network`s, and the exchange of weights with torchvision. The only user of flax.linen."""

from ssl_jax.models.conv import resolve_conv
from ssl_jax.models.heads import linear, mlp
from ssl_jax.models.resnet import build_encoder, normalization
from ssl_jax.models.torch_weights import from_torch, to_torch

__all__ = ["build_encoder", "from_torch", "linear", "mlp", "normalization", "resolve_conv", "to_torch"]
