"""Mixup, CutMix and label smoothing: batches whose images and labels are mixtures, and the loss of such labels.

Sources: https://arxiv.org/abs/1710.09412 (mixup), https://arxiv.org/abs/1905.04899 (CutMix), arXiv 1512.00567, section
7 (smoothing); huggingface/pytorch-image-models, timm/data/mixup.py, mode "batch", which MAE and DeiT fine-tune with.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax.losses import binary_cross_entropy

SWITCH = 0.5  # probability of CutMix in a batch, if there is mixup, too (timm's switch_prob)


class Mix(NamedTuple):
    """How the images of a batch are mixed with those of the batch in reverse order.

    share: float32, of an image's own label
    box:   int32 [4], top, bottom, left, right: what CutMix takes from the other image; empty: mixup
    """

    share: Any
    box: Any


def draw_mix(mixup: float, cutmix: float, size: int, seed: int, step: int) -> Mix:
    """The mix of a step, a pure function of (seed, step): one for the whole batch.

    mixup, cutmix: alpha of the share's Beta(alpha, alpha) distribution; 0: never. size: side of the views in px.
    """
    rng = np.random.default_rng([seed, step, 1])
    cut = cutmix > 0 and (mixup == 0 or rng.random() < SWITCH)
    alpha = cutmix if cut else mixup
    share, box = rng.beta(alpha, alpha), np.zeros(4, np.int32)
    if cut:
        side, centre = int(size * np.sqrt(1 - share)), rng.integers(0, size, 2)
        start, stop = (np.clip(at, 0, size) for at in (centre - side // 2, centre + (side + 1) // 2))
        box = np.array([start[0], stop[0], start[1], stop[1]], np.int32)
        share = 1 - np.prod(stop - start) / size**2  # what the border cuts off is not taken
    return Mix(np.float32(share), box)


def mix_images(images: jax.Array, mix: Mix) -> jax.Array:
    """Images [B, s, s, C], each mixed with that at the same place in the reversed batch."""
    top, bottom, left, right = mix.box
    row, column = jnp.arange(images.shape[1])[:, None, None], jnp.arange(images.shape[2])[:, None]
    inside = (row >= top) & (row < bottom) & (column >= left) & (column < right)
    own = jnp.where(mix.box.any(), 1 - inside, mix.share)
    return images * own + images[::-1] * (1 - own)


def soft_labels(labels: jax.Array, classes: int, smoothing: float, mix: Mix | None) -> jax.Array:
    """Targets float32 [B, K] of labels int [B], or float [B, K] with NaN where unknown.

    smoothing: s. A label becomes (1 - s) y + s / K; one of several labels, (1 - s) y + s / 2. Mixed, a label of several
    is known where it is known of both images.
    """
    several = labels.ndim == 2
    hard = labels if several else jax.nn.one_hot(labels, classes)
    soft = hard * (1 - smoothing) + smoothing / (2 if several else classes)
    return soft if mix is None else soft * mix.share + soft[::-1] * (1 - mix.share)


def loss_of_targets(logits: jax.Array, targets: jax.Array, weights: jax.Array | None, several: bool) -> jax.Array:
    """Mean cross-entropy of targets [B, K]: sum of -w t log p over classes; of several labels: mean over the known.

    weights: of the classes, as `cross_entropy` and `binary_cross_entropy` take them.
    """
    if several:
        return binary_cross_entropy(logits, targets, weights=weights)
    terms = targets * jax.nn.log_softmax(logits)
    return -(terms if weights is None else terms * weights).sum(axis=-1).mean()


def least_loss(targets: jax.Array, weights: jax.Array | None, several: bool) -> jax.Array:
    """The smallest `loss_of_targets` that there is: that of the targets, weighted, as the prediction."""
    tiny = jnp.finfo(targets.dtype).tiny
    if several:
        absent, present = (1, 1) if weights is None else weights
        best = jnp.log(jnp.maximum(present * targets, tiny)) - jnp.log(jnp.maximum(absent * (1 - targets), tiny))
        best = jnp.where(jnp.isnan(targets), 0, best)
    else:
        best = jnp.log(jnp.maximum(targets if weights is None else targets * weights, tiny))
    return loss_of_targets(best, targets, weights, several)
