"""What is exported: one pure function from images of any size to features or probabilities."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax.augment import center_view
from ssl_jax.encoder import Encoder, build, model_of
from ssl_jax.evaluate.finetuning import Classifier
from ssl_jax.evaluate.references import SIDE
from ssl_jax.models import normalization

EXACT = jax.lax.Precision.HIGHEST


class Inference(NamedTuple):
    """A function that holds its weights, and what is to be known about it.

    function: images uint8 [N, H, W, C] -> arrays by name. An encoder: embedding [N, D] and patches [N, h, w, D], or one
              of them; a classifier: probabilities [N, K] and, if it decides, predicted: int32 [N], the class, or
              bool [N, K], whether a probability reaches its class's threshold
    """

    function: Callable[[Any], dict[str, jax.Array]]
    size: int
    channels: int


def resized(images: jax.Array, size: int, test_side: int = 0) -> jax.Array:
    """The central square of each image [N, H, W, C], 0 to 255, at `size` px: whole numbers, float32.

    test_side: the shorter side to which images are resized before the square is cut out (`data.central`), unless they
    have size x size px; 0: the largest square.
    As Pillow resizes files here: bilinear with antialias, along the rows and then along the columns, and rounded after
    each. A pixel may differ by one or two of 255: where the exact value lies halfway between two integers, and in
    images higher than wide, of which Pillow 13 resizes the columns first. N, H and W may be symbolic.
    Source: precompute_coeffs in Pillow's src/libImaging/Resample.c.
    """
    height, width = (jnp.asarray(side, jnp.float32) for side in images.shape[1:3])
    side = jnp.minimum(height, width)

    def square(length):  # where it begins, and its pixels per pixel of the result
        return (length - side) / 2, side / size

    def cut(length):
        as_it_is = (height == size) & (width == size)
        scaled, first = _scaled(length, side, jnp.where(as_it_is, float(size), float(test_side)), size)
        return first * (length / scaled), length / scaled

    def weights(pixels, length):  # [pixels, size]: of each pixel in each pixel of the result
        start, scale = cut(length) if test_side else square(length)
        middle = start + (jnp.arange(size, dtype=jnp.float32) + 0.5) * scale
        distance = jnp.arange(pixels, dtype=jnp.float32)[:, None] + 0.5 - middle
        triangle = jnp.maximum(0, 1 - jnp.abs(distance) / jnp.maximum(scale, 1))
        return triangle / triangle.sum(0)

    def along_last(x, matrix):  # [N, A, C, B] -> [N, A, C, size]
        return jnp.floor(jnp.matmul(x, matrix, precision=EXACT) + 0.5)

    x = images.astype(jnp.float32).transpose(0, 1, 3, 2)
    x = along_last(x, weights(images.shape[2], width))  # [N, H, C, size]
    x = along_last(x.transpose(0, 3, 2, 1), weights(images.shape[1], height))  # [N, size (columns), C, size (rows)]
    return x.transpose(0, 3, 1, 2)


def _scaled(length: jax.Array, shorter: jax.Array, side: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """(length, first pixel of the central `size`) of a side of an image whose shorter side becomes `side` px.

    All are whole numbers in float32. As torchvision counts, the length is rounded down, half a pixel to an even number.
    """
    whole = jnp.floor(side * length / shorter)
    half = jnp.floor((whole - size) / 2)
    odd = whole - size - 2 * half
    return whole, half + odd * (half - 2 * jnp.floor(half / 2))


def described(encoder: Encoder) -> str:
    """`resized`, in words."""
    size, side = encoder.size, encoder.test_side
    if not side:
        return f"the central square of each image is resized to {size} px (bilinear with antialias)"
    return (
        f"the shorter side of each image is resized to {side} px (bilinear with antialias), of which the central "
        f"{size} x {size} px are used; an image of {size} x {size} px is taken as it is"
    )


def in_float32(encoder: Encoder, conv: str = "") -> Encoder:
    """The encoder with the same weights, computing in float32. conv: as `config.model.conv`; "": unchanged."""
    model = dataclasses.replace(model_of(encoder.about), dtype="float32")
    model = dataclasses.replace(model, conv=conv or model.conv)
    return encoder._replace(network=build(model, encoder.channels, encoder.size))


def of_encoder(encoder: Encoder, features: str) -> Inference:
    """features: cls (the embedding), patch (the feature map) or both."""
    features_of = _features(encoder)

    def function(images):
        embedding, patches = features_of(resized(images, encoder.size, encoder.test_side) / 255)
        found = {"embedding": embedding, "patches": patches}
        return {"cls": {"embedding": embedding}, "patch": {"patches": patches}, "both": found}[features]

    return Inference(function, encoder.size, encoder.channels)


def of_classifier(classifier: Classifier) -> Inference:
    """Probabilities, with the regression on raw pixels if it votes, and decisions."""
    encoder = classifier.fitted_encoder
    features_of, head = _features(encoder), jax.tree.map(np.asarray, classifier.params["head"])
    limits = thresholds(classifier)

    def function(images):
        x = resized(images, encoder.size, encoder.test_side)
        logits = jnp.matmul(features_of(x / 255)[0], head["w"], precision=EXACT) + head["b"]
        if classifier.pixels is not None:
            side = min(SIDE, encoder.size)
            raw = x / 255 if side == encoder.size else center_view(x / 255, side)
            flat = raw.reshape(-1, side * side * encoder.channels)
            scores = jnp.matmul(flat, classifier.pixels.weights, precision=EXACT) + classifier.pixels.bias
            logits = (logits + scores) / 2
        if not classifier.multilabel:
            shares = jax.nn.softmax(logits)
            return {"probabilities": shares, "predicted": jnp.argmax(shares, 1).astype(jnp.int32)}
        shares = jax.nn.sigmoid(logits)
        return {"probabilities": shares} | ({} if limits is None else {"predicted": shares >= limits})

    return Inference(function, encoder.size, encoder.channels)


def thresholds(classifier: Classifier) -> np.ndarray | None:
    """float32 [K], the smallest probability at which each class is said to be present; None if none were chosen.

    A class without a threshold, for want of labels, has 0.5.
    """
    chosen = classifier.about.get("thresholds")
    if not chosen:
        return None
    return np.array([chosen.get(name, {}).get("threshold", 0.5) for name in classifier.classes], np.float32)


def preprocessing(encoder: Encoder) -> dict[str, Any]:
    """In words and numbers, for formats that hold weights alone."""
    mean, std = normalization(model_of(encoder.about), encoder.channels)
    sides = {"size": encoder.size, "test_side": encoder.test_side or encoder.size}
    return {**sides, "channels": encoder.channels, "mean": list(mean), "std": list(std)}


def _features(encoder: Encoder) -> Callable[[Any], tuple[jax.Array, jax.Array]]:
    """Images [N, S, S, C] in [0, 1] -> embedding and feature map, in float32 and for any platform."""
    own = in_float32(encoder, conv="lax")
    params, stats = jax.tree.map(np.asarray, (own.params, own.stats))

    def of_one(image):  # networks ask for the number of images, which is no number if it is symbolic
        embedding, patches = own.network.apply(params, stats, image[None], train=False, dense=True)[0]
        return embedding[0], patches[0]

    def features(x):
        with jax.default_matmul_precision("highest"):
            return jax.vmap(of_one)(x)

    return features
