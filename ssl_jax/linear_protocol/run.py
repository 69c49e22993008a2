"""Training and choosing the linear classifiers of one draw of labels; a killed one goes on where it was saved last."""

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax import files, parallel
from ssl_jax.augment import check_no_warp, resolve_views
from ssl_jax.config import Config, Linear, to_steps
from ssl_jax.data.labelled import Labelled
from ssl_jax.data.source import Images, Source
from ssl_jax.encoder import Encoder
from ssl_jax.errors import UserError
from ssl_jax.evaluate.references import weights_digest
from ssl_jax.evaluate.saved import Saved
from ssl_jax.evaluate.scores import selection_score
from ssl_jax.evaluate.subsets import holdout
from ssl_jax.linear_protocol import heads as of_heads
from ssl_jax.linear_protocol.heads import Spec, State
from ssl_jax.progress import counting
from ssl_jax.train.step import batches

VERSION = 1  # of the computation; raise it when a change to the code changes the numbers
FOLDER = "heads"  # beside the results: what a killed evaluation goes on from
AT_A_TIME = 1024  # images that are scored at a time
Grid = Sequence[tuple[float, float]]


class Trained(NamedTuple):
    """The classifier that was chosen.

    chosen: lr, weight_decay and batch; if there was a choice, also validation (accuracy or mean AUC), the number of
            labels that it was trained on, and all trials
    """

    scorer: "Scorer"
    state: State
    chosen: dict[str, Any]

    def scores(self, images: Images) -> np.ndarray:
        """Logits float32 [N, K] of images uint8 [N, H, W, C]."""
        parts = [np.asarray(logits[0])[: len(rows)] for rows, logits in self.scorer(self.state, images)]
        return np.concatenate(parts)


class Scorer:
    """(state, images) -> (indices [n], logits [G, batch, K]) of all images, a batch at a time; the last batch has rows
    to spare."""

    def __init__(self, encoder: Encoder, spec: Spec, mesh: Any, batch: int):
        devices = mesh.devices.size
        self.mesh, self.batch = mesh, min(batch, max(1, AT_A_TIME // devices) * devices)
        self.weights = parallel.replicate(mesh, (encoder.params, encoder.stats))
        self.function = of_heads.compiled_logits(encoder.network, spec, mesh)

    def __call__(self, state: State, images: Images) -> Iterator[tuple[np.ndarray, jax.Array]]:
        size = self.batch
        for start in range(0, len(images), size):
            part = images[start : start + size]
            padded = np.pad(part, [(0, size - len(part)), (0, 0), (0, 0), (0, 0)])
            shown = parallel.global_batch(self.mesh, size, np.arange(size), {"image": padded})["image"]
            logits = self.function(state["heads"], state["norm"], *self.weights, shown)
            yield np.arange(start, start + len(part)), logits


def train(
    encoder: Encoder, config: Config, labelled: Labelled, *, classes: int, seed: int, path: Path, inputs: Any
) -> Trained:
    """Trains a classifier for every learning rate and weight decay of config.linear, and chooses one.

    If there is more than one, a stratified share of the labels (groups stay together) is held out and decides, as of
    `selection_score`; the winner is used as it is, trained on the rest. A single one is trained on all labels.

    path: of the results. What is needed to go on after a kill lies in the folder FOLDER beside it. It is only used
    again for the same labels, encoder, config.linear and `inputs`, which JSON can hold.

    Raises UserError if options do not fit the encoder or each other, or if training diverges with all of them.
    """
    settings, labels = config.linear, labelled.labels
    grid = list(itertools.product(settings.lr, settings.weight_decay))
    if not grid:
        raise UserError("config.linear: lr or weight_decay is empty; give at least one value for each")
    of_heads.check_blocks(encoder.network, encoder.params, settings.blocks, settings.patches)
    kept, held = np.arange(len(labels)), np.zeros(0, np.int64)
    if len(grid) > 1:
        kept, held = holdout(labels, settings.validation, seed, labelled.source.groups)
    source = labelled.source.take(kept) if len(held) else labelled.source
    batch, devices = _shared_batch(settings.batch, len(kept), config.train.devices)
    config = replace(config, train=replace(config.train, batch=batch, devices=devices, seed=seed))
    spec = _spec(settings, encoder.size, len(kept), batch)
    if config.data.crops == "file":
        check_no_warp(spec.views, "config.linear.augment")
    scorer = Scorer(encoder, spec, parallel.make_mesh(devices, batch), batch)
    image = jax.ShapeDtypeStruct((1, spec.views[0].size, spec.views[0].size, encoder.channels), np.float32)
    width = of_heads.width_of(encoder.network, encoder.params, encoder.stats, image, spec)
    state = of_heads.init_state(width, classes, len(grid), spec, seed)
    saved = Saved(path.parent / FOLDER / f"{path.name}-{seed}.npz", _key(encoder, spec, grid, source, kept, inputs))
    state = _trained(scorer, encoder, config, source, spec, grid, state, saved)
    chosen, winner = dict[str, Any](batch=batch), 0
    if len(held):
        scores = _validated(scorer, state, Labelled(labelled.source.take(held), labels[held]))
        winner = max(range(len(grid)), key=lambda i: scores[i])  # the first of equals
        trials = [{"lr": lr, "weight_decay": d, "validation": s} for (lr, d), (s, _) in zip(grid, scores, strict=True)]
        chosen |= {"validation": scores[winner][0], "trained_on": len(kept), "trials": trials}
    state = {**state, "heads": jax.tree.map(lambda x: x[winner : winner + 1], state["heads"])}
    if not all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(state["heads"])):
        raise UserError(f"config.linear.lr={settings.lr}: training diverged; use smaller learning rates")
    return Trained(scorer, state, {"lr": grid[winner][0], "weight_decay": grid[winner][1], **chosen})


def finished(path: Path, seeds: int) -> None:
    """The results at `path` are written: removes what a killed evaluation would have gone on from."""
    for seed in range(seeds):
        (path.parent / FOLDER / f"{path.name}-{seed}.npz").unlink(missing_ok=True)


def _shared_batch(batch: int, images: int, devices: int) -> tuple[int, int]:
    """(batch, devices): no more than `images`, in equal parts for all devices; fewer images than devices have one."""
    batch, devices = min(batch, images), devices or len(jax.devices())
    devices = devices if devices <= batch else 1
    return batch // devices * devices, devices


def _spec(settings: Linear, size: int, images: int, batch: int) -> Spec:
    steps = settings.epochs * (images // batch)
    warmup = to_steps(settings.warmup, images, batch, "config.linear.warmup")
    if warmup >= steps:
        raise UserError(f"config.linear.warmup={settings.warmup!r}: allowed: less than {settings.epochs} epochs")
    shared = "optimizer", "momentum", "nesterov", "schedule", "blocks", "patches", "batch_norm"
    options: Any = {key: getattr(settings, key) for key in shared}
    return Spec(views=resolve_views(settings.augment, 1, size), steps=steps, warmup=warmup, **options)


def _key(encoder: Encoder, spec: Spec, grid: Grid, source: Source, kept: np.ndarray, inputs: Any) -> str:
    """A hash of all that the training depends on."""
    known = files.digest({"kept": kept, "labels": np.asarray(source.labels)})
    names = hashlib.sha256("\n".join(source.names).encode()).hexdigest()
    parts = [VERSION, weights_digest(encoder), known, names, list(map(str, spec)), list(grid), inputs]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _trained(
    scorer: Scorer,
    encoder: Encoder,
    config: Config,
    source: Source,
    spec: Spec,
    grid: Grid,
    state: State,
    saved: Saved,
) -> State:
    """The state after all steps, each of which shows the encoder a batch of random views once, for all heads."""
    settings, mesh = config.linear, scorer.mesh
    scale = config.train.batch / settings.lr_batch if settings.lr_batch else 1.0
    rates, decays = (jnp.asarray(values, jnp.float32) for values in zip(*grid, strict=True))
    start, state = saved.read(state)
    if start:
        print(f"linear: goes on after step {start} of {spec.steps}", flush=True)
    state, key = parallel.replicate(mesh, state), jax.random.key(config.train.seed)
    step_fn = of_heads.compiled_step(encoder.network, spec, mesh)
    losses = None
    with counting("linear", f"steps of {config.train.batch} images") as progress:
        for step, batch in enumerate(batches(config, source, mesh, start, spec.steps, spec.views), start):
            before = losses
            state, losses = step_fn(state, *scorer.weights, batch, key, step, rates * scale, decays)
            jax.block_until_ready(before)  # so that the device never waits for the host, nor the clock runs ahead
            progress(step + 1, spec.steps)
            if step + 1 == spec.steps or saved.due():
                saved.write(step + 1, state)
    return state


def _validated(scorer: Scorer, state: State, held: Labelled) -> list[tuple[float, float]]:
    """The `selection_score` of each head. With one label per image only sums are kept: all logits of all heads may be
    more than memory holds."""
    images, labels = held.source.all_images(), held.labels
    if labels.ndim == 2:
        parts = [np.asarray(logits)[:, : len(rows)] for rows, logits in scorer(state, images)]
        return [selection_score(each, labels) for each in np.concatenate(parts, axis=1)]
    totals = np.zeros((2, len(state["heads"]["b"])))
    for rows, logits in scorer(state, images):
        known = np.full(logits.shape[1], -1, np.int32)
        known[: len(rows)] = labels[rows]
        totals += np.array(of_heads.hits(logits, known), np.float64)
    right, likelihood = totals / len(labels)
    return [(r, s) if np.isfinite(s) else (-1.0, -np.inf) for r, s in zip(right.tolist(), likelihood.tolist())]
