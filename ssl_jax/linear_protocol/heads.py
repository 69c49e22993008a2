"""Linear classifiers on frozen features, all of a grid at once: one pass of the encoder per batch serves every one.

State: {"heads": {"w" [G, D, K], "b" [G, K]}, "optimizer": of each head, "norm": {"mean" [D], "var" [D]}}.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from ssl_jax import parallel
from ssl_jax.augment import center_view, finish_views, make_views
from ssl_jax.config import Optim, View
from ssl_jax.encoder import PIXELS_ON_CPU, compiler_options
from ssl_jax.errors import UserError
from ssl_jax.losses import binary_cross_entropy, cross_entropy
from ssl_jax.network import Network
from ssl_jax.train.step import join_batch, split_batch
from ssl_jax.transforms import lars, layers, learning_rate

EPS = 1e-6  # of the BatchNorm (facebookresearch/mae, main_linprobe.py, line 222)
FORGET = 0.1  # share of a batch in the running statistics, PyTorch's default
DEVIATION = 0.01  # of the initial weights (facebookresearch/dino, eval_linear.py, line 243)
PIXELS_AT_A_TIME = 2**24  # on a GPU or TPU, for each device: 334 images of 224 px

State = dict[str, Any]


class Spec(NamedTuple):
    """What a compiled step depends on, beside the network and the mesh."""

    views: tuple[View, ...]
    optimizer: str
    momentum: float
    nesterov: bool
    schedule: str
    steps: int
    warmup: int
    blocks: int
    patches: bool
    batch_norm: bool


def check_blocks(network: Network, params: Any, blocks: int, patches: bool) -> None:
    """Raises UserError if the network has no such blocks or no patches."""
    if not blocks and not patches:
        return
    if not network.patch:
        key = f"blocks={blocks}" if blocks else "patches=True"
        raise UserError(f"config.linear.{key}: the encoder is no ViT; allowed: blocks=0, patches=False")
    depth = layers(params)[1] - 1
    if blocks > depth:
        raise UserError(f"config.linear.blocks={blocks}: the encoder has {depth}; allowed: 0 to {depth}")


def features_of(network: Network, params: Any, stats: Any, images: jax.Array, spec: Spec) -> jax.Array:
    """Features [B, D] of views [B, s, s, C] in [0, 1], with running statistics: the embedding, or the class tokens of
    the last blocks, the earliest first, and the mean of the last block's patches.

    Source: facebookresearch/dino, eval_linear.py, lines 164 to 170, which lay tokens and patches side by side in
    another order.
    """
    if not spec.blocks and not spec.patches:
        return network.apply(params, stats, images, train=False)[0].astype(jnp.float32)
    chosen = tuple(range(-max(1, spec.blocks), 0))
    embedding, _, found = network.apply(params, stats, images, train=False, blocks=chosen)[0]
    parts = [token for token, _ in found] if spec.blocks else [embedding]
    if spec.patches:
        parts.append(found[-1][1].mean(axis=(1, 2)))
    return jnp.concatenate(parts, axis=-1).astype(jnp.float32)


def width_of(network: Network, params: Any, stats: Any, image: jax.ShapeDtypeStruct, spec: Spec) -> int:
    """D, the number of features."""
    return jax.eval_shape(functools.partial(features_of, network, spec=spec), params, stats, image).shape[-1]


def init_state(width: int, classes: int, count: int, spec: Spec, seed: int) -> State:
    """All heads start with the same weights, so that each one ends as it would if it were trained alone."""
    w = DEVIATION * jax.random.normal(jax.random.key(seed), (width, classes))
    head = {"w": w, "b": jnp.zeros(classes)}
    state = {"heads": head, "optimizer": _optimizer(spec, 0.0, 0.0).init(head)}
    stacked = jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *jnp.shape(x))) + 0, state)
    return {**stacked, "norm": {"mean": jnp.zeros(width), "var": jnp.ones(width)}}


def _optimizer(spec: Spec, lr: Any, decay: Any) -> optax.GradientTransformation:
    """Of one head. SGD decays biases, too, as PyTorch's does; LARS leaves them alone, as MAE's util/lars.py does."""
    if spec.optimizer == "lars":
        return lars(lr, weight_decay=decay, momentum=spec.momentum)
    trace = optax.trace(decay=spec.momentum, nesterov=spec.nesterov)
    return optax.chain(optax.add_decayed_weights(decay), trace, optax.scale_by_learning_rate(lr))


def logits_of(heads: Any, features: jax.Array) -> jax.Array:
    """[G, B, K] of features [B, D]."""
    return jnp.einsum("bd,gdk->gbk", features, heads["w"], precision="highest") + heads["b"][:, None]


@functools.cache
def compiled_step(network: Network, spec: Spec, mesh: Mesh) -> Any:
    """(state, params, stats, batch {"image", "label"}, key, step, lr [G], decay [G]) -> state, losses [G].

    lr: peak rates, which the schedule multiplies. The state is donated.
    """
    relative = learning_rate(Optim(lr=1.0, lr_batch=0, schedule=spec.schedule), 1, spec.steps, spec.warmup)  # type: ignore[arg-type]

    def step(state, params, stats, batch, key, number, lr, decay):
        cut = "crops" in batch  # by the host
        seen = (batch["crops"], batch["boxes"]) if cut else (batch["image"],)

        def embed(seen, positions):
            draw = (finish_views if cut else make_views)(spec.views)
            (views,), _ = draw(jax.random.fold_in(key, number), *seen, positions=positions)
            return features_of(network, params, stats, views, spec)

        x, norm = _in_parts(embed, seen, mesh), state["norm"]
        if spec.batch_norm:
            mean, var, count = x.mean(axis=0), x.var(axis=0), len(x)
            fresh = {"mean": mean, "var": var * count / max(1, count - 1)}
            norm = jax.tree.map(lambda old, new: (1 - FORGET) * old + FORGET * new, norm, fresh)
            x = (x - mean) / jnp.sqrt(var + EPS)

        def loss_of(heads):
            loss = binary_cross_entropy if batch["label"].ndim == 2 else cross_entropy
            losses = jax.vmap(lambda logits: loss(logits, batch["label"]))(logits_of(heads, x))
            return losses.sum(), losses  # no head has a gradient from another's loss

        def update(grads, optimizer, head, lr, decay):
            updates, optimizer = _optimizer(spec, lr * relative(number), decay).update(grads, optimizer, head)
            return optax.apply_updates(head, updates), optimizer

        grads, losses = jax.grad(loss_of, has_aux=True)(state["heads"])
        heads, optimizer = jax.vmap(update)(grads, state["optimizer"], state["heads"], lr, decay)
        return {"heads": heads, "optimizer": optimizer, "norm": norm}, losses

    return _compiled(step, network, mesh, donate=True)


@functools.cache
def compiled_logits(network: Network, spec: Spec, mesh: Mesh) -> Any:
    """(heads, norm, params, stats, images uint8 [B, H, W, C]) -> logits [G, B, K] of the images as they are."""

    def logits(heads, norm, params, stats, images):
        def embed(seen, positions):
            del positions
            return features_of(network, params, stats, center_view(seen[0], spec.views[0].size), spec)

        x = _in_parts(embed, (images,), mesh)
        if spec.batch_norm:
            x = (x - norm["mean"]) / jnp.sqrt(norm["var"] + EPS)
        return logits_of(heads, x)

    return _compiled(logits, network, mesh)


@jax.jit
def hits(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(how many of labels int [B] are right, sum of their log-likelihoods), each [G], of logits [G, B, K]; -1 does not
    count."""
    known, chosen = labels >= 0, jnp.maximum(labels, 0)
    likelihood = jnp.take_along_axis(jax.nn.log_softmax(logits), chosen[None, :, None], axis=-1)[..., 0]
    right = (logits.argmax(axis=-1) == labels) & known
    return right.sum(axis=1), jnp.where(known, likelihood, 0).sum(axis=1)


def _compiled(function: Any, network: Network, mesh: Mesh, donate: bool = False) -> Any:
    whole: Any = parallel.replicated(mesh)
    made = jax.jit(
        function,
        donate_argnums=0 if donate else (),
        out_shardings=(whole, whole) if donate else whole,
        compiler_options=compiler_options(network),
    )

    def call(*args):
        with parallel.use_mesh(mesh):  # for `shard_batch`
            return made(*args)

    return call


def _in_parts(embed: Any, seen: Any, mesh: Mesh) -> jax.Array:
    """embed(seen, positions [B]) -> [B, D], a part of the batch at a time: what is frozen needs no activations, so
    memory need not grow with the batch. seen: images [B, H, W, C], and what belongs to them, [B, ...]."""
    images = jax.tree.leaves(seen)[0]
    batch, devices = len(images), mesh.devices.size
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    each = PIXELS_ON_CPU if on_cpu else PIXELS_AT_A_TIME * devices
    least = math.ceil(batch * math.prod(images.shape[1:3]) / each)
    parts = next(p for p in range(least, batch + 1) if batch % p == 0 and (batch // p) % devices == 0 or p == batch)
    if parts == 1 or (batch // parts) % devices:
        return embed(seen, jnp.arange(batch))
    pieces = split_batch((seen, jnp.arange(batch)), parts)
    return join_batch(jax.lax.map(lambda piece: embed(*jax.tree.map(parallel.shard_batch, piece)), pieces))
