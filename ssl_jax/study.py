"""The label-efficiency study: arms x label counts x seeds, every arm on the same draw of labels unless it chooses.

    cells/<arm>/<labels>/<seed>.json   scores, hyper-parameters, key    ... .npz   test scores, indices of the labels
    references/<labels>/<seed>.json    scores of the references, which cost nothing: see `evaluate.references`
    config.json, study.json            options; classes and their frequencies
    test.npz                           labels, file names and patients of the test images
    results.csv   one row per cell                                   summary.csv, summary.md   means and differences
    references.csv   means of the references
    curve.png     score against label count                          gain_by_class.png, classes.csv   gains by class

A finished cell is reused until something it depends on changes: its `key` is a hash of all its inputs.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

import numpy as np

from ssl_jax import files
from ssl_jax.config import Config, Data, Finetune, Model, Study, merge, to_json
from ssl_jax.data import open_source, phantom
from ssl_jax.data.labelled import labelled_indices, labelled_part
from ssl_jax.data.source import Images, Source, images_at
from ssl_jax.encoder import Encoder, given_encoder, model_of, plain
from ssl_jax.errors import DamagedError, NoPartError, UserError, unknown
from ssl_jax.evaluate.finetuning import loss_curve
from ssl_jax.evaluate.linear import linear_probe
from ssl_jax.evaluate.propagation import spread_probe
from ssl_jax.evaluate.references import RANDOM, References, digest, weights_digest
from ssl_jax.evaluate.scores import metrics
from ssl_jax.evaluate.selftraining import Unlabelled, train_classifier
from ssl_jax.evaluate.subsets import nested_subset
from ssl_jax.files import read_json, read_npz, remove_leftovers, write_json, write_npz
from ssl_jax.models import resolve_model
from ssl_jax.report.summary import write_all, write_tables
from ssl_jax.report.tables import Cell, Row
from ssl_jax.run_folder import RunFolder, StudyFolder
from ssl_jax.selection import embed, select

FROM = "from"  # the key of an arm that names a run, whose encoder it takes
SELECT = "select"  # the key of an arm that draws its labels in another way than config.study.draw
DRAWN = ("stratified", "random")  # draws that need no encoder; all others are strategies of `selection`
VERSION = 4  # of the computation in a cell; raise it when a change to the code changes a cell's numbers
SHORT = {"top1": "top-1", "macro_auc": "macro AUC"}  # names of scores in the log


class CellId(NamedTuple):
    arm: str
    labels: int
    seed: int


class Examples(NamedTuple):
    """The labelled images that a cell trains on."""

    images: Images
    labels: np.ndarray
    groups: np.ndarray | None


class Subsets(NamedTuple):
    """The labelled subsets of all cells, with every image decoded once."""

    used: np.ndarray  # sorted indices, among all training images, of those in any subset
    examples: Examples  # of these images
    draws: Mapping[CellId, np.ndarray]  # indices among all training images

    def of(self, cell: CellId) -> Examples:
        rows = np.searchsorted(self.used, self.draws[cell])
        images, labels, groups = self.examples
        return Examples(images_at(images, rows), labels[rows], None if groups is None else groups[rows])


def from_scratch(changes: Mapping[str, Any]) -> bool:
    """Whether an arm starts from random weights: it changes nothing but, at most, its fine-tuning and its labels."""
    return set(changes) <= {"finetune", SELECT}


def draw_of(study: Study, arm: str) -> str:
    """How an arm draws its labels. One from scratch has no encoder to choose with, and draws at random instead.

    Raises UserError if it asks for something else.
    """
    changes = study.arms[arm]
    draw, key = changes.get(SELECT, study.draw), f"config.study.arms: {arm}: {SELECT}"
    if draw not in (allowed := get_args(get_type_hints(Study)["draw"])):
        raise unknown(key, draw, allowed)
    if draw in DRAWN or not from_scratch(changes):
        return draw
    if SELECT in changes:
        raise UserError(f"{key}={draw!r}: the arm starts from scratch; allowed: {' or '.join(DRAWN)}")
    return "random"


def arms_of(config: Config) -> dict[str, Config]:
    """The config of each arm. Raises UserError for a mistake in any of them."""
    if not config.study.arms:
        raise UserError("config.study.arms: empty; name at least one arm, as configs/study_fashion_mnist.py does")
    arms = {}
    for arm, changes in config.study.arms.items():
        own = {section: values for section, values in changes.items() if section not in (FROM, SELECT)}
        arms[arm] = merge(config, own)
        draw_of(config.study, arm)
        beside = [f"{section}.{key}" for section in own if section != "finetune" for key in own[section]]
        if FROM in changes and beside:
            reason = f"not expected beside {FROM!r}, whose encoder is trained already; allowed: finetune, {SELECT}"
            raise UserError(f"config.study.arms: {arm}: {', '.join(beside)}: {reason}")
    if config.study.baseline not in arms:
        raise unknown("config.study.baseline", config.study.baseline, arms)
    return arms


def pretrainings(config: Config) -> dict[tuple[str, int], Config]:
    """(arm, number) -> config of every pretraining that the study needs. Those of one arm differ only in their seed."""
    runs = {}
    for arm, arm_config in arms_of(config).items():
        changes = config.study.arms[arm]
        if not from_scratch(changes) and FROM not in changes:
            for i in range(min(config.study.pretrainings, config.study.seeds)):
                train = dataclasses.replace(arm_config.train, seed=arm_config.train.seed + i)
                runs[arm, i] = dataclasses.replace(arm_config, train=train)
    return runs


def encoders_of_runs(config: Config, train: Source) -> dict[str, Encoder]:
    """The encoder of each arm that takes that of a finished run, {"from": "runs/a"}, or published weights as they are,
    {"from": "model.safetensors"}.

    Raises UserError if there is none, or if it was trained on images of another size or number of channels.
    """
    size, channels, found = min(train.shape[:2]), train.shape[2], {}
    for arm, changes in config.study.arms.items():
        if FROM not in changes:
            continue
        key = f"config.study.arms: {arm}: {FROM}"
        try:
            encoder = given_encoder(changes[FROM], size, channels)
        except UserError as error:  # it begins with the path
            raise UserError(f"{key}={error}") from error
        if (encoder.size, encoder.channels) != (size, channels):
            raise UserError(
                f"{key}={changes[FROM]}: its images have size={encoder.size}, channels={encoder.channels}; "
                f"allowed: those of config.data, size={size}, channels={channels}"
            )
        found[arm] = encoder
    return found


def list_cells(study: Study, part: tuple[int, int] | None = None) -> list[CellId]:
    """The cells in the order in which they run, seeds outermost; with part=(k, n) only share k (1 to n) of them.

    Cells are numbered label count by label count and dealt out in turn, so every share gets as many of the long ones.
    """
    k, n = part or (1, 1)
    arms = sorted(study.arms, key=lambda arm: arm != study.baseline)  # the baseline comes first, also in tables
    cells = [CellId(a, c, s) for c, s, a in itertools.product(study.labels, range(study.seeds), arms)]
    return sorted(cells[k - 1 :: n], key=lambda cell: cell.seed)


# The keys of config.data that say how images are read. All others say which images, and what is known about them.
READING = ("size", "test_side", "channels", "bands", "window", "cache", "workers", "max_bad_share")


def data_of_test(config: Config) -> Data:
    """config.study.test, completed from config.data: its test part, or other data read in the same way.

    Data of another kind (`name`) take only the keys READING from config.data, because their columns may differ.
    """
    test, data, default = config.study.test, config.data, Study().test
    values = {field.name: getattr(test, field.name) for field in dataclasses.fields(Data)}
    changes = {key: value for key, value in values.items() if value != getattr(default, key)}
    if test.name in ("", data.name):
        base = dataclasses.replace(data, split=default.split, limit=0, pairs="")
    else:
        base = dataclasses.replace(default, **{key: getattr(data, key) for key in READING})
    return dataclasses.replace(base, **changes)


def open_test(config: Config, size: int, channels: int) -> Source:
    """The test part of `data_of_test`; all images of data that are not config.data's and have no test part."""
    data = dataclasses.replace(data_of_test(config), size=size, channels=channels)
    try:
        return open_source(data)
    except NoPartError:
        if (data.name, data.path) == (config.data.name, config.data.path):
            raise
        return open_source(data, "all")


def run_study(
    config: Config,
    workdir: Path,
    *,
    get_encoder: Callable[[str, Config, int], Encoder],
    train: Source,
    test: Source,
    log: Callable[[str], None],
    part: tuple[int, int] | None = None,
) -> list[Row]:
    """Runs every unfinished cell of config.study in `workdir` and returns the rows of summary.csv.

    get_encoder(arm, config of the arm, number) is called once per pretraining of an arm (number: which one; 0 for the
    encoder of a finished run), and once per seed of an arm that starts from scratch (number: the seed). Labels are
    drawn from `train`; scores are computed on all of `test`. log receives one line per cell. With part=(k, n) only the
    k-th of n shares of the cells is run and no table is written; a call without part completes the study.

    Seeds are the outermost loop, so paired differences of all arms exist early. Tables are written after each seed,
    figures at the end. A study that is killed and restarted, or run in parts, writes the same tables, byte for byte.
    """
    study, workdir = config.study, Path(workdir)
    if RunFolder(workdir).checkpoints.exists():
        raise UserError(f"--workdir={workdir}: holds a pretraining run; choose a new folder or the folder of a study")
    arms, cell_ids = arms_of(config), list_cells(study, part)
    labelled_part(train, train, "config.data")
    test, test_labels = labelled_part(test, train, "config.study.test")
    _check_test_labels(test_labels)
    _check_counts(train, study)
    _write_metadata(config, workdir, train, test, test_labels)

    cells: list[Cell] = []
    references: list[Cell] = []
    progress, rows = _Progress(len(cell_ids)), list[Row]()
    evaluator = _Evaluator(config, arms, train, test.all_images(), test_labels)
    encoders = _Encoders(study, arms, get_encoder, cell_ids)
    subsets = _draw(train, study, cell_ids, encoders)
    networks = _networks(encoders, study, arms, train)
    compared = References(networks, test.all_images(), test_labels, train.classes, config.eval)
    for cell_id in cell_ids:
        encoder, encoder_digest = encoders.of(cell_id)
        examples, indices = subsets.of(cell_id), subsets.draws[cell_id]
        key = evaluator.key(cell_id, encoder_digest, indices, examples)
        path = StudyFolder(workdir).cell(*cell_id)
        cell = _load(path, key, log)
        if cell is None:
            cell, scores = evaluator.run(cell_id, encoder, encoder_digest, examples)
            _save(path, cell | {"key": key}, scores, indices)
            note, cell = progress.add(cell["seconds"]), read_json(path)  # as a later run will read it
        else:
            note = progress.skip()
        cells.append(cell)
        if cell_id.arm == study.baseline:  # once for each draw, whichever part of the study runs here
            references += _references(compared, StudyFolder(workdir), cell_id, examples)
        name = "top1" if "top1" in cell["scores"] else "macro_auc"
        score = f"{SHORT[name]} {cell['scores'][name]:.4f}"
        log(f"{progress}  {cell_id.arm}, {cell_id.labels} labels, seed {cell_id.seed}: {score}  ({note})")
        if part is None and len(cells) % (len(cell_ids) // study.seeds) == 0:
            rows = write_tables(workdir, cells, study.baseline, references)
    return write_all(workdir, cells, study.baseline, references) if part is None else rows


def _networks(encoders: "_Encoders", study: Study, arms: Mapping[str, Config], train: Source) -> dict[str, Encoder]:
    """An encoder of each network that is compared, under the name of its random counterpart."""
    size, channels = min(train.shape[:2]), train.shape[2]
    first: dict[Model, str] = {}
    for arm in sorted(arms, key=lambda arm: arm != study.baseline):
        model = arms[arm].model
        if FROM in study.arms[arm]:
            model = model_of(encoders.of(CellId(arm, study.labels[0], 0))[0].about)
        first.setdefault(dataclasses.replace(plain(resolve_model(model, size, channels=channels)), conv="auto"), arm)
    names = {arm: RANDOM if len(first) == 1 else f"{RANDOM} of {arm}" for arm in first.values()}
    return {name: encoders.of(CellId(arm, study.labels[0], 0))[0] for arm, name in names.items()}


def _references(compared: References, folder: StudyFolder, cell: CellId, examples: Examples) -> list[Cell]:
    """The references on the labels of a cell, as cells whose arm is the name of a reference."""
    path = folder.references(cell.labels, cell.seed)
    each = compared.of(path, examples.images, examples.labels, seed=cell.seed, groups=examples.groups)
    return [{"arm": name, "labels": cell.labels, "seed": cell.seed, "scores": scores} for name, scores in each.items()]


class _Encoders:
    """The encoder that each cell starts from, with its digest. All pretrained ones exist before the first cell runs."""

    def __init__(self, study: Study, arms: Mapping[str, Config], get_encoder: Callable, cells: Sequence[CellId]):
        self.study, self.arms, self.get_encoder = study, arms, get_encoder
        self.scratch = {arm for arm, changes in study.arms.items() if from_scratch(changes)}
        self.cache: dict[tuple[str, int], tuple[Encoder, str]] = {}
        for cell in cells:
            if cell.arm not in self.scratch:
                self.of(cell)

    def of(self, cell: CellId) -> tuple[Encoder, str]:
        scratch = cell.arm in self.scratch
        count = 1 if FROM in self.study.arms[cell.arm] else self.study.pretrainings
        number = cell.seed if scratch else cell.seed % count
        if (cell.arm, number) not in self.cache:
            if scratch:  # random encoders of the previous seed are no longer needed
                self.cache = {k: v for k, v in self.cache.items() if k[0] not in self.scratch or k[1] == number}
            encoder = self.get_encoder(cell.arm, self.arms[cell.arm], number)
            self.cache[cell.arm, number] = encoder, weights_digest(encoder)
        return self.cache[cell.arm, number]


class _Evaluator:
    """Trains the classifier of a cell and scores it on the test images."""

    def __init__(self, config: Config, arms: Mapping[str, Config], train: Source, images: Images, labels: np.ndarray):
        self.protocol, self.images, self.labels, self.classes = config.study.protocol, images, labels, train.classes
        self.unlabelled, self.groups = Unlabelled(train), train.groups
        self.settings = {arm: _settings(arms[arm], from_scratch(config.study.arms[arm])) for arm in arms}
        protocol = self.protocol.removesuffix("_quick")  # the name that linear_quick had in the keys of older cells
        self.shared_inputs = {"test": digest(images, labels), "classes": self.classes, "protocol": protocol}
        self.test_features: dict[str, np.ndarray] = {}  # by the encoder's digest

    def key(self, cell: CellId, encoder_digest: str, indices: np.ndarray, examples: Examples) -> str:
        """A hash of everything that the cell depends on."""
        labels = digest(indices, *(array for array in examples if array is not None))
        settings = self.settings[cell.arm].inputs()
        if self.protocol == "linear_quick":
            settings = {key: settings[key] for key in ("unlabelled", "align") if key in settings}
        own = {"labels": labels, "seed": cell.seed, "settings": settings or None, "encoder": encoder_digest}
        if "unlabelled" in settings:
            own["unlabelled"] = self.unlabelled.digest
        inputs = {"version": VERSION, **self.shared_inputs, **own}
        return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()

    def run(self, cell: CellId, encoder: Encoder, encoder_digest: str, examples: Examples) -> tuple[Cell, np.ndarray]:
        start = time.monotonic()
        options: Any = {"classes": len(self.classes), "seed": cell.seed, "groups": examples.groups}
        result: dict[str, Any] = {}
        if self.protocol == "linear_quick":
            known = encoder.embed(examples.images, fixed=True), examples.labels
            if self.settings[cell.arm].unlabelled == "none":
                probe = linear_probe(*known, **options)
            else:
                options |= {"pool_groups": self.groups, "align": self.settings[cell.arm].align}
                probe = spread_probe(*known, self.unlabelled.neighbourhood(encoder), **options)
            if encoder_digest not in self.test_features:
                self.test_features[encoder_digest] = encoder.embed(self.images, fixed=True)
            scores = probe.scores(self.test_features[encoder_digest])
            chosen: dict[str, Any] = {"strength": probe.strength, "validation": probe.validation}
        else:
            settings = self.settings[cell.arm]
            given = encoder, examples.images, examples.labels, self.unlabelled
            classifier = train_classifier(*given, settings=settings, **options)
            scores, chosen = classifier.logits(self.images, fixed=True), classifier.chosen
            result["loss"] = loss_curve(classifier)
        result |= {"chosen": chosen, "scores": metrics(scores, self.labels, self.classes)}
        return {**cell._asdict(), **result, "seconds": round(time.monotonic() - start, 1)}, scores


def _settings(config: Config, scratch: bool) -> Finetune:
    """A random encoder has no features worth probing and no statistics worth freezing."""
    return dataclasses.replace(config.finetune, head="zero", batch_norm="train") if scratch else config.finetune


class _Progress:
    """How far the study is, as in "[12/40]", and the remaining time, estimated from the cells run so far."""

    def __init__(self, total: int):
        self.total, self.done, self.run, self.seconds = total, 0, 0, 0.0

    def __str__(self) -> str:
        return f"[{self.done}/{self.total}]"

    def skip(self) -> str:
        self.done += 1
        return "reused"

    def add(self, seconds: float) -> str:
        self.done, self.run, self.seconds = self.done + 1, self.run + 1, self.seconds + seconds
        remaining = self.seconds / self.run * (self.total - self.done)
        return f"{seconds:.0f} s; {time.strftime('%H:%M:%S', time.gmtime(remaining))} left"


# The inputs of a cell.


def _check_counts(train: Source, study: Study) -> None:
    counts = study.labels
    if not counts:
        raise UserError("config.study.labels: empty; give at least one label count")
    available = len(labelled_indices(np.asarray(train.labels)))
    if not 1 <= min(counts) <= max(counts) <= available:
        raise UserError(
            f"config.study.labels={tuple(counts)}: allowed: 1 to {available}, the number of labelled images"
        )


def _draw(train: Source, study: Study, cells: Sequence[CellId], encoders: "_Encoders") -> Subsets:
    """The subsets that `cells` need. Only images that are in one of them are decoded, and all if an arm looks at them
    to choose."""
    labels, groups, chosen = np.asarray(train.labels), train.groups, _Chosen(train, max(study.labels))

    @functools.cache  # the same for all arms
    def drawn(draw: str, count: int, seed: int) -> np.ndarray:
        return nested_subset(labels, count, seed, groups, stratified=draw == "stratified")

    draws = {}
    for cell in cells:
        draw = draw_of(study, cell.arm)
        if draw in DRAWN:
            draws[cell] = drawn(draw, cell.labels, cell.seed)
        else:
            draws[cell] = np.sort(chosen.order(draw, *encoders.of(cell), cell.seed)[: cell.labels])
    used = np.unique(np.concatenate(list(draws.values())))
    examples = Examples(train.take(used).all_images(), labels[used], None if groups is None else groups[used])
    return Subsets(used, examples, draws)


class _Chosen:
    """Orders in which `selection` would label the images whose labels are known, `count` of them, without a look at
    their labels."""

    def __init__(self, train: Source, count: int):
        self.train, self.known, self.count = train, labelled_indices(np.asarray(train.labels)), count
        self.features: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # by the encoder's digest
        self.orders: dict[tuple[str, str, int], np.ndarray] = {}

    def order(self, strategy: str, encoder: Encoder, encoder_digest: str, seed: int) -> np.ndarray:
        key = strategy, encoder_digest, seed
        if encoder_digest not in self.features:
            self.features[encoder_digest] = embed(encoder, self.train.take(self.known))
        if key not in self.orders:
            features, readable = self.features[encoder_digest]
            index = self.known[readable]
            options: Any = {"groups": None if self.train.groups is None else self.train.groups[index]}
            options |= {"seed": seed, "classes": len(self.train.classes)}
            self.orders[key] = index[select(features, self.count, strategy, **options)]
        return self.orders[key]


def _check_test_labels(labels: np.ndarray) -> None:
    if labels.ndim == 2 and not ((labels >= 0.5).any(axis=0) & (labels < 0.5).any(axis=0)).any():
        raise UserError("config.study.test: no class has both positive and negative images; at least one must")


def _load(path: Path, key: str, log: Callable[[str], None]) -> Cell | None:
    """The finished cell at `path`; None if there is none with this key, or if it is damaged, which is told."""
    try:
        cell = read_json(path)
        if cell.get("key") != key:
            return None
        arrays = read_npz(path.with_suffix(".npz"), ("scores", "indices"))
        if cell.get("arrays") not in (None, files.digest(arrays)):  # None: an older cell
            raise DamagedError(path.with_suffix(".npz"), "is not of this cell", "")
        return cell
    except DamagedError as error:
        log(f"{error.damage}; running the cell again")
        return None


def _save(path: Path, cell: Cell, scores: np.ndarray, indices: np.ndarray) -> None:
    """The .json is written last: if it exists, the cell is complete."""
    path.unlink(missing_ok=True)
    remove_leftovers(path.parent)
    arrays = {"scores": scores.astype(np.float32), "indices": indices}
    write_npz(path.with_suffix(".npz"), **arrays)
    write_json(path, {**cell, "arrays": files.digest(arrays)})


def _write_metadata(config: Config, workdir: Path, train: Source, test: Source, test_labels: np.ndarray) -> None:
    groups = np.arange(len(test)) if test.groups is None else test.groups
    arrays = {"labels": test_labels, "classes": np.array(train.classes), "names": np.array(test.names)}
    write_npz(StudyFolder(workdir).test, **arrays, groups=groups)
    shares = _shares(np.asarray(train.labels), len(train.classes))
    metadata = {
        "classes": train.classes,
        "share": dict(zip(train.classes, shares, strict=True)),
        "train_images": len(train),
        "test_images": len(test),
        "phantom": phantom(config.data),
        "pretrainings": max([1, *(number + 1 for _, number in pretrainings(config))]),
        "seeds": config.study.seeds,
        "draws": {arm: draw_of(config.study, arm) for arm in config.study.arms},
        "from": {arm: changes[FROM] for arm, changes in config.study.arms.items() if FROM in changes},
    }
    remove_leftovers(workdir)
    write_json(StudyFolder(workdir).config, to_json(config))
    write_json(StudyFolder(workdir).about, metadata)


def _shares(labels: np.ndarray, classes: int) -> list[float]:
    """Share of each class among the images whose label is known."""
    if labels.ndim == 1:
        counts = np.bincount(labels[labels >= 0], minlength=classes)
        return (counts / counts.sum()).tolist()
    known = ~np.isnan(labels)
    return (np.where(known, labels, 0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)).tolist()
