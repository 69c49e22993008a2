"""A fine-tuned classifier on disk: classifier.safetensors, with torchvision's names, and classifier.json."""

from pathlib import Path
from typing import Any

import numpy as np

from ssl_jax import files
from ssl_jax.encoder import rebuild
from ssl_jax.errors import UserError
from ssl_jax.evaluate.finetuning import Classifier
from ssl_jax.evaluate.linear import Probe

# What `ssl-jax finetune` writes, in this order, before classifier.json. Without that, it is what a killed one left.
PARTS = ("classifier.safetensors", "test.csv", "reliability.png")
STATE = ".unfinished"  # a folder: what a killed `finetune` goes on from
# What classifier.json says of its encoder, with the options of config.data that its images are read with.
OF_ENCODER = ("model", "size", "channels", "mean", "std", "method", "step", "read")
# Options of config.data that a classifier keeps: its images are read as in training.
READ = ("window", "frontal", "background", "bands", "test_side")
AGAIN = "remove the folder and run its `ssl-jax finetune` command again"


def begin_classifier(folder: Path, flag: str) -> None:
    """Removes what a killed `finetune` left in a folder, but for STATE. UserError if there is anything else in it."""
    found = [path for path in folder.iterdir() if path.name != STATE] if folder.is_dir() else []
    parts = PARTS if (folder / PARTS[0]).exists() else ()  # a test.csv alone may be anybody's
    left = [path for path in found if path.name in parts or files.is_leftover(path)]
    if len(left) < len(found) or (folder.exists() and not folder.is_dir()):
        raise UserError(f"{flag}={folder}: exists already; allowed: a new folder")
    for path in left:
        path.unlink()


def save_weights(folder: Path, classifier: Classifier) -> None:
    """Writes classifier.safetensors. Raises UserError if a weight is not finite.

    The regression on raw pixels is head.pixels; whoever reads an encoder leaves out what is called fc or head.
    """
    from ssl_jax.models import to_torch

    weights = to_torch(classifier.params["encoder"], classifier.stats)
    # torchvision's names for the classification layer.
    weights["fc.weight"] = np.asarray(classifier.params["head"]["w"]).T
    weights["fc.bias"] = np.asarray(classifier.params["head"]["b"])
    if classifier.pixels:
        weights["head.pixels.weight"], weights["head.pixels.bias"] = classifier.pixels.weights.T, classifier.pixels.bias
    files.write_weights(folder / "classifier.safetensors", weights)


def save_about(folder: Path, about: dict[str, Any]) -> None:
    """Writes classifier.json. It comes last: with it the classifier is complete."""
    files.write_json(folder / "classifier.json", about)


def load_classifier(path: str | Path) -> Classifier:
    """The classifier in a folder that `ssl-jax finetune` wrote, to `embed` and `predict` with.

    Raises UserError if there is none or it is damaged.
    """
    folder = Path(path)
    if not (folder / "classifier.json").is_file():
        unfinished = (folder / "classifier.safetensors").exists()
        made = "a folder made by `ssl-jax finetune`"
        hint = "its `ssl-jax finetune` command has not ended; run it again" if unfinished else f"allowed: {made}"
        raise UserError(f"{folder}: no classifier.json; {hint}")
    about = files.read_json(folder / "classifier.json", AGAIN)
    weights = files.read_weights(folder / "classifier.safetensors", AGAIN)
    encoder = rebuild({key: about[key] for key in OF_ENCODER if key in about}, weights)
    params = {"encoder": encoder.params, "head": {"w": weights["fc.weight"].T, "b": weights["fc.bias"]}}
    multilabel = about.get("multilabel", False)
    loaded = Classifier(encoder, params, encoder.stats, about["chosen"], multilabel=multilabel, about=about)
    if "head.pixels.weight" not in weights:
        return loaded
    beside = Probe(weights["head.pixels.weight"].T, weights["head.pixels.bias"], strength=np.nan, validation=np.nan)
    return loaded._replace(pixels=beside)
