r"""DINOv2: DINO for the image, iBOT for masked patches, balanced targets, and embeddings that are spread evenly.

The method behind the encoders that many start from; use it to continue one on your own images, or from scratch with
many of them. Sinkhorn's iteration balances the teacher's outputs over both views, and over all masked patches of the
batch; `centring=centre` takes DINO's moving average instead. KoLeo keeps each embedding away from its nearest neighbour
in the batch. Best with a ViT and local views (in the paper 8 of 98 px, crop_scale 0.05 to 0.32). Each view draws its
own mask, where the official code spreads the ratios evenly over a batch; the last layer has norm 1. The teacher is what
is exported.

$$L_{\mathrm{DINO}} + L_{\mathrm{iBOT}} - 0.1\,\mathrm{mean}_i \log \min_{j\ne i} \lVert n(y_i)-n(y_j)\rVert$$

Source: https://arxiv.org/abs/2304.07193; facebookresearch/dinov2, dinov2/train/ssl_meta_arch.py.

Family: clustering and distillation.
"""

from dataclasses import dataclass
from typing import Literal

from ssl_jax.fields import option
from ssl_jax.methods.prototypes import masked_self_distillation


@dataclass(frozen=True)
class Config:
    temperature: float = 0.1  # of the student (dinov2/loss/dino_clstoken_loss.py)
    teacher_temperature: float = 0.07  # ssl_default_config.yaml, as everything below
    warmup_temperature: float = 0.04  # where it starts
    warmup: float = 0.1  # share of the run until it has its value: 30 of 300 epochs; official: 30 of 100 to 500
    centring: Literal["sinkhorn", "centre"] = "sinkhorn"  # train/vitl14.yaml; vitl16_short.yaml: centre
    heads: Literal["tied", "own"] = "own"  # of image and patches: one, or two (train/vitl14.yaml; ViT-L/16: tied)
    koleo: float = option(0.1, "weight of the embeddings' spread", min=0)
    mask: tuple[float, float] = option((0.1, 0.5), "smallest and largest share of masked patches", min=0, max=1)
    mask_share: float = option(0.5, "share of the whole views that is masked", min=0, max=1)
    patch_weight: float = 1.0  # of the masked patches beside the image's 1
    momentum: float = 0.992  # of the teacher, rises to 1; train/vitl14.yaml: 0.994
    centre_momentum: float = 0.9  # centring=centre; 1: no centre, which collapses
    freeze_epochs: float = 1.0  # the last layers stay in the first epoch
    hidden: int = 2048  # of the heads
    bottleneck: int = 256  # width before the last layer; train/vitl14.yaml: 384
    out: int = 8192  # fewer for less data (as iBOT); official: 65536, with 142 million images 131072


# The rate is official for a batch of 1024 (and grows with its root there): 4e-3 for ViT-L/16, 2e-4 for ViT-L/14.
RECIPE = {
    "model.name": "vit_tiny",
    "augment.crop_scale": (0.32, 1.0),  # ssl_default_config.yaml
    "optim.name": "adamw",
    "optim.lr": 1e-3,
    "optim.lr_batch": 1024,
    "optim.weight_decay": 0.04,
    "optim.weight_decay_end": 0.4,
    "optim.warmup": "0.1 epochs",  # official: 10 of 100
    "optim.clip_norm": 3.0,
}
TINY = {"augment.local_views": 1, "augment.local.size": 4}  # for the contract test


def make(config, encoder, run):
    return masked_self_distillation(
        config,
        encoder,
        run,
        "dinov2",
        least=4,  # dinov2/data/masking.py
        koleo_weight=config.koleo,
        centring=config.centring,
        patch_head=config.heads,
    )
