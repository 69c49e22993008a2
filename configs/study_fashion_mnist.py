"""Fashion-MNIST: one encoder pretrained on 60,000 images without labels, against training from scratch on few labels.

ssl-jax study --config=study_fashion_mnist --workdir=runs/study         2 CPU cores, about NN minutes
ssl-jax study --config=study_fashion_mnist:demo --workdir=runs/demo     `make demo`: the same, shortened
"""

from ml_collections import ConfigDict

from ssl_jax.config import default


def get_config(size="full"):
    demo = size == "demo"
    config = default("simclr")
    config.data.name = "fashion_mnist"
    config.augment.preset = "grayscale"
    config.model.update({"name": "resnet_thin"})
    config.method.update({"temperature": 0.2, "hidden": 256, "out": 64})
    config.optim.update({"name": "sgd", "lr": 0.3, "nesterov": True, "weight_decay": 1e-4, "warmup": "100 steps"})
    config.train.update({"batch": 256, "duration": "2 epochs" if demo else "12 epochs"})

    # Every arm chooses its learning rate by the same rule, on a validation split of the labels it is given.
    config.finetune.update({"steps": 200 if demo else 400, "batch": 32, "lr": (1e-3,) if demo else (5e-4, 2e-3)})
    config.study.arms = ConfigDict({"scratch": {}, "simclr": {"method": {"name": "simclr"}}})
    config.study.labels = (50, 100, 250, 1000)
    config.study.seeds = 1 if demo else 5
    return config
