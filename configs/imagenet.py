"""ImageNet: the recipes behind published numbers, from the authors' code where there is any. None of them was run here.

    ssl-jax pretrain --config=imagenet:byol --workdir=runs/byol

The recipes are the keys of RECIPES; "published" is what a source reports for one. TFDS must have prepared imagenet2012.
What they took: 512 TPU v3 for 8 hours (byol), 32 TPU v3 for 6 hours (simclr), 64 GPUs for two days (swav; mae, ViT-L),
32 GPUs (vicreg, vicregl, moco_v3_vit_small), 16 V100 (moco_v3; barlow_twins: 7 days), 16 GPUs (simmim), 8 GPUs for two
days (moco_v1, moco_v2, dino), 8 GPUs (simsiam, rotation, jigsaw), 4 GPUs (swav_256), 2 RTX 4090 for four days (tico,
dino_resnet50). On less, lower config.train.batch: the learning rate follows it.

Crops are cut from the whole photograph, and tests see the central 224 px of a shorter side of 256. Different from the
sources: images are resized bilinearly where some resize bicubically, and learning rates fall to 0 where some fall to a
thousandth of the peak. "differs" says what else.
"""

from ssl_jax.config import default
from ssl_jax.errors import unknown

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
}
_SWAV_CROPS = {  # facebookresearch/swav, every script
    "augment.crop_scale": (0.14, 1.0),
    "augment.local_views": 6,
    "augment.local.size": 96,
    "augment.local.crop_scale": (0.05, 0.14),
}

RECIPES = {
    # google-research/simclr. differs: no BatchNorm after the projector's last layer (model_util.py has one).
    "simclr": {
        "published": "64.5 % linear, ResNet-50, 100 epochs (README); not run here",
        "model.zero_init": True,  # tf2/resnet.py, init_zero
        "train.batch": 4096,  # README
        "train.duration": "100 epochs",  # README
        "optim.name": "lars",  # run.py
        "optim.lr": 0.3,  # at batch 256 (README)
        "optim.vector_lr": 2.0,  # their loss is twice ours, which under LARS biases and norm scales alone would feel
        "optim.weight_decay": 1e-6,  # README of 2020 and 2021; a later one says 1e-4
        "optim.warmup": "10 epochs",  # run.py
        "method.temperature": 0.1,  # README
        "method.hidden": 2048,  # the width of the embedding (model_util.py)
        "method.out": 128,  # run.py
        **_SIMCLR_VIEWS,
        "augment.crop_scale": (0.08, 1.0),  # data_util.py
    },
    # facebookresearch/moco
    "moco_v1": {
        "published": "60.6 % linear, ResNet-50, 200 epochs (README; arXiv 1911.05722); not run here",
        "method": "moco",
        "train.batch": 256,  # README
        "train.duration": "200 epochs",  # main_moco.py
        "optim.name": "sgd",  # main_moco.py, as everything below
        "optim.lr": 0.03,
        "optim.schedule": "step",  # x 0.1 at epochs 120 and 160
        "optim.weight_decay": 1e-4,
        "optim.decay_all": True,
        "method.head": "linear",
        "method.temperature": 0.07,
        "method.queue": 65536,
        "method.momentum": 0.999,
        "method.out": 128,
        "method.bn_groups": 8,  # the GPUs of README
        **_MOCO_V1_VIEWS,
    },
    # facebookresearch/moco, --mlp --moco-t 0.2 --aug-plus --cos
    "moco_v2": {
        "published": "67.7 % linear, ResNet-50, 200 epochs (README; arXiv 2003.04297); not run here",
        "method": "moco",
        "train.batch": 256,  # README
        "train.duration": "200 epochs",  # main_moco.py; 71.1 % after 800 (README)
        "optim.name": "sgd",  # main_moco.py, as everything below
        "optim.lr": 0.03,
        "optim.schedule": "cosine",  # --cos
        "optim.weight_decay": 1e-4,
        "optim.decay_all": True,
        "method.head": "mlp",  # --mlp
        "method.temperature": 0.2,  # --moco-t
        "method.queue": 65536,
        "method.momentum": 0.999,
        "method.hidden": 2048,  # the width of the embedding (builder.py)
        "method.out": 128,
        "method.bn_groups": 8,  # the GPUs of README
        **_MOCO_V2_VIEWS,
    },
    # facebookresearch/moco-v3.
    "moco_v3": {
        "published": "74.6 % linear, ResNet-50, 1000 epochs (CONFIG.md; arXiv 2104.02057); not run here",
        "model.zero_init": True,  # main_moco.py
        "train.batch": 4096,  # CONFIG.md
        "train.duration": "1000 epochs",  # CONFIG.md; 100: lr 0.6, decay 1e-6, momentum 0.99, 68.9 %
        "optim.name": "lars",  # main_moco.py
        "optim.lr": 0.3,  # CONFIG.md
        "optim.weight_decay": 1.5e-6,  # CONFIG.md
        "optim.warmup": "10 epochs",  # main_moco.py
        "method.momentum": 0.996,  # CONFIG.md, rises to 1
        "method.temperature": 1.0,  # main_moco.py
        "method.hidden": 4096,  # main_moco.py
        "method.out": 256,  # main_moco.py
        "augment.crop_scale": (0.2, 1.0),  # CONFIG.md; else the preset (main_moco.py)
    },
    # facebookresearch/moco-v3. differs: 6 heads of 64 features; vits.py has 12 of 32.
    "moco_v3_vit_small": {
        "published": "73.2 % linear, ViT-S/16, 300 epochs (CONFIG.md; arXiv 2104.02057); not run here",
        "method": "moco_v3",
        "model.name": "vit_small",
        "model.patch": 16,  # vits.py
        "model.positions": "fixed",  # vits.py
        "model.freeze_patch": True,  # CONFIG.md, --stop-grad-conv1
        "train.batch": 4096,  # CONFIG.md
        "train.duration": "300 epochs",  # CONFIG.md
        "optim.name": "adamw",  # CONFIG.md
        "optim.lr": 1.5e-4,  # at batch 256 (CONFIG.md)
        "optim.weight_decay": 0.1,  # CONFIG.md
        "optim.decay_all": True,  # main_moco.py
        "optim.warmup": "40 epochs",  # CONFIG.md
        "method.momentum": 0.99,  # main_moco.py, rises to 1
        "method.temperature": 0.2,  # CONFIG.md
        "method.hidden": 4096,  # main_moco.py
        "method.out": 256,  # main_moco.py
        "augment.crop_scale": (0.08, 1.0),  # main_moco.py; else the preset
    },
    # google-deepmind/deepmind-research, byol; its views are the preset (utils/augmentations.py).
    "byol": {
        "published": "74.3 % linear, ResNet-50, 1000 epochs (arXiv 2006.07733, abstract); not run here",
        "model.zero_init": True,  # a bottleneck of Haiku's ResNet (BlockV1)
        "train.batch": 4096,  # README
        "train.duration": "1000 epochs",  # configs/byol.py, as everything below
        "optim.name": "lars",
        "optim.lr": 0.2,  # 300 epochs: 0.3, 100: 0.45
        "optim.weight_decay": 1.5e-6,  # 300 and 100 epochs: 1e-6
        "optim.warmup": "10 epochs",
        "method.momentum": 0.996,  # 300 and 100 epochs: 0.99; rises to 1
        "method.hidden": 4096,
        "method.out": 256,
    },
    # facebookresearch/simsiam
    "simsiam": {
        "published": "68.1 % linear, ResNet-50, 100 epochs (README; arXiv 2011.10566, table 1); not run here",
        "model.zero_init": True,  # builder.py
        "train.batch": 512,  # main_simsiam.py, as everything below
        "train.duration": "100 epochs",
        "optim.name": "sgd",
        "optim.lr": 0.05,  # at batch 256
        "optim.weight_decay": 1e-4,
        "optim.decay_all": True,
        "method.hidden": 2048,
        "method.out": 2048,
        "method.bottleneck": 512,
        **_MOCO_V2_VIEWS,
    },
    # facebookresearch/barlowtwins; its views are the preset.
    "barlow_twins": {
        "published": "73.5 % linear, ResNet-50, 1000 epochs (README; 73.2 in arXiv 2103.03230); not run here",
        "model.zero_init": True,  # main.py
        "train.batch": 2048,  # main.py, as everything below
        "train.duration": "1000 epochs",
        "optim.name": "lars",
        "optim.lr": 0.2,  # at batch 256
        "optim.vector_lr": 0.0015,  # 0.0048 / 0.2 / 16: the sum over 16 GPUs has no gradient (lightly, issue 1977)
        "optim.weight_decay": 1e-6,
        "optim.warmup": "10 epochs",
        "method.off_diagonal": 0.0051,
        "method.hidden": 8192,
        "method.out": 8192,
    },
    # facebookresearch/vicreg; its views are the preset.
    "vicreg": {
        "published": "73.2 % linear, ResNet-50, 1000 epochs (README; arXiv 2105.04906); not run here",
        "model.zero_init": True,  # main_vicreg.py
        "train.batch": 2048,  # README
        "train.duration": "1000 epochs",  # README
        "optim.name": "lars",  # main_vicreg.py, as everything below
        "optim.lr": 0.2,  # at batch 256
        "optim.weight_decay": 1e-6,
        "optim.warmup": "10 epochs",
        "method.invariance": 25.0,
        "method.variance": 25.0,
        "method.covariance": 1.0,
        "method.hidden": 8192,
        "method.out": 8192,
    },
    # facebookresearch/VICRegL; its views are the preset (transforms.py), with two crops of 224 px for a ResNet.
    "vicregl": {
        "published": "70.4 % linear, ResNet-50, alpha 0.75 (README; arXiv 2210.01571); not run here",
        "model.zero_init": True,  # main_vicregl.py
        "train.batch": 2048,  # README, as everything below
        "train.duration": "300 epochs",
        "optim.name": "lars",
        "optim.lr": 0.2,  # at batch 256
        "optim.weight_decay": 1e-6,
        "optim.warmup": "10 epochs",  # main_vicregl.py, as everything below
        "method.alpha": 0.75,  # 0.9: 71.2 % (README)
        "method.matches": (20, 4),
        "method.hidden": 8192,
        "method.out": 8192,
        "method.local": 512,
        "augment.crop_scale": (0.08, 1.0),  # README
    },
    # lightly, benchmarks/imagenet/resnet50/tico.py: the authors' code is not public. Its views are the preset.
    "tico": {
        "published": "49.7 % linear, ResNet-50, 100 epochs (lightly's documentation, Benchmarks); not run here",
        "train.batch": 256,  # documentation
        "train.duration": "100 epochs",  # documentation
        "optim.name": "lars",  # tico.py, as everything below
        "optim.lr": 0.2,
        "optim.weight_decay": 1.5e-6,
        "optim.warmup": "10 epochs",
        "method.momentum": 0.99,  # rises to 1
    },
    # facebookresearch/swav. differs: BatchNorm over the whole batch; the script's over 8 GPUs, 512 images, at a time.
    "swav": {
        "published": "75.3 % linear, ResNet-50, 800 epochs (README; arXiv 2006.09882); not run here",
        "train.batch": 4096,  # README; scripts/swav_800ep_pretrain.sh, as everything below
        "train.duration": "800 epochs",
        "optim.name": "lars",
        "optim.lr": 4.8,
        "optim.lr_batch": 4096,
        "optim.weight_decay": 1e-6,
        "optim.decay_all": True,  # LARC over all parameters (main_swav.py)
        "optim.warmup": "10 epochs",  # differs: from 0; theirs from 0.3
        "method.prototypes": 3000,
        "method.temperature": 0.1,
        "method.epsilon": 0.05,
        "method.sinkhorn_iterations": 3,
        "method.freeze_steps": 313,
        "method.queue": 0,
        "method.hidden": 2048,  # main_swav.py
        "method.out": 128,
        **_SIMCLR_VIEWS,
        **_SWAV_CROPS,
    },
    "swav_256": {
        "published": "72.7 % linear, ResNet-50, 200 epochs (README; arXiv 2006.09882); not run here",
        "method": "swav",
        "train.batch": 256,  # README; scripts/swav_200ep_bs256_pretrain.sh, as everything below
        "train.duration": "200 epochs",
        "optim.name": "lars",
        "optim.lr": 0.6,
        "optim.weight_decay": 1e-6,
        "optim.decay_all": True,  # main_swav.py
        "optim.warmup": "0 epochs",
        "method.prototypes": 3000,
        "method.temperature": 0.1,
        "method.epsilon": 0.05,
        "method.sinkhorn_iterations": 3,
        "method.freeze_steps": 5005,
        "method.queue": 3840,
        "method.queue_start": 15 / 200,  # from epoch 15
        "method.hidden": 2048,  # main_swav.py
        "method.out": 128,
        **_SIMCLR_VIEWS,
        **_SWAV_CROPS,
    },
    # facebookresearch/dino. differs: no stochastic depth (0.1), and the gradient is clipped as a whole, not by tensor.
    "dino": {
        "published": "74.0 % linear, 69.3 % kNN, ViT-S/16, 100 epochs (README; arXiv 2104.14294); not run here",
        "model.name": "vit_small",
        "model.patch": 16,  # main_dino.py
        "model.positions": "learned",  # vision_transformer.py
        "eval.knn_k": 20,  # eval_knn.py
        "eval.knn_temperature": 0.07,
        "train.batch": 512,  # README, 8 GPUs with 64 images
        "train.duration": "100 epochs",  # README
        "optim.name": "adamw",  # main_dino.py, as everything below
        "optim.lr": 5e-4,  # at batch 256
        "optim.weight_decay": 0.04,
        "optim.weight_decay_end": 0.4,
        "optim.warmup": "10 epochs",
        "optim.clip_norm": 3.0,
        "method.teacher_temperature": 0.04,
        "method.warmup_temperature": 0.04,
        "method.momentum": 0.996,  # rises to 1
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
        "published": "68.2 % linear, ResNet-50, 100 epochs (lightly's documentation, Benchmarks); not run here",
        "method": "dino",
        "train.batch": 128,  # documentation
        "train.duration": "100 epochs",  # documentation
        "optim.name": "sgd",  # dino.py, as everything below
        "optim.lr": 0.03,  # at batch 256, as in the authors' README
        "optim.weight_decay": 1e-4,
        "optim.weight_decay_end": -1.0,
        "optim.warmup": "10 epochs",
        "optim.clip_norm": 3.0,
        "method.momentum": 0.996,  # rises to 1
        "method.freeze_epochs": 1.0,
        "method.out": 65536,
        "augment.crop_scale": (0.14, 1.0),
        "augment.local_views": 6,  # lightly's dino_transform.py
        "augment.local.size": 96,
        "augment.local.crop_scale": (0.05, 0.14),
        "augment.local.blur": 0.5,
    },
    # zhirongw/lemniscate.pytorch. differs: the negatives are drawn for a batch, not for each image.
    "instance_discrimination": {
        "published": "41.0 % kNN, ResNet-18, 200 epochs (README; arXiv 1805.01978); not run here",
        "model.name": "resnet18",  # README; with a ResNet-50 46.8 %
        "eval.knn_k": 200,  # main.py; on the 128 features of the head, here on the embedding
        "eval.knn_temperature": 0.07,
        "train.batch": 256,  # README
        "train.duration": "200 epochs",  # main.py
        "optim.name": "sgd",  # main.py, as everything below
        "optim.lr": 0.03,
        "optim.schedule": "step",  # x 0.1 at epochs 120 and 160
        "optim.weight_decay": 1e-4,
        "optim.decay_all": True,
        "method.mode": "nce",
        "method.negatives": 4096,
        "method.temperature": 0.07,
        "method.momentum": 0.5,
        "method.out": 128,
        **_MOCO_V1_VIEWS,
    },
    # facebookresearch/vissl, configs/config/pretrain/rotnet/rotnet_8gpu_resnet.yaml. differs: all four turns of each
    # image, not one at random; two drops of the rate, not those at epochs 30, 60, 90 and 100.
    "rotation": {
        "published": "48.2 % linear, ResNet-50, 105 epochs (vissl's MODEL_ZOO.md; arXiv 1803.07728); not run here",
        "train.batch": 256,  # the yaml, 8 GPUs with 32 images, as everything below
        "train.duration": "105 epochs",
        "optim.name": "sgd",
        "optim.lr": 0.1,
        "optim.lr_batch": 256,
        "optim.nesterov": False,
        "optim.schedule": "step",
        "optim.weight_decay": 1e-4,
        "augment.preset": "light",
        "augment.crop_scale": (0.08, 1.0),
    },
    # facebookresearch/vissl, configs/config/pretrain/jigsaw/jigsaw_8gpu_resnet.yaml and permutations/perm100.yaml.
    # differs: one head over nine embeddings, where each first went to 1000 features; tiles normalised one by one; two
    # drops of the rate, not those at epochs 30, 60, 90 and 100.
    "jigsaw": {
        "published": "48.57 % linear, ResNet-50, 100 permutations (vissl's MODEL_ZOO.md); not run here",
        "data.size": 255,
        "train.batch": 256,  # the yaml, 8 GPUs with 32 images, as everything below
        "train.duration": "105 epochs",
        "optim.name": "sgd",
        "optim.lr": 0.1,
        "optim.schedule": "step",
        "optim.weight_decay": 1e-4,
        "optim.warmup": "5 epochs",  # differs: from 0; theirs from 0.025
        "method.permutations": 100,
        "method.tile": 0.75,  # 64 of 85 px: patch_jitter 21
        "method.channel_shift": 0,
        "augment.preset": "light",
        "augment.crop_scale": (1.0, 1.0),
        "augment.gray": 0.66,
    },
    # facebookresearch/mae
    "mae": {
        "published": "68.0 % linear, 83.7 % fine-tuned, ViT-B/16, 1600 epochs (FINETUNE.md); not run here",
        "model.name": "vit_base",
        "model.patch": 16,
        "train.batch": 4096,  # PRETRAIN.md
        "train.duration": "1600 epochs",  # FINETUNE.md
        "optim.name": "adamw",  # main_pretrain.py
        "optim.lr": 1.5e-4,  # at batch 256 (PRETRAIN.md)
        "optim.b2": 0.95,  # main_pretrain.py
        "optim.weight_decay": 0.05,  # PRETRAIN.md
        "optim.warmup": "40 epochs",  # PRETRAIN.md
        "method.mask": 0.75,  # PRETRAIN.md
        "method.normalize": True,  # PRETRAIN.md
        "method.width": 512,  # models_mae.py
        "method.depth": 8,  # models_mae.py
        "method.heads": 16,  # models_mae.py
        "augment.preset": "light",
        "augment.crop_scale": (0.2, 1.0),  # main_pretrain.py
    },
    # microsoft/SimMIM, configs/vit_base__800ep. differs: fixed positions where theirs are a bias of the attention, no
    # layer scale, no stochastic depth (0.1); two drops of the rate, not one at epoch 700.
    "simmim": {
        "published": "83.8 % fine-tuned, ViT-B/16, 800 epochs (README; arXiv 2111.09886); not run here",
        "model.name": "vit_base",
        "model.patch": 16,
        "train.batch": 2048,  # README, 16 GPUs with 128 images
        "train.duration": "800 epochs",  # the yaml, as everything below
        "optim.name": "adamw",
        "optim.lr": 1e-4,
        "optim.lr_batch": 512,  # main_simmim.py
        "optim.schedule": "step",
        "optim.weight_decay": 0.05,
        "optim.warmup": "10 epochs",
        "optim.clip_norm": 5.0,  # config.py
        "method.mask": 0.6,
        "method.block": 2,  # 32 px
        "augment.preset": "light",
        "augment.crop_scale": (0.67, 1.0),  # data_simmim.py
    },
}


def get_config(name="byol"):
    if name not in RECIPES:
        raise unknown("--config=imagenet:RECIPE", name, RECIPES)
    recipe = {"method": name, **COMMON, **RECIPES[name]}
    config = default(recipe.pop("method"))
    del recipe["published"]
    config.update_from_flattened_dict(recipe)
    return config
