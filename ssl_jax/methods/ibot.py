r"""iBOT: DINO, and a student that also names its masked patches as a teacher does, which sees them.

For a ViT whose patches matter later: few labels, segmentation, retrieval of parts. Half of the whole views are masked
in blocks. Everything that holds for `dino` holds here: local views, temperatures, collapses; in the paper 10 local
views of 96 px. The centre of the patches follows the masked ones alone, as in DINOv2's code, and the last layer has
norm 1. The teacher is what is exported.

$$-\sum_k q(x)_k \log p(x')_k - \mathrm{mean}_{i \in \mathrm{masked}} \sum_k q(x)_{ik} \log p(\hat x)_{ik}$$

Source: https://arxiv.org/abs/2111.07832; bytedance/ibot, main_ibot.py.

Family: clustering and distillation.
"""

from dataclasses import dataclass

from ssl_jax.fields import option
from ssl_jax.methods.prototypes import masked_self_distillation


@dataclass(frozen=True)
class Config:
    temperature: float = 0.1  # of the student (main_ibot.py, as everything below)
    teacher_temperature: float = 0.07  # README; of images and patches
    warmup_temperature: float = 0.04  # where it starts
    warmup: float = 0.1  # share of the run until it has its value: 30 of 300 epochs
    mask: tuple[float, float] = option((0.1, 0.5), "smallest and largest share of masked patches", min=0, max=1)
    mask_share: float = option(0.5, "share of the whole views that is masked", min=0, max=1)  # README: ratios 0 and 0.3
    patch_weight: float = 1.0  # of the masked patches beside the image's 1 (--lambda2)
    shared_head: bool = True  # one last layer for image and patches (README)
    momentum: float = 0.996  # of the teacher, rises to 1; 0.9995 at batch 256 in long runs
    centre_momentum: float = 0.9  # 1: no centre, which collapses
    freeze_epochs: float = 1.0  # the last layer stays in the first epoch
    hidden: int = 2048  # of the head (models/head.py)
    bottleneck: int = 256  # width before the last layer (models/head.py)
    out: int = 8192


RECIPE = {
    "model.name": "vit_tiny",
    "augment.crop_scale": (0.14, 1.0),  # without local views; with them (README): 0.25 to 1, local ones 0.05 to 0.25
    "optim.name": "adamw",
    "optim.lr": 5e-4,
    "optim.weight_decay": 0.04,
    "optim.weight_decay_end": 0.4,
    "optim.warmup": "0.1 epochs",  # official: 10 of 100
    "optim.clip_norm": 3.0,  # of the whole gradient; main_ibot.py: of each tensor's
}
# For the contract test. Lower temperatures enlarge the rounding of a sum over devices beyond what it allows.
TINY = {
    "augment.local_views": 1,
    "augment.local.size": 4,
    "method.temperature": 0.2,
    "method.warmup_temperature": 0.1,
    "method.teacher_temperature": 0.1,
}


def make(config, encoder, run):
    heads = "tied" if config.shared_head else "layer"
    return masked_self_distillation(config, encoder, run, "ibot", least=None, patch_head=heads)
