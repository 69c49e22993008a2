"""The interface of all methods, and what several of them share. A new method is one new file beside this one.

Such a file contains a docstring (the first line says what the method does, a paragraph "Source: https://..."
says where it is from), a frozen dataclass `Config`, a dict `RECIPE` with the defaults that the method changes in other
sections, such as {"optim.lr": 0.3}, and

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
from ssl_jax.network import Network, dense_shapes

Params = Any
Stats = Any
Memory = dict[str, jax.Array]
Batch = Mapping[str, Any]
Outputs = dict[str, Any]
Metrics = dict[str, jax.Array]


class RunInfo(NamedTuple):
    """The facts about a run that schedules and sizes of a method may depend on."""

    steps: int  # of the whole run
    epoch: int  # steps per epoch
    examples: int  # images in the data set
    classes: int  # number of label classes, 0 without labels
    bn_batch: int = 0  # images that share BatchNorm statistics (config.train.bn_group, micro_batch); 0: the batch
    load_encoder: Callable[..., Any] | None = None  # (path, dtype=) -> `ssl_jax.encoder.Encoder`; None: cannot


class State(NamedTuple):
    """What a method keeps besides its parameters."""

    stats: Stats  # BatchNorm's running statistics, with a target network's under "target"; only `forward` updates them
    memory: Memory  # queue, centre, memory bank, ...; only `post_update` updates it


class Context(NamedTuple):
    """What `loss` and `post_update` get besides outputs and state."""

    step: jax.Array  # the counter that all schedules follow: learning rate, momentum, temperature, freezing
    key: jax.Array  # a random key for this step, the same in both functions
    params: Params  # in `loss` those before the step, which receive gradients; in `post_update` those after the step


Init = Callable[[jax.Array, Sequence[jax.Array]], tuple[Params, State]]
Forward = Callable[[Params, Params, State, Batch, jax.Array], tuple[Outputs, Stats]]
Loss = Callable[[Outputs, State, Batch, Context], tuple[jax.Array, Metrics]]
PostUpdate = Callable[[Outputs, State, Context], tuple[Params, Memory]]


def no_update(outputs: Outputs, state: State, ctx: Context) -> tuple[Params, Memory]:
    """The `post_update` of a method that updates nothing after a step."""
    del outputs
    return ctx.params, state.memory


def online_encoder(params: Params, target: Params, state: State) -> tuple[Params, Stats]:
    """The `encoder` of a method that has it in params["encoder"] and state.stats["encoder"]."""
    del target
    return params["encoder"], state.stats["encoder"]


def target_encoder(params: Params, target: Params, state: State) -> tuple[Params, Stats]:
    """The `encoder` of a method that exports its moving average, with statistics of its own."""
    del params
    return target["encoder"], state.stats["target"]["encoder"]


class Method(NamedTuple):
    """A self-supervised (or supervised) method. Shapes: B images per batch, V views, D features.

    init: (key, views) -> params, State. `views`: V arrays [B, H, W, C].
    forward: (params, target, state, batch, key) -> outputs, stats. Runs the networks. Apart from BatchNorm, it must
        treat each image on its own, because it may be called on micro-batches. `target`: the parameters that
        `transforms.track_target` keeps, or None. batch["views"]: V arrays [B, H, W, C] in [0, 1]; batch["drawn"]: V
        dicts of the parameters that they were drawn with (see `augment.draw`); and what `needs` names, such as
        batch["label"] [B]. `key` [B]: one key per image. outputs: a dict of arrays [B, ...], or of lists and dicts of
        such arrays; outputs["embedding"] [B, D] is the encoder's output for the first view. stats: the new
        state.stats, with the same structure.
    loss: (outputs, state, batch, ctx) -> scalar, metrics. Compares images; it sees the whole global batch. `batch`
        contains what `needs` names.
    views: number of views drawn from each image.
    local_views: whether the method accepts more, smaller views after these (config.augment.local_views).
    shares: for each view, the factors (`augment.FACTORS`) that it has in common with the first view.
    needs: what the data must provide besides images: a subset of {"label", "index"}.
    transform: the end of the optimizer's chain, optax.identity() or transforms.track_target(...).
    constant_lr: top-level names of params whose learning rate stays at its peak.
    frozen: top-level name -> first steps in which these params stay, and the optimizer keeps nothing of them.
    post_update: (outputs, state, ctx) -> params, memory. Runs after the optimizer: updates a queue, normalises
        prototypes.
    encoder: (params, target, state) -> params, stats of the encoder to evaluate, export and fine-tune.
    collapsed: metrics as floats -> a description of a collapse that only this method can see, or "".
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
    frozen: Mapping[str, int] | None = None
    post_update: PostUpdate = no_update
    encoder: Callable[[Params, Params, State], tuple[Params, Stats]] = online_encoder
    collapsed: Callable[[Mapping[str, float]], str] = lambda metrics: ""


def init_network(network: Network) -> Init:
    """The `init` of a method with a single network, without target or memory."""

    def init(key, views):
        params, stats = network.init(key, views[0])
        return params, State(stats, {})

    return init


def init_with_target(network: Network, *names: str) -> Init:
    """The `init` of a method whose target network has the parts `names` of the online network (default: all)."""

    def init(key, views):
        params, stats = network.init(key, views[0])
        # Copies, because a donated state must not hold one buffer twice.
        target = {name: jax.tree.map(jnp.copy, stats[name]) for name in names or stats}
        return params, State({**stats, "target": target}, {})

    return init


def one_label(batch: Batch) -> jax.Array:
    """batch["label"] int [B], for methods that take one label per image. UserError for multi-label data."""
    label = batch["label"]
    if label.ndim != 1:
        raise UserError(
            f"config.method.name: needs one label per image, but the data have {label.shape[1]}; "
            "use supervised, a method without labels, or a single column in config.data.labels"
        )
    return label


def require_shuffle(bn_groups: int, run: RunInfo, encoder: Network) -> None:
    """UserError if shuffling the keys (`network.shuffle_bn`) cannot hide which images a query was normalised with.

    If BatchNorm sees only a part of the batch at a time, a single group contains the same images for query and key,
    whatever their order.
    """
    if run.bn_batch and bn_groups == 1 and not encoder.patch:  # a ViT has no BatchNorm
        raise UserError(
            "config.method.bn_groups=1: with config.train.micro_batch or bn_group, query and key would be normalised "
            "over the same images, which gives the positive away; allowed: 2 or more"
        )


def select_entries(*names: str) -> Callable[[Params], Params]:
    """Selects these entries of a dict, for `track_target` of a method whose predictor has no target."""
    return lambda tree: {name: tree[name] for name in names}


def require_vit(encoder: Network, method: str) -> int:
    """The encoder's patch size. UserError if it is not a ViT."""
    if not encoder.patch:
        raise UserError(f"config.model.name: {method} masks patches; allowed: vit_tiny, vit_small, vit_base, ...")
    return encoder.patch


def init_with_head(encoder: Network, head: Callable[[jax.Array], Network]) -> Init:
    """The `init` of a method that predicts pixels with a ViT and head(images), which takes its tokens [B, 1 + N, D]."""

    def init(key, views):
        images = views[0][:1]
        key_encoder, key_head = jax.random.split(key)
        params, stats = encoder.init(key_encoder, images)
        _, height, width, features = dense_shapes(encoder, params, stats, images)[1].shape
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
    """UserError if images are embedded one at a time, so that they have no variance."""
    if len(views[0]) < 2:
        raise UserError(
            f"config.train: {method} gets one image at a time; allowed: 2 or more (batch, micro_batch, bn_group)"
        )


def refuse_randaugment(drawn: Sequence[Mapping[str, Any]], method: str) -> None:
    """UserError if the views of a method that reads how they were drawn have moved pixels by RandAugment, too."""
    if any("moved" in parameters for parameters in drawn):
        raise UserError(f"config.augment.randaugment: changes views in ways that {method} does not read; allowed: 0")


def std_collapse(cause: str, threshold: float = 0.05) -> Callable[[Mapping[str, float]], str]:
    """The `collapsed` of a method with the metric "projection_std": a collapse if it is below `threshold`."""

    def collapsed(metrics):
        std = metrics["projection_std"]
        if std >= threshold:
            return ""
        return f"projection_std {std:.2g}: all images get almost the same projection; likely cause: {cause}"

    return collapsed


def entropies(targets: Sequence[jax.Array]) -> Metrics:
    """The mean entropy of probabilities [B, K], and the entropy of their mean over all images."""
    p = interleave(targets)
    entropy = jax.scipy.special.entr
    return {"target_entropy": entropy(p).sum(axis=1).mean(), "mean_target_entropy": entropy(p.mean(axis=0)).sum()}


def entropy_collapse(classes: int, uniform: str, single: str) -> Callable[[Mapping[str, float]], str]:
    """The `collapsed` of a method with the metrics of `entropies`.

    uniform, single: the likely causes if all targets are uniform (their entropy is above 99.9 % of ln K), or if all
    images get the same one (the mean target's entropy is below 0.1 nats).
    """

    def collapsed(metrics):
        maximum = math.log(classes)
        if metrics["target_entropy"] > 0.999 * maximum:
            return (
                f"target entropy {metrics['target_entropy']:.3f} of at most ln {classes} = {maximum:.3f}: no image "
                f"prefers any output; likely cause: {uniform}"
            )
        if metrics["mean_target_entropy"] < 0.1:
            return (
                f"mean target entropy {metrics['mean_target_entropy']:.3f}: all images get the same output; "
                f"likely cause: {single}"
            )
        return ""

    return collapsed


def init_queue(key: jax.Array, size: int, *shape: int) -> Memory:
    """The memory for `enqueue`: "queue" [size, *shape] of random unit vectors, and "oldest", its oldest row's index."""
    return {"queue": normalize(jax.random.normal(key, (size, *shape))), "oldest": jnp.zeros([], jnp.int32)}


def enqueue(memory: Memory, keys: jax.Array) -> Memory:
    """`memory` with keys [B, ...] written over the oldest rows of its queue, a ring buffer of any length."""
    size = len(memory["queue"])
    keys = jax.lax.stop_gradient(keys[-size:])
    rows = (memory["oldest"] + jnp.arange(len(keys))) % size
    oldest = (memory["oldest"] + len(keys)) % size
    return {**memory, "queue": memory["queue"].at[rows].set(keys), "oldest": oldest}


# The images that `search_metrics` looks at: enough for a mean, and little memory whatever the batch.
METRIC_ROWS = slice(256)


def search_metrics(loss: jax.Array, similarity: jax.Array, index: jax.Array | int = 0) -> Metrics:
    """How well positives are found, from the InfoNCE `loss` and similarity [B, K].

    chance: the loss divided by ln K, the loss of guessing. positive_rank: how many negatives are at least as similar as
    the positive at `index`, on average; 0 is best, a collapse gives K - 1.
    """
    positive = jnp.take_along_axis(similarity, jnp.broadcast_to(index, len(similarity))[:, None], axis=1)
    rank = (similarity >= positive).sum(axis=1).mean() - 1
    return {"chance": loss / math.log(similarity.shape[1]), "positive_rank": rank}


def chance_collapse(metrics: Mapping[str, float]) -> str:
    """The `collapsed` of a method with the metric "chance"."""
    if metrics["chance"] < 0.99:
        return ""
    return (
        f"the loss is {metrics['chance']:.0%} of that of guessing: positives look like negatives; likely cause: a "
        "learning rate too high, a temperature too low, or transforms that leave nothing in common"
    )
