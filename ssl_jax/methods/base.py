"""The one interface behind which every method stands. A new method is one new file beside this one.

Such a file holds a docstring (its first line says what the method does, a paragraph "Source: https://..." where it is
from), a frozen dataclass `Config`, a dict `RECIPE` of the settings in other sections that differ from their defaults,
such as {"optim.lr": 0.3}, and

    make(config: Config, encoder: Network, run: RunInfo) -> Method
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ssl_jax.errors import UserError
from ssl_jax.losses import interleave, normalize
from ssl_jax.losses.reconstruction import masked_error
from ssl_jax.network import Network

Params = Any
Stats = Any
Memory = dict[str, jax.Array]
Batch = Mapping[str, Any]
Outputs = dict[str, Any]
Metrics = dict[str, jax.Array]


class RunInfo(NamedTuple):
    """What a method may know about the run it is made for: schedules and sizes depend on it."""

    steps: int  # of the whole run
    epoch: int  # steps per epoch
    examples: int  # images in the data set
    classes: int  # number of label classes, 0 without labels
    bn_batch: int = 0  # images that share BatchNorm statistics (config.train.bn_group, micro_batch); 0: the whole batch


class State(NamedTuple):
    """What a method keeps beside its parameters."""

    stats: Stats  # running statistics of BatchNorm; a target network's under "target". Only `forward` changes them
    memory: Memory  # queue, centre, memory bank, ... Only `post_update` changes it


class Context(NamedTuple):
    """What `loss` and `post_update` know beside outputs and state."""

    step: jax.Array  # the one counter that every schedule follows: learning rate, momentum, temperature, freezing
    key: jax.Array  # a random key for this step, the same in both functions
    params: Params  # in `loss` those being trained, gradients flow into them; in `post_update` those after the step


Init = Callable[[jax.Array, Sequence[jax.Array]], tuple[Params, State]]
Forward = Callable[[Params, Params, State, Batch, jax.Array], tuple[Outputs, Stats]]
Loss = Callable[[Outputs, State, Batch, Context], tuple[jax.Array, Metrics]]
PostUpdate = Callable[[Outputs, State, Context], tuple[Params, Memory]]


def no_update(outputs: Outputs, state: State, ctx: Context) -> tuple[Params, Memory]:
    """The `post_update` of a method that has nothing to do after a step."""
    del outputs
    return ctx.params, state.memory


def online_encoder(params: Params, target: Params, state: State) -> tuple[Params, Stats]:
    """The `encoder` of a method that keeps it under params["encoder"] and state.stats["encoder"]."""
    del target
    return params["encoder"], state.stats["encoder"]


class Method(NamedTuple):
    """A self-supervised (or supervised) method. Shapes: B images per batch, V views, D features.

    init: (key, views) -> params, State. `views`: V arrays [B, H, W, C].
    forward: (params, target, state, batch, key) -> outputs, stats. Networks: one image at a time (BatchNorm aside), so
        it may be called on micro-batches. `target`: the parameters of `transforms.track_target`, None without one.
        batch["views"]: V arrays [B, H, W, C] in [0, 1]; batch["drawn"]: V dicts of the parameters they were drawn with
        (see `augment.draw`); and what `needs` names, batch["label"] [B] for example. `key` [B]: one key per image.
        outputs: a dict of arrays [B, ...], or of lists and dicts of such arrays; outputs["embedding"] [B, D] is the
        encoder's output for the first view. stats: the new state.stats, of the same structure.
    loss: (outputs, state, batch, ctx) -> scalar, metrics. Compares images: sees the whole global batch. `batch` holds
        what `needs` names.
    views: number of views drawn from each image.
    local_views: whether the method takes further, smaller views after these (config.augment.local_views).
    shares: for each view, the factors (`augment.FACTORS`) that it has in common with the first view.
    needs: what the data must provide beyond images: a subset of {"label", "index"}.
    transform: the last link of the optimizer's chain, optax.identity() or transforms.track_target(...).
    constant_lr: top-level names of params whose learning rate stays at its peak.
    post_update: (outputs, state, ctx) -> params, memory. After the optimizer: moves a queue, normalises prototypes.
    encoder: (params, target, state) -> params, stats of the encoder that is evaluated, exported and fine-tuned.
    collapsed: metrics as floats -> the sign of a collapse that only this method knows, in words, or "".
    """

    init: Init
    forward: Forward
    loss: Loss
    views: int = 2
    local_views: bool = False
    shares: Sequence[Sequence[str]] = ()
    needs: frozenset[str] = frozenset()
    transform: optax.GradientTransformation = optax.identity()
    constant_lr: frozenset[str] = frozenset()
    post_update: PostUpdate = no_update
    encoder: Callable[[Params, Params, State], tuple[Params, Stats]] = online_encoder
    collapsed: Callable[[Mapping[str, float]], str] = lambda metrics: ""


def init_network(network: Network) -> Init:
    """The `init` of a method that is one network, without target or memory."""

    def init(key, views):
        params, stats = network.init(key, views[0])
        return params, State(stats, {})

    return init


def init_with_target(network: Network, *names: str) -> Init:
    """The `init` of a method whose target network has the parts `names` of the online network (default: all)."""

    def init(key, views):
        params, stats = network.init(key, views[0])
        # Copies: a donated state must not hold one buffer twice.
        target = {name: jax.tree.map(jnp.copy, stats[name]) for name in names or stats}
        return params, State({**stats, "target": target}, {})

    return init


def one_label(batch: Batch) -> jax.Array:
    """batch["label"] int [B], for methods that take one label per image. UserError for multi-label data."""
    label = batch["label"]
    if label.ndim != 1:
        raise UserError(
            f"config.method.name: needs one label per image, the data have {label.shape[1]}; "
            "allowed: supervised, methods without labels, or a single column in config.data.labels"
        )
    return label


def require_shuffle(bn_groups: int, run: RunInfo, encoder: Network) -> None:
    """UserError if shuffling the keys cannot hide which images a query was normalised with (`network.shuffle_bn`).

    Where BatchNorm sees a part of the batch at a time, a single group holds the same images for query and key, whatever
    their order.
    """
    if run.bn_batch and bn_groups == 1 and not encoder.patch:  # a ViT has no BatchNorm
        raise UserError(
            "config.method.bn_groups=1: with config.train.micro_batch or bn_group set, query and key would be "
            "normalised over the same images, which gives the positive away; allowed: 2 or more"
        )


def select_entries(*names: str) -> Callable[[Params], Params]:
    """Of a dict, these entries: what `track_target` selects when the predictor has no target."""
    return lambda tree: {name: tree[name] for name in names}


def require_vit(encoder: Network, method: str) -> int:
    """The encoder's patch size. UserError if it is not a ViT."""
    if not encoder.patch:
        raise UserError(f"config.model.name: {method} masks patches; allowed: vit_tiny, vit_small, vit_base")
    return encoder.patch


def init_with_head(encoder: Network, head: Callable[[jax.Array], Network]) -> Init:
    """The `init` of a method that predicts pixels: a ViT, and head(images), which takes its tokens [B, 1 + N, D]."""

    def init(key, views):
        images = views[0][:1]
        key_encoder, key_head = jax.random.split(key)
        params, stats = encoder.init(key_encoder, images)
        patches = jax.eval_shape(lambda p, s: encoder.apply(p, s, images, train=True, dense=True)[0], params, stats)
        _, height, width, features = patches.shape
        head_params, _ = head(images).init(key_head, jnp.zeros((1, 1 + height * width, features)))
        return {"encoder": params, "head": head_params}, State({"encoder": stats}, {})

    return init


def masked_loss(power: int) -> Loss:
    """The `loss` of a method with the outputs "prediction" and "pixels" [B, N, P] and "mask" [B, N]."""

    def loss(outputs, state, batch, ctx):
        del state, batch, ctx
        return masked_error(outputs["prediction"], outputs["pixels"], outputs["mask"], power=power), {}

    return loss


def require_batch(views: Sequence[jax.Array], method: str) -> None:
    """UserError if a single image is embedded at a time, so that nothing varies."""
    if len(views[0]) < 2:
        raise UserError(
            f"config.train: {method} gets one image at a time; allowed: 2 or more (batch, micro_batch, bn_group)"
        )


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


def init_queue(key: jax.Array, size: int, *shape: int) -> Memory:
    """The memory that `enqueue` moves: "queue" [size, *shape] of random unit vectors, and "oldest", its oldest row."""
    return {"queue": normalize(jax.random.normal(key, (size, *shape))), "oldest": jnp.zeros([], jnp.int32)}


def enqueue(memory: Memory, keys: jax.Array) -> Memory:
    """`memory` with the newest keys [B, ...] written over the oldest rows of its queue, a ring of any length."""
    size = len(memory["queue"])
    keys = jax.lax.stop_gradient(keys[-size:])
    places = (memory["oldest"] + jnp.arange(len(keys))) % size
    oldest = (memory["oldest"] + len(keys)) % size
    return {**memory, "queue": memory["queue"].at[places].set(keys), "oldest": oldest}


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
