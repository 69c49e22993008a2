"""ImageNet: the recipes behind published numbers, from the authors' code where there is any. None of them was run here.

    ssl-jax pretrain --config=imagenet:byol --workdir=runs/byol
    ssl-jax reproduce imagenet:byol --workdir=runs/byol

The recipes are the keys of RECIPES; "published" is what a source reports for one. Where each number is from, line by
line, and what is different and why: docs/recipes.md. TFDS must have prepared imagenet2012.

What they took, and what they would take of a TPU slice: docs/reproduce.md. On less, lower config.train.batch: the
learning rate follows it.

Crops are cut from the whole photograph, and tests see the central 224 px of a shorter side of 256. Different from some
sources: images are resized bilinearly where they resize bicubically. "differs" says what else matters.
"""

from ssl_jax.config import default
from ssl_jax.errors import unknown


def _accuracy(protocol, value, source):
    """A published accuracy in %, and how it was measured: a protocol of `ssl-jax evaluate`."""
    return {"protocol": protocol, "metric": "top1", "value": value, "source": source}


COMMON = {
    "data.name": "tfds",
    "data.path": "imagenet2012",
    "data.size": 224,
    "data.test_side": 256,  # of which the central 224 are used
    "data.crops": "file",
    "model.name": "resnet50",
}

# Views, as far as they are not the preset "natural", BYOL's two; here both are alike.
_ALIKE = {"augment.solarize": 0.0, "augment.saturation": 0.4}
_SIMCLR_VIEWS = {  # google-research/simclr, data_util.py; also swav's: src/multicropdataset.py
    **_ALIKE,
    "augment.blur": 0.5,
    "augment.brightness": 0.8,  # 0.8, 0.8, 0.8 and 0.2, times a strength of 1
    "augment.contrast": 0.8,
    "augment.saturation": 0.8,
    "augment.hue": 0.2,
}
_MOCO_V2_VIEWS = {  # facebookresearch/moco, main_moco.py, --aug-plus; also simsiam's
    **_ALIKE,
    "augment.crop_scale": (0.2, 1.0),
    "augment.blur": 0.5,
}
_MOCO_V1_VIEWS = {  # main_moco.py without --aug-plus: those of instance discrimination
    **_ALIKE,
    "augment.crop_scale": (0.2, 1.0),
    "augment.blur": 0.0,
    "augment.jitter_prob": 1.0,
    "augment.hue": 0.4,
    "augment.gray_first": True,
}
_SWAV_CROPS = {  # facebookresearch/swav, every script
    "augment.crop_scale": (0.14, 1.0),
    "augment.local_views": 6,
    "augment.local.size": 96,
    "augment.local.crop_scale": (0.05, 0.14),
}

RECIPES = {
    # google-research/simclr, first README; a later one has a weight decay of 1e-4 and a deeper head, for SimCLRv2.
    # differs: no BatchNorm after the projector's last layer; brightness is multiplied, not added to.
    "simclr": {
        "published": [_accuracy("linear", 64.5, "README of 2020")],
        "model.zero_init": True,
        "train.batch": 4096,
        "train.duration": "100 epochs",
        "optim.name": "lars",
        "optim.lr": 0.3,
        "optim.vector_lr": 2.0,
        "optim.weight_decay": 1e-6,
        "optim.warmup": "10 epochs",
        "method.temperature": 0.1,
        "method.hidden": 2048,
        "method.out": 128,
        **_SIMCLR_VIEWS,
        "augment.crop_scale": (0.08, 1.0),
    },
    # facebookresearch/moco
    "moco_v1": {
        "published": [_accuracy("linear", 60.6, "README")],
        "method": "moco",
        "train.batch": 256,
        "train.duration": "200 epochs",
        "optim.name": "sgd",
        "optim.lr": 0.03,
        "optim.schedule": "step",
        "optim.weight_decay": 1e-4,
        "optim.decay_all": True,
        "method.head": "linear",
        "method.temperature": 0.07,
        "method.queue": 65536,
        "method.momentum": 0.999,
        "method.out": 128,
        "method.bn_groups": 8,
        **_MOCO_V1_VIEWS,
    },
    # facebookresearch/moco, --mlp --moco-t 0.2 --aug-plus --cos
    "moco_v2": {
        "published": [_accuracy("linear", 67.7, "README")],
        "method": "moco",
        "train.batch": 256,
        "train.duration": "200 epochs",
        "optim.name": "sgd",
        "optim.lr": 0.03,
        "optim.schedule": "cosine",
        "optim.weight_decay": 1e-4,
        "optim.decay_all": True,
        "method.head": "mlp",
        "method.temperature": 0.2,
        "method.queue": 65536,
        "method.momentum": 0.999,
        "method.hidden": 2048,
        "method.out": 128,
        "method.bn_groups": 8,
        **_MOCO_V2_VIEWS,
    },
    # facebookresearch/moco-v3
    "moco_v3": {
        "published": [_accuracy("linear", 74.6, "CONFIG.md")],
        "model.zero_init": True,
        "train.batch": 4096,
        "train.duration": "1000 epochs",
        "optim.name": "lars",
        "optim.lr": 0.3,
        "optim.weight_decay": 1.5e-6,
        "optim.warmup": "10 epochs",
        "method.momentum": 0.996,
        "method.temperature": 1.0,
        "method.hidden": 4096,
        "method.out": 256,
        "augment.crop_scale": (0.2, 1.0),
    },
    # facebookresearch/moco-v3
    "moco_v3_vit_small": {
        "published": [_accuracy("linear", 73.2, "CONFIG.md")],
        "method": "moco_v3",
        "model.name": "vit_small",
        "model.patch": 16,
        "model.heads": 12,
        "model.positions": "fixed",
        "model.initial": "xavier_qkv",
        "model.freeze_patch": True,
        "train.batch": 4096,
        "train.duration": "300 epochs",
        "optim.name": "adamw",
        "optim.lr": 1.5e-4,
        "optim.weight_decay": 0.1,
        "optim.decay_all": True,
        "optim.warmup": "40 epochs",
        "method.momentum": 0.99,
        "method.temperature": 0.2,
        "method.hidden": 4096,
        "method.out": 256,
        "augment.crop_scale": (0.08, 1.0),
    },
    # google-deepmind/deepmind-research, byol; its views are the preset.
    "byol": {
        "published": [_accuracy("linear", 74.3, "arXiv 2006.07733, abstract")],
        "model.zero_init": True,
        "train.batch": 4096,
        "train.duration": "1000 epochs",
        "optim.name": "lars",
        "optim.lr": 0.2,
        "optim.weight_decay": 1.5e-6,
        "optim.warmup": "10 epochs",
        "method.momentum": 0.996,
        "method.hidden": 4096,
        "method.out": 256,
    },
    # facebookresearch/simsiam
    "simsiam": {
        "published": [_accuracy("linear", 68.1, "README")],
        "model.zero_init": True,
        "train.batch": 512,
        "train.duration": "100 epochs",
        "optim.name": "sgd",
        "optim.lr": 0.05,
        "optim.weight_decay": 1e-4,
        "optim.decay_all": True,
        "method.hidden": 2048,
        "method.out": 2048,
        "method.bottleneck": 512,
        **_MOCO_V2_VIEWS,
    },
    # facebookresearch/barlowtwins; its views are the preset.
    "barlow_twins": {
        "published": [_accuracy("linear", 73.5, "README")],
        "model.zero_init": True,
        "train.batch": 2048,
        "train.duration": "1000 epochs",
        "optim.name": "lars",
        "optim.lr": 0.2,
        "optim.vector_lr": 0.0015,
        "optim.weight_decay": 1e-6,
        "optim.warmup": "10 epochs",
        "optim.lr_end": 0.001,
        "method.off_diagonal": 0.0051,
        "method.hidden": 8192,
        "method.out": 8192,
    },
    # facebookresearch/vicreg; its views are the preset.
    "vicreg": {
        "published": [_accuracy("linear", 73.2, "README")],
        "model.zero_init": True,
        "train.batch": 2048,
        "train.duration": "1000 epochs",
        "optim.name": "lars",
        "optim.lr": 0.2,
        "optim.weight_decay": 1e-6,
        "optim.warmup": "10 epochs",
        "optim.lr_end": 0.001,
        "method.invariance": 25.0,
        "method.variance": 25.0,
        "method.covariance": 1.0,
        "method.hidden": 8192,
        "method.out": 8192,
    },
    # facebookresearch/VICRegL; its views are the preset. differs: 20 places match in both directions, there 20 and 4.
    "vicregl": {
        "published": [_accuracy("linear", 70.4, "README")],
        "model.zero_init": True,
        "train.batch": 2048,
        "train.duration": "300 epochs",
        "optim.name": "lars",
        "optim.lr": 0.2,
        "optim.weight_decay": 1e-6,
        "optim.warmup": "10 epochs",
        "optim.lr_end": 0.001,
        "method.alpha": 0.75,
        "method.matches": (20, 4),
        "method.hidden": 8192,
        "method.out": 8192,
        "method.local": 512,
        "method.flips": False,
        "augment.crop_scale": (0.08, 1.0),
    },
    # lightly, benchmarks/imagenet/resnet50/tico.py: the authors' code is not public. Its views are the preset. The
    # documentation says batch 256; its checkpoint has 250,200 steps for 100 epochs, which is 512 (2 GPUs).
    "tico": {
        "published": [
            _accuracy("linear", 49.7, "lightly's documentation, Benchmarks"),
            _accuracy("knn", 26.6, "lightly's documentation, Benchmarks"),
        ],
        "eval.knn_k": 200,
        "eval.knn_temperature": 0.1,
        "train.batch": 512,
        "train.duration": "100 epochs",
        "optim.name": "lars",
        "optim.lr": 0.2,
        "optim.weight_decay": 1.5e-6,
        "optim.warmup": "10 epochs",
        "optim.lr_end": 0.001,
        "method.momentum": 0.99,
    },
    # facebookresearch/swav
    "swav": {
        "published": [_accuracy("linear", 75.3, "README")],
        "train.batch": 4096,
        "train.bn_group": 512,
        "train.duration": "800 epochs",
        "optim.name": "lars",
        "optim.lr": 4.8,
        "optim.lr_batch": 4096,
        "optim.weight_decay": 1e-6,
        "optim.decay_all": True,
        "optim.warmup": "10 epochs",
        "optim.lr_start": 0.3 / 4.8,
        "optim.lr_end": 0.001,
        "method.prototypes": 3000,
        "method.temperature": 0.1,
        "method.epsilon": 0.05,
        "method.sinkhorn_iterations": 3,
        "method.freeze_steps": 313,
        "method.queue": 0,
        "method.hidden": 2048,
        "method.out": 128,
        **_SIMCLR_VIEWS,
        **_SWAV_CROPS,
    },
    "swav_256": {
        "published": [_accuracy("linear", 72.7, "README")],
        "method": "swav",
        "train.batch": 256,
        "train.duration": "200 epochs",
        "optim.name": "lars",
        "optim.lr": 0.6,
        "optim.weight_decay": 1e-6,
        "optim.decay_all": True,
        "optim.warmup": "0 epochs",
        "optim.lr_end": 0.001,
        "method.prototypes": 3000,
        "method.temperature": 0.1,
        "method.epsilon": 0.05,
        "method.sinkhorn_iterations": 3,
        "method.freeze_steps": 5005,
        "method.queue": 3840,
        "method.queue_start": 15 / 200,
        "method.hidden": 2048,
        "method.out": 128,
        **_SIMCLR_VIEWS,
        **_SWAV_CROPS,
    },
    # facebookresearch/dino
    "dino": {
        "published": [_accuracy("linear", 74.0, "README"), _accuracy("knn", 69.3, "README")],
        "model.name": "vit_small",
        "model.patch": 16,
        "model.positions": "learned",
        "model.resize": "dino",
        "model.initial": "normal",
        "model.drop_path": 0.1,
        "eval.knn_k": 20,
        "eval.knn_temperature": 0.07,
        "train.batch": 512,
        "train.duration": "100 epochs",
        "optim.name": "adamw",
        "optim.lr": 5e-4,
        "optim.weight_decay": 0.04,
        "optim.weight_decay_end": 0.4,
        "optim.warmup": "10 epochs",
        "optim.lr_end": 0.001,
        "optim.clip_norm": 3.0,
        "optim.clip_each": True,
        "method.teacher_temperature": 0.04,
        "method.warmup_temperature": 0.04,
        "method.momentum": 0.996,
        "method.freeze_epochs": 1.0,
        "method.out": 65536,
        "augment.crop_scale": (0.4, 1.0),
        "augment.local_views": 8,
        "augment.local.size": 96,
        "augment.local.crop_scale": (0.05, 0.4),
        "augment.local.blur": 0.5,
    },
    # lightly, benchmarks/imagenet/resnet50/dino.py: for the authors' 75.3 % the README gives no command.
    "dino_resnet50": {
        "published": [
            _accuracy("linear", 68.2, "lightly's documentation, Benchmarks"),
            _accuracy("knn", 49.9, "lightly's documentation, Benchmarks"),
        ],
        "method": "dino",
        "eval.knn_k": 200,
        "eval.knn_temperature": 0.1,
        "train.batch": 128,
        "train.duration": "100 epochs",
        "optim.name": "sgd",
        "optim.lr": 0.03,
        "optim.weight_decay": 1e-4,
        "optim.weight_decay_end": -1.0,
        "optim.warmup": "10 epochs",
        "optim.lr_end": 0.001,
        "optim.clip_norm": 3.0,
        "method.momentum": 0.996,
        "method.freeze_epochs": 1.0,
        "method.out": 65536,
        "augment.crop_scale": (0.14, 1.0),
        "augment.local_views": 6,
        "augment.local.size": 96,
        "augment.local.crop_scale": (0.05, 0.14),
        "augment.local.blur": 0.5,
    },
    # zhirongw/lemniscate.pytorch. differs: the negatives are drawn for a batch, not for each image.
    "instance_discrimination": {
        "published": [_accuracy("knn", 41.0, "README")],
        "model.name": "resnet18",
        "eval.knn_k": 200,
        "eval.knn_temperature": 0.07,
        "train.batch": 256,
        "train.duration": "200 epochs",
        "optim.name": "sgd",
        "optim.lr": 0.03,
        "optim.schedule": "step",
        "optim.weight_decay": 1e-4,
        "optim.decay_all": True,
        "method.mode": "nce",
        "method.negatives": 4096,
        "method.temperature": 0.07,
        "method.momentum": 0.5,
        "method.out": 128,
        **_MOCO_V1_VIEWS,
    },
    # facebookresearch/vissl, rotnet_8gpu_resnet.yaml. differs: all four turns of each image, not one at random.
    "rotation": {
        "published": [_accuracy("linear", 48.2, "vissl's MODEL_ZOO.md")],
        "train.batch": 256,
        "train.duration": "105 epochs",
        "optim.name": "sgd",
        "optim.lr": 0.1,
        "optim.lr_batch": 256,
        "optim.nesterov": False,
        "optim.schedule": "step",
        "optim.drops": (30 / 105, 60 / 105, 90 / 105, 100 / 105),
        "optim.weight_decay": 1e-4,
        "augment.preset": "light",
        "augment.crop_scale": (0.08, 1.0),
    },
    # facebookresearch/vissl, jigsaw_8gpu_resnet.yaml and permutations/perm100.yaml. differs: one head over nine
    # embeddings, where each first went to 1000 features; tiles normalised one by one.
    "jigsaw": {
        "published": [_accuracy("linear", 48.57, "vissl's MODEL_ZOO.md")],
        "data.size": 255,
        "train.batch": 256,
        "train.duration": "105 epochs",
        "optim.name": "sgd",
        "optim.lr": 0.1,
        "optim.schedule": "step",
        "optim.drops": (30 / 105, 60 / 105, 90 / 105, 100 / 105),
        "optim.weight_decay": 1e-4,
        "optim.warmup": "5 epochs",
        "optim.lr_start": 0.25,
        "method.permutations": 100,
        "method.tile": 0.75,
        "method.channel_shift": 0,
        "augment.preset": "light",
        "augment.crop_scale": (1.0, 1.0),
        "augment.gray": 0.66,
    },
    # facebookresearch/mae
    "mae": {
        "published": [
            _accuracy("finetune", 83.57, "FINETUNE.md, mean of four runs"),
            _accuracy("linear", 67.8, "FINETUNE.md"),
        ],
        "model.name": "vit_base",
        "model.patch": 16,
        "train.batch": 4096,
        "train.duration": "1600 epochs",
        "optim.name": "adamw",
        "optim.lr": 1.5e-4,
        "optim.b2": 0.95,
        "optim.weight_decay": 0.05,
        "optim.warmup": "40 epochs",
        "method.mask": 0.75,
        "method.normalize": True,
        "method.width": 512,
        "method.depth": 8,
        "method.heads": 16,
        "augment.preset": "light",
        "augment.crop_scale": (0.2, 1.0),
    },
    # microsoft/SimMIM, configs/vit_base__800ep. differs: fixed positions, theirs are a bias of the attention; initial
    # values.
    "simmim": {
        "published": [_accuracy("finetune", 83.8, "README")],
        "model.name": "vit_base",
        "model.patch": 16,
        "model.layer_scale": 0.1,
        "model.drop_path": 0.1,
        "train.batch": 2048,
        "train.duration": "800 epochs",
        "optim.name": "adamw",
        "optim.lr": 1e-4,
        "optim.lr_batch": 512,
        "optim.schedule": "step",
        "optim.drops": (700 / 800,),
        "optim.weight_decay": 0.05,
        "optim.warmup": "10 epochs",
        "optim.lr_start": 0.005,
        "optim.clip_norm": 5.0,
        "method.mask": 0.6,
        "method.block": 2,
        "augment.preset": "light",
        "augment.crop_scale": (0.67, 1.0),
    },
}


def get_published(name="byol"):
    """What `ssl-jax reproduce` compares with."""
    get_config(name)
    return RECIPES[name]["published"]


def get_config(name="byol"):
    if name not in RECIPES:
        raise unknown("--config=imagenet:RECIPE", name, RECIPES)
    recipe = {"method": name, **COMMON, **RECIPES[name]}
    config = default(recipe.pop("method"))
    del recipe["published"]
    config.update_from_flattened_dict(recipe)
    return config
