"""A fine-tuned classifier on disk: classifier.safetensors, with torchvision's names, and classifier.json."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from ssl_jax import files
from ssl_jax.encoder import rebuild
from ssl_jax.errors import UserError
from ssl_jax.evaluate.finetuning import Classifier


def save_classifier(folder: Path, classifier: Classifier, about: dict[str, Any]) -> None:
    import safetensors.numpy

    from ssl_jax.models import to_torch

    weights = to_torch(classifier.params["encoder"], classifier.stats)
    # torchvision's names for the classification layer.
    weights["fc.weight"] = np.asarray(classifier.params["head"]["w"]).T
    weights["fc.bias"] = np.asarray(classifier.params["head"]["b"])
    content = safetensors.numpy.save({k: np.ascontiguousarray(v) for k, v in weights.items()})
    files.write_bytes(folder / "classifier.safetensors", content)
    files.write_json(folder / "classifier.json", about)


def load_classifier(folder: Path) -> tuple[Classifier, dict[str, Any]]:
    """(classifier, the content of classifier.json)."""
    import safetensors.numpy

    path = folder / "classifier.json"
    if not path.is_file():
        raise UserError(f"--workdir={folder}: no classifier.json; allowed: a folder made by `ssl-jax finetune`")
    about = json.loads(path.read_text())
    encoder = rebuild(about, folder / "classifier.safetensors")
    weights = safetensors.numpy.load_file(folder / "classifier.safetensors")
    head = {"w": weights["fc.weight"].T, "b": weights["fc.bias"]}
    params = {"encoder": encoder.params, "head": head}
    return Classifier(encoder, params, encoder.stats, about["chosen"]), about


def probabilities(scores: np.ndarray, multilabel: bool) -> np.ndarray:
    """float64 [N, K] from logits [N, K]: a softmax over classes or, if multilabel, a sigmoid per class."""
    from scipy.special import expit, softmax

    scores = np.asarray(scores, np.float64)
    return expit(scores) if multilabel else softmax(scores, axis=1)
