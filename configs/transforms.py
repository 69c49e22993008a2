"""Which label is lost under which transforms? One run of benchmarks/transforms.py: small backbone, short training.

    ssl-jax pretrain --config=transforms:moco --workdir=runs/moco               generated colour images, four attributes
    ssl-jax pretrain --config=transforms:moco --config.data.name=chexpert --config.data.path=DIR --workdir=runs/moco
    python benchmarks/transforms.py                                              all presets, several seeds

Budget and sizes are ours: about two minutes a run on 2 CPU cores. Heads and queue are smaller than in the papers, as
the backbone is; the learning rates are those of configs/methods_fashion_mnist.py.
"""

from ssl_jax.config import default

SMALLER = {"hidden": 512, "predictor_hidden": 512, "out": 128, "queue": 4096}


def get_config(method="moco"):
    config = default(method)
    config.data.name = "factors"
    config.data.path = "n=10000,test=2000"
    config.model.name = "resnet_thin"
    config.method.update({key: value for key, value in SMALLER.items() if key in config.method})
    config.augment.preset = "natural"
    config.augment.rotate = None  # LooC's recipe turns; here the preset decides
    config.optim.update({"name": "sgd", "lr": 0.1, "lr_batch": 256, "nesterov": True, "weight_decay": 1e-4})
    config.optim.warmup = "50 steps"
    config.train.update({"batch": 128, "duration": "40000 examples"})
    config.eval.update({"every": "0 steps", "online_probe": False})
    return config
