"""Which images to label: the same encoder on labels drawn at random, stratified, and chosen by its embedding.

ssl-jax pretrain --config=study_fashion_mnist:demo --workdir=runs/fashion
ssl-jax study --config=study_select:runs/fashion --workdir=runs/select

On a run of your own, whose images have labels: --config=study_select:RUN --data=DIR. Frozen embeddings, logistic
regression: it takes minutes.
"""

from ssl_jax.config import default


def get_config(run="runs/fashion"):
    config = default("simclr")
    config.data.name = "fashion_mnist"
    draws = ("random", "stratified", "typical", "coverage", "kcenter")
    config.study.arms = {draw: {"from": run, "select": draw} for draw in draws}
    config.study.baseline = "random"
    config.study.protocol = "linear"
    config.study.labels = (20, 50, 100, 250)
    return config
