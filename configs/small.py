"""SimCLR for a few thousand small pictures on a CPU, and a classifier beside which raw pixels vote.

    ssl-jax pretrain --config=small DIR --size=32 --epochs=100 --workdir=runs/a

What it gives on emoji and icons, and how long it takes: benchmarks/colour.md.
"""

from ssl_jax.config import default


def get_config():
    config = default("simclr")
    config.train.batch = 128  # twice the steps of 256 in the same time
    # As in study_fashion_mnist, where they were chosen on training images held out; not tuned again here.
    config.method.update({"temperature": 0.3, "hidden": 256, "out": 64})
    config.optim.update({"name": "sgd", "lr": 0.3, "nesterov": True, "weight_decay": 1e-4, "warmup": "50 steps"})
    # A short training without a choice: a fifth of 50 labels is too few to choose by.
    config.finetune.update({"pixels": True, "batch": 32, "steps": 300, "lr": (1e-3,)})
    return config
