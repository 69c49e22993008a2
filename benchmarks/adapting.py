"""A study at few labels: a ViT of one data set, continued on another, beside both of its starting points.

    ssl-jax study --config=benchmarks/adapting.py:linear_quick DIR/letters --workdir=runs/study

The commands before it, and what came out: benchmarks/adapting.md.
"""

from ssl_jax.config import default


def get_config(protocol="finetune"):
    config = default("simclr")
    config.data.update({"size": 28, "channels": 1})
    config.model.update({"name": "vit_tiny", "width": 0.5, "depth": 6, "patch": 4})
    config.finetune.update({"batch": 32, "steps": 150, "epochs": 0, "lr": (5e-4,), "backbone_ratio": (1.0,)})
    config.finetune.augment.update({"preset": "light", "flip": 0.0})
    config.study.arms = {
        "scratch": {},
        "Fashion-MNIST": {"from": "runs/fashion_timm"},
        "letters": {"from": "runs/letters"},
        "Fashion-MNIST, then letters": {"from": "runs/continued"},
    }
    config.study.update({"labels": (50, 200), "seeds": 5, "protocol": protocol, "baseline": "letters"})
    return config
