"""`ssl-jax weights FILE`: what a file of weights is, what of it would be used, and the options that use it."""

from typing import Any

import jax
import numpy as np

from ssl_jax.config import Model
from ssl_jax.encoder import build
from ssl_jax.errors import UserError
from ssl_jax.models import published, resolve_model, to_torch, vit

SHOWN = 6  # names of a list that are printed


def weights(file: str, size: int = 0, channels: int = 3) -> dict[str, Any]:
    """Prints what the file is and how to use it, for images of `size` px with `channels` channels.

    size: 0: that of the file, or the nearest to 224 px that its patches divide. Returns what is printed, as a dict.
    Raises UserError, one line, if there is no such file or it holds nothing known here.
    """
    found_file = published.locate(file, "FILE")
    trained = 0
    if found_file.own and found_file.config:
        trained = found_file.config.get("size", 0)
        options = found_file.config.get("model", {})
        heads = options.get("heads") or vit.ARCHITECTURES.get(options.get("name"), (0, 0, 0))[1]
        found_file = found_file._replace(config={"num_attention_heads": heads})  # what is in no shape
    found = published.recognise(found_file)
    patch = found.model.get("patch", 0)
    usual, trained = max(1, round(224 / patch)) * patch if patch else 224, trained or found.size
    size = size or (min(trained, usual) if trained else usual)
    model = resolve_model(Model(init=file), size, channels=channels)
    network = build(model, channels, size)
    shapes = jax.eval_shape(network.init, jax.random.key(0), np.zeros((1, size, size, channels), np.float32))
    expected = to_torch(*jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), shapes))
    missing = sorted(set(expected) - set(found.names))
    unknown = sorted(source for name in set(found.names) - set(expected) for source in found.names[name])
    parameters = sum(leaf.size for leaf in jax.tree.leaves(shapes[0]))
    result: dict[str, Any] = {"file": found.file.name, "about": found.about, "model": _options(model)}
    result |= {"parameters": parameters, "trained_size": found.size, "channels": found.channels}
    result |= {"ignored": found.ignored, "unknown": unknown, "missing": missing}
    _print(file, found, model, result, size, channels)
    if missing or unknown:
        first = f"{missing[0]} is missing" if missing else f"{unknown[0]} belongs to no layer"
        raise UserError(f"{found.file.name}: {first}; the weights are of another architecture than {model.name} here")
    return result


def _options(model: Model) -> dict[str, Any]:
    """The options that are not at their defaults."""
    usual = Model()
    return {k: v for k, v in vars(model).items() if v != getattr(usual, k) and k not in ("init", "conv")}


def _print(
    file: str, found: published.Published, model: Model, result: dict[str, Any], size: int, channels: int
) -> None:
    options = " ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in result["model"].items()
    )
    print(f"{found.file.name}: {found.about}")
    print(f"  network     {options}")
    print(f"  parameters  {result['parameters']:,}")
    if found.size:
        print(f"  trained at  {found.size} px; other sizes work if {model.patch} px divide them")
    for key, words in (("ignored", "not needed"), ("missing", ""), ("unknown", "of no layer here")):
        names = result[key]
        more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        listed = f"{len(names)} {words}".rstrip() + ": " + ", ".join(names[:SHOWN]) + more
        print(f"  {key:11} {listed if names else 'nothing'}")
    if found.channels != channels:
        print(f"  channels    {found.channels} in the file, {channels} in your images: the first layer is adapted")
    if not found.normalised and not found.file.own:
        print(
            "  normalised  with ImageNet's mean and deviation; no file beside it names others (config.model.mean, std)"
        )
    print(
        f"  use it      ssl-jax pretrain METHOD DIR --config.model.init={file} --config.data.size={size} --workdir=RUN"
    )
