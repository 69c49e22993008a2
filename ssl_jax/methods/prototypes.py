"""What DINO, iBOT and DINOv2 share: a head whose last layer is a table of unit vectors, and a sharpened teacher.

`masked_self_distillation` is the method of the latter two: a student that sees masked views matches a teacher that sees
all of them, for the whole image and for each masked patch.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ssl_jax.losses import interleave, koleo, normalize, prototype_cross_entropy, sinkhorn_shift
from ssl_jax.methods.base import (
    METRIC_ROWS,
    Method,
    RunInfo,
    entropies,
    entropy_collapse,
    init_with_target,
    require_vit,
    select_entries,
    target_encoder,
)
from ssl_jax.methods.masks import block_mask, first_of
from ssl_jax.models import mlp
from ssl_jax.network import Network, apply_jointly, dense_shapes, stack
from ssl_jax.transforms import cosine_momentum, track_target


def dino_head(config: Any) -> Network:
    """The head below the last layer; config: hidden and bottleneck. Source: main_dino.py, vision_transformer.py."""
    return mlp((config.hidden, config.hidden, config.bottleneck), norm=False, bias=True, gelu=True)


def draw_prototypes(key: jax.Array, config: Any) -> jax.Array:
    """The last layer: unit vectors [out, bottleneck]."""
    return normalize(jax.random.normal(key, (config.out, config.bottleneck)))


def warmed(config: Any, run: RunInfo, step: jax.Array) -> jax.Array:
    """The teacher's temperature: from warmup_temperature to teacher_temperature over the first share `warmup`."""
    share = jnp.minimum(1, step / max(1, config.warmup * run.steps))
    return config.warmup_temperature + share * (config.teacher_temperature - config.warmup_temperature)


def masked_self_distillation(
    config: Any,
    encoder: Network,
    run: RunInfo,
    name: str,
    *,
    least: int | None,
    koleo_weight: float = 0.0,
    centring: str = "centre",
    patch_head: str = "tied",
) -> Method:
    """The method iBOT or DINOv2, from the options that their configs have in common.

    least: patches of the smallest masked block; None: the square of a third of the side.
    koleo_weight: of the entropy of the student's embeddings, for each whole view.
    centring: what keeps the teacher's outputs apart: "centre" subtracts a moving average, "sinkhorn" balances a batch.
    patch_head: of the patches: "tied" (the image's), "layer" (a last layer of its own) or "own".

    The last layer is applied in the loss, to the masked patches of the whole batch, so that micro-batches need not keep
    a number for each prototype. Its moving average therefore lies in the memory.
    """
    patch = require_vit(encoder, name)
    head = dino_head(config)
    tau = cosine_momentum(config.momentum, run.steps)
    patch_key = "head" if patch_head != "own" else "patch_head"
    last_of_patches = "last" if patch_head == "tied" else "patch_last"
    lasts = tuple(dict.fromkeys(("last", last_of_patches)))
    moving = tuple(dict.fromkeys(("encoder", "head", patch_key)))

    def init(key, views):
        keys = jax.random.split(key, 4)
        params, state = init_with_target(stack(encoder=encoder, head=head))(keys[0], views)
        embedding, _ = dense_shapes(encoder, params["encoder"], state.stats["encoder"], views[0][:1])
        if patch_head == "own":
            params["patch_head"], _ = head.init(keys[1], jnp.zeros(embedding.shape))
        for k, last in zip(keys[2:], lasts):
            params[last] = draw_prototypes(k, config)
        params["token"] = jnp.zeros(embedding.shape[1])  # both official codes
        memory = {f"target_{last}": jnp.copy(params[last]) for last in lasts}
        if centring == "centre":
            memory |= {"centre": jnp.zeros(config.out), "patch_centre": jnp.zeros(config.out)}
        return params, state._replace(memory=memory)

    def masks_of(key, side):
        """[B, N] of key [B]: `mask_share` of the views are masked, a share of their patches drawn from `mask`."""
        keys = jax.vmap(jax.random.split)(key)
        u, (low, high) = jax.vmap(lambda k: jax.random.uniform(k, (2,)))(keys[:, 0]), config.mask
        count = jnp.where(u[:, 0] < config.mask_share, jnp.floor(side * side * (low + u[:, 1] * (high - low))), 0)
        smallest = (side // 3) ** 2 if least is None else least
        return block_mask(keys[:, 1], side, count, least=smallest, most=largest(side))

    def largest(side):
        return max(1, int(side * side * config.mask[1]))

    def of_head(params, x, which="head"):
        return normalize(head.apply(params[which], {}, x, train=True)[0])

    def forward(params, target, state, batch, key):
        views, count = batch["views"][:2], len(batch["views"][0])
        side = views[0].shape[1] // patch
        images, mask = interleave(views), masks_of(jax.vmap(jax.random.split)(key).reshape(-1), side)
        index, masked = first_of(mask, largest(side))

        def see(params, stats, **kwargs):
            (y, places), stats = encoder.apply(params["encoder"], stats, images, train=True, dense=True, **kwargs)
            places = places.reshape(len(y), -1, places.shape[-1])
            places = jnp.take_along_axis(places, index[..., None], axis=1)
            z, patches = of_head(params, y), of_head(params, places, patch_key)
            return y, z.reshape(count, 2, -1), patches.reshape(count, 2, *patches.shape[1:]), stats

        y, z, patches, stats = see(params, state.stats["encoder"], masked=(mask, params["token"]))
        t_y, t_z, t_patches, t_stats = see(target, state.stats["target"]["encoder"])
        if len(batch["views"]) > 2:
            local, stats = apply_jointly(encoder, params["encoder"], stats, batch["views"][2:])
            z = jnp.concatenate([z, jnp.stack([of_head(params, x) for x in local], axis=1)], axis=1)
        outputs = {
            "embedding": t_y[::2],
            "student": z,
            "teacher": t_z,
            "student_patches": patches,
            "teacher_patches": t_patches,
            "masked": masked.reshape(count, 2, -1),
        }
        if koleo_weight:
            outputs["features"] = y.reshape(count, 2, -1)
        stats = {"encoder": stats, "head": {}, "target": {"encoder": t_stats, "head": {}}}
        return outputs, stats

    def shifts(outputs, memory, temperature):
        """What is added to the teacher's logits, for images and for patches."""
        if centring == "centre":
            return -memory["centre"] / temperature, -memory["patch_centre"] / temperature
        flat = {name: outputs[name].reshape(-1, config.bottleneck) for name in ("teacher", "teacher_patches")}
        everywhere = jnp.ones(len(flat["teacher"]), bool)
        return (
            sinkhorn_shift(flat["teacher"], memory["target_last"], everywhere, temperature=temperature),
            sinkhorn_shift(
                flat["teacher_patches"],
                memory[f"target_{last_of_patches}"],
                outputs["masked"].ravel(),
                temperature=temperature,
            ),
        )

    def loss(outputs, state, batch, ctx):
        del batch
        memory, temperature = state.memory, warmed(config, run, ctx.step)
        shift, patch_shift = shifts(outputs, memory, temperature)
        options = {"temperature": config.temperature, "teacher_temperature": temperature}
        student, teacher = outputs["student"], outputs["teacher"]
        count, views = student.shape[:2]
        pairs = 1.0 - jnp.eye(2, views, dtype=student.dtype)
        weights = jnp.broadcast_to(pairs / pairs.sum() / count, (count, 2, views))
        last, moved = normalize(ctx.params["last"]), normalize(memory["target_last"])
        whole = prototype_cross_entropy(student, teacher, weights, last, moved, shift, **options)

        masked = outputs["masked"].astype(student.dtype)
        of_patch = masked / jnp.maximum(1, masked.sum(axis=-1, keepdims=True)) / (2 * count)
        ours, theirs = (outputs[f"{name}_patches"].reshape(-1, 1, config.bottleneck) for name in ("student", "teacher"))
        patches = prototype_cross_entropy(
            ours,
            theirs,
            of_patch.reshape(-1, 1, 1),
            normalize(ctx.params[last_of_patches]),
            normalize(memory[f"target_{last_of_patches}"]),
            patch_shift,
            **options,
        )
        value = whole + config.patch_weight * patches
        few = teacher[METRIC_ROWS] @ moved.T / temperature + shift
        metrics = {
            "image_loss": whole,
            "patch_loss": patches,
            **entropies([jax.nn.softmax(few[:, 0]), jax.nn.softmax(few[:, 1])]),
        }
        if koleo_weight:
            metrics["koleo"] = koleo(outputs["features"][:, 0]) + koleo(outputs["features"][:, 1])
            value = value + koleo_weight * metrics["koleo"]
        return value, metrics

    def after(outputs, state, ctx):
        """The teacher's last layer follows the student's; the centres follow the batch."""
        memory, rate = state.memory, tau(ctx.step)
        new = {
            f"target_{last}": rate * memory[f"target_{last}"] + (1 - rate) * ctx.params[last].astype(jnp.float32)
            for last in lasts
        }
        if centring == "centre":
            masked = outputs["masked"][..., None]
            share = masked / jnp.maximum(1, masked.sum())
            means = {
                "centre": (outputs["teacher"].mean(axis=(0, 1)), "target_last", True),
                "patch_centre": (
                    (share * outputs["teacher_patches"]).sum(axis=(0, 1, 2)),
                    f"target_{last_of_patches}",
                    masked.any(),
                ),
            }
            for name, (mean, last, known) in means.items():
                centre = mean @ normalize(memory[last]).T
                moved = config.centre_momentum * memory[name] + (1 - config.centre_momentum) * centre
                new[name] = jnp.where(known, moved, memory[name])
        return ctx.params, new

    return Method(
        init,
        forward,
        loss,
        local_views=True,
        transform=track_target(tau, select_entries(*moving)),
        frozen=dict.fromkeys(lasts, round(config.freeze_epochs * run.epoch)),
        post_update=after,
        encoder=target_encoder,
        collapsed=entropy_collapse(
            config.out,
            uniform="teacher_temperature too high, or a learning rate too high",
            single="centre_momentum too close to 1, or teacher_temperature too low",
        ),
    )
