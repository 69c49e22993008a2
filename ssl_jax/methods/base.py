"""The one interface behind which every method stands. A new method is one new file beside this one.

Such a file holds a docstring whose first line says what the method is and names its source, a frozen dataclass
`Config`, a dict `RECIPE` ("optim.lr": 0.3, ...: where its defaults differ from those of `ssl_jax.config`) and

    make(config: Config, encoder: Network, steps: int) -> Method      steps: length of the run, for schedules
"""

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

    An encoder takes images [B, H, W, C] in [0, 1] and returns embeddings [B, D]; a head takes [B, D].
    """

    init: Callable[..., tuple[Params, Any]]
    apply: Callable[..., tuple[jax.Array, Any]]


class Method(NamedTuple):
    """A self-supervised (or supervised) method. Shapes: B batch, V views, D features.

    views:       number of views the method draws from each image
    needs:       what the data must give beyond images: a subset of {"label"}
    init:        (rng, views) -> params, extra        views: V arrays [B, H, W, C]; extra: statistics, queue, centre ...
                 batch statistics that follow the parameters live in extra["stats"], the target's in extra["target"]
    forward:     (params, target, extra, batch, rng) -> outputs, extra   per example (but for BatchNorm): may be cut
                 into micro-batches. batch["views"]: V arrays [B, H, W, C] in [0, 1]; batch["label"] [B] if needed.
                 outputs: a dict; outputs["embedding"] [B, D] is the encoder's output for the first view.
    loss:        (outputs, extra, batch) -> scalar, metrics               sees the whole global batch
    transform:   last of the optimizer's chain: optax.identity() or transforms.track_target(...)
    post_update: (params, extra, outputs, step) -> params, extra          after the optimizer: queue, prototypes
    encoder:     (params, extra) -> params, stats of the encoder itself: what is exported, evaluated and fine-tuned
    """

    views: int
    needs: frozenset[str]
    init: Callable[..., tuple[Params, Extra]]
    forward: Callable[..., tuple[dict[str, Any], Extra]]
    loss: Callable[..., tuple[jax.Array, Metrics]]
    transform: optax.GradientTransformation
    post_update: Callable[..., tuple[Params, Extra]]
    encoder: Callable[..., tuple[Params, Any]]


def keep(params, extra, outputs, step):
    """The `post_update` of a method that has nothing to do after a step."""
    del outputs, step
    return params, extra


def encoder_of(params, extra):
    """The `encoder` of a method that keeps it under params["encoder"] and extra["stats"]["encoder"]."""
    return params["encoder"], extra["stats"]["encoder"]


def stack(**networks: Network) -> Network:
    """Networks one after the other, as one; params and stats are dicts under their names.

    apply returns every network's output under its name, so that a loss can read the embedding below the projector.
    """

    def init(rng, x):
        params, stats = {}, {}
        for key, (name, network) in zip(jax.random.split(rng, len(networks)), networks.items(), strict=True):
            params[name], stats[name] = network.init(key, x)
            x = jax.eval_shape(lambda p, s, x, f=network.apply: f(p, s, x, train=True)[0], params[name], stats[name], x)
            x = jax.numpy.zeros(x.shape, x.dtype)
        return params, stats

    def apply(params, stats, x, *, train, groups=1):
        outputs, after = {}, {}
        for name, network in networks.items():
            x, after[name] = network.apply(params[name], stats[name], x, train=train, groups=groups)
            outputs[name] = x
        return outputs, after

    return Network(init, apply)
