r"""Distillation: a student predicts the features of a frozen teacher, an encoder that was trained before.

For a small network from a large one. `method.teacher` is the folder of a finished run or of an export; any encoder
teaches any other. Teacher and student see the same view; weak ones teach more (benchmarks/adapting.md). What all images
have in common in the teacher's features, the batch's mean, is subtracted, or it would fill most of the cosine. With
`patches` the student learns the places of the feature map, too; where the two maps differ in size, the student's is
resized. A student that gets 0 for the cosine on new images has learnt nothing: see the metric `similarity`. The teacher
is frozen, has no gradient, and lies in the checkpoints; the projections are thrown away.

$$1 - \cos\!\big(p(f(x)),\, g(x) - \bar g\big)$$

Source: https://arxiv.org/abs/2312.06709 (AM-RADIO), section 3.3: cosines, for the whole image and for the patches;
centred features: https://arxiv.org/abs/2410.01680; the same view for both: https://arxiv.org/abs/2106.05237.

Family: clustering and distillation.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from ssl_jax.collapse import embedding_std
from ssl_jax.errors import UserError
from ssl_jax.fields import option
from ssl_jax.losses import negative_cosine
from ssl_jax.methods.base import Method, State, std_collapse
from ssl_jax.models import mlp
from ssl_jax.network import dense_shapes


@dataclass(frozen=True)
class Config:
    teacher: str = option(
        "", "the encoder that teaches: folder of a run, or published weights (docs/weights.md)", path=True
    )
    random_teacher: bool = False  # instead: a random network like the student; what no teacher's knowledge is worth
    dtype: Literal["float32", "bfloat16"] = "float32"  # the teacher computes in it
    patches: float = option(0.0, "weight of the feature map's places beside the whole image's 1; 0: none", min=0)
    hidden: int = 2048  # of the student's projections (ours)


# Ours: AdamW as for most ViTs, views that keep most of the image, because the teacher has to recognise it.
RECIPE = {
    "augment.crop_scale": (0.25, 1.0),
    "optim.name": "adamw",
    "optim.lr": 1e-3,
    "optim.weight_decay": 0.05,
    "optim.warmup": "0.5 epochs",
}
TINY = {"method.random_teacher": True}  # for the contract test: there is no run


def make(config, encoder, run):
    if config.random_teacher and config.teacher:
        raise UserError(f"config.method.teacher={config.teacher!r}: not together with config.method.random_teacher")
    teacher = None if config.random_teacher else find_teacher(config, run)
    network = teacher.network if teacher else encoder
    dense = config.patches > 0

    def init(key, views):
        key_student, key_heads, key_teacher = jax.random.split(key, 3)
        if teacher:
            check_views(config.teacher, teacher, views[0].shape)
        params, stats = encoder.init(key_student, views[0])
        frozen = (teacher.params, teacher.stats) if teacher else encoder.init(key_teacher, views[0])
        mine, _ = dense_shapes(encoder, params, stats, views[0][:1])
        others, _ = dense_shapes(network, frozen[0], frozen[1], views[0][:1])
        heads = {"projector": key_heads, **({"patch_projector": jax.random.fold_in(key_heads, 1)} if dense else {})}
        head, x = mlp((config.hidden, others.shape[1]), norm=False, bias=True, gelu=True), jnp.zeros(mine.shape)
        made = {"encoder": params, **{name: head.init(k, x)[0] for name, k in heads.items()}}
        memory = {
            "teacher": jax.tree.map(jnp.asarray, frozen[0]),
            "teacher_stats": jax.tree.map(jnp.asarray, frozen[1]),
        }
        return made, State({"encoder": stats}, memory)

    def project(params, x):
        head = mlp((config.hidden, params["linear2"]["kernel"].shape[1]), norm=False, bias=True, gelu=True)
        return head.apply(params, {}, x, train=True)[0]

    def forward(params, target, state, batch, key):
        del target, key
        (images,) = batch["views"]
        (y, places), stats = encoder.apply(params["encoder"], state.stats["encoder"], images, train=True, dense=True)
        frozen = jax.lax.stop_gradient((state.memory["teacher"], state.memory["teacher_stats"]))
        (features, map_), _ = network.apply(*frozen, images, train=False, dense=True)
        outputs = {"embedding": y, "whole": (project(params["projector"], y), features.astype(y.dtype))}
        if dense:
            places = jax.image.resize(places, (*map_.shape[:3], places.shape[-1]), "bilinear")
            rows = [x.reshape(len(y), -1, x.shape[-1]) for x in (places, map_)]
            outputs["patches"] = (project(params["patch_projector"], rows[0]), rows[1].astype(y.dtype))
        return outputs, {"encoder": stats}

    def loss(outputs, state, batch, ctx):
        del state, batch, ctx
        prediction, features = outputs["whole"]
        whole = distance(prediction, features)
        metrics = {"similarity": 1 - whole, "projection_std": embedding_std(prediction)}
        if not dense:
            return whole, metrics
        places = distance(*(x.reshape(-1, x.shape[-1]) for x in outputs["patches"]))
        return whole + config.patches * places, {**metrics, "patch_similarity": 1 - places}

    collapsed = std_collapse("a teacher whose embeddings are all alike, or a learning rate too high", threshold=0.1)
    return Method(init, forward, loss, views=1, collapsed=collapsed)


def distance(prediction, features):
    """Mean of 1 - cos(prediction, features - their mean) of arrays [R, D]."""
    return 1 + negative_cosine(prediction, features - features.mean(axis=0))


def find_teacher(config, run):
    """The teacher, an `Encoder`. UserError if it is not named or cannot be read."""
    if not config.teacher:
        raise UserError(
            "config.method.teacher: has to be given; allowed: the folder of a finished run, or published weights"
        )
    try:
        return run.load_encoder(config.teacher, dtype=config.dtype)
    except UserError as error:
        raise UserError(f"config.method.teacher={config.teacher!r}: {error}") from error


def check_views(path, teacher, shape):
    """UserError if views [B, H, W, C] have other sizes or channels than the teacher's images."""
    for what, has, takes, cure in (
        ("channels", shape[3], teacher.channels, "config.data.channels"),
        ("px", shape[1], teacher.size, "config.augment.size"),
    ):
        if has != takes:
            raise UserError(
                f"config.method.teacher={path!r}: takes images of {takes} {what}, the views have {has}; "
                f"allowed: another teacher, or {cure}={takes}"
            )
