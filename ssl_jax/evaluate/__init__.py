"""How good an encoder is: kNN, a linear probe, fine-tuning on few labels, and signs of collapse."""

from ssl_jax.collapse import embedding_std, rank_me
from ssl_jax.evaluate.finetuning import Classifier, finetune
from ssl_jax.evaluate.knn import knn_predict
from ssl_jax.evaluate.linear import linear_probe
from ssl_jax.evaluate.multilabel import reliability, threshold_at_sensitivity
from ssl_jax.evaluate.propagation import Neighbourhood, propagate
from ssl_jax.evaluate.references import References, over_pixels, pixels
from ssl_jax.evaluate.scores import interval, metrics, paired
from ssl_jax.evaluate.selftraining import self_train
from ssl_jax.evaluate.subsets import holdout, nested_subset, without_positive
from ssl_jax.evaluate.uncertainty import bootstrap_by_group, delong

__all__ = [
    "Classifier",
    "Neighbourhood",
    "References",
    "bootstrap_by_group",
    "delong",
    "embedding_std",
    "finetune",
    "holdout",
    "interval",
    "knn_predict",
    "linear_probe",
    "metrics",
    "nested_subset",
    "over_pixels",
    "paired",
    "pixels",
    "propagate",
    "rank_me",
    "reliability",
    "self_train",
    "threshold_at_sensitivity",
    "without_positive",
]
