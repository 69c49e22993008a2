"""Networks as pairs of pure functions, and the ways in which a method applies one to its views."""

from collections.abc import Callable
from itertools import groupby
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ssl_jax.losses import interleave
from ssl_jax.parallel import shard_batch
from ssl_jax.transforms import layers

Params = Any


class Network(NamedTuple):
    """A network as two pure functions. Encoders and heads are both this.

    init:  (rng, x) -> params, stats           stats: batch statistics, {} without any
    apply: (params, stats, x, *, train, groups=1) -> y, stats
           train=False uses the stored statistics and returns them unchanged. groups > 1 cuts the batch into that many
           equal parts, each normalised by its own statistics (MoCo's cure against cheating through BatchNorm).
    patch: side of a ViT's patches, px; 0 for any other network
    drop_path: largest probability with which apply(..., train=True, keys=) leaves out a branch, for each image by its
           key of keys [B]; without keys, nothing is left out
    scaled: images in [0, 1] as an encoder's first layer gets them, each channel with its mean and deviation

    An encoder takes images [B, H, W, C] in [0, 1] and returns embeddings [B, D]; with dense=True it returns these and
    its last feature map [B, h, w, D] (of a ResNet, what the embedding is the mean of; of a ViT, the patches). A ViT
    with blocks=(-2, -1) returns both and, third, the outputs of these blocks, each as (class token [B, D], patches
    [B, h, w, D]). A head takes [B, D].
    """

    init: Callable[..., tuple[Params, Any]]
    apply: Callable[..., tuple[jax.Array, Any]]
    patch: int = 0
    drop_path: float = 0.0
    scaled: Callable[[jax.Array], jax.Array] = lambda images: images


def dense_shapes(encoder: Network, params, stats, images) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Of the embeddings [B, D] and the feature map [B, h, w, D] of images [B, H, W, C]; nothing is computed."""
    return jax.eval_shape(lambda p, s: encoder.apply(p, s, images, train=False, dense=True)[0], params, stats)


def stack(**networks: Network) -> Network:
    """Networks one after the other, as one; params and stats are dicts under their names.

    apply returns every network's output under its name, so that a loss can read the embedding below the projector.
    """

    def init(rng, x):
        params, stats = {}, {}
        for key, (name, network) in zip(jax.random.split(rng, len(networks)), networks.items(), strict=True):
            params[name], stats[name] = network.init(key, x)
            x = jax.eval_shape(lambda p, s, x, f=network.apply: f(p, s, x, train=True)[0], params[name], stats[name], x)
            x = jnp.zeros(x.shape, x.dtype)
        return params, stats

    def apply(params, stats, x, *, train, groups=1):
        outputs, after = {}, {}
        for name, network in networks.items():
            x, after[name] = network.apply(params[name], stats[name], x, train=train, groups=groups)
            outputs[name] = x
        return outputs, after

    return Network(init, apply)


def hold(network: Network, count: int) -> Network:
    """`network` without a gradient into its first `count` layers (`transforms.layers`), which then is not computed."""

    def apply(params, *args, **kwargs):
        places, _ = layers(params)
        held = {name: jax.lax.stop_gradient(own) if places[name] < count else own for name, own in params.items()}
        return network.apply(held, *args, **kwargs)

    return network._replace(apply=apply)


KEYS = "drop_path"


def with_keys(network: Network) -> Network:
    """`network` with drop path, whose keys lie in its statistics under KEYS: one for each image that a batch is drawn
    from, of which the views of it are neighbours. A moving average, whose statistics have none, drops nothing.
    """

    def apply(params, stats, x, *, train, **kwargs):
        own = {name: value for name, value in stats.items() if name != KEYS}
        if not train or KEYS not in stats:
            y, own = network.apply(params, own, x, train=train, **kwargs)
            return y, {**stats, **own}
        keys = stats[KEYS]
        views = jnp.arange(len(x) // len(keys))
        each = jax.vmap(lambda key: jax.vmap(lambda view: jax.random.fold_in(key, view))(views))(keys).reshape(-1)
        y, own = network.apply(params, own, x, train=True, keys=each, **kwargs)
        return y, {**own, KEYS: jax.vmap(jax.random.split)(keys)[:, 0]}  # other ones for the next pass

    return network._replace(apply=apply)


def siamese(encoder: Network) -> Network:
    """The encoder for P images at a time, [B, P, H, W, C] -> their embeddings side by side [B, P * D]."""

    def apply(params, stats, x, **kwargs):
        y, stats = encoder.apply(params, stats, x.reshape(-1, *x.shape[2:]), **kwargs)
        return y.reshape(len(x), -1), stats

    return Network(lambda rng, x: encoder.init(rng, x[:, 0]), apply)


def apply_jointly(network: Network, params, stats, views, **kwargs) -> tuple[list[Any], Any]:
    """The outputs for each view, and the statistics. Neighbouring views of one size go through in one pass.

    BatchNorm then sees them together: with statistics of its own, each view could be told by them.
    """
    outputs = []
    for _, same in groupby(views, key=lambda view: view.shape):
        group = list(same)
        y, stats = network.apply(params, stats, interleave(group), train=True, **kwargs)
        count = len(group)
        outputs += [jax.tree.map(lambda x, at=slice(i, None, count): x[at], y) for i in range(count)]
    return outputs, stats


def apply_separately(network: Network, params, stats, views, **kwargs) -> tuple[list[Any], Any]:
    """The outputs for each view, and the statistics: every view is normalised by its own."""
    outputs = []
    for view in views:
        y, stats = network.apply(params, stats, view, train=True, **kwargs)
        outputs.append(y)
    return outputs, stats


def shuffle_bn(network: Network, params, stats, x, rng, groups: int) -> tuple[Any, Any]:
    """Outputs in the order of x, and statistics; in between, the batch is shuffled and normalised in `groups` parts.

    For the keys of a queue: query and key must not share the batch that BatchNorm sees, or its statistics give the
    positive away. Shuffled, a key is normalised with others than its query was (MoCo v1, section 3.3).
    """
    order = jax.random.permutation(rng, len(x))
    # Left to itself, the compiler puts what an order has chosen on every device, and each would embed the whole batch.
    y, stats = network.apply(params, stats, shard_batch(x[order]), train=True, groups=groups)
    back = jnp.argsort(order)
    return jax.tree.map(lambda v: v[back], y), stats
