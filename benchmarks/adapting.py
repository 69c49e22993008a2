"""A study at few labels: a ViT of one folder of pictures, continued on another, beside both of its starting points.

    ssl-jax study --config=benchmarks/adapting.py:finetune DIR/icons --workdir=runs/study

The commands before it, and what came out: benchmarks/adapting.md.
"""

from ssl_jax.config import default


def get_config(protocol="finetune"):
    config = default("simclr")
    config.data.size = 32
    config.model.update({"name": "vit_tiny", "width": 0.5, "depth": 6, "patch": 4})
    config.finetune.update({"batch": 32, "steps": 150, "epochs": 0, "lr": (5e-4,), "backbone_ratio": (1.0,)})
    config.study.arms = {
        "scratch": {},
        "clip art": {"from": "runs/clipart_timm"},
        "icons": {"from": "runs/icons"},
        "clip art, then icons": {"from": "runs/continued"},
    }
    config.study.update({"labels": (50, 200), "seeds": 5, "protocol": protocol, "baseline": "clip art"})
    return config
