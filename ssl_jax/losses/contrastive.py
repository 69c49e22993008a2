"""Losses that pull positives together and push negatives apart."""

import jax
import jax.numpy as jnp
import optax

from ssl_jax.losses.common import normalize


def nt_xent(z_a: jax.Array, z_b: jax.Array, *, temperature: float) -> jax.Array:
    """Normalised temperature-scaled cross-entropy of SimCLR over all 2B views.

    Each view finds its partner among the 2B - 1 others: mean_i of -log softmax_{j != i}(z_i . z_j / T)_{partner(i)}.

    Args:
      z_a, z_b: [B, D] projections of the two views, normalised here.
      temperature: T > 0.

    Source: SimCLR, equation 1, https://arxiv.org/abs/2002.05709. The official code adds the means of the two halves,
    twice this value.

    >>> round(float(nt_xent(jnp.ones((4, 8)), jnp.ones((4, 8)), temperature=0.5)), 4)  # collapsed: log(2B - 1)
    1.9459
    """
    z = normalize(jnp.concatenate([z_a, z_b]))
    n = len(z)
    logits = jnp.where(jnp.eye(n, dtype=bool), -jnp.inf, z @ z.T / temperature)
    partner = (jnp.arange(n) + n // 2) % n
    return optax.softmax_cross_entropy_with_integer_labels(logits, partner).mean()


def info_nce(query: jax.Array, key: jax.Array, negatives: jax.Array, *, temperature: float) -> jax.Array:
    """InfoNCE with explicit negatives: mean of -log softmax([q . k, q . negatives] / T)_0.

    Args:
      query: [B, D], normalised here.
      key: [B, D] the positive of each query, normalised here; pass it through stop_gradient if it is a target.
      negatives: [K, D] shared by all queries (MoCo's queue), normalised here.
      temperature: T > 0.

    Source: MoCo, equation 1, https://arxiv.org/abs/1911.05722; InfoNCE from https://arxiv.org/abs/1807.03748.

    >>> one = jnp.ones((2, 3))
    >>> round(float(info_nce(one, one, jnp.ones((7, 3)), temperature=0.1)), 4)  # collapsed: log(1 + K)
    2.0794
    """
    query, key, negatives = normalize(query), normalize(key), normalize(negatives)
    positive = jnp.sum(query * key, axis=-1, keepdims=True)
    logits = jnp.concatenate([positive, query @ negatives.T], axis=1) / temperature
    return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.zeros(len(query), int)).mean()


def triplet(anchor: jax.Array, positive: jax.Array, negative: jax.Array, *, margin: float) -> jax.Array:
    """Triplet loss: mean of max(0, |a - p| - |a - n| + margin), Euclidean, inputs as given (not normalised).

    Args:
      anchor, positive, negative: [B, D].
      margin: how much farther the negative shall be, in units of the distance.

    Source: FaceNet, https://arxiv.org/abs/1503.03832, with the plain distance of torch.nn.TripletMarginLoss, which
    adds 1e-6 to each difference so that the gradient exists at distance 0.

    >>> a = jnp.array([[0.0, 0.0]])
    >>> round(float(triplet(a, a, jnp.array([[3.0, 4.0]]), margin=6.0)), 3)
    1.0
    """

    def distance(x, y):
        return jnp.linalg.norm(x - y + 1e-6, axis=-1)

    return jnp.maximum(0, distance(anchor, positive) - distance(anchor, negative) + margin).mean()


def in_batch_info_nce(query: jax.Array, key: jax.Array, *, temperature: float) -> jax.Array:
    """InfoNCE among the batch: query i finds key i among all keys, mean of -log softmax(q . keys / T)_i.

    Args:
      query: [B, D], normalised here.
      key: [B, D], normalised here; gets no gradient.
      temperature: T > 0.

    Source: MoCo v3, algorithm 1, https://arxiv.org/abs/2104.02057, which multiplies it by 2 T.

    >>> one = jnp.ones((4, 3))
    >>> round(float(in_batch_info_nce(one, one, temperature=0.2)), 4)  # collapsed: log(B)
    1.3863
    """
    logits = normalize(query) @ normalize(jax.lax.stop_gradient(key)).T / temperature
    return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.arange(len(logits))).mean()


def sup_con(z_a: jax.Array, z_b: jax.Array, label: jax.Array, *, temperature: float) -> jax.Array:
    """Supervised contrastive: mean over all 2B views i of -mean_p log softmax_{j != i}(z_i . z_j / T)_p.

    The positives p are all other views of the class of i. Every anchor has one, the other view of its image.

    Args:
      z_a, z_b: [B, D] projections of the two views, normalised here.
      label: [B], -1 where it is not known: such an image is a class of its own.
      temperature: T > 0.

    Source: SupCon, equation 2, https://arxiv.org/abs/2004.11362. The official code multiplies by T / 0.07; not here.

    >>> round(float(sup_con(jnp.ones((4, 8)), jnp.ones((4, 8)), jnp.zeros(4, int), temperature=0.5)), 4)  # log(2B - 1)
    1.9459
    """
    z = normalize(jnp.concatenate([z_a, z_b]))
    own = jnp.where(label >= 0, label, -1 - jnp.arange(len(label)))
    group = jnp.concatenate([own, own])
    others = ~jnp.eye(len(z), dtype=bool)
    positive = (group[:, None] == group) & others
    log_odds = jax.nn.log_softmax(jnp.where(others, z @ z.T / temperature, -jnp.inf), axis=1)
    return -(jnp.where(positive, log_odds, 0).sum(axis=1) / positive.sum(axis=1)).mean()
