"""`ssl-jax evaluate`: an encoder judged on test images, beside what costs nothing, with a file that says under which
conditions."""

import dataclasses
import hashlib
import json
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssl_jax import files, linear_protocol
from ssl_jax.config import Config, Data
from ssl_jax.data.labelled import Labelled
from ssl_jax.data.source import Images, images_at
from ssl_jax.encoder import Encoder
from ssl_jax.evaluate.finetuning import loss_curve, still_falling
from ssl_jax.evaluate.knn import knn_scores
from ssl_jax.evaluate.linear import linear_probe
from ssl_jax.evaluate.propagation import spread_bank
from ssl_jax.evaluate.references import RANDOM, References, over_pixels
from ssl_jax.evaluate.scores import interval, metrics
from ssl_jax.evaluate.selftraining import Unlabelled, train_classifier
from ssl_jax.evaluate.stored import embeddings
from ssl_jax.evaluate.subsets import nested_subset, without_positive
from ssl_jax.report.tables import main_metric

PROTOCOLS = ("knn", "linear", "linear_quick", "propagate", "finetune")
LARGE_GB = 2.0  # of embeddings in memory: more is told
CHOSEN = ("lr", "weight_decay", "validation")  # by the protocol linear, printed for each draw
HOW_READ = (
    "cache",
    "workers",
    "engine",
    "memory_gb",
    "crops",
    "shuffle_buffer",
    "retries",
    "timeout",
)  # options of config.data that change how images are read, not which


def learns_from_others(config: Config, protocol: str) -> bool:
    """Whether a protocol also learns from images without a label."""
    return protocol == "propagate" or protocol != "linear" and config.finetune.unlabelled == "all"


def evaluate(
    encoder: Encoder,
    config: Config,
    protocol: str,
    train: Labelled,
    test: Labelled,
    *,
    labels: int,
    seeds: int,
    about: Mapping[str, Any],
    path: Path,
    others: Unlabelled | None = None,
) -> dict[str, Any]:
    """Writes path.json and path.npz, prints the means, and returns what path.json holds.

    labels: drawn from `train` for each seed; 0: all. about: what the file says of its conditions. others: images
    without a label, for protocols that learn from such; None: those of `train`, whose labels they do not look at.
    """
    classes, count = train.source.classes, len(train.labels)
    every = np.arange(count)
    draws = [nested_subset(train.labels, labels, s, train.source.groups) if labels else every for s in range(seeds)]
    for seed, draw in enumerate(draws):
        if absent := without_positive(train.labels[draw], classes):
            print(f"draw {seed}: no image of {', '.join(absent)} among the {len(draw)} labelled images")
    learns = others is None and learns_from_others(config, protocol)
    used = every if learns else np.unique(np.concatenate(draws))  # all images, but not all labels
    pool = train if len(used) == count else Labelled(train.source.take(used), train.labels[used])
    draws, test_images = [np.searchsorted(used, draw) for draw in draws], test.source.all_images()
    curve: list[float] | None = None
    chosen: list[dict[str, Any]] | None = None
    if protocol == "linear":
        scores, chosen = _linear(encoder, config, pool, draws, test_images, path, about)
    else:
        scores, curve = _scores(encoder, config, protocol, pool, draws, test_images, others, path)
    each = [metrics(s, test.labels, classes) for s in scores]
    compared = References({RANDOM: encoder}, test_images, test.labels, classes, config.eval)
    # Those of all protocols and steps are the same.
    names = path.parent / "references" / re.sub(r"-step\d+$", "", path.name.partition("-")[2])
    beside = _references(compared, pool, draws if labels else draws[:1], names)
    beside *= 1 if labels else seeds
    result: dict[str, Any] = {
        "protocol": protocol,
        "labels": labels or "all",
        "seeds": seeds,
        "classes": classes,
        "step": encoder.about.get("step"),
        "metric": main_metric([{"scores": each[0]}]),
        "per_seed": each,
        **_means([{name: value for name, value in m.items() if isinstance(value, float)} for m in each]),
        "references": {name: _means([scores[name] for scores in beside]) for name in beside[0]},
        "loss": curve,
        **({} if chosen is None else {"chosen": chosen}),
        **about,
    }
    arrays = {"scores": np.stack(scores), "labels": test.labels, "names": np.array(test.source.names)}
    if test.source.groups is not None:
        arrays["groups"] = test.source.groups
    _print(result, beside)  # first, so that a full disk loses no number
    files.write_npz(path.with_name(f"{path.name}.npz"), **arrays)
    files.write_json(path.with_name(f"{path.name}.json"), result)
    linear_protocol.finished(path, seeds)
    shutil.rmtree(_unfinished(path), ignore_errors=True)
    print(f"predictions: {path}.npz")
    return result


def _unfinished(path: Path) -> Path:
    """What a killed fine-tuning goes on from, beside the results."""
    return path.with_name(f".{path.name}")


def _linear(
    encoder: Encoder,
    config: Config,
    train: Labelled,
    draws: Sequence[np.ndarray],
    test_images: Images,
    path: Path,
    about: Mapping[str, Any],
) -> tuple[list[np.ndarray], list[dict[str, Any]]]:
    """For each draw, the scores [N, K] of the test images, and what was chosen (`linear_protocol.train`)."""
    scores, chosen = [], []
    for seed, rows in enumerate(draws):
        part = train if len(rows) == len(train.labels) else Labelled(train.source.take(rows), train.labels[rows])
        options: Any = {"classes": len(train.source.classes), "seed": seed, "path": path, "inputs": about["conditions"]}
        trained = linear_protocol.train(encoder, config, part, **options)
        best = ", ".join(f"{key} {trained.chosen[key]:.4g}" for key in CHOSEN if key in trained.chosen)
        print(f"draw {seed}: {best}", flush=True)
        scores.append(trained.scores(test_images))
        chosen.append(trained.chosen)
    return scores, chosen


def _scores(
    encoder: Encoder,
    config: Config,
    protocol: str,
    train: Labelled,
    draws: Sequence[np.ndarray],
    test_images: Images,
    others: Unlabelled | None,
    path: Path,
) -> tuple[list[np.ndarray], list[float] | None]:
    """For each draw of labelled images, the scores [N, K] that a classifier trained on it gives to the test images;
    and the mean loss curve of fine-tuning."""
    images, labels, all_groups = train.source.all_images(), train.labels, train.source.groups
    classes, spread, scores, curves = len(train.source.classes), learns_from_others(config, protocol), [], []
    if protocol != "finetune":
        # Neighbours are looked for in a part of the embeddings at a time; what is trained has all of them in memory.
        memory = train.source.memory_gb if protocol == "knn" and not spread else math.inf
        features, test_features = (
            _embedded(encoder, each, memory, path.parent, protocol) for each in (images, test_images)
        )
    pool, pool_groups = others, None
    if pool is None:
        pool, pool_groups = Unlabelled(train.source), all_groups
    everything = np.arange(len(labels))
    for seed, rows in enumerate(draws):
        groups = None if all_groups is None else all_groups[rows]
        if protocol == "finetune":
            options = {"classes": classes, "settings": config.finetune, "seed": seed, "groups": groups}
            options["saved"] = _unfinished(path)
            classifier = train_classifier(encoder, images_at(images, rows), labels[rows], pool, **options)
            scores.append(classifier.logits(test_images))
            curves.append(loss_curve(classifier))
            continue
        known = (features if np.array_equal(rows, everything) else features[rows]), labels[rows]
        kind = dict[str, Any](classes=classes)
        if spread:
            known = spread_bank(*known, pool.neighbourhood(encoder), **kind, align=config.finetune.align)
            groups = None if groups is None or pool_groups is None else np.concatenate([groups, pool_groups])
        if protocol == "knn":
            k, temperature = min(config.eval.knn_k, len(known[0])), config.eval.knn_temperature
            scores.append(knn_scores(*known, test_features, **kind, k=k, temperature=temperature))
        else:
            scores.append(linear_probe(*known, **kind, seed=seed, groups=groups).scores(test_features))
    return scores, np.mean(curves, axis=0).tolist() if curves else None


def _embedded(encoder: Encoder, images: Images, memory_gb: float, folder: Path, protocol: str) -> Any:
    """As `stored.embeddings`; a line tells if much is held in memory, however large that is."""
    size = 4e-9 * len(images) * encoder.width
    if size > LARGE_GB and math.isinf(memory_gb):
        print(f"{protocol} holds {size:.1f} GB of embeddings in memory, and copies of them; --protocol=linear none")
    return embeddings(encoder, images, memory_gb, folder)


def _means(each: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """{"mean": metric -> mean over draws, "interval": metric -> half width of its 95 % interval, None for one draw}."""
    found = {name: interval([values[name] for values in each]) for name in each[0]}
    return {
        "mean": {name: mean for name, (mean, _) in found.items()},
        "interval": {name: half if len(each) > 1 else None for name, (_, half) in found.items()},
    }


def conditions(
    config: Config, protocol: str, data: Data, test: Data | None, step: int = 0, unlabelled: Data | None = None
) -> dict[str, Any]:
    """What a result depends on beside the run's encoder: the data, test data that are not their own, the settings; the
    step of the encoder, if it is not the run's last; and images without a label that are not those of the data."""
    spread: dict[str, Any] = {"align": config.finetune.align} if config.finetune.align else {}
    if protocol != "propagate":
        spread = {"unlabelled": "all", **spread} if config.finetune.unlabelled == "all" else {}
    settings: dict[str, dict[str, Any]] = {
        "knn": {key: getattr(config.eval, key) for key in ("knn_k", "knn_temperature")} | spread,
        "linear": dataclasses.asdict(config.linear),
        "linear_quick": spread,
        "propagate": spread,
        "finetune": config.finetune.inputs(),
    }
    made: dict[str, Any] = {"data": _described(data), "test": test and _described(test)}
    made |= {"settings": settings[protocol], **({"step": step} if step else {})}
    made |= {"unlabelled": _described(unlabelled)} if unlabelled else {}
    return json.loads(json.dumps(made))  # as a reader of the file will see it


def _described(data: Data) -> dict[str, Any]:
    path = str(Path(data.path).absolute()) if data.path and Path(data.path).exists() else data.path
    return {k: v for k, v in dataclasses.asdict(data).items() if k not in HOW_READ} | {"path": path}


def suffix(usual: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """The end of a result's name: "" under the run's own conditions, else the data and a hash of the conditions. An
    encoder that is not the run's last adds its step, so that it overwrites no result of the finished run."""
    if "step" in here:
        return f"{suffix(usual, {k: v for k, v in here.items() if k != 'step'})}-step{here['step']}"
    if here == usual:
        return ""
    changed = next((here[key] for key in ("test", "data") if here[key] != usual[key]), None)
    stem = re.sub(r"\W+", "_", Path(changed["path"] or changed["name"]).stem)[:30] if changed else "settings"
    return f"-{stem}-{hashlib.sha256(json.dumps(here, sort_keys=True).encode()).hexdigest()[:6]}"


def _references(
    compared: References, train: Labelled, draws: Sequence[np.ndarray], name: Path
) -> list[dict[str, dict[str, float]]]:
    images, groups, found = train.source.all_images(), train.source.groups, []
    for seed, rows in enumerate(draws):
        options: Any = {"seed": seed, "groups": None if groups is None else groups[rows]}
        found.append(
            compared.of(
                name.with_name(f"{name.name}-{seed}.json"), images_at(images, rows), train.labels[rows], **options
            )
        )
    return found


def _print(result: Mapping[str, Any], beside: Sequence[Mapping[str, Mapping[str, float]]]) -> None:
    data, draws = result["conditions"]["data"], result["seeds"]
    where = f"{data['path'] or data['name']}, tested on: {result['test']}"
    print(f"{result['protocol']}, {result['labels']} labels, {draws} draw{'s' * (draws > 1)}, {where}:")
    for name, mean in result["mean"].items():
        half = result["interval"][name]
        print(f"  {name:20} {mean:.4f}" + ("" if half is None else f" ± {half:.4f} (95 %)"))
    print_left_out(result["per_seed"][0])
    metric = result["metric"]
    if metric not in result["mean"]:  # no class can be scored on these test images
        return
    print(f"what costs nothing, {metric}:")
    for name, values in result["references"].items():
        print(f"  {name:22} {values['mean'][metric]:.4f}")
    theirs = [{name: values[metric] for name, values in each.items()} for each in beside]
    margin = over_pixels([each[metric] for each in result["per_seed"]], theirs)
    spread = "" if np.isnan(margin.half) else f" ± {margin.half:.4f}"
    print(f"the encoder is {margin.words}: {margin.difference:+.4f}{spread} against {margin.name}")
    if margin.words.startswith("not") and not result["conditions"]["settings"].get("pixels"):
        print("what may help: a longer pretraining, other views, or that pixels vote: --config.finetune.pixels=True")
    if result["loss"] and still_falling(result["loss"]):
        print("fine-tuning was probably too short: its loss still fell; try more --config.finetune.steps")


def print_left_out(result: Mapping[str, Any]) -> None:
    if result["left_out"]:
        print(f"  left out (cannot be scored on these test images): {', '.join(result['left_out'])}")
