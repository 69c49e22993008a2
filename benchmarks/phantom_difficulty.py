"""How hard phantom radiographs are: AUC of a linear model on pixels and of a ResNet trained on the noisy labels.

    ssl-jax phantom --out=phantoms --patients=5000 --test=1000
    python benchmarks/phantom_difficulty.py phantoms --model=resnet18 --epochs=6

Training labels: -1 is ignored, blank counts as absent. Test labels are clean. Images are read at 64 px.
"""

import argparse
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from ssl_jax.config import Data, Model
from ssl_jax.data import open_source
from ssl_jax.data.chexpert import STUDY
from ssl_jax.models import build_encoder

SIZE, BATCH, SHIFT = 64, 64, 4


def read(path, split):
    """(images float32 [N, 64, 64, 1] in [0, 1], labels float32 [N, 14], NaN where not known, names)."""
    data = Data(name="chexpert", path=path, split=split, size=SIZE, labels=(), uncertain="ignore", blank="zeros")
    source = open_source(data, split)
    return source.arrays().astype(np.float32) / 255, source.labels, source.classes


def linear(train, test):
    """Scores [N, 14] of logistic regression on 32 px."""

    def pixels(images):
        return images.reshape(len(images), 32, 2, 32, 2).mean((2, 4)).reshape(len(images), -1) - 0.5

    (images, labels), x, scores = train, pixels(test), []
    for column in labels.T:
        known = np.isfinite(column)
        model = LogisticRegression(C=1e-2, max_iter=300).fit(pixels(images[known]), column[known])
        scores.append(model.decision_function(x))
    return np.stack(scores, axis=1)


def resnet(model, epochs, train, test):
    """Scores [N, 14]: AdamW, cosine from 1.5e-3, flips and shifts of up to 4 px."""
    images, labels = train
    network = build_encoder(model, 1, SIZE)
    params, stats = network.init(jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 1)))
    width = network.apply(params, stats, jnp.zeros((1, SIZE, SIZE, 1)), train=False)[0].shape[-1]
    weights = {"encoder": params, "w": jnp.zeros((width, labels.shape[1])), "b": jnp.zeros(labels.shape[1])}
    steps = len(images) // BATCH
    optimizer = optax.adamw(optax.cosine_decay_schedule(1.5e-3, epochs * steps), weight_decay=1e-2)

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(weights, stats, state, x, y):
        def loss(weights):
            features, new = network.apply(weights["encoder"], stats, x, train=True)
            known, logits = jnp.isfinite(y), features @ weights["w"] + weights["b"]
            each = optax.sigmoid_binary_cross_entropy(logits, jnp.where(known, y, 0))
            return jnp.sum(jnp.where(known, each, 0)) / known.sum(), new

        gradient, stats = jax.grad(loss, has_aux=True)(weights)
        updates, state = optimizer.update(gradient, state, weights)
        return optax.apply_updates(weights, updates), stats, state

    @jax.jit
    def predict(weights, stats, x):
        return network.apply(weights["encoder"], stats, x, train=False)[0] @ weights["w"] + weights["b"]

    state, rng, began = optimizer.init(weights), np.random.default_rng(0), time.monotonic()
    for epoch in range(epochs):
        for chosen in rng.permutation(len(images))[: steps * BATCH].reshape(steps, BATCH):
            x, (top, left) = images[chosen], rng.integers(0, 2 * SHIFT + 1, 2)
            flipped = rng.random(BATCH) < 0.5
            x[flipped] = x[flipped, :, ::-1]
            x = np.pad(x, ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)), mode="edge")
            x = x[:, top : top + SIZE, left : left + SIZE]
            weights, stats, state = step(weights, stats, state, x, labels[chosen])
        print(f"epoch {epoch + 1}/{epochs}, {time.monotonic() - began:.0f} s", flush=True)
    return np.concatenate([predict(weights, stats, test[i : i + 250]) for i in range(0, len(test), 250)])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--epochs", type=int, default=6)
    args = parser.parse_args()
    *train, classes = read(args.path, "train")
    test, truth, _ = read(args.path, "test")
    network = Model(name=args.model, width=args.width, stem="imagenet")
    aucs = [
        [roc_auc_score(truth[:, j], scores[:, j]) for j in range(len(classes))]
        for scores in (linear(train, test), resnet(network, args.epochs, train, test))
    ]
    ten = [classes.index(name) for name in STUDY]
    print(
        f"phantom radiographs, {len(train[0])} training images, {len(test)} test images\n\n| | pixels | {args.model} |"
    )
    print("|---|---|---|")
    for name, *row in zip(classes, *aucs, strict=True):
        print(f"| {name} | {row[0]:.2f} | {row[1]:.2f} |")
    print(
        f"| mean of the study's ten | {np.mean(np.array(aucs)[0, ten]):.3f} | {np.mean(np.array(aucs)[1, ten]):.3f} |"
    )


if __name__ == "__main__":
    main()
