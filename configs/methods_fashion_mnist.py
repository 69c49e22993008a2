"""Every method on Fashion-MNIST with one small backbone: the settings of benchmarks/methods.py.

    ssl-jax pretrain --config=methods_fashion_mnist:byol --workdir=runs/byol         2 CPU cores, minutes
    python benchmarks/methods.py                                                    all of them, tuned, three seeds

Heads are smaller than in the papers, as the backbone is. SGD for the ResNet and AdamW for the ViT that some methods
need; benchmarks/methods.py tunes the learning rate, and the temperature where there is one, with five trials each.
"""

from ssl_jax.config import default

SMALLER = {
    "hidden": 512,
    "out": 128,
    "queue": 4096,
    "prototypes": 256,
    "negatives": 2048,
    "predictor_hidden": 512,
    "freeze_steps": 50,
    "local": 128,
}
FOR = {
    "barlow_twins": {"method.out": 512},
    "vicreg": {"method.out": 512},
    "vicregl": {"method.out": 512},
    "dino": {"method.out": 1024, "augment.local_views": 2, "augment.local.size": 16},
    "swav": {"augment.local_views": 2, "augment.local.size": 16},
    "looc": {"method.factors": ("rotate",), "augment.rotate": 30.0},
    "instance_discrimination": {"method.mode": "nce"},
}


def get_config(method="simclr"):
    config = default(method)
    config.data.name = "fashion_mnist"
    if "augment.preset" not in _recipe(method):
        config.augment.preset = "grayscale"
    vit = config.model.name.startswith("vit")
    config.model.update({"name": "vit_tiny", "patch": 4} if vit else {"name": "resnet_thin"})
    config.method.update({key: value for key, value in SMALLER.items() if key in config.method})
    if vit:
        config.optim.update({"lr": 1e-3, "lr_batch": 256})
    else:
        config.optim.update({"name": "sgd", "lr": 0.1, "lr_batch": 256, "nesterov": True, "weight_decay": 1e-4})
    config.optim.warmup = "50 steps"
    config.train.update({"batch": 128, "duration": "2 epochs"})
    config.update_from_flattened_dict(FOR.get(method, {}))
    return config


def _recipe(method):
    from ssl_jax.config import method_module

    return method_module(method).RECIPE
