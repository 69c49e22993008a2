"""What each command of `ssl-jax` does, as a function of plain values. Each can be called from Python as well."""

import contextlib
import dataclasses
import functools
import io
import os
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from ssl_jax import files
from ssl_jax.config import Config, method_module, method_names, resolve
from ssl_jax.data import Source, open_source
from ssl_jax.data import phantom as phantom_of
from ssl_jax.data.labelled import Labelled, labelled_part
from ssl_jax.encoder import Encoder, load_encoder, random_encoder
from ssl_jax.errors import BusyError, NoPartError, UserError, unknown
from ssl_jax.run_folder import RunFolder, StudyFolder
from ssl_jax.settings import data_of, settings_of

PROTOCOLS = ("knn", "linear", "finetune")
READ = ("window", "frontal")  # fields of config.data that a classifier's images must be read with, as in training


def start_jax() -> None:
    """JAX's compilation cache in the user's cache folder, unless the environment names another.

    And with the TPU compiler installed for `plan`, no search for a TPU on a machine that has only its processor.
    """
    if find_spec("libtpu") and "JAX_PLATFORMS" not in os.environ and not _accelerators():
        jax.config.update("jax_platforms", "cpu")
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        home = os.environ.get("XDG_CACHE_HOME") or str(Path("~/.cache").expanduser())
        jax.config.update("jax_compilation_cache_dir", str(Path(home) / "ssl_jax" / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _accelerators() -> list[Path]:
    return [path for name in ("accel*", "nvidia*", "vfio") for path in Path("/dev").glob(name)]


def pretrain(config: ConfigDict, workdir: str, cluster: bool = False) -> Encoder:
    from ssl_jax import parallel
    from ssl_jax.report.html import write_report
    from ssl_jax.train import fit

    parallel.join_processes(cluster)
    folder = Path(workdir)
    encoder = fit(resolve(config), folder)
    if parallel.is_main_process():
        print(f"encoder: {RunFolder(folder).encoder}\nreport:  {write_report(folder)}")
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
    from ssl_jax.evaluate.scores import interval, metrics
    from ssl_jax.evaluate.subsets import nested_subset, without_positive

    if protocol not in PROTOCOLS:
        raise unknown("--protocol", protocol, PROTOCOLS)
    if labels < 0 or seeds < 1:
        raise UserError(f"--labels={labels} --seeds={seeds}: allowed: labels 0 (all) or more, seeds 1 or more")
    folder = Path(workdir)
    encoder, config = load_encoder(folder), settings_of(folder, overrides)
    train, held, what = _train_and_test(encoder, config, data, test)
    y, classes, groups = train.labels, train.source.classes, train.source.groups
    draws = [nested_subset(y, labels, seed, groups) if labels else np.arange(len(y)) for seed in range(seeds)]
    for seed, chosen in enumerate(draws):
        if absent := without_positive(y[chosen], classes):
            print(f"draw {seed}: no image of {', '.join(absent)} among its {len(chosen)} labels")
    scores = _scores(encoder, config, protocol, train, draws, held.source.arrays())
    each = [metrics(s, held.labels, classes) for s in scores]
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
    out = RunFolder(folder).evaluation / f"{protocol}-{labels or 'all'}"
    more = {} if held.source.groups is None else {"groups": held.source.groups}
    names = np.array(held.source.names)
    files.write_npz(out.with_suffix(".npz"), scores=np.stack(scores), labels=held.labels, names=names, **more)
    files.write_json(out.with_suffix(".json"), made)
    print(f"{protocol}, {labels or 'all'} labels, {seeds} draw{'s' * (seeds > 1)}, {what}:")
    for name in numbers:
        half = made["interval"][name]
        print(f"  {name:20} {made['mean'][name]:.4f}" + (f" ± {half:.4f} (95 %)" if half is not None else ""))
    if each[0]["left_out"]:
        print(f"  left out, not to be judged on the test data: {', '.join(each[0]['left_out'])}")
    print(f"predictions: {out}.npz")
    return made


def _scores(
    encoder: Encoder,
    config: Config,
    protocol: str,
    train: Labelled,
    draws: Sequence[np.ndarray],
    test_images: np.ndarray,
) -> list[np.ndarray]:
    """Scores [N, K] of the test images, learnt from each draw of the training images."""
    from ssl_jax.evaluate.finetuning import finetune, predict
    from ssl_jax.evaluate.knn import knn_predict
    from ssl_jax.evaluate.linear import linear_probe

    used = np.unique(np.concatenate(draws))
    images, labels = train.source.take(used).arrays(), train.labels[used]
    patients = None if train.source.groups is None else train.source.groups[used]
    classes = len(train.source.classes)
    if protocol != "finetune":
        features, test_features = encoder.embed(images), encoder.embed(test_images)
    scores = []
    for seed, chosen in enumerate(draws):
        at = np.searchsorted(used, chosen)
        groups = None if patients is None else patients[at]
        if protocol == "knn":
            k, temperature = min(config.eval.knn_k, len(at)), config.eval.knn_temperature
            bank = (features[at], labels[at], test_features)
            votes = np.asarray(knn_predict(*bank, classes=classes, k=k, temperature=temperature))
            scores.append(_log_odds(votes) if train.source.multilabel else votes)
        elif protocol == "linear":
            probe = linear_probe(features[at], labels[at], classes=classes, seed=seed, groups=groups)
            scores.append(probe.scores(test_features))
        else:
            options: Any = {"classes": classes, "settings": config.finetune, "seed": seed, "groups": groups}
            scores.append(predict(finetune(encoder, images[at], labels[at], **options), test_images))
    return scores


def _log_odds(shares: np.ndarray) -> np.ndarray:
    shares = np.clip(shares, 1e-6, 1 - 1e-6)  # all neighbours of one mind are no certainty
    return np.log(shares) - np.log1p(-shares)


def study(config: ConfigDict, workdir: str, cells: str = "") -> None:
    """Pretrains every arm that needs it in workdir/pretrain/<arm>, then runs the cells; see `ssl_jax.study`.

    cells: "0/N" pretrains only, and several such processes divide the arms among them; "K/N" runs the K-th share of the
    cells from finished encoders (SystemExit(75), "try again later", if one is missing). "" does what is left of both,
    and writes the tables.
    """
    from ssl_jax import study as of
    from ssl_jax.report.html import write_report
    from ssl_jax.train import REQUEUE, fit

    resolved, folder, part = resolve(config), Path(workdir), _part(cells)
    needed = of.pretrainings(resolved)  # a mistake in any arm is told before the first one trains
    with StudyFolder(folder).lock(shared=part is not None):
        StudyFolder(folder).record_environment()
        homes = {(arm, i): StudyFolder(folder).pretraining(arm, i).path for arm, i in needed}
        unfinished = [home for home in homes.values() if not RunFolder(home).finished()]
        if part and part[0] and unfinished:
            print(f"ssl-jax: {unfinished[0]}: not pretrained yet; first run the same with --cells=0/{part[1]}")
            raise SystemExit(REQUEUE)
        train = open_source(resolved.data)
        size, channels = min(train.shape[:2]), train.shape[2]
        test = of.open_test(resolved, size, channels)  # now: a mistake here would else be told after the pretraining

        def pretrained(arm: str, number: int) -> Encoder:
            made = needed[arm, number]
            own = made.data != resolved.data  # pairs, say, or fewer images
            return fit(made, homes[arm, number], open_source(made.data) if own else train)

        if part and not part[0]:
            for place, home in homes.items():
                try:
                    pretrained(*place)
                except BusyError:
                    print(f"{home}: left to the process that is working on it")
            return

        def get_encoder(arm: str, arm_config: Config, number: int) -> Encoder:
            if of.from_scratch(resolved.study.arms[arm]):
                return random_encoder(arm_config.model, size, channels, number)
            return pretrained(arm, number)

        given: Any = {"get_encoder": get_encoder, "train": train, "test": test, "part": part}
        of.run_study(resolved, folder, **given, log=functools.partial(print, flush=True))
        if not part:
            print(StudyFolder(folder).summary_md.read_text())
            print(f"report: {write_report(folder)}")


def _part(cells: str) -> tuple[int, int] | None:
    if not cells:
        return None
    found = re.fullmatch(r"(\d+)/(\d+)", cells)
    if not found or not 0 <= int(found[1]) <= int(found[2]) or found[2] == "0":
        raise UserError(f"--cells={cells}: allowed: K/N with K from 1 to N, or 0/N, which pretrains only")
    return int(found[1]), int(found[2])


def finetune(
    workdir: str, data: str, out: str, test: str = "", seed: int = 0, overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """Writes out/classifier.safetensors and out/classifier.json; prints the validation and the test score.

    With a test also out/test.csv, the prediction of every image, and of several labels an image reliability.png.
    """
    from ssl_jax.classifier import save_classifier
    from ssl_jax.evaluate.finetuning import finetune as fit_classifier
    from ssl_jax.evaluate.finetuning import predict as scores_of
    from ssl_jax.evaluate.tested import judge, table, thresholds_of
    from ssl_jax.report.figures import reliability

    encoder, config = load_encoder(workdir), settings_of(Path(workdir), overrides)
    folder = Path(out)
    _new(folder, "--out")
    source = open_source(encoder.data(data_of(data, "--data", config.data)))
    train, classes = labelled_part(source, source, data), source.classes
    held = None
    if test:  # before training, or a wrong name of a class would cost all of it
        held = labelled_part(_open_test(encoder, config, test, data), source, test)
    print(f"fine-tuning on {len(train.labels)} labelled images, classes: {', '.join(classes)}", flush=True)
    options: Any = {"classes": len(classes), "settings": config.finetune, "seed": seed, "groups": train.source.groups}
    classifier = fit_classifier(encoder, train.source.arrays(), train.labels, **options)
    about = {**encoder.about, "classes": classes, "finetune": dataclasses.asdict(config.finetune), "seed": seed}
    about |= {"chosen": classifier.chosen, "multilabel": source.multilabel}
    about["read"] = {k: v for k, v in dataclasses.asdict(config.data).items() if k in READ}
    if source.multilabel and classifier.held_out:
        about["thresholds"] = thresholds_of(*classifier.held_out, classes, config.finetune.sensitivity)
    save_classifier(folder, classifier, about)
    if held:
        scores = scores_of(classifier, held.source.arrays())
        _write_predictions(folder / "test.csv", held.source, scores, classes, source.multilabel)
        more: Any = {"groups": held.source.groups, "thresholds": about.get("thresholds", {})}
        about["test"] = judge(scores, held.labels, classes, **more)
        files.write_json(folder / "classifier.json", about)
    for name, value in {**about["chosen"], **about.get("test", {})}.items():
        if isinstance(value, float):
            print(f"  {name:20} {value:.4g}")
    if held and source.multilabel:
        print("\n".join(table(about["test"])))
        if about["test"]["left_out"]:
            print(f"  left out, not to be judged on the test data: {', '.join(about['test']['left_out'])}")
        title = "Phantoms: reliability" if phantom_of(data_of(test, "--test", config.data)) else "Reliability"
        reliability(about["test"]["reliability"], folder / "reliability.png", title=title)
    print(f"classifier: {out}")
    return about


def predict(workdir: str, data: str, out: str, overrides: Sequence[str] = ()) -> None:
    """Writes a CSV: path, patient where the data tell it, then one column of probability a class; of one label an
    image before them the predicted class."""
    from ssl_jax.classifier import load_classifier
    from ssl_jax.evaluate.finetuning import predict as scores_of

    classifier, about = load_classifier(Path(workdir))
    source = _readable(classifier.encoder, data, settings_of(Path(workdir), overrides, about.get("read", {})))
    scores = scores_of(classifier, source.arrays())
    _write_predictions(Path(out), source, scores, about["classes"], about.get("multilabel", False))
    print(f"{len(scores)} predictions: {out}")


def embed(workdir: str, data: str, out: str, overrides: Sequence[str] = ()) -> None:
    """Writes .npz (embeddings float32 [N, D], names [N]), .csv or .parquet (name, then one column a dimension)."""
    path = Path(out)
    if path.suffix not in (".npz", ".csv", ".parquet"):
        raise UserError(f"--out={out}: unknown ending {path.suffix!r}; allowed: .npz, .csv, .parquet")
    encoder = load_encoder(workdir)
    source = _readable(encoder, data, settings_of(Path(workdir), overrides))
    features, names = encoder.embed(source.arrays()), source.names
    columns = ["file", *(f"e{i}" for i in range(features.shape[1]))]
    if path.suffix == ".npz":
        files.write_npz(path, embeddings=features, names=np.array(names))
    elif path.suffix == ".csv":
        rows = [[name, *(f"{v:.7g}" for v in f)] for name, f in zip(names, features, strict=True)]
        files.write_csv(path, columns, rows, end="\r\n")
    else:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise UserError(f"--out={out}: needs pyarrow: pip install pyarrow (or write .npz or .csv)") from None
        packed = io.BytesIO()
        table = pyarrow.table([names, *features.T.copy()], names=columns)
        pyarrow.parquet.write_table(table, packed)
        files.write_bytes(path, packed.getvalue())
    print(f"{len(features)} embeddings of {features.shape[1]} dimensions: {out}")


def views(config: ConfigDict, out: str, images: int = 6, masks: str = "") -> None:
    from ssl_jax.audit.command import kind
    from ssl_jax.audit.masks import find_lesions, open_masks
    from ssl_jax.augment import resolve_views
    from ssl_jax.augment.sheet import view_sheet

    resolved, count = resolve(config), max(1, images)
    seed = resolved.train.seed
    source = open_source(dataclasses.replace(resolved.data, cache=""))  # a few images: no reason to decode all
    chosen: Sequence[int] = np.random.default_rng(seed).permutation(len(source))[:count].tolist()
    outlines = None
    if masks:
        lesions, _ = find_lesions(source, open_masks(masks, source, resolved.data), count, seed)
        chosen = list(dict.fromkeys(lesion.image for lesion in lesions))
        outlines = [{e.name: e.mask for e in lesions if e.image == i} for i in chosen]
    # Every method draws its views from the same two; one-view methods use the first.
    drawn = resolve_views(resolved.augment, 2, min(source.shape[:2]))
    preset = resolved.augment.preset
    title = f"{kind(resolved.data)}images, preset {preset}{', changed' * bool(resolved.augment.changes())}"
    loaded = source.load_many(chosen)
    view_sheet(loaded, drawn, Path(out), seed=seed, outlines=outlines, title=title)
    print(f"views: {out}")


def phantom(out: str, patients: int = 10_000, seed: int = 0, size: int = 128, test: int = 300) -> None:
    from ssl_jax.phantom import write
    from ssl_jax.progress import counting

    with counting("phantoms", "patients") as progress:
        numbers = {"patients": patients, "seed": seed, "size": size, "test": test}
        count = write(Path(out), **numbers, workers=os.cpu_count() or 1, progress=progress)
    print(f"{count} phantom radiographs: {out}")


def plan(
    config: ConfigDict, topology: str = "", sweep: str = "", images: int = 0, classes: int = 0, out: str = ""
) -> None:
    from ssl_jax.plan import command

    command(resolve(config), topology, sweep, images, classes, out)


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
    from ssl_jax.methods.base import RunInfo
    from ssl_jax.network import Network

    nothing: Any = Network(lambda *_: ({}, {}), lambda *_, **__: (jax.numpy.zeros(0), {}), patch=1)
    return "label" in method_module(name).make(method_module(name).Config(), nothing, RunInfo(1, 1, 1, 1)).needs


# What several commands share.


def _open_test(encoder: Encoder, config: Config, test: str, data: str) -> Source:
    """The images that --test names: all of them, or the test part of data that --data has trained on."""
    wanted = encoder.data(data_of(test, "--test", config.data))
    return open_source(wanted, "test" if wanted.name == "chexpert" or test == data else "all")


def _train_and_test(encoder: Encoder, config: Config, data: str, test: str) -> tuple[Labelled, Labelled, str]:
    """(training images, test images, what the test images are), in the size that the encoder wants."""
    from ssl_jax.evaluate.subsets import holdout

    wanted = encoder.data(data_of(data, "--data", config.data) if data else dataclasses.replace(config.data, limit=0))
    source = open_source(wanted)
    train, held, what = labelled_part(source, source, data or config.data.path or config.data.name), None, "test split"
    if test:
        held, what = _open_test(encoder, config, test, data), test
    else:
        with contextlib.suppress(NoPartError):
            held = open_source(wanted, "test")
    if held is not None:
        return train, labelled_part(held, source, what), what
    parts = holdout(train.labels, 0.2, seed=0, groups=train.source.groups)
    kept, out = (Labelled(train.source.take(part), train.labels[part]) for part in parts)
    return kept, out, "20 % of the labelled images, held out (the encoder may have seen them, without labels)"


def _new(folder: Path, flag: str) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{flag}={folder}: exists already; allowed: a new folder")


def _write_predictions(path: Path, source: Source, scores: np.ndarray, classes: list[str], multilabel: bool) -> None:
    from ssl_jax.classifier import probabilities

    odds = probabilities(scores, multilabel)
    columns: dict[str, Sequence[Any]] = {"path": source.names}
    if source.groups is not None:
        columns["patient"] = source.groups.tolist()
    if not multilabel:
        columns["predicted"] = [classes[i] for i in odds.argmax(axis=1)]
    # Every digit: rounded, probabilities near 0 and 1 would tie, and their AUC and thresholds would not be the same.
    rows = [[*about, *p] for *about, p in zip(*columns.values(), odds.tolist(), strict=True)]
    files.write_csv(path, [*columns, *classes], rows, end="\r\n")


def _readable(encoder: Encoder, data: str, config: Config) -> Source:
    """All files that can be read, however few; the source names the others."""
    wanted = encoder.data(data_of(data, "--data", config.data))
    # Columns of labels that the training data had may be missing here, and are not needed.
    source = open_source(dataclasses.replace(wanted, labels=(), max_bad_share=1.0), "all")
    source.forget_labels()
    source.arrays()
    good = [i for i in range(len(source)) if i not in source.replaced]  # a stand-in is another file's image
    return source if len(good) == len(source) else source.take(good)
