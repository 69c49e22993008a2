"""The gradient of a method's loss over a batch: at once, or exactly the same in micro-batches that fit in memory.

A loss that compares images is no sum over parts of the batch. So all parts are embedded first, without a gradient; the
gradient of the loss with respect to these outputs is taken, of the whole batch; and it is pulled back through each
part, embedded a second time: with the same views, masks and permutations, since all of them are functions of (key,
place in the batch). Memory grows with the micro-batch and with the outputs, not with the batch. Source: GradCache,
https://arxiv.org/abs/2101.06983.

BatchNorm is the exception: it sees a micro-batch where it saw the batch. `bn_group` images share their statistics in
either case, if it is set, and then the gradients are equal again. Running statistics are means over parts and groups.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ssl_jax import parallel
from ssl_jax.methods.base import Context, Method, State

Inputs = Mapping[str, jax.Array]


def split_batch(tree: Any, parts: int, stretch: int = 1) -> Any:
    """Arrays [B, ...] as [parts, B / parts, ...]; part i has the stretches of so many images i, i + parts, ...

    A batch that is laid out over devices one part after the other is so cut without moving any image: every part lies
    on all devices. And the parts are the same however many devices there are.
    """

    def cut(x):
        return x.reshape(-1, parts, stretch, *x.shape[1:]).swapaxes(0, 1).reshape(parts, -1, *x.shape[1:])

    return jax.tree.map(cut, tree)


def join_batch(tree: Any, stretch: int = 1) -> Any:
    """What `split_batch` has cut: [parts, B / parts, ...] as [B, ...], in the order of the batch."""

    def mend(x):
        return x.reshape(len(x), -1, stretch, *x.shape[2:]).swapaxes(0, 1).reshape(-1, *x.shape[2:])

    return jax.tree.map(mend, tree)


def keys_at(key: jax.Array, places: jax.Array) -> jax.Array:
    """A key for each of `places` [B], a function of nothing else."""
    return jax.vmap(lambda place: jax.random.fold_in(key, place))(places)


def make_gradient(
    method: Method, augment: Callable[..., Any], *, micro_batch: int = 0, bn_group: int = 0, mesh: Any = None
) -> Callable[..., Any]:
    """A function (ctx, target, state, inputs, keys) -> (loss, (outputs, stats, metrics)), gradients of ctx.params.

    inputs: arrays [B, ...] under "image" (uint8), and "pair", "label", "index" where there are any.
    keys: two random keys, for the views and for `forward`.
    micro_batch: images embedded at a time, a divisor of B; 0: all.
    bn_group: images that share the statistics of BatchNorm, neighbours in the batch, a divisor of that; 0: all of
    them. Groups stay whole in micro-batches, and on their devices if their number divides among them.
    mesh: what `parallel.shard_batch` in the method's forward lays images out over; a group's stay where they are.
    """
    stretch = bn_group or 1

    def forward(params, target, state, inputs, keys):
        key_views, key_forward = keys
        views, drawn = augment(key_views, inputs["image"], inputs.get("pair"), inputs["place"])
        batch = {"views": views, "drawn": drawn, **{name: inputs[name] for name in method.needs}}
        key = keys_at(key_forward, inputs["place"])
        if not bn_group or bn_group == len(key):
            with parallel.use_mesh(mesh):
                outputs, stats = method.forward(params, target, state, batch, key)
        else:
            groups = split_batch((batch, key), len(key) // bn_group, bn_group)
            outputs, stats = jax.vmap(lambda group: method.forward(params, target, state, *group))(groups)
            outputs, stats = join_batch(outputs, bn_group), jax.tree.map(lambda x: x.mean(axis=0), stats)
        check_structure("forward", "statistics", stats, state.stats)
        return outputs, stats

    def whole(ctx, target, state, inputs, keys):
        def objective(params):
            outputs, stats = forward(params, target, state, inputs, keys)
            loss, metrics = method.loss(outputs, state, needed(inputs), ctx._replace(params=params))
            return loss, (outputs, stats, metrics)

        return jax.value_and_grad(objective, has_aux=True)(ctx.params)

    def in_parts(ctx, target, state, inputs, keys):
        count = len(inputs["place"]) // micro_batch
        parts = split_batch(inputs, count, stretch)

        def embed(total, part):
            outputs, stats = forward(ctx.params, target, state, part, keys)
            return jax.tree.map(jnp.add, total, stats), outputs

        total, outputs = jax.lax.scan(embed, jax.tree.map(jnp.zeros_like, state.stats), parts)
        stats, outputs = jax.tree.map(lambda x: x / count, total), join_batch(outputs, stretch)
        leaves, structure = jax.tree.flatten(outputs)
        real = [n for n, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.inexact)]

        def objective(real_leaves, params):
            filled = list(leaves)
            for n, leaf in zip(real, real_leaves, strict=True):
                filled[n] = leaf
            tree = jax.tree.unflatten(structure, filled)
            return method.loss(tree, state, needed(inputs), ctx._replace(params=params))

        # `direct`: what reaches parameters that the loss itself reads, past the outputs.
        (loss, metrics), (pulls, direct) = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)(
            [leaves[n] for n in real], ctx.params
        )

        def pull_back(total, part_and_pulls):
            part, pulls = part_and_pulls

            def pulled(params):
                again = jax.tree.leaves(forward(params, target, state, part, keys)[0])
                return sum(jnp.vdot(again[n], pull) for n, pull in zip(real, pulls, strict=True))

            return jax.tree.map(jnp.add, total, jax.grad(pulled)(ctx.params)), None

        grads, _ = jax.lax.scan(pull_back, direct, (parts, split_batch(pulls, count, stretch)))
        return (loss, (outputs, stats, metrics)), grads

    def needed(inputs):
        return {name: inputs[name] for name in method.needs}

    def gradient(ctx: Context, target, state: State, inputs: Inputs, keys):
        inputs = {**inputs, "place": jnp.arange(len(inputs["image"]))}
        cut = micro_batch and micro_batch < len(inputs["image"])
        return (in_parts if cut else whole)(ctx, target, state, inputs, keys)

    return gradient


def check_structure(function: str, what: str, after: Any, before: Any) -> None:
    """TypeError if a method's function returns a tree of another structure than the part of the state it replaces."""
    wanted, got = str(jax.tree.structure(before)), str(jax.tree.structure(after))
    if got != wanted:
        raise TypeError(
            f"a method's {function} must return {what} of the structure that init made, {wanted}, not {got}"
        )
