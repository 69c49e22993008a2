"""Encoders and heads as `Network`s, and conversion of weights from and to torch. The only user of flax.linen."""

from ssl_jax.models.build import build_encoder, normalization, resolve_model
from ssl_jax.models.layers import linear, mlp, resolve_conv
from ssl_jax.models.lora import low_rank, merge
from ssl_jax.models.predictor import predictor
from ssl_jax.models.torch_weights import from_torch, to_torch
from ssl_jax.models.vit import decoder, patchify

__all__ = [
    "build_encoder",
    "decoder",
    "from_torch",
    "linear",
    "low_rank",
    "merge",
    "mlp",
    "normalization",
    "patchify",
    "predictor",
    "resolve_conv",
    "resolve_model",
    "to_torch",
]
