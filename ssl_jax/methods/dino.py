r"""DINO: a student matches the centred and sharpened outputs of its own moving average; for ViTs and ResNets.

Centring prevents one output for all images, sharpening prevents uniform outputs. Best with a ViT and local views; its
attention finds objects. In the paper: two views of 224 px (crop_scale 0.4 to 1) and config.augment.local_views=8 of 96
px; without local views, crop_scale 0.14 to 1. A ResNet wants SGD and a weight decay of 1e-4 throughout (its README).
The teacher is what is exported.

$$-\sum_k \mathrm{softmax}((t-c)/T_t)_k \log \mathrm{softmax}(s/T_s)_k$$

Source: https://arxiv.org/abs/2104.14294; facebookresearch/dino, main_dino.py.

Family: clustering and distillation.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from ssl_jax.losses import dino, dino_targets, normalize
from ssl_jax.methods.base import Method, entropies, entropy_collapse, init_with_target, target_encoder
from ssl_jax.methods.prototypes import dino_head, draw_prototypes, warmed
from ssl_jax.network import apply_jointly, stack
from ssl_jax.transforms import cosine_momentum, track_target


@dataclass(frozen=True)
class Config:
    temperature: float = 0.1  # of the student (main_dino.py, as everything below)
    teacher_temperature: float = 0.04  # 0.07 for the best run (README), with a warm-up
    warmup_temperature: float = 0.04  # where it starts
    warmup: float = 0.1  # share of the run until it has its value: 30 of 300 epochs
    momentum: float = 0.996  # of the teacher, rises to 1; 0.9995 at batch 256 in long runs
    centre_momentum: float = 0.9  # 1: no centre, which collapses
    freeze_epochs: float = 1.0  # the last layer stays in the first epoch
    hidden: int = 2048  # of the head
    bottleneck: int = 256  # width before the last layer (main_dino.py)
    out: int = 4096  # as solo-learn has it for CIFAR-10; ImageNet: 65536 (less data, fewer)


RECIPE = {
    "optim.name": "adamw",
    "optim.lr": 5e-4,
    "optim.weight_decay": 0.04,
    "optim.weight_decay_end": 0.4,
    "optim.warmup": "0.1 epochs",
    "optim.clip_norm": 3.0,  # of the whole gradient; main_dino.py: of each tensor's
}
TINY = {"augment.local_views": 2, "augment.local.size": 4}  # for the contract test


def make(config, encoder, run):
    network = stack(encoder=encoder, head=dino_head(config))

    def init(key, views):
        key_net, key_last = jax.random.split(key)
        params, state = init_with_target(network)(key_net, views)
        params["last"] = draw_prototypes(key_last, config)
        return params, state._replace(memory={"centre": jnp.zeros(config.out)})

    def outputs_of(params, stats, views):
        """Embeddings and logits of each view; the last layer's weights have norm 1 whatever their parameters."""
        y, stats = apply_jointly(network, {k: params[k] for k in ("encoder", "head")}, stats, views)
        last = normalize(params["last"])
        return [x["encoder"] for x in y], [normalize(x["head"]) @ last.T for x in y], stats

    def forward(params, target, state, batch, key):
        del key
        _, student, stats = outputs_of(params, state.stats, batch["views"])
        embeddings, teacher, target_stats = outputs_of(target, state.stats["target"], batch["views"][:2])
        outputs = {"embedding": embeddings[0], "student": student, "teacher": teacher}
        return outputs, {**stats, "target": target_stats}

    def loss(outputs, state, batch, ctx):
        del batch
        cold = warmed(config, run, ctx.step)
        teacher, centre = outputs["teacher"], state.memory["centre"]
        value = dino(outputs["student"], teacher, centre, temperature=config.temperature, teacher_temperature=cold)
        return value, entropies(dino_targets(teacher, centre, temperature=cold))

    def move_centre(outputs, state, ctx):
        mean = jnp.stack(outputs["teacher"]).mean(axis=(0, 1))
        centre = config.centre_momentum * state.memory["centre"] + (1 - config.centre_momentum) * mean
        return ctx.params, {"centre": centre}

    return Method(
        init,
        forward,
        loss,
        local_views=True,
        transform=track_target(cosine_momentum(config.momentum, run.steps)),
        frozen={"last": round(config.freeze_epochs * run.epoch)},
        post_update=move_centre,
        encoder=target_encoder,
        collapsed=entropy_collapse(
            config.out,
            uniform="teacher_temperature too high, or a learning rate too high",
            single="centre_momentum too close to 1, or teacher_temperature too low",
        ),
    )
