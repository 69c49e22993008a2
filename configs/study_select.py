"""Which images to label, and what to do with all others: the same encoder, with few labels.

ssl-jax pretrain --config=study_fashion_mnist --workdir=runs/fashion
ssl-jax study --config=study_select:runs/fashion --workdir=runs/select             fine-tuned
ssl-jax study --config=study_select:runs/fashion,linear_quick --workdir=runs/linear   frozen embeddings: minutes

On a run of your own, whose images have labels: --config=study_select:RUN --data=DIR; if its classes are not about
equally frequent, study_select:RUN,unequal. Measured with the encoder of study_fashion_mnist:demo, linear_quick, 20,000
images: benchmarks/few_labels.md.
"""

from ssl_jax.config import default

DRAWS = ("random", "stratified", "typical", "coverage", "kcenter")


def get_config(what="runs/fashion"):
    run, *words = what.split(",")
    config = default("simclr")
    config.data.name = "fashion_mnist"
    # The classes of Fashion-MNIST are equally frequent, and known to be.
    align = False if "unequal" in words else "equal"
    self_trained = {"finetune": {"unlabelled": "all", "teacher": "propagated", "align": align}}
    arms = {"random": {"select": "random"}, "typical": {"select": "typical"}}
    arms |= {"self-trained": {**arms["random"], **self_trained}, "both": {**arms["typical"], **self_trained}}
    if linear := [word for word in words if word.startswith("linear")]:
        config.study.protocol = linear[0]
        arms |= {draw: {"select": draw} for draw in DRAWS if draw not in arms}
    config.study.arms = {arm: {"from": run, **changes} for arm, changes in arms.items()}
    config.study.baseline = "random"
    config.study.labels = (20, 50, 250)
    # As in study_fashion_mnist.
    config.finetune.update({"batch": 64, "steps": 300, "epochs": 75, "lr": (1e-3,), "backbone_ratio": (1.0,)})
    return config
