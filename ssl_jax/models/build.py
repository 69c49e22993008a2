"""From `config.model` to an encoder."""

from ssl_jax.config import Model
from ssl_jax.errors import UserError, unknown
from ssl_jax.models import resnet, vit
from ssl_jax.network import Network

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def build_encoder(model: Model, channels: int, size: int = 224, *, zero_init: bool = False) -> Network:
    """The encoder that `config.model` describes, for images with `channels` channels and `size` px sides.

    It then takes images of any size (a ViT: that its patch divides). zero_init: blocks of a ResNet start as the
    identity (https://arxiv.org/abs/1706.02677, section 5.1).

    Raises UserError for an unknown name, stem, dtype or remat, for mean or std of another length than `channels`, and
    for a patch that does not divide `size`.
    """
    if model.name not in (*resnet.ARCHITECTURES, *vit.ARCHITECTURES):
        raise unknown("config.model.name", model.name, [*resnet.ARCHITECTURES, *vit.ARCHITECTURES])
    if model.dtype not in ("float32", "bfloat16", "float64"):  # the last for tests
        raise unknown("config.model.dtype", model.dtype, ("float32", "bfloat16"))
    if model.remat not in ("none", "blocks"):
        raise unknown("config.model.remat", model.remat, ("none", "blocks"))
    if model.width <= 0:
        raise UserError(f"config.model.width={model.width}: allowed: more than 0")
    mean, std = normalization(model, channels)
    if model.name in vit.ARCHITECTURES:
        return vit.build_vit(model, size, mean, std)
    return resnet.build_resnet(model, size, mean, std, zero_init=zero_init)


def normalization(model: Model, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std per channel, of images in [0, 1], by which the encoder normalises its input."""
    rgb = channels == 3
    mean = _per_channel("mean", model.mean, IMAGENET_MEAN if rgb else (0.5,) * channels, channels)
    return mean, _per_channel("std", model.std, IMAGENET_STD if rgb else (0.25,) * channels, channels)


def _per_channel(key: str, given: tuple[float, ...], default: tuple[float, ...], channels: int) -> tuple[float, ...]:
    if given and len(given) != channels:
        raise UserError(f"config.model.{key}={given}: {len(given)} values; allowed: {channels}, one per channel, or ()")
    return tuple(given) or default
