"""The one interface behind which every method stands. A new method is one new file beside this one."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import optax

Params = Any
Extra = Any
Batch = Mapping[str, Any]
Metrics = dict[str, jax.Array]


class Network(NamedTuple):
    """A network as two pure functions. Encoders and heads are both this.

    init:  (rng, x) -> params, stats           stats: batch statistics, {} without any
    apply: (params, stats, x, *, train, groups=1) -> y, stats
           train=False uses the stored statistics and returns them unchanged. groups > 1 cuts the batch into that many
           equal parts, each normalised by its own statistics (MoCo's cure against cheating through BatchNorm).
    """

    init: Callable[..., tuple[Params, Any]]
    apply: Callable[..., tuple[jax.Array, Any]]


def chain(*networks: Network) -> Network:
    """Networks one after the other, as one; params and stats are tuples in their order."""

    def init(rng, x):
        params, stats = [], []
        for key, network in zip(jax.random.split(rng, len(networks)), networks, strict=True):
            p, s = network.init(key, x)
            x = jax.eval_shape(lambda p, s, x, f=network.apply: f(p, s, x, train=True)[0], p, s, x)
            params.append(p)
            stats.append(s)
        return tuple(params), tuple(stats)

    def apply(params, stats, x, *, train, groups=1):
        after = []
        for network, p, s in zip(networks, params, stats, strict=True):
            x, s = network.apply(p, s, x, train=train, groups=groups)
            after.append(s)
        return x, tuple(after)

    return Network(init, apply)


class Method(NamedTuple):
    """A self-supervised (or supervised) method. Shapes: B batch, V views, D features.

    views:       number of views the method draws from each image
    needs:       what the data must give beyond images: a subset of {"label", "index"}
    init:        (rng, views) -> params, extra        views: V arrays [B, H, W, C]; extra: statistics, queue, centre ...
    forward:     (params, target, extra, batch, rng) -> outputs, extra   per example (but for BatchNorm): may be cut
                 into micro-batches. batch["views"]: V arrays [B, H, W, C] in [0, 1]; batch["label"], batch["index"] [B].
    loss:        (outputs, extra, batch) -> scalar, metrics               sees the whole global batch
    transform:   last of the optimizer's chain: optax.identity() or transforms.track_target(...)
    post_update: (params, extra, outputs, step) -> params, extra          after the optimizer: queue, prototypes
    encoder:     (params, extra) -> params, stats of the encoder itself: what is exported, evaluated and fine-tuned
    """

    views: int
    needs: frozenset[str]
    init: Callable[..., tuple[Params, Extra]]
    forward: Callable[..., tuple[Any, Extra]]
    loss: Callable[..., tuple[jax.Array, Metrics]]
    transform: optax.GradientTransformation
    post_update: Callable[..., tuple[Params, Extra]]
    encoder: Callable[..., tuple[Params, Any]]


def keep(params, extra, outputs, step):
    """The `post_update` of a method that has nothing to do after a step."""
    del outputs, step
    return params, extra
