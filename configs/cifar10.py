"""CIFAR-10: the recipes behind published numbers, ResNet-18 for small images. None of them was run here.

    ssl-jax pretrain --config=cifar10:simclr --workdir=runs/simclr
    ssl-jax reproduce cifar10:simclr --workdir=runs/simclr

The recipes are the keys of RECIPES; "published" is what a source reports for one. TFDS must have prepared cifar10. Each
took one GPU: 5 to 8 hours on an RTX A6000 (byol, barlow_twins, swav), half a day (simsiam), a V100 (moco).

"kNN" is measured on the test images with 200 neighbours, lightly's of the best epoch. "differs" says where a recipe
cannot follow its source. solo-learn's recipes are not here: its LARS caps the trust ratio at the learning rate.
"""

from ssl_jax.config import default
from ssl_jax.errors import unknown


def _accuracy(protocol, value, source):
    """A published accuracy in %, and how it was measured: a protocol of `ssl-jax evaluate`."""
    return {"protocol": protocol, "metric": "top1", "value": value, "source": source}


COMMON = {
    "data.name": "tfds",
    "data.path": "cifar10",
    "data.size": 32,
    "model.name": "resnet18",
    "model.stem": "small",
    "eval.knn_k": 200,  # lightly's benchmark, and MoCo's notebook
    "eval.knn_temperature": 0.1,
    "augment.preset": "small",  # with crops from 0.2, those of sup_con and simsiam
}
_MEAN_STD = {"model.mean": (0.4914, 0.4822, 0.4465), "model.std": (0.2023, 0.1994, 0.2010)}
# lightly's documentation, benchmarks/cifar10_benchmark.py; views: lightly/data/collate.py
_LIGHTLY = {
    "train.batch": 512,
    "train.duration": "800 epochs",
    "optim.name": "sgd",
    "optim.lr": 0.06,
    "optim.lr_batch": 128,
    "optim.vector_lr": 1.0,
    "optim.weight_decay": 5e-4,
    "optim.decay_all": True,
    "optim.warmup": "0 epochs",
    "augment.crop_scale": (0.08, 1.0),
}

RECIPES = {
    # google-research/simclr. differs: no BatchNorm after the projector's last layer (model_util.py has one).
    "simclr": {
        "published": [_accuracy("linear", 91.0, "README (around)")],
        "train.batch": 512,  # README
        "train.duration": "1000 epochs",  # README
        "optim.name": "lars",  # run.py
        "optim.lr": 1.0,  # at batch 256 (README)
        "optim.vector_lr": 2.0,  # their loss is twice ours, which under LARS biases and norm scales alone would feel
        "optim.weight_decay": 1e-6,  # first README; a later one, with SimCLRv2, says 1e-4
        "optim.warmup": "10 epochs",  # run.py
        "method.temperature": 0.5,  # README
        "method.hidden": 512,  # the width of the embedding (model_util.py)
        "method.out": 128,  # run.py
        "augment.crop_scale": (0.08, 1.0),  # data_util.py; colours of README are the preset's
    },
    # facebookresearch/moco, branch colab-notebook, colab/moco_cifar10_demo.ipynb, as everything below; asymmetric loss
    "moco": {
        "published": [_accuracy("knn", 88.7, "the notebook")],
        "train.batch": 512,
        "train.duration": "800 epochs",  # 200: 82.6 %, 400: 86.3 %
        "optim.name": "sgd",
        "optim.lr": 0.03,  # at batch 256
        "optim.weight_decay": 5e-4,
        "optim.decay_all": True,
        "method.head": "linear",
        "method.queue": 4096,
        "method.momentum": 0.99,
        "method.temperature": 0.1,
        "method.out": 128,
        "method.bn_groups": 8,
        "augment.crop_scale": (0.08, 1.0),
        **_MEAN_STD,
    },
    # PatrickHua/SimSiam, which follows appendix D of arXiv 2011.10566. differs: a projector of 3 layers, theirs has 2.
    "simsiam": {
        "published": [_accuracy("linear", 90.83, "PatrickHua/SimSiam, README")],
        "train.batch": 512,  # configs/simsiam_cifar.yaml, as everything below
        "train.duration": "800 epochs",
        "optim.name": "sgd",
        "optim.lr": 0.03,  # at batch 256
        "optim.weight_decay": 5e-4,
        "optim.decay_all": True,
        "optim.warmup": "10 epochs",
        "method.hidden": 2048,  # appendix D, as everything below
        "method.out": 2048,
        "method.bottleneck": 512,
    },
    # lightly. differs: the target's momentum rises to 1, theirs stays.
    "byol": {
        "published": [_accuracy("knn", 91.0, "lightly's documentation, Benchmarks")],
        **_LIGHTLY,
        "optim.lr": 0.06 / 4,  # our loss is four times theirs: with this and the next line the step is the same
        "optim.weight_decay": 4 * 5e-4,
        "method.momentum": 0.99,  # cifar10_benchmark.py
        "method.hidden": 1024,  # cifar10_benchmark.py
        "method.out": 256,  # cifar10_benchmark.py
    },
    # lightly. differs: a projector of 3 layers, theirs has 2.
    "barlow_twins": {
        "published": [_accuracy("knn", 85.9, "lightly's documentation, Benchmarks")],
        **_LIGHTLY,
        "method.off_diagonal": 5e-3,  # lightly/loss/barlow_twins_loss.py
        "method.hidden": 2048,  # cifar10_benchmark.py
        "method.out": 2048,  # cifar10_benchmark.py
    },
    # lightly. differs: Adam's weight decay is decoupled.
    "swav": {
        "published": [_accuracy("knn", 88.4, "lightly's documentation, Benchmarks")],
        **_LIGHTLY,
        "optim.name": "adamw",  # cifar10_benchmark.py, as everything below
        "optim.lr": 1e-3,
        "optim.weight_decay": 1e-6,
        "method.prototypes": 512,
        "method.temperature": 0.1,  # lightly/loss/swav_loss.py, with the next two
        "method.epsilon": 0.05,
        "method.sinkhorn_iterations": 3,
        "method.freeze_steps": 0,
        "method.queue": 0,
        "method.hidden": 512,
        "method.out": 128,
        "augment.crop_scale": (0.14, 1.0),
        "augment.brightness": 0.8,  # collate.py, SwaVCollateFunction, with the next three
        "augment.contrast": 0.8,
        "augment.saturation": 0.8,
        "augment.hue": 0.2,
    },
    # HobbitLong/SupContrast; its views are the preset (main_supcon.py).
    "sup_con": {
        "published": [_accuracy("linear", 96.0, "README; arXiv 2004.11362")],
        "model.name": "resnet50",  # main_supcon.py
        "train.batch": 1024,  # README
        "train.duration": "1000 epochs",  # main_supcon.py
        "optim.name": "sgd",  # util.py
        "optim.lr": 0.5 / 0.7,  # 0.5 (README); our loss is 0.7 of theirs: with the decay below the step is the same
        "optim.lr_batch": 1024,
        "optim.weight_decay": 0.7 * 1e-4,  # 1e-4 (main_supcon.py)
        "optim.decay_all": True,  # util.py
        "optim.warmup": "10 epochs",  # main_supcon.py; differs: from 0, theirs from 0.01
        "method.temperature": 0.1,  # README
        "method.hidden": 2048,  # networks/resnet_big.py
        "method.out": 128,  # networks/resnet_big.py
        **_MEAN_STD,
    },
}


def get_published(name="simclr"):
    """What `ssl-jax reproduce` compares with."""
    get_config(name)
    return RECIPES[name]["published"]


def get_config(name="simclr"):
    if name not in RECIPES:
        raise unknown("--config=cifar10:RECIPE", name, RECIPES)
    recipe = {"method": name, **COMMON, **RECIPES[name]}
    config = default(recipe.pop("method"))
    del recipe["published"]
    config.update_from_flattened_dict(recipe)
    return config
