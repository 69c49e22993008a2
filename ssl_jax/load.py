"""What `ssl_jax.load_encoder` does: an encoder from a run, any of its checkpoints, an export or a classifier."""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from ssl_jax import checkpoint, encoder
from ssl_jax.classifier import load_classifier
from ssl_jax.config import Config, from_json, resolve
from ssl_jax.data import Source, open_source
from ssl_jax.encoder import Encoder
from ssl_jax.errors import DamagedError, UserError
from ssl_jax.files import read_json
from ssl_jax.models import resolve_conv
from ssl_jax.run_folder import RunFolder
from ssl_jax.settings import settings_of
from ssl_jax.train import init_state, set_up
from ssl_jax.train.memory import decided_model, with_decisions
from ssl_jax.train.step import encoder_of


def load_encoder(path: str | Path, step: int | Literal["latest"] | None = None) -> Encoder:
    """The encoder in a folder that `ssl-jax pretrain` or `ssl-jax finetune` wrote.

    step: of the checkpoint to take, also of a run that has not ended; "latest": the newest one; None: the exported
        encoder of a run that has ended.

    Raises UserError if there is none, naming the steps that exist, if it is damaged, or if it does not fit its config.
    """
    run = RunFolder(path)
    if step is None:
        is_classifier = (run.path / "classifier.json").is_file()
        return load_classifier(path).fitted_encoder if is_classifier else encoder.load_encoder(path)
    exported = read_json(run.encoder / "encoder.json", run.again).get("step")
    steps = sorted({*checkpoint.steps(run.checkpoints), *([] if exported is None else [exported])})
    number = steps[-1] if steps and step == "latest" else step
    if number not in steps:
        allowed = f"allowed: latest, {', '.join(map(str, steps))}" if steps else "it has no checkpoints"
        raise UserError(f"step={step}: not in {path}; {allowed}")
    return encoder.load_encoder(path) if number == exported else _from_checkpoint(run, int(number))


def load_with_settings(workdir: str, step: int | str, overrides: Sequence[str]) -> tuple[Encoder, Config]:
    """The encoder of a run or a classifier, and the settings that its images are read with, with overrides.

    step: of a checkpoint, or "latest"; "": the finished encoder.
    """
    if step not in ("", "latest") and not str(step).isdecimal():
        raise UserError(f"--step={step}: allowed: the step of a checkpoint, or latest")
    number: Any = step if step == "latest" else int(step) if step != "" else None
    encoder = load_encoder(workdir, number)
    return encoder, settings_of(Path(workdir), overrides, encoder.about.get("read"))


def _from_checkpoint(run: RunFolder, step: int) -> Encoder:
    config, recorded = resolve(from_json(run.read_config())), dict[str, Any]()
    with contextlib.suppress(DamagedError):  # then it is as if nothing had been recorded
        recorded = read_json(run.environment)
    source = _stand_in(**recorded["data"]) if "data" in recorded else open_source(config.data)
    config = with_decisions(config, _decided(config, source.shape, recorded))
    # Where the weights came from does not matter any more, and need not be there.
    setup = set_up(dataclasses.replace(config, model=dataclasses.replace(config.model, init="")), source)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), jax.eval_shape(lambda: init_state(setup, 0))
    )
    return encoder_of(setup, config, checkpoint.restore(run.checkpoints, step, like))


def _decided(config: Config, shape: tuple[int, ...], recorded: Mapping[str, Any]) -> dict[str, Any]:
    """What a run decides at its start (`train.memory.decisions`), as far as its encoder depends on it."""
    decided = {"conv": resolve_conv(config.model.conv), "micro_batch": config.train.part, **recorded}
    if "model" not in decided:  # only then, as the weights that it started from may be gone
        decided["model"] = decided_model(config.model, min(shape[:2]), shape[2])
    return decided


def _stand_in(images: int, shape: list[int], classes: int) -> Source:
    """In place of the training data, which may be gone: as many images, of which none can be read."""

    def load(index: int) -> np.ndarray:
        raise UserError(f"image {index} of the training data: not opened")

    labels = np.zeros(images, np.int32) if classes else None
    height, width, channels = shape
    return Source([""] * images, (height, width, channels), load, labels=labels, classes=[""] * classes)
