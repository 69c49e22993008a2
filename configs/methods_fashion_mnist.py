"""Every method on Fashion-MNIST with one small backbone and one budget: the settings of benchmarks/methods.py.

    ssl-jax pretrain --config=methods_fashion_mnist:byol --workdir=runs/byol         one CPU core, about 3 minutes
    python benchmarks/methods.py                                                    all of them, tuned, three seeds

10,000 images, 3 epochs. Heads are smaller than in the papers, as the backbone is, and moving averages move faster, as
the runs are short. AdamW for all, whose rate does not depend on the scale of a loss; benchmarks/methods.py tunes the
rate, and the temperature where there is one.
"""

from ssl_jax.config import default, method_module

SMALLER = {
    "hidden": 512,
    "out": 128,
    "queue": 4096,
    "prototypes": 256,
    "predictor_hidden": 512,
    "bottleneck": 128,
    "freeze_steps": 50,
    "local": 128,
}
FASTER = {"momentum": 0.99}  # of the target network
WITH_TARGET = ("byol", "dino", "looc", "moco", "moco_v3", "tico")
LOCAL = {"augment.local_views": 2, "augment.local.size": 16}
FOR = {
    # With 64 images and a young encoder almost all of its 262,144 correlations are large: at 0.005, the paper's, the
    # quickest way to remove them is to forget what the views share (a loss of 512, one for each dimension).
    "barlow_twins": {"method.out": 512, "method.off_diagonal": 0.0002},
    "vicreg": {"method.out": 512},
    "vicregl": {"method.out": 512},
    # With the papers' numbers both end at uniform assignments here: sharper ones, that move from the start.
    "dino": {
        "method.out": 1024,
        "method.freeze_epochs": 0.0,
        "method.teacher_temperature": 0.02,
        "method.warmup_temperature": 0.02,
        "optim.clip_norm": 0.3,
        "optim.weight_decay": 0.0,
    },
    "swav": {
        "method.prototypes": 64,
        "method.epsilon": 0.02,
        "method.freeze_steps": 0,
        "method.queue": 0,
        **LOCAL,
    },
    "looc": {"method.factors": ("rotate",), "augment.rotate": 30.0},
    # A row of its bank is as old as an epoch is long, and this run has three of 10,000 images: of 500, sixty.
    "instance_discrimination": {
        "method.mode": "softmax",
        "method.temperature": 0.1,
        "data.limit": 500,
        "train.duration": "60 epochs",
    },
    "moco_v3": {"method.temperature": 0.2},
}
# What served SimCLR best on training images held out (configs/study_fashion_mnist.py).
VIEWS = {"preset": "grayscale", "jitter_prob": 1.0, "brightness": 0.8, "contrast": 0.8}
VIEWS |= {"blur": 0.5, "solarize": 0.5, "rotate": 10.0}


def get_config(method="simclr"):
    config = default(method)
    config.data.update({"name": "fashion_mnist", "limit": 10_000})
    if "augment.preset" not in method_module(method).RECIPE:  # the others have views of their own
        config.augment.update(VIEWS)
    vit = "model.name" in method_module(method).RECIPE
    config.model.update({"name": "vit_tiny", "patch": 4, "depth": 3} if vit else {"name": "resnet_thin"})
    config.method.update({key: value for key, value in SMALLER.items() if key in config.method})
    if method in WITH_TARGET:
        config.method.update(FASTER)
    config.optim.update({"name": "adamw", "lr": 1e-3, "lr_batch": 0, "momentum": 0.9, "vector_lr": 1.0})
    config.optim.update({"schedule": "cosine", "warmup": "50 steps", "weight_decay_end": -1.0})
    config.optim.weight_decay = 0.05 if vit else 0.01
    config.train.update({"batch": 64, "duration": "3 epochs"})
    config.update_from_flattened_dict(FOR.get(method, {}))
    return config
