"""The one interface behind which every method stands. A new method is one new file beside this one.

Such a file holds a docstring whose first line says what the method is and names its source, a frozen dataclass
`Config`, a dict `RECIPE` ("optim.lr": 0.3, ...: where its defaults differ from those of `ssl_jax.config`) and

    make(config: Config, encoder: Network, run: Run) -> Method
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ssl_jax.errors import UserError
from ssl_jax.losses.common import interleave, normalize
from ssl_jax.losses.reconstruction import masked_error
from ssl_jax.parallel import spread

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
    patch: side of a ViT's patches, px; 0 for any other network

    An encoder takes images [B, H, W, C] in [0, 1] and returns embeddings [B, D]; with dense=True it returns its last
    feature map [B, h, w, D] (of a ResNet, what the embedding is the mean of; of a ViT, the patches). A head takes
    [B, D].
    """

    init: Callable[..., tuple[Params, Any]]
    apply: Callable[..., tuple[jax.Array, Any]]
    patch: int = 0


class Run(NamedTuple):
    """What a method may know of the run it is made for, for schedules and sizes."""

    steps: int  # of the whole run
    epoch: int  # steps in one
    examples: int  # images in the data set
    classes: int  # of the labels, 0 without


def keep(params, extra, outputs, step):
    """The `post_update` of a method that has nothing to do after a step."""
    del outputs, step
    return params, extra


def one_label(batch: Batch) -> jax.Array:
    """batch["label"] int [B], for methods that know nothing of multi-label data. UserError if the data are such."""
    label = batch["label"]
    if label.ndim != 1:
        raise UserError(
            f"config.method.name: needs one label an image, the data have {label.shape[1]} labels an image; "
            "allowed: supervised, methods without labels, or one column in config.data.labels"
        )
    return label


def own_encoder(params, target, extra):
    """The `encoder` of a method that keeps it under params["encoder"] and extra["stats"]["encoder"]."""
    del target
    return params["encoder"], extra["stats"]["encoder"]


class Method(NamedTuple):
    """A self-supervised (or supervised) method. Shapes: B batch, V views, D features.

    init:        (rng, views) -> params, extra        views: V arrays [B, H, W, C]; extra: statistics, queue, centre ...
                 batch statistics that follow the parameters live in extra["stats"], the target's in extra["target"]
    forward:     (params, target, extra, batch, rng) -> outputs, extra   per example (but for BatchNorm): may be cut
                 into micro-batches. batch["views"]: V arrays [B, H, W, C] in [0, 1]; batch["drawn"]: V dicts of the
                 parameters they were drawn with (see augment.draw); what `needs` names: batch["label"] [B], ...
                 rng: a key for each image [B]. outputs: a dict of arrays [B, ...], or lists and dicts of such;
                 outputs["embedding"] [B, D] is the encoder's output for the first view.
    loss:        (outputs, extra, batch) -> scalar, metrics               sees the whole global batch; batch: what
                 `needs` names
    views:       number of views the method draws from each image
    local_views: whether it takes further, smaller views after these (config.augment.local_views)
    shares:      for each view the factors (augment.FACTORS) that it has in common with the first view
    needs:       what the data must give beyond images: a subset of {"label", "index"}
    transform:   last of the optimizer's chain: optax.identity() or transforms.track_target(...)
    constant_lr: top-level names of params whose learning rate stays at its peak
    post_update: (params, extra, outputs, step) -> params, extra          after the optimizer: queue, prototypes
    encoder:     (params, target, extra) -> params, stats of the encoder: what is exported, evaluated and fine-tuned
    collapsed:   (metrics as floats) -> the sign of a collapse that this method alone knows, in words, or ""
    """

    init: Callable[..., tuple[Params, Extra]]
    forward: Callable[..., tuple[dict[str, Any], Extra]]
    loss: Callable[..., tuple[jax.Array, Metrics]]
    views: int = 2
    local_views: bool = False
    shares: Sequence[Sequence[str]] = ()
    needs: frozenset[str] = frozenset()
    transform: optax.GradientTransformation = optax.identity()
    constant_lr: frozenset[str] = frozenset()
    post_update: Callable[..., tuple[Params, Extra]] = keep
    encoder: Callable[..., tuple[Params, Any]] = own_encoder
    collapsed: Callable[[Mapping[str, float]], str] = lambda metrics: ""


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


def siamese(encoder: Network) -> Network:
    """The encoder for P images at a time, [B, P, H, W, C] -> their embeddings side by side [B, P * D]."""

    def apply(params, stats, x, **kwargs):
        y, stats = encoder.apply(params, stats, x.reshape(-1, *x.shape[2:]), **kwargs)
        return y.reshape(len(x), -1), stats

    return Network(lambda rng, x: encoder.init(rng, x[:, 0]), apply)


def init_of(network: Network) -> Callable[..., tuple[Params, Extra]]:
    """The `init` of a method that is one network, without target or queue."""

    def init(rng, views):
        params, stats = network.init(rng, views[0])
        return params, {"stats": stats}

    return init


def init_with_target(network: Network, *names: str) -> Callable[..., tuple[Params, Extra]]:
    """The `init` of a method whose target network has the parts `names` of the online one (all, if none is named)."""

    def init(rng, views):
        params, stats = network.init(rng, views[0])
        # Copies: a donated state must not hold one buffer twice.
        target = {name: jax.tree.map(jnp.copy, stats[name]) for name in names or stats}
        return params, {"stats": stats, "target": target}

    return init


def parts(*names: str) -> Callable[[Params], Params]:
    """Of a dict, these entries: what `track_target` selects when the predictor has no target."""
    return lambda tree: {name: tree[name] for name in names}


def together(network: Network, params, stats, views, **kwargs) -> tuple[list[Any], Any]:
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


def one_by_one(network: Network, params, stats, views, **kwargs) -> tuple[list[Any], Any]:
    """The outputs for each view, and the statistics: every view is normalised by its own."""
    outputs = []
    for view in views:
        y, stats = network.apply(params, stats, view, train=True, **kwargs)
        outputs.append(y)
    return outputs, stats


def need_vit(encoder: Network, method: str) -> int:
    """The encoder's patch size. UserError if it is not a ViT."""
    if not encoder.patch:
        raise UserError(f"config.model.name: {method} masks patches; allowed: vit_tiny, vit_small, vit_base")
    return encoder.patch


def init_with_head(encoder: Network, head: Callable[[jax.Array], Network]) -> Callable[..., tuple[Params, Extra]]:
    """The `init` of a method that predicts pixels: a ViT, and head(images), which takes its tokens [B, 1 + N, D]."""

    def init(rng, views):
        images = views[0][:1]
        rng_encoder, rng_head = jax.random.split(rng)
        params, stats = encoder.init(rng_encoder, images)
        patches = jax.eval_shape(lambda p, s: encoder.apply(p, s, images, train=True, dense=True)[0], params, stats)
        _, height, width, features = patches.shape
        of_head, _ = head(images).init(rng_head, jnp.zeros((1, 1 + height * width, features)))
        return {"encoder": params, "head": of_head}, {"stats": {"encoder": stats}}

    return init


def masked_loss(power: int) -> Callable[..., tuple[jax.Array, Metrics]]:
    """The `loss` of a method with the outputs "prediction" and "pixels" [B, N, P] and "mask" [B, N]."""

    def loss(outputs, extra, batch):
        del extra, batch
        return masked_error(outputs["prediction"], outputs["pixels"], outputs["mask"], power=power), {}

    return loss


def need_batch(views: Sequence[jax.Array], method: str) -> None:
    """UserError for a batch of one image, in which nothing varies."""
    if len(views[0]) < 2:
        raise UserError(f"config.train.batch=1: {method} needs images that differ; allowed: 2 or more")


def lost_spread(cause: str, least: float = 0.05) -> Callable[[Mapping[str, float]], str]:
    """The `collapsed` of a method with the metric "projection_std": words if it is below `least`."""

    def collapsed(metrics):
        std = metrics["projection_std"]
        words = f"projection_std {std:.2g}: all images get almost the same projection; likely cause: {cause}"
        return words if std < least else ""

    return collapsed


def entropies(targets: Sequence[jax.Array]) -> Metrics:
    """Of probabilities, arrays [B, K]: the mean entropy of an image, and the entropy of the mean over all images."""
    p = interleave(targets)
    entropy = jax.scipy.special.entr
    return {"target_entropy": entropy(p).sum(axis=1).mean(), "mean_target_entropy": entropy(p.mean(axis=0)).sum()}


def lost_entropy(classes: int, uniform: str, single: str) -> Callable[[Mapping[str, float]], str]:
    """The `collapsed` of a method with the metrics of `entropies`: the causes if all targets are uniform, or all one.

    Uniform is 99.9 % of ln K: targets without any preference. One: together they have less than a tenth of a nat.
    """

    def collapsed(metrics):
        most = math.log(classes)
        if metrics["target_entropy"] > 0.999 * most:
            return (
                f"target entropy {metrics['target_entropy']:.3f} of ln {classes} = {most:.3f}: no image prefers any "
                f"output; likely cause: {uniform}"
            )
        if metrics["mean_target_entropy"] < 0.1:
            return (
                f"mean target entropy {metrics['mean_target_entropy']:.3f}: all images get one and the same output; "
                f"likely cause: {single}"
            )
        return ""

    return collapsed


def new_queue(rng, size: int, *shape: int) -> dict[str, jax.Array]:
    """The entries of `extra` that `push` fills: "queue" [size, *shape] of random unit vectors, and "oldest"."""
    return {"queue": normalize(jax.random.normal(rng, (size, *shape))), "oldest": jnp.zeros([], jnp.int32)}


def push(extra: dict[str, Any], keys: jax.Array) -> dict[str, Any]:
    """`extra` with the newest keys [B, ...] over the oldest ones of its queue, a ring of any length."""
    size = len(extra["queue"])
    keys = jax.lax.stop_gradient(keys[-size:])
    places = (extra["oldest"] + jnp.arange(len(keys))) % size
    oldest = (extra["oldest"] + len(keys)) % size
    return {**extra, "queue": extra["queue"].at[places].set(keys), "oldest": oldest}


def shuffled(network: Network, params, stats, x, rng, groups: int) -> tuple[Any, Any]:
    """Outputs in the order of x, and statistics; in between, the batch is shuffled and normalised in `groups` parts.

    For the keys of a queue: query and key must not share the batch that BatchNorm sees, or its statistics give the
    positive away. Shuffled, a key is normalised with others than its query was (MoCo v1, section 3.3).
    """
    order = jax.random.permutation(rng, len(x))
    # Left to itself, the compiler puts what an order has chosen on every device, and each would embed the whole batch.
    y, stats = network.apply(params, stats, spread(x[order]), train=True, groups=groups)
    back = jnp.argsort(order)
    return jax.tree.map(lambda v: v[back], y), stats


# The images of a batch that `search_metrics` looks at: enough for a mean, at any batch little memory.
RANKED = slice(256)


def search_metrics(loss: jax.Array, similarity: jax.Array, index: jax.Array | int = 0) -> Metrics:
    """How well positives are found: "chance", "positive_rank", from InfoNCE `loss` over similarity [B, K].

    chance: the loss as a share of ln K, what guessing gives. positive_rank: how many of the others are at least as
    similar as the positive at `index`, on average; 0 is best, a collapse gives K - 1.
    """
    own = jnp.take_along_axis(similarity, jnp.broadcast_to(index, len(similarity))[:, None], axis=1)
    rank = (similarity >= own).sum(axis=1).mean() - 1
    return {"chance": loss / math.log(similarity.shape[1]), "positive_rank": rank}


def at_chance(metrics: Mapping[str, float]) -> str:
    """The `collapsed` of a method that has the metric "chance"."""
    if metrics["chance"] < 0.99:
        return ""
    return (
        f"the loss is {metrics['chance']:.0%} of what guessing among all keys gives: positives look like negatives; "
        "likely a learning rate too high, a temperature too low, or transforms that leave nothing in common"
    )
