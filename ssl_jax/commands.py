"""What each command of `ssl-jax` does, as a function of plain values. Each can be called from Python as well."""

import contextlib
import csv
import dataclasses
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from ssl_jax import run
from ssl_jax.config import Config, Data, default, from_json, merge, method_module, method_names, resolve
from ssl_jax.data import open_source
from ssl_jax.encoder import Encoder, load_encoder, random_encoder, rebuild
from ssl_jax.errors import NoPartError, UserError, unknown


def start_jax() -> None:
    """JAX's compilation cache in the user's cache folder, unless the environment names another."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        home = os.environ.get("XDG_CACHE_HOME") or str(Path("~/.cache").expanduser())
        jax.config.update("jax_compilation_cache_dir", str(Path(home) / "ssl_jax" / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def pretrain(config: ConfigDict, workdir: str) -> Encoder:
    from ssl_jax.report.html import write_report
    from ssl_jax.trainer import fit

    folder = Path(workdir)
    encoder = fit(resolve(config), folder)
    print(f"encoder: {folder / 'encoder'}\nreport:  {write_report(folder)}")
    return encoder


def evaluate(
    workdir: str,
    protocol: str,
    labels: int = 0,
    seeds: int = 1,
    data: str = "",
    test: str = "",
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Writes evaluation/<protocol>-<labels>.json and .npz (scores of all test images); prints and returns the means."""
    from ssl_jax.evaluate.finetune import finetune, predict
    from ssl_jax.evaluate.knn import knn_predict
    from ssl_jax.evaluate.linear import linear_probe
    from ssl_jax.evaluate.metrics import interval, metrics
    from ssl_jax.evaluate.subsets import nested_subset

    if protocol not in ("knn", "linear", "finetune"):
        raise unknown("--protocol", protocol, ("knn", "linear", "finetune"))
    if labels < 0 or seeds < 1:
        raise UserError(f"--labels={labels} --seeds={seeds}: allowed: labels 0 (all) or more, seeds 1 or more")
    folder = Path(workdir)
    encoder, config = load_encoder(folder), _settings(folder, overrides)
    (images, y), (test_images, test_y), names, classes, what = _train_and_test(encoder, config, data, test)
    draws = [nested_subset(y, labels, seed) if labels else np.flatnonzero(y >= 0) for seed in range(seeds)]
    if protocol != "finetune":
        features, test_features = encoder.embed(images), encoder.embed(test_images)
    scores = []
    for seed, chosen in enumerate(draws):
        if protocol == "knn":
            k = min(config.eval.knn_k, len(chosen))
            temperature = config.eval.knn_temperature
            bank = (features[chosen], y[chosen], test_features)
            scores.append(np.asarray(knn_predict(*bank, classes=len(classes), k=k, temperature=temperature)))
        elif protocol == "linear":
            scores.append(
                linear_probe(features[chosen], y[chosen], classes=len(classes), seed=seed).scores(test_features)
            )
        else:
            drawn = images[chosen], y[chosen]
            made_of = finetune(encoder, *drawn, classes=len(classes), settings=config.finetune, seed=seed)
            scores.append(predict(made_of, test_images))
    each = [metrics(s, test_y, classes) for s in scores]
    numbers = [k for k, v in each[0].items() if isinstance(v, float)]
    made: dict[str, Any] = {
        "protocol": protocol,
        "labels": labels or "all",
        "seeds": seeds,
        "classes": classes,
        "test": what,
        "per_seed": each,
        "mean": {k: interval([m[k] for m in each])[0] for k in numbers},
        "interval": {k: interval([m[k] for m in each])[1] if seeds > 1 else None for k in numbers},
    }
    out = folder / "evaluation" / f"{protocol}-{labels or 'all'}"
    run.write_npz(out.with_suffix(".npz"), scores=np.stack(scores), labels=test_y, names=np.array(names))
    run.write_json(out.with_suffix(".json"), made)
    print(f"{protocol}, {labels or 'all'} labels, {seeds} draw{'s' * (seeds > 1)}, {what}:")
    for name in numbers:
        half = made["interval"][name]
        print(f"  {name:20} {made['mean'][name]:.4f}" + (f" ± {half:.4f} (95 %)" if half is not None else ""))
    print(f"predictions: {out}.npz")
    return made


def study(config: ConfigDict, workdir: str) -> None:
    """Pretrains every arm that needs it in workdir/pretrain/<arm>, then runs the cells; see `ssl_jax.study`."""
    from ssl_jax.report.html import write_report
    from ssl_jax.study import from_scratch, run_study
    from ssl_jax.trainer import fit

    resolved, folder = resolve(config), Path(workdir)
    if not resolved.study.arms:
        raise UserError("config.study.arms: empty; allowed: a mapping of arms, as in configs/study_fashion_mnist.py")
    with run.lock(folder):
        run.record_environment(folder)
        train = open_source(resolved.data)
        size, channels = min(train.shape[:2]), train.shape[2]

        def get_encoder(arm: str, arm_config: Config, seed: int) -> Encoder:
            if from_scratch(resolved.study.arms[arm]):
                return random_encoder(arm_config.model, size, channels, seed)
            return fit(arm_config, folder / "pretrain" / arm, train)

        for changes in resolved.study.arms.values():
            merge(resolved, changes)  # a mistake in any arm is told before the first one trains
        test = open_source(dataclasses.replace(resolved.study.test, size=size, channels=channels))
        run_study(resolved, folder, get_encoder=get_encoder, train=train, test=test, log=print)
        print((folder / "summary.md").read_text())
        print(f"report: {write_report(folder)}")


def finetune(
    workdir: str, data: str, out: str, test: str = "", seed: int = 0, overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """Writes out/classifier.safetensors and out/classifier.json; prints the validation and the test score."""
    from ssl_jax.evaluate.finetune import finetune as fit_classifier
    from ssl_jax.evaluate.finetune import predict
    from ssl_jax.evaluate.metrics import metrics

    encoder, config = load_encoder(workdir), _settings(Path(workdir), overrides)
    _new(Path(out), "--out")
    source = open_source(encoder.data(_data(data, "--data")))
    labels = source.labels_as(source.classes, data)
    known = np.flatnonzero(labels >= 0)
    if test:  # before training, or a wrong name of a class would cost all of it
        held = open_source(encoder.data(_data(test, "--test")), "all")
        wanted = held.labels_as(source.classes, test)
    print(f"fine-tuning on {len(known)} labelled images, classes: {', '.join(source.classes)}", flush=True)
    classifier = fit_classifier(
        encoder,
        source.arrays()[known],
        labels[known],
        classes=len(source.classes),
        settings=config.finetune,
        seed=seed,
    )
    about = {**encoder.about, "classes": source.classes, "finetune": dataclasses.asdict(config.finetune), "seed": seed}
    about["chosen"] = classifier.chosen
    if test:
        about["test"] = metrics(predict(classifier, held.arrays())[wanted >= 0], wanted[wanted >= 0], source.classes)
    _save_classifier(Path(out), classifier, about)
    for name, value in {**about["chosen"], **about.get("test", {})}.items():
        if isinstance(value, float):
            print(f"  {name:20} {value:.4g}")
    print(f"classifier: {out}")
    return about


def predict(workdir: str, data: str, out: str) -> None:
    """Writes a CSV: file, predicted class, then one column of probability a class."""
    from ssl_jax.evaluate.finetune import predict as scores_of

    classifier, encoder, classes = _load_classifier(Path(workdir))
    images, names = _readable(encoder, data)
    scores = np.asarray(scores_of(classifier, images), np.float64)
    odds = np.exp(scores - scores.max(axis=1, keepdims=True))
    odds /= odds.sum(axis=1, keepdims=True)
    rows = [[name, classes[p.argmax()], *(f"{v:.6f}" for v in p)] for name, p in zip(names, odds, strict=True)]
    _write_csv(Path(out), ["file", "predicted", *classes], rows)
    print(f"{len(rows)} predictions: {out}")


def embed(workdir: str, data: str, out: str) -> None:
    """Writes .npz (embeddings float32 [N, D], names [N]), .csv or .parquet (name, then one column a dimension)."""
    path = Path(out)
    if path.suffix not in (".npz", ".csv", ".parquet"):
        raise UserError(f"--out={out}: unknown ending {path.suffix!r}; allowed: .npz, .csv, .parquet")
    encoder = load_encoder(workdir)
    images, names = _readable(encoder, data)
    features = encoder.embed(images)
    columns = ["file", *(f"e{i}" for i in range(features.shape[1]))]
    if path.suffix == ".npz":
        run.write_npz(path, embeddings=features, names=np.array(names))
    elif path.suffix == ".csv":
        rows = [[name, *(f"{v:.7g}" for v in f)] for name, f in zip(names, features, strict=True)]
        _write_csv(path, columns, rows)
    else:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise UserError(f"--out={out}: needs pyarrow: pip install pyarrow (or write .npz or .csv)") from None
        packed = io.BytesIO()
        table = pyarrow.table([names, *features.T.copy()], names=columns)
        pyarrow.parquet.write_table(table, packed)
        run.write_bytes(path, packed.getvalue())
    print(f"{len(features)} embeddings of {features.shape[1]} dimensions: {out}")


def views(config: ConfigDict, out: str, images: int = 6, masks: str = "") -> None:
    from ssl_jax.audit.command import phantom
    from ssl_jax.audit.masks import find_lesions, open_masks
    from ssl_jax.augment import resolve as resolve_views
    from ssl_jax.report.sheet import view_sheet

    resolved, count = resolve(config), max(1, images)
    source, seed = open_source(resolved.data), resolved.train.seed
    chosen: Sequence[int] = np.random.default_rng(seed).permutation(len(source))[:count].tolist()
    outlines = None
    if masks:
        lesions, _ = find_lesions(source, open_masks(masks, source, resolved.data), count, seed)
        chosen = list(dict.fromkeys(lesion.image for lesion in lesions))
        outlines = [{e.name: e.mask for e in lesions if e.image == i} for i in chosen]
    # Every method draws its views from the same two; one-view methods use the first.
    drawn = resolve_views(resolved.augment, 2, min(source.shape[:2]))
    preset = resolved.augment.preset
    changed = resolved.augment.override or resolved.augment.second
    title = f"{phantom(resolved.data)}images, preset {preset}{', changed' * bool(changed)}"
    loaded = np.stack([source.load(i) for i in chosen])
    view_sheet(loaded, drawn, Path(out), seed=seed, outlines=outlines, title=title)
    print(f"views: {out}")


def report(workdir: str, out: str = "") -> None:
    from ssl_jax.report.html import write_report

    print(f"report: {write_report(Path(workdir), Path(out) if out else None)}")


def audit(
    lesions: bool = False,
    invariance: bool = False,
    config: ConfigDict | None = None,
    masks: str = "",
    workdir: str = "",
    data: str = "",
    out: str = "audit",
    images: int = 200,
) -> None:
    """One audit or both; see `ssl_jax.audit.command`."""
    from ssl_jax.audit import command

    if not lesions and not invariance:
        raise UserError("audit: of what? allowed: --lesions, --invariance or both")
    if images < 1:
        raise UserError(f"--images={images}: allowed: 1 or more")
    if lesions and not (config and masks):
        raise UserError(f"--{'masks' if config else 'config'}: missing; `ssl-jax audit --lesions` needs it")
    if lesions and config:
        command.lesions(config, masks, out, images)
    if invariance:
        command.invariance(config or None, workdir, data, out, images)


def methods() -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("name", "what it does", "source", "needs"):
        table.add_column(column, overflow="fold", no_wrap=column in ("name", "source"))
    for name in method_names():
        module = method_module(name)
        head, _, rest = (module.__doc__ or "").partition("\n\n")
        source = (
            next(word for word in rest.split() if word.startswith("https://")).strip(".,;").removeprefix("https://")
        )
        needs = "labels" if name_needs_labels(name) else "images"
        table.add_row(name, " ".join(head.split()), source, needs)
    Console().print(table)


def name_needs_labels(name: str) -> bool:
    from ssl_jax.methods.base import Network, Run

    nothing: Any = Network(lambda *_: ({}, {}), lambda *_, **__: (jax.numpy.zeros(0), {}), patch=1)
    return "label" in method_module(name).make(method_module(name).Config(), nothing, Run(1, 1, 1, 1)).needs


# What several commands share.


def _settings(folder: Path, overrides: Sequence[str]) -> Config:
    """The run's config with overrides; the defaults for an exported encoder that has no run folder."""
    from ssl_jax.cli import override

    found = (folder / "config.json").is_file()
    return resolve(override(from_json(run.read_config(folder)) if found else default(), overrides))


def _data(text: str, flag: str) -> Data:
    """Data as a flag names it."""
    path = Path(text)
    if text == "fashion_mnist":
        return Data()
    if text.startswith("tfds:"):
        return Data(name="tfds", path=text.removeprefix("tfds:"))
    if path.is_dir():
        return Data(name="folder", path=text)
    kinds = {".csv": "csv", ".tsv": "csv", ".npz": "npz"}
    if path.is_file() and path.suffix.lower() in kinds:
        return Data(name=kinds[path.suffix.lower()], path=text)
    found = "not found" if not path.exists() else f"unknown ending {path.suffix!r}"
    raise UserError(f"{flag}={text}: {found}; allowed: a folder, a .csv, .tsv or .npz file, fashion_mnist, tfds:NAME")


def _train_and_test(
    encoder: Encoder, config: Config, data: str, test: str
) -> tuple[Any, Any, list[str], list[str], str]:
    """((images, labels), (images, labels), test names, classes, what the test data is), resized for the encoder."""
    from ssl_jax.evaluate.subsets import holdout

    wanted = encoder.data(_data(data, "--data") if data else dataclasses.replace(config.data, limit=0))
    train = open_source(wanted)
    y, held = train.labels_as(train.classes, data or config.data.path or config.data.name), None
    what = "test split"
    if test:
        held, what = open_source(encoder.data(_data(test, "--test")), "all"), test
    else:
        with contextlib.suppress(NoPartError):
            held = open_source(wanted, "test")
    if held is None:
        kept, out = holdout(y, 0.2, seed=0)
        what = "20 % of the labelled images, held out (the encoder may have seen them, without labels)"
        images = train.arrays()
        names = [train.names[i] for i in out]
        return (images[kept], y[kept]), (images[out], y[out]), names, train.classes, what
    test_y = held.labels_as(train.classes, what)
    known = np.flatnonzero(test_y >= 0)
    names = [held.names[i] for i in known]
    return (train.arrays(), y), (held.arrays()[known], test_y[known]), names, train.classes, what


def _new(folder: Path, flag: str) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{flag}={folder}: exists already; allowed: a new folder")


def _write_csv(path: Path, header: list[str], rows: list[list[Any]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerows([header, *rows])
    run.write_bytes(path, text.getvalue().encode())


def _readable(encoder: Encoder, data: str) -> tuple[np.ndarray, list[str]]:
    """Images and names of all files that can be read, however few; the source names the others."""
    source = open_source(dataclasses.replace(encoder.data(_data(data, "--data")), max_bad_share=1.0), "all")
    images = source.arrays()
    good = [i for i in range(len(source)) if i not in source.replaced]  # a stand-in is another file's image
    return images[good], [source.names[i] for i in good]


def _save_classifier(folder: Path, classifier: Any, about: dict[str, Any]) -> None:
    import safetensors.numpy

    from ssl_jax.models import to_torch

    weights = to_torch(classifier.params["encoder"], classifier.stats)
    # torchvision's names for the classifying layer.
    weights["fc.weight"] = np.asarray(classifier.params["head"]["w"]).T
    weights["fc.bias"] = np.asarray(classifier.params["head"]["b"])
    packed = safetensors.numpy.save({k: np.ascontiguousarray(v) for k, v in weights.items()})
    run.write_bytes(folder / "classifier.safetensors", packed)
    run.write_json(folder / "classifier.json", about)


def _load_classifier(folder: Path) -> tuple[Any, Encoder, list[str]]:
    import safetensors.numpy

    from ssl_jax.evaluate.finetune import Classifier

    path = folder / "classifier.json"
    if not path.is_file():
        raise UserError(f"--workdir={folder}: no classifier.json; allowed: a folder made by `ssl-jax finetune`")
    about = json.loads(path.read_text())
    encoder = rebuild(about, folder / "classifier.safetensors")
    weights = safetensors.numpy.load_file(folder / "classifier.safetensors")
    head = {"w": weights["fc.weight"].T, "b": weights["fc.bias"]}
    params = {"encoder": encoder.params, "head": head}
    return Classifier(encoder, params, encoder.stats, about["chosen"]), encoder, about["classes"]
