"""The label-efficiency study: arms x label counts x seeds, every arm on the same draw of labels.

    cells/<arm>/<labels>/<seed>.json   scores, choices, key          ... .npz   test scores, indices of the labels
    config.json, study.json            options; classes and their frequencies
    test.npz                           labels, file names and patients of the test images
    results.csv   one row a cell                                     summary.csv, summary.md   means and differences
    curve.png     score against label count                          gain_by_class.png, classes.csv   gains by class

A cell that is finished stays finished until something that it depends on changes: its `key` is a hash of all of that.
"""

import dataclasses
import hashlib
import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from ssl_jax.config import Config, Data, Finetune, Study, merge, to_json
from ssl_jax.data import open_source, phantom
from ssl_jax.data.labelled import labelled_part
from ssl_jax.errors import NoPartError, UserError, unknown
from ssl_jax.evaluate.finetuning import finetune, predict
from ssl_jax.evaluate.linear import linear_probe
from ssl_jax.evaluate.scores import metrics
from ssl_jax.evaluate.subsets import labelled, nested_subset
from ssl_jax.files import write_json, write_npz
from ssl_jax.report.summary import write_all, write_tables
from ssl_jax.report.tables import Cell, Row
from ssl_jax.run_folder import RunFolder, StudyFolder

if TYPE_CHECKING:
    from ssl_jax.data.source import Source
    from ssl_jax.encoder import Encoder

VERSION = 1  # of what a cell does; raise it when a change to the code changes its numbers
SHORT = {"top1": "top-1", "macro_auc": "macro AUC"}  # what is told of a cell as it ends


class Place(NamedTuple):
    """Which cell."""

    arm: str
    labels: int
    seed: int


Labelled = tuple[np.ndarray, np.ndarray, np.ndarray | None]  # images, labels and groups of a cell


class Drawn(NamedTuple):
    """All labelled images that the draws take: images, labels and groups are those of indices `used`."""

    used: np.ndarray
    images: np.ndarray
    labels: np.ndarray
    groups: np.ndarray | None
    draws: Mapping[tuple[int, int], np.ndarray]  # (label count, seed) -> indices among all training images

    def at(self, place: Place) -> Labelled:
        chosen = np.searchsorted(self.used, self.draws[place.labels, place.seed])
        return self.images[chosen], self.labels[chosen], None if self.groups is None else self.groups[chosen]


def from_scratch(changes: Mapping[str, Any]) -> bool:
    """Whether an arm starts from random initialisation: it changes nothing, or nothing but how it is fine-tuned."""
    return set(changes) <= {"finetune"}


def arms_of(config: Config) -> dict[str, Config]:
    """The config of each arm. UserError for a mistake in any of them."""
    if not config.study.arms:
        raise UserError("config.study.arms: empty; allowed: a mapping of arms, as in configs/study_fashion_mnist.py")
    arms = {arm: merge(config, changes) for arm, changes in config.study.arms.items()}
    if config.study.baseline not in arms:
        raise unknown("config.study.baseline", config.study.baseline, arms)
    return arms


def pretrainings(config: Config) -> dict[tuple[str, int], Config]:
    """(arm, number) -> config of every pretraining that the study needs; they differ by their seed alone."""
    found = {}
    for arm, made in arms_of(config).items():
        if not from_scratch(config.study.arms[arm]):
            for i in range(min(config.study.pretrainings, config.study.seeds)):
                found[arm, i] = dataclasses.replace(
                    made, train=dataclasses.replace(made.train, seed=made.train.seed + i)
                )
    return found


def plan(study: Study, part: tuple[int, int] | None = None) -> list[Place]:
    """The cells in the order in which they are run, seeds outermost; of part (k, n), k from 1 to n, its share alone.

    Cells are numbered label count by label count and dealt out in turns, so that each part has its share of the long
    ones.
    """
    k, n = part or (1, 1)
    arms = sorted(study.arms, key=lambda arm: arm != study.baseline)  # the baseline first, also in tables
    numbered = [Place(a, c, s) for c, s, a in itertools.product(study.labels, range(study.seeds), arms)]
    return sorted(numbered[k - 1 :: n], key=lambda place: place.seed)


# How images are read. Everything else in config.data says which, and what is known of them.
READING = ("size", "channels", "window", "cache", "workers", "max_bad_share")


def data_of_test(config: Config) -> Data:
    """The test part of config.data, or data of another path, with all that config.study.test says differently.

    Data of another kind (`name`) are only read like config.data: their columns, say, are others.
    """
    test, data, start = config.study.test, config.data, Study().test
    said = {key.name: getattr(test, key.name) for key in dataclasses.fields(Data)}
    said = {key: value for key, value in said.items() if value != getattr(start, key)}
    if test.name in ("", data.name):
        base = dataclasses.replace(data, split=start.split, limit=0, pairs="")
    else:
        base = dataclasses.replace(start, **{key: getattr(data, key) for key in READING})
    return dataclasses.replace(base, **said)


def open_test(config: Config, size: int, channels: int) -> "Source":
    """The images of `data_of_test`: their test part. Of data that are not config.data's and have none, all."""
    wanted = dataclasses.replace(data_of_test(config), size=size, channels=channels)
    try:
        return open_source(wanted)
    except NoPartError:
        if (wanted.name, wanted.path) == (config.data.name, config.data.path):
            raise
        return open_source(wanted, "all")


def run_study(
    config: Config,
    workdir: Path,
    *,
    get_encoder: Callable[[str, Config, int], "Encoder"],
    train: "Source",
    test: "Source",
    log: Callable[[str], None],
    part: tuple[int, int] | None = None,
) -> list[Row]:
    """Runs every cell of config.study that is not finished in `workdir`, and returns the rows of summary.csv.

    get_encoder(arm, config of the arm, number): called once a pretraining for an arm that pretrains (number: which of
    config.study.pretrainings), and once a seed for one that starts from scratch (number: the seed). train and test:
    sources with labels; labels are drawn from train, scores are on all of test. log: receives a line a cell.
    part: (k, n), only the k-th share of n of the cells, and no table: a call without it puts all together.

    Seeds are the outermost loop, so that paired differences of all arms are there early; tables are written after
    each seed, figures at the end. A study that is killed and started again, or done in parts, writes the same tables,
    byte for byte.
    """
    study, workdir = config.study, Path(workdir)
    if RunFolder(workdir).checkpoints.exists():
        raise UserError(f"--workdir={workdir}: holds a pretraining run; allowed: a new folder, or that of a study")
    arms, places = arms_of(config), plan(study, part)
    labelled_part(train, train, "config.data")
    test, test_labels = labelled_part(test, train, "config.study.test")
    _check_judged(test_labels)
    drawn = _draw(train, study, places)
    _write_about(config, workdir, train, test, test_labels)

    cells: list[Cell] = []
    clock, rows = _Clock(len(places)), list[Row]()
    judge = _Judge(config, arms, test.arrays(), test_labels, train.classes)
    encoders = _Encoders(study, arms, get_encoder, places)
    for place in places:
        encoder, digest = encoders.of(place)
        given = drawn.at(place)
        key = judge.key(place, digest, drawn.draws[place.labels, place.seed], given)
        path = StudyFolder(workdir).cell(*place)
        cell = _finished(path, key)
        if cell is None:
            cell, scores = judge.run(place, encoder, digest, given)
            _save(path, cell | {"key": key}, scores, drawn.draws[place.labels, place.seed])
            note, cell = clock.tick(cell["seconds"]), json.loads(path.read_text())  # as it will be found again
        else:
            note = clock.skip()
        cells.append(cell)
        name = "top1" if "top1" in cell["scores"] else "macro_auc"
        score = f"{SHORT[name]} {cell['scores'][name]:.4f}"
        log(f"{clock}  {place.arm}, {place.labels} labels, seed {place.seed}: {score}  ({note})")
        if part is None and len(cells) % (len(places) // study.seeds) == 0:
            rows = write_tables(workdir, cells, study.baseline)
    return write_all(workdir, cells, study.baseline) if part is None else rows


class _Encoders:
    """The encoder that a cell starts from, with its digest. Pretrained ones are there before the first cell is run."""

    def __init__(self, study: Study, arms: Mapping[str, Config], get_encoder: Callable, places: Sequence[Place]):
        self.study, self.arms, self.get_encoder = study, arms, get_encoder
        self.pretrained: dict[tuple[str, int], tuple[Encoder, str]] = {}
        self.fresh: dict[tuple[str, int], tuple[Encoder, str]] = {}
        for place in places:
            if not from_scratch(study.arms[place.arm]):
                self.of(place)

    def of(self, place: Place) -> tuple["Encoder", str]:
        scratch = from_scratch(self.study.arms[place.arm])
        number = place.seed if scratch else place.seed % self.study.pretrainings
        known = self.fresh if scratch else self.pretrained
        if (place.arm, number) not in known:
            if scratch:  # those of the seed before are done with
                known = self.fresh = {k: v for k, v in self.fresh.items() if k[1] == number}
            encoder = self.get_encoder(place.arm, self.arms[place.arm], number)
            known[place.arm, number] = encoder, _encoder_digest(encoder)
        return known[place.arm, number]


class _Judge:
    """Trains a cell's classifier and scores it on the test images."""

    def __init__(self, config: Config, arms: Mapping[str, Config], images: np.ndarray, labels: np.ndarray, classes):
        self.protocol, self.images, self.labels, self.classes = config.study.protocol, images, labels, classes
        self.settings = {arm: _settings(made, from_scratch(config.study.arms[arm])) for arm, made in arms.items()}
        self.same = {"test": _digest(images, labels), "classes": classes, "protocol": self.protocol}
        self.features: dict[str, np.ndarray] = {}  # of the test images, by the encoder's digest

    def key(self, place: Place, encoder: str, draw: np.ndarray, given: Labelled) -> str:
        """A hash of everything that the cell depends on."""
        how = None if self.protocol == "linear" else dataclasses.asdict(self.settings[place.arm])
        drawn = _digest(draw, *(array for array in given if array is not None))
        own = {"labels": drawn, "seed": place.seed, "settings": how, "encoder": encoder}
        parts = {"version": VERSION, **self.same, **own}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def run(self, place: Place, encoder: "Encoder", digest: str, given: Labelled) -> tuple[Cell, np.ndarray]:
        began = time.monotonic()
        (images, labels, groups), count = given, len(self.classes)
        how: Any = {"classes": count, "seed": place.seed, "groups": groups}
        chosen: dict[str, Any]
        if self.protocol == "linear":
            if digest not in self.features:
                self.features[digest] = encoder.embed(self.images)
            probe = linear_probe(encoder.embed(images), labels, **how)
            scores, chosen = probe.scores(self.features[digest]), {"strength": probe.strength}
            chosen["validation"] = probe.validation
        else:
            made = finetune(encoder, images, labels, settings=self.settings[place.arm], **how)
            scores, chosen = predict(made, self.images), made.chosen
        cell: Cell = {**place._asdict(), "chosen": chosen, "scores": metrics(scores, self.labels, self.classes)}
        return cell | {"seconds": round(time.monotonic() - began, 1)}, scores


def _settings(config: Config, scratch: bool) -> Finetune:
    """A random encoder has neither features to probe nor statistics to freeze."""
    return dataclasses.replace(config.finetune, head="zero", batch_norm="train") if scratch else config.finetune


class _Clock:
    """How far the study is: "[12/40]", and from the cells made so far when it will end."""

    def __init__(self, total: int):
        self.total, self.done, self.made, self.seconds = total, 0, 0, 0.0

    def __str__(self) -> str:
        return f"[{self.done}/{self.total}]"

    def skip(self) -> str:
        self.done += 1
        return "reused"

    def tick(self, seconds: float) -> str:
        self.done, self.made, self.seconds = self.done + 1, self.made + 1, self.seconds + seconds
        left = self.seconds / self.made * (self.total - self.done)
        return f"{seconds:.0f} s; left {time.strftime('%H:%M:%S', time.gmtime(left))}"


# What a cell depends on.


def _draw(train: "Source", study: Study, places: Sequence[Place]) -> Drawn:
    """The draws that `places` need; only the images that are in one of them are decoded."""
    labels, groups, counts = np.asarray(train.labels), train.groups, study.labels
    if not counts:
        raise UserError("config.study.labels: empty; allowed: at least one label count")
    most = len(labelled(labels))
    if not 1 <= min(counts) <= max(counts) <= most:
        raise UserError(f"config.study.labels={tuple(counts)}: allowed: 1 to {most}, the labelled images there are")
    wanted = dict.fromkeys((p.labels, p.seed) for p in places)
    draws = {(n, seed): nested_subset(labels, n, seed, groups) for n, seed in wanted}
    used = np.unique(np.concatenate(list(draws.values())))
    return Drawn(used, train.take(used).arrays(), labels[used], None if groups is None else groups[used], draws)


def _check_judged(labels: np.ndarray) -> None:
    if labels.ndim == 2 and not ((labels >= 0.5).any(axis=0) & (labels < 0.5).any(axis=0)).any():
        raise UserError("config.study.test: no class has images with and without it; allowed: at least one such class")


def _digest(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        array = np.ascontiguousarray(array)
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(array)
    return digest.hexdigest()


def _encoder_digest(encoder: "Encoder") -> str:
    leaves, structure = jax.tree.flatten((encoder.params, encoder.stats))
    # As JSON, in which an encoder loaded from disk says the same of itself as one just trained.
    about = json.dumps([str(structure), encoder.size, encoder.channels, encoder.about.get("model")], sort_keys=True)
    return hashlib.sha256((about + _digest(*map(np.asarray, leaves))).encode()).hexdigest()


def _finished(path: Path, key: str) -> Cell | None:
    """The cell at `path` if its inputs were those of `key`."""
    try:
        cell = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return cell if cell.get("key") == key and path.with_suffix(".npz").exists() else None


def _save(path: Path, cell: Cell, scores: np.ndarray, indices: np.ndarray) -> None:
    """The .json is written last: where it is, the cell is complete."""
    path.unlink(missing_ok=True)
    write_npz(path.with_suffix(".npz"), scores=scores.astype(np.float32), indices=indices)
    write_json(path, cell)


def _write_about(config: Config, workdir: Path, train: "Source", test: "Source", test_labels: np.ndarray) -> None:
    labels, groups = np.asarray(train.labels), np.arange(len(test)) if test.groups is None else test.groups
    truth = {"labels": test_labels, "classes": np.array(train.classes)}
    write_npz(StudyFolder(workdir).test, **truth, names=np.array(test.names), groups=groups)
    share = dict(zip(train.classes, _shares(labels, len(train.classes)), strict=True))
    about: dict[str, Any] = {"classes": train.classes, "share": share}
    about |= {"train_images": len(train), "test_images": len(test), "phantom": phantom(config.data)}
    about |= {"pretrainings": min(config.study.pretrainings, config.study.seeds), "seeds": config.study.seeds}
    write_json(StudyFolder(workdir).config, to_json(config))
    write_json(StudyFolder(workdir).about, about)


def _shares(labels: np.ndarray, classes: int) -> list[float]:
    """Share of each class among the images whose label is known."""
    if labels.ndim == 1:
        counts = np.bincount(labels[labels >= 0], minlength=classes)
        return (counts / counts.sum()).tolist()
    known = ~np.isnan(labels)
    return (np.where(known, labels, 0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)).tolist()
