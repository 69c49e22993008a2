"""The commands of `ssl-jax`, each a function of a `Config` or plain values that can also be called from Python."""

import contextlib
import dataclasses
import functools
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssl_jax import files, interrupts
from ssl_jax.config import Config, Data, Model, method_module, method_names
from ssl_jax.data import Source, open_source
from ssl_jax.data import phantom as phantom_of
from ssl_jax.data.labelled import Labelled, labelled_part
from ssl_jax.encoder import Encoder, random_encoder
from ssl_jax.errors import BusyError, NoPartError, UserError, unknown
from ssl_jax.run_folder import RunFolder, StudyFolder
from ssl_jax.settings import data_of, images_only, settings_of
from ssl_jax.weights import weights as weights


def pretrain(config: Config, workdir: str, cluster: bool = False, dry_run: bool = False) -> Encoder | None:
    from ssl_jax import parallel
    from ssl_jax.report.html import write_report
    from ssl_jax.train import fit

    parallel.join_processes(cluster)
    interrupts.take_back()
    folder = Path(workdir)
    if dry_run:
        from ssl_jax import dry_runs

        _print_lines(dry_runs.pretraining(config, folder, open_source(config.data)))
        return None
    encoder = fit(config, folder)
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
    unlabelled: str = "",
    step: int | str = "",
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Writes evaluation/<protocol>-<labels>.json and .npz (scores of all test images); prints the means, and those of
    what costs nothing on the same images. See `ssl_jax.evaluation`.

    On other data or with other settings than the run's own, the names end with the data and a hash of what differs; of
    a checkpoint that is not the finished run's last (step: its number, or "latest"), with its step. Returns the content
    of the .json file.

    unlabelled: images to learn from as well; "": all training images, if the protocol or config.finetune.unlabelled
    says so.
    """
    from ssl_jax import evaluation
    from ssl_jax.evaluate.selftraining import unlabelled_of
    from ssl_jax.load import load_with_settings

    if protocol not in evaluation.PROTOCOLS:
        raise unknown("--protocol", protocol, evaluation.PROTOCOLS)
    if unlabelled and protocol == "linear":
        rest = ", ".join(other for other in evaluation.PROTOCOLS if other != protocol)
        raise UserError(f"--unlabelled={unlabelled}: not with --protocol=linear; allowed: {rest}")
    if labels < 0:
        raise UserError(f"--labels={labels}: allowed: 0 (all) or more")
    if seeds < 1:
        raise UserError(f"--seeds={seeds}: allowed: 1 or more")
    folder = Path(workdir)
    (encoder, config), own = load_with_settings(workdir, step, overrides), settings_of(folder, ())
    others = None
    if unlabelled:
        config = dataclasses.replace(config, finetune=dataclasses.replace(config.finetune, unlabelled="all"))
        others = unlabelled_of(encoder, config, unlabelled)
    train, held_out, description = _train_and_test(encoder, config, data, test)
    specs = _data_spec(encoder, config, data), data_of(test, "--test", config.data) if test else None
    usual = evaluation.conditions(own, protocol, _data_spec(encoder, own, ""), None)
    beside: Any = {"step": _other_step(encoder, folder) if step else 0}
    beside["unlabelled"] = data_of(unlabelled, "--unlabelled", config.data) if unlabelled else None
    conditions = evaluation.conditions(config, protocol, *specs, **beside)
    name = f"{protocol}-{labels or 'all'}{evaluation.suffix(usual, conditions)}"
    about = {"test": description, "conditions": conditions}
    options: Any = {"labels": labels, "seeds": seeds, "about": about, "path": RunFolder(folder).evaluation / name}
    return evaluation.evaluate(encoder, config, protocol, train, held_out, **options, others=others)


def study(config: Config, workdir: str, cells: str = "", dry_run: bool = False) -> None:
    """Pretrains the arms that need it in workdir/pretrain/<arm>, then runs the cells; see `ssl_jax.study`.

    cells: "0/N" only pretrains, and several such processes share the arms. "K/N" runs the K-th of N parts of the cells
    with encoders that are already there; if one is missing, it raises SystemExit(75), "try again later". "" does
    everything that is left and writes the tables.
    """
    from ssl_jax import study as studies
    from ssl_jax.report.html import write_report
    from ssl_jax.train import REQUEUE, fit

    folder, part = StudyFolder(workdir), _parse_part(cells)
    pretrainings = studies.pretrainings(config)  # a mistake in any arm is an error before the first one trains
    if dry_run:
        from ssl_jax import dry_runs

        given = studies.encoders_of_runs(config, open_source(config.data))
        _print_lines(dry_runs.study(config, folder, pretrainings, given))
        return
    with folder.lock(shared=part is not None):
        folder.record_environment()
        runs = {key: folder.pretraining(*key) for key in pretrainings}
        unfinished = [run.path for run in runs.values() if not run.finished()]
        if part and part[0] and unfinished:
            print(f"ssl-jax: {unfinished[0]}: not pretrained yet; first run the same command with --cells=0/{part[1]}")
            raise SystemExit(REQUEUE)
        train = open_source(config.data)
        size, channels = min(train.shape[:2]), train.shape[2]
        test = studies.open_test(config, size, channels)  # before pretraining, so that mistakes show up now
        given = studies.encoders_of_runs(config, train)

        def pretrained(arm: str, number: int) -> Encoder:
            run = pretrainings[arm, number]
            # An arm may change the data: pairs, say, or fewer images.
            return fit(run, runs[arm, number].path, train if run.data == config.data else open_source(run.data))

        if part and not part[0]:
            for arm, number in runs:
                try:
                    pretrained(arm, number)
                except BusyError:
                    print(f"{runs[arm, number].path}: another process is working on it; skipped")
            return

        def get_encoder(arm: str, arm_config: Config, number: int) -> Encoder:
            if studies.from_scratch(config.study.arms[arm]):
                return random_encoder(arm_config.model, size, channels, number)
            return given[arm] if arm in given else pretrained(arm, number)

        log = functools.partial(print, flush=True)
        studies.run_study(config, folder.path, get_encoder=get_encoder, train=train, test=test, log=log, part=part)
        if not part:
            print(folder.summary_md.read_text())
            print(f"report: {write_report(folder.path)}")


def sweep(
    config: Config, workdir: str, over: str, cells: str = "", dry_run: bool = False, **more: Any
) -> dict[str, Any]:
    """See `ssl_jax.sweep.command`. cells: "K/N" runs the K-th of N shares of the trials."""
    from ssl_jax.sweep import command

    part = _parse_part(cells)
    if part and not part[0]:
        raise UserError(f"--cells={cells}: allowed: K/N with K from 1 to N")
    if dry_run:
        _print_lines(command.dry_run(config, workdir, over, **more))
        return {}
    return command.sweep(config, workdir, over, part=part, **more)


def _parse_part(cells: str) -> tuple[int, int] | None:
    if not cells:
        return None
    match = re.fullmatch(r"(\d+)/(\d+)", cells)
    if not match or not 0 <= int(match[1]) <= int(match[2]) or match[2] == "0":
        raise UserError(f"--cells={cells}: allowed: K/N with K from 1 to N, or 0/N, which only pretrains")
    return int(match[1]), int(match[2])


def finetune(
    workdir: str,
    data: str,
    out: str,
    test: str = "",
    unlabelled: str = "",
    seed: int = 0,
    step: int | str = "",
    dry_run: bool = False,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Writes out/classifier.safetensors and, last, out/classifier.json; prints the validation and the test score, and
    whether training was probably too short.

    With test data it also writes out/test.csv, the prediction for every image, and for multi-label data
    out/reliability.png. `out` is a new folder, or one in which an earlier call was killed: it goes on from there.
    Returns the content of classifier.json.

    unlabelled: images to learn from beside the labelled ones; "": those of the run, if config.finetune.unlabelled=all.
    """
    from ssl_jax.classifier import READ, STATE, begin_classifier, save_about, save_weights
    from ssl_jax.evaluate.classification_report import choose_thresholds
    from ssl_jax.evaluate.finetuning import loss_curve, still_falling
    from ssl_jax.evaluate.selftraining import train_classifier, unlabelled_of
    from ssl_jax.load import load_with_settings
    from ssl_jax.outputs import print_numbers, trainings_watched, write_test

    encoder, config = load_with_settings(workdir, step, overrides)
    if unlabelled:
        config = dataclasses.replace(config, finetune=dataclasses.replace(config.finetune, unlabelled="all"))
    folder = Path(out)
    if not dry_run:
        begin_classifier(folder, "--out")
    source = open_source(encoder.data(data_of(data, "--data", config.data)))
    train, classes = labelled_part(source, source, data), source.classes
    held_out = None
    if test:  # before training, which a misspelt class would otherwise waste
        held_out = labelled_part(_open_test(encoder, config, test, data), source, test)
    others: Any = unlabelled_of(encoder, config, unlabelled) if config.finetune.unlabelled == "all" else None
    if dry_run:
        from ssl_jax import dry_runs

        _print_lines(dry_runs.finetuning_run(encoder, config, train, folder))
        return {}
    print(f"fine-tuning on {len(train.labels)} labelled images, classes: {', '.join(classes)}", flush=True)
    options: Any = {"classes": len(classes), "settings": config.finetune, "seed": seed, "groups": train.source.groups}
    if others is not None:
        teacher = "the classifier" if config.finetune.teacher == "finetuned" else "labels spread over their neighbours"
        print(f"then on {len(others.images)} images without a label, taught by {teacher}", flush=True)
    known = encoder, train.source.all_images(), train.labels
    with trainings_watched(config.finetune, len(train.labels)) as watch:
        classifier = train_classifier(*known, others, **options, watch=watch, saved=folder / STATE)
    about = {**encoder.about, "classes": classes, "finetune": config.finetune.inputs(), "seed": seed}
    about |= {"chosen": classifier.chosen, "multilabel": source.multilabel, "data": data, "test_data": test}
    about["read"] = {k: v for k, v in dataclasses.asdict(config.data).items() if k in READ}
    if source.multilabel and classifier.held_out:
        about["thresholds"] = choose_thresholds(*classifier.held_out, classes, config.finetune.sensitivity)
    save_weights(folder, classifier)
    print_numbers(about["chosen"])
    if others is not None:
        about |= {"unlabelled": unlabelled, "unlabelled_images": len(others.images)}
        print("the student is used" if classifier.chosen["student"] else "the teacher is used: its student is worse")
    about["loss"] = loss_curve(classifier)
    if reason := still_falling(about["loss"]):
        about["undertrained"] = reason
        print(f"it looks undertrained: {reason}; try more --config.finetune.steps, or a higher --config.finetune.lr")
    if held_out:
        title = "Phantoms: reliability" if phantom_of(data_of(test, "--test", config.data)) else "Reliability"
        about["test"] = write_test(classifier, held_out, classes, about.get("thresholds", {}), folder, title)
    save_about(folder, about)
    shutil.rmtree(folder / STATE, ignore_errors=True)
    print(f"classifier: {out}")
    return about


def predict(workdir: str, data: str, out: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Writes the probabilities of each class as a CSV or JSON file; see `outputs.write_predictions`.

    Returns the number of predictions, the classes and the path.
    """
    from ssl_jax.classifier import load_classifier
    from ssl_jax.outputs import predictions, write_predictions

    path = Path(out)
    _require_ending(path, "--out", (".csv", ".json"))
    classifier = load_classifier(workdir)
    config = settings_of(Path(workdir), overrides, classifier.about.get("read", {}))
    source, _ = _open_readable(classifier.encoder, data, config)
    classes = classifier.classes
    count = write_predictions(path, source, predictions(classifier, source), classes, classifier.multilabel)
    print(f"{count} predictions: {out}")
    return {"predictions": count, "classes": classes, "out": out}


def embed(
    workdir: str, data: str, out: str, step: int | str = "", features: str = "cls", overrides: Sequence[str] = ()
) -> None:
    """See `ssl_jax.embedding`."""
    from ssl_jax import embedding

    embedding.embed(workdir, data, Path(out), step, features, overrides, _open_readable)


def export(workdir: str, format: str, out: str, **more: Any) -> dict[str, Any]:
    """See `ssl_jax.exporting.command`."""
    from ssl_jax.exporting import command

    return command.export(workdir, format, out, **more)


def check(
    data: str, workdir: str = "", test: str = "", out: str = "check", overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """See `ssl_jax.check.command`."""
    from ssl_jax.check import command

    return command.check(data, workdir, test, out, overrides)


def search(
    workdir: str, query: str, data: str, out: str = "neighbours.html", k: int = 10, overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """See `ssl_jax.searching`."""
    from ssl_jax import searching

    return searching.search(workdir, query, data, out, k, overrides)


def compare(runs: Sequence[str], out: str = "compare.html") -> dict[str, Any]:
    """See `ssl_jax.comparing`. runs: folders; or one text, separated by commas."""
    from ssl_jax import comparing

    return comparing.compare(runs.split(",") if isinstance(runs, str) else runs, out)


def select(
    workdir: str,
    labels: int = 50,
    out: str = "to_label.csv",
    data: str = "",
    have: str = "",
    strategy: str = "typical",
    page: bool = False,
    classes: str = "",
    seed: int = 0,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Writes a table of the images to label next; see `ssl_jax.to_label.select`."""
    from ssl_jax import to_label

    options: Any = {"have": have, "data": data, "strategy": strategy, "classes": classes, "page": page, "seed": seed}
    return to_label.select(workdir, labels, out, **options, overrides=overrides)


def views(config: Config, out: str, images: int = 6, masks: str = "") -> None:
    from ssl_jax.audit.command import kind
    from ssl_jax.audit.masks import find_lesions, open_masks
    from ssl_jax.augment import preset_of, resolve_views
    from ssl_jax.augment.sheet import view_sheet
    from ssl_jax.data.crops import draws

    count, seed = max(1, images), config.train.seed
    source = open_source(dataclasses.replace(config.data, cache=""))  # filling a cache would decode every image
    indices: Sequence[int] = np.random.default_rng(seed).permutation(len(source))[:count].tolist()
    outlines = None
    if masks:
        lesions, _ = find_lesions(source, open_masks(masks, source, config.data), count, seed)
        indices = list(dict.fromkeys(lesion.image for lesion in lesions))
        outlines = [{e.name: e.mask for e in lesions if e.image == i} for i in indices]
    # Every method draws its views from these two; methods with a single view use the first.
    size = min(source.shape[:2])
    specs, preset = resolve_views(config.augment, 2, size), preset_of(config.augment.preset, size)
    title = f"{kind(config.data)}images, preset {preset}{', changed' * bool(config.augment.changes())}"
    more: Any = {"names": [source.names[i] for i in indices], "outlines": outlines, "title": title}
    cuts = [] if outlines else draws(config, source, specs, indices)  # masks lie on the test image
    view_sheet(source.load_many(indices), specs, Path(out), seed=seed, cuts=cuts, **more)
    print(f"views: {out}")


def phantom(out: str, patients: int = 10_000, seed: int = 0, size: int = 128, test: int = 300) -> None:
    from ssl_jax.phantom import write
    from ssl_jax.progress import counting

    with counting("phantoms", "patients") as progress:
        numbers = {"patients": patients, "seed": seed, "size": size, "test": test}
        count = write(Path(out), **numbers, workers=os.cpu_count() or 1, progress=progress)
    print(f"{count} phantom radiographs: {out}")


def plan(config: Config, topology: str = "", sweep: str = "", images: int = 0, classes: int = 0, out: str = "") -> None:
    from ssl_jax.plan import command

    command(config, topology, sweep, images, classes, out)


def report(workdir: str, out: str = "") -> None:
    from ssl_jax.report.html import write_report

    print(f"report: {write_report(Path(workdir), Path(out) if out else None)}")


def audit(
    lesions: bool = False,
    invariance: bool = False,
    config: Config | None = None,
    masks: str = "",
    workdir: str = "",
    data: str = "",
    out: str = "audit",
    images: int = 200,
) -> None:
    """Runs one audit or both; see `ssl_jax.audit.command`."""
    from ssl_jax.audit import command

    if not lesions and not invariance:
        raise UserError("audit: nothing to do; use --lesions, --invariance or both")
    if images < 1:
        raise UserError(f"--images={images}: allowed: 1 or more")
    if lesions and not (config and masks):
        raise UserError(f"--{'masks' if config else 'config'}: missing; `ssl-jax audit --lesions` needs it")
    if lesions and config:
        command.lesions(config, masks, out, images)
    if invariance:
        command.invariance(config or None, workdir, data, out, images)


def methods() -> list[dict[str, str]]:
    """Prints a table of the methods; returns its rows."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table, rows = Table(box=None, pad_edge=False), []
    for column in ("name", "what it does", "source", "needs"):
        table.add_column(column, overflow="fold", no_wrap=column in ("name", "source"))
    for name in method_names():
        try:
            summary, _, rest = (method_module(name).__doc__ or "").partition("\n\n")
            url = re.search(r"https://(\S*[^\s.,;)])", rest)
            row = (" ".join(summary.split()), url[1] if url else "", "labels" if needs_labels(name) else "images")
        except UserError as error:  # another package's method that is broken
            row = (str(error), "", "")
        table.add_row(name, *map(escape, row))
        rows.append(dict(zip(("name", "summary", "source", "needs"), (name, *row))))
    Console().print(table)
    return rows


def needs_labels(method: str) -> bool:
    from ssl_jax.methods.base import RunInfo
    from ssl_jax.models import build_encoder

    module = method_module(method)
    encoder = build_encoder(Model(name="vit_tiny"), channels=3, size=32)  # some methods accept nothing but a ViT
    return "label" in module.make(module.Config(), encoder, RunInfo(steps=1, epoch=1, examples=1, classes=1)).needs


# Shared by several commands.


def _print_lines(lines: Iterable[str]) -> None:
    for line in lines:
        print(line, flush=True)


def _other_step(encoder: Encoder, folder: Path) -> int:
    """The step of an encoder that is not the one which the run has exported; else 0."""
    exported = files.read_json(RunFolder(folder).encoder / "encoder.json").get("step")
    return 0 if encoder.about["step"] == exported else encoder.about["step"]


def _open_test(encoder: Encoder, config: Config, test: str, data: str) -> Source:
    """The images that --test names: the test part of CheXpert and of the data that --data names, all of other data."""
    spec = encoder.data(data_of(test, "--test", config.data))
    return open_source(spec, "test" if spec.name == "chexpert" or test == data else "all")


def _data_spec(encoder: Encoder, config: Config, data: str) -> Data:
    return encoder.data(data_of(data, "--data", config.data) if data else dataclasses.replace(config.data, limit=0))


def _train_and_test(encoder: Encoder, config: Config, data: str, test: str) -> tuple[Labelled, Labelled, str]:
    """(training images, test images, description of the test images), in the size that the encoder takes."""
    from ssl_jax.evaluate.subsets import without_test_part

    spec = _data_spec(encoder, config, data)
    source = open_source(spec)
    train = labelled_part(source, source, data or config.data.path or config.data.name)
    if test:
        return train, labelled_part(_open_test(encoder, config, test, data), source, test), test
    with contextlib.suppress(NoPartError):
        description = "test split"
        return train, labelled_part(open_source(spec, "test"), source, description), description
    kept, held_out = without_test_part(train)
    return kept, held_out, "20 % of the labelled images, held out (pretraining may have seen them, without labels)"


def _require_ending(path: Path, flag: str, endings: Sequence[str]) -> None:
    if path.suffix not in endings:
        raise UserError(f"{flag}={path}: unknown ending {path.suffix!r}; allowed: {', '.join(endings)}")
    if path.is_dir():
        raise UserError(f"{flag}={path}: is a folder; allowed: the path of a file")


def _open_readable(
    encoder: Encoder, data: str, config: Config, labelled: bool = False
) -> tuple[Source, np.ndarray | None]:
    """All images, and with `labelled` their labels, if there are any. Nothing has been read yet: those that cannot be
    read, however many, have a stand-in (`Source.replaced`), and are logged when they are reached."""
    spec = encoder.data(data_of(data, "--data", config.data))
    unlabelled = images_only(spec)
    try:
        source = open_source(dataclasses.replace(unlabelled, labels=spec.labels) if labelled else unlabelled, "all")
    except UserError as error:
        if not str(error).startswith("config.data.labels"):
            raise
        print(f"no labels: {error}")
        source = open_source(unlabelled, "all")
    labels = source.labels if labelled else None
    source.forget_labels()  # so that any image may stand in for a damaged one
    return source, labels
