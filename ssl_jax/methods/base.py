"""The one interface behind which every method stands. A new method is one new file beside this one.

Such a file holds a docstring whose first line says what the method is and names its source, a frozen dataclass
`Config`, a dict `RECIPE` ("optim.lr": 0.3, ...: where its defaults differ from those of `ssl_jax.config`) and

    make(config: Config, encoder: Network, run: Run) -> Method
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ssl_jax.errors import UserError
from ssl_jax.losses.common import interleave, normalize
from ssl_jax.losses.reconstruction import masked_error
from ssl_jax.network import Network

Params = Any
Extra = Any
Batch = Mapping[str, Any]
Metrics = dict[str, jax.Array]


class RunInfo(NamedTuple):
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


def online_encoder(params, target, extra):
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
    encoder: Callable[..., tuple[Params, Any]] = online_encoder
    collapsed: Callable[[Mapping[str, float]], str] = lambda metrics: ""


def init_network(network: Network) -> Callable[..., tuple[Params, Extra]]:
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


def select_entries(*names: str) -> Callable[[Params], Params]:
    """Of a dict, these entries: what `track_target` selects when the predictor has no target."""
    return lambda tree: {name: tree[name] for name in names}


def require_vit(encoder: Network, method: str) -> int:
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


def require_batch(views: Sequence[jax.Array], method: str) -> None:
    """UserError for a batch of one image, in which nothing varies."""
    if len(views[0]) < 2:
        raise UserError(f"config.train.batch=1: {method} needs images that differ; allowed: 2 or more")


def std_collapse(cause: str, least: float = 0.05) -> Callable[[Mapping[str, float]], str]:
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


def entropy_collapse(classes: int, uniform: str, single: str) -> Callable[[Mapping[str, float]], str]:
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


def init_queue(rng, size: int, *shape: int) -> dict[str, jax.Array]:
    """The entries of `extra` that `enqueue` fills: "queue" [size, *shape] of random unit vectors, and "oldest"."""
    return {"queue": normalize(jax.random.normal(rng, (size, *shape))), "oldest": jnp.zeros([], jnp.int32)}


def enqueue(extra: dict[str, Any], keys: jax.Array) -> dict[str, Any]:
    """`extra` with the newest keys [B, ...] over the oldest ones of its queue, a ring of any length."""
    size = len(extra["queue"])
    keys = jax.lax.stop_gradient(keys[-size:])
    places = (extra["oldest"] + jnp.arange(len(keys))) % size
    oldest = (extra["oldest"] + len(keys)) % size
    return {**extra, "queue": extra["queue"].at[places].set(keys), "oldest": oldest}


# The images of a batch that `search_metrics` looks at: enough for a mean, at any batch little memory.
METRIC_ROWS = slice(256)


def search_metrics(loss: jax.Array, similarity: jax.Array, index: jax.Array | int = 0) -> Metrics:
    """How well positives are found: "chance", "positive_rank", from InfoNCE `loss` over similarity [B, K].

    chance: the loss as a share of ln K, what guessing gives. positive_rank: how many of the others are at least as
    similar as the positive at `index`, on average; 0 is best, a collapse gives K - 1.
    """
    own = jnp.take_along_axis(similarity, jnp.broadcast_to(index, len(similarity))[:, None], axis=1)
    rank = (similarity >= own).sum(axis=1).mean() - 1
    return {"chance": loss / math.log(similarity.shape[1]), "positive_rank": rank}


def chance_collapse(metrics: Mapping[str, float]) -> str:
    """The `collapsed` of a method that has the metric "chance"."""
    if metrics["chance"] < 0.99:
        return ""
    return (
        f"the loss is {metrics['chance']:.0%} of what guessing among all keys gives: positives look like negatives; "
        "likely a learning rate too high, a temperature too low, or transforms that leave nothing in common"
    )
