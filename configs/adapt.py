"""Go on from given weights with your own images, carefully: any method, with a tenth of its learning rate.

    ssl-jax pretrain --config=adapt:mae DIR --config.model.init=FILE --workdir=runs/a

The first layers learn least, because they know most of what all images have in common; adapters alone (LoRA) change
even less: --config.model.lora=8. The report says if the encoder classifies worse than before the first step. The
numbers are ours, a place to start from: docs/weights.md.
"""

from ssl_jax.config import default


def get_config(method="simclr"):
    config = default(method)
    config.optim.lr *= 0.1
    config.optim.layer_decay = 0.8
    config.optim.warmup = "0.5 epochs"
    config.train.duration = "20 epochs"
    return config
