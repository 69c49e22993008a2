r"""VICRegL: VICReg on whole views and on places of their feature maps, which match in the image or in feature space.

For segmentation, detection and small findings. Places are matched where they show the same spot of the image, and where
they look most alike. Positions follow the crop, the flip and every warp of a view. The views of the official code have
no warps, and it ignores flips (`flips=False`). Two views of 224 px for a ResNet; the paper's multi-crop has crop_scale
0.4 to 1 and config.augment.local_views=6 of 96 px (local.crop_scale 0.08 to 0.4).

$$\alpha\,\mathrm{VICReg}(\mathrm{whole}) + (1-\alpha)\,\mathrm{VICReg}(\mathrm{matched\ places})$$

Source: https://arxiv.org/abs/2210.01571; facebookresearch/VICRegL.

Family: without negatives.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from ssl_jax.augment import origins
from ssl_jax.fields import option
from ssl_jax.losses import vicregl
from ssl_jax.methods.base import Method, State, refuse_randaugment, require_batch, std_collapse
from ssl_jax.models import mlp
from ssl_jax.network import Network, apply_separately, stack


@dataclass(frozen=True)
class Config:
    alpha: float = 0.75  # weight of the whole views (main_vicregl.py, as everything below); 0.9 classifies better
    matches: tuple[int, int] = option(
        (20, 4), "places matched by position: in the first two views, in each local one", min=1
    )
    invariance: float = 25.0  # weights of the three terms (main_vicregl.py)
    variance: float = 25.0  # 0 collapses
    covariance: float = 1.0  # against redundant dimensions
    hidden: int = 2048  # of the projector of whole views; ImageNet: 8192
    out: int = 2048
    local: int = 512  # hidden and out of the projector of places
    flips: bool = True  # whether positions follow a flip; official: no (main_vicregl.py, no_flip_grid)


RECIPE = {
    "optim.name": "lars",
    "optim.lr": 0.3,
    "optim.weight_decay": 1e-6,
    "optim.warmup": "0.1 epochs",
}  # README: ResNet-50, 100 epochs; 0.2 for 300
# For the contract test: two local views double the time to compile, and rounding grows with the learning rate.
TINY = {"augment.local_views": 1, "augment.local.size": 4, "optim.lr": 0.0125}


def make(config, encoder, run):
    del run
    projector = mlp((config.hidden, config.hidden, config.out), last_bias=False)
    places = mlp((config.local, config.local, config.local), last_bias=False)
    whole = stack(encoder=encoder, projector=projector)
    settings = {k: getattr(config, k) for k in ("alpha", "matches", "invariance", "variance", "covariance")}

    def init(key, views):
        key_whole, key_places = jax.random.split(key)
        params, stats = whole.init(key_whole, views[0])
        width = params["projector"]["linear1"]["kernel"].shape[0]
        params["places"], stats["places"] = places.init(key_places, jnp.zeros((1, width)))
        return params, State(stats, {})

    def apply(params, stats, x, *, train):
        (y, maps), encoder_stats = encoder.apply(params["encoder"], stats["encoder"], x, train=train, dense=True)
        z, projector_stats = projector.apply(params["projector"], stats["projector"], y, train=train)
        local, places_stats = places.apply(params["places"], stats["places"], maps, train=train)
        stats = {"encoder": encoder_stats, "projector": projector_stats, "places": places_stats}
        return {"embedding": y, "z": z, "maps": local}, stats

    def forward(params, target, state, batch, key):
        del target, key
        require_batch(batch["views"], "vicregl")
        refuse_randaugment(batch.get("drawn", ()), "vicregl")
        each, stats = apply_separately(Network(init, apply), params, state.stats, batch["views"])
        drawn = batch["drawn"]
        if not config.flips:
            drawn = [{**own, "flip": jnp.zeros_like(own["flip"])} for own in drawn]
        where = [origins(own, *y["maps"].shape[1:3]) for y, own in zip(each, drawn, strict=True)]
        maps = [y["maps"].reshape(*p.shape[:2], -1) for y, p in zip(each, where, strict=True)]
        outputs = {"embedding": each[0]["embedding"], "z": [y["z"] for y in each], "maps": maps, "positions": where}
        return outputs, stats

    def loss(outputs, state, batch, ctx):
        del state, batch, ctx
        z = outputs["z"]
        value = vicregl(z, outputs["maps"], outputs["positions"], **settings)
        return value, {"projection_std": z[0].std(axis=0).mean()}

    collapsed = std_collapse("config.method.variance too small")
    return Method(init, forward, loss, local_views=True, collapsed=collapsed)
