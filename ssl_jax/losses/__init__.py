"""Losses of self-supervised learning: pure functions of arrays, without networks, state or device counts.

Shapes: B batch, D features, K queue. Every loss returns a scalar, the mean over the batch, in the type of its inputs.
"""

from ssl_jax.losses.clustering import dino, dino_targets, msn, msn_targets, sinkhorn, swapped, swav
from ssl_jax.losses.contrastive import (
    in_batch_info_nce,
    indexed_info_nce,
    info_nce,
    interleave,
    log_sum_exp,
    nce,
    nce_normalizer,
    normalize,
    nt_xent,
    similarities,
    sup_con,
    triplet,
)
from ssl_jax.losses.gaussian import lejepa, sig_reg
from ssl_jax.losses.metric import mined_triplet
from ssl_jax.losses.negative_free import negative_cosine
from ssl_jax.losses.prototypes import koleo, prototype_cross_entropy, sinkhorn_shift
from ssl_jax.losses.reconstruction import masked_error, smooth_l1
from ssl_jax.losses.redundancy import (
    barlow_twins,
    covariance_term,
    tico,
    tico_covariance,
    variance_term,
    vicreg,
    vicregl,
)
from ssl_jax.losses.supervised import binary_cross_entropy, cross_entropy

__all__ = [
    "barlow_twins",
    "binary_cross_entropy",
    "covariance_term",
    "cross_entropy",
    "dino",
    "dino_targets",
    "in_batch_info_nce",
    "indexed_info_nce",
    "info_nce",
    "interleave",
    "koleo",
    "lejepa",
    "log_sum_exp",
    "masked_error",
    "mined_triplet",
    "msn",
    "msn_targets",
    "nce",
    "nce_normalizer",
    "negative_cosine",
    "normalize",
    "nt_xent",
    "prototype_cross_entropy",
    "sig_reg",
    "similarities",
    "sinkhorn",
    "sinkhorn_shift",
    "smooth_l1",
    "sup_con",
    "swapped",
    "swav",
    "tico",
    "tico_covariance",
    "triplet",
    "variance_term",
    "vicreg",
    "vicregl",
]
