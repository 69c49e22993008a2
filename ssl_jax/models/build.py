"""From `config.model` to an encoder."""

import dataclasses

import jax
import jax.numpy as jnp

from ssl_jax import fields, registry
from ssl_jax.config import Model
from ssl_jax.errors import UserError
from ssl_jax.models import convnext, published, resnet, vit
from ssl_jax.network import Network

IMAGENET_MEAN, IMAGENET_STD = published.MEAN, published.STD
ARCHITECTURES = (*resnet.ARCHITECTURES, *vit.ARCHITECTURES, *convnext.ARCHITECTURES)


def build_encoder(model: Model, channels: int, size: int = 224) -> Network:
    """The encoder that `config.model` describes, for images with `channels` channels and sides of `size` px.

    It is built by the module that `config.model.name` names (see `ssl_jax.registry`). Raises UserError for an unknown
    name or a value that is not allowed.
    """
    fields.check(model, "config.model")
    model = resolve_model(model, size, channels=channels)
    return registry.find("model", model.name).build(model, channels, size)


THIN_UP_TO = 32  # px: a ResNet-18 of small images is too slow to try things on a CPU (benchmarks/README.md)


def resolve_model(model: Model, size: int, backend: str | None = None, channels: int = 3) -> Model:
    """The model with what is left open: what follows from the weights of model.init, and a name if it has none: a small
    network for small images on a CPU, else a ResNet-18.

    On a CPU, this ResNet-18 has the stem of large images from 33 px on: with the small one, images of 64 px take longer
    than images of 224 px with the other.

    size, channels: of the images. backend: the platform that it is for, such as "tpu"; None for this machine's.
    Raises UserError for weights that are not known, and for options that contradict them.
    """
    if model.init and (not model.name or model.name in ARCHITECTURES):
        model = published.follow(model, channels, size)
    if model.name:
        return model
    on_cpu = (backend or jax.default_backend()) == "cpu"
    thin = on_cpu and size <= THIN_UP_TO
    stem = "imagenet" if on_cpu and not thin and model.stem == "auto" else model.stem
    return dataclasses.replace(model, name="resnet_thin" if thin else "resnet18", stem=stem)


def build(model: Model, channels: int, size: int) -> Network:
    """A ResNet, ViT or ConvNeXt. It then takes images of any size (a ViT: any that its patch divides).

    Raises UserError if mean or std do not have `channels` values, or if the patch does not divide `size`.
    """
    mean, std = normalization(model, channels)
    if model.name in vit.ARCHITECTURES:
        made = vit.build_vit(model, size, mean, std)
    elif model.name in convnext.ARCHITECTURES:
        made = convnext.build_convnext(model, mean, std)
    else:
        made = resnet.build_resnet(model, size, mean, std)
    return made._replace(scaled=lambda images: (images - jnp.array(mean)) / jnp.array(std))


def normalization(model: Model, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std per channel, for images in [0, 1], with which the encoder normalizes its input."""
    rgb = channels == 3
    mean = _per_channel("mean", model.mean, IMAGENET_MEAN if rgb else (0.5,) * channels, channels)
    return mean, _per_channel("std", model.std, IMAGENET_STD if rgb else (0.25,) * channels, channels)


def _per_channel(key: str, values: tuple[float, ...], default: tuple[float, ...], channels: int) -> tuple[float, ...]:
    if values and len(values) != channels:
        allowed = f"{channels}, one per channel, or ()"
        raise UserError(f"config.model.{key}={values}: {len(values)} values; allowed: {allowed}")
    return tuple(values) or default
