"""A small student, taught by a larger encoder or pretrained alone, at few labels of Fashion-MNIST.

    ssl-jax pretrain --config=study_fashion_mnist --workdir=runs/teacher
    ssl-jax pretrain --config=benchmarks/distilling.py:alone   --workdir=runs/alone
    ssl-jax pretrain --config=benchmarks/distilling.py:taught  --workdir=runs/taught
    ssl-jax study    --config=benchmarks/distilling.py:finetune --workdir=runs/study

What came out, and what equal compute means here: benchmarks/adapting.md.
"""

import runpy
from pathlib import Path

from ssl_jax.config import default

STUDY = runpy.run_path(str(Path(__file__).parent.parent / "configs" / "study_fashion_mnist.py"))["get_config"]


def get_config(part="finetune"):
    config = STUDY()
    if part == "taught":
        taught = default("distill")
        for section in ("data", "augment", "model", "train"):
            taught[section].update(config[section].to_dict())
        taught.method.update({"teacher": "runs/teacher", "hidden": 512})
        # Of four settings, by kNN on training images after one epoch: 0.76 with the teacher's views and 1e-3, 0.83 so.
        taught.augment.update({"blur": 0.0, "solarize": 0.0, "brightness": 0.2, "contrast": 0.2, "rotate": 0.0})
        taught.augment.crop_scale = (0.5, 1.0)
        taught.optim.lr = 4e-3
        taught.train.duration = "3 epochs"
        config = taught
    elif part == "alone":
        config.train.duration = "3.5 epochs"
    else:
        config.study.protocol = part
        config.study.arms = {
            "scratch": {"finetune": {"steps": 600, "lr": (3e-3,)}},
            "pretrained alone": {"from": "runs/alone"},
            "taught": {"from": "runs/taught"},
        }
        config.study.update({"baseline": "pretrained alone", "labels": (50, 250), "seeds": 5})
    config.model.width = 0.5
    return config
