"""Every option of a run on one screen: frozen dataclasses, and the way from a ConfigDict to them.

A config file returns an `ml_collections.ConfigDict`, usually `default(method)` with a few lines changed; `resolve`
checks each key and type and returns a `Config`. Durations are written "10 epochs", "500 steps" or "100000 examples".
"""

import dataclasses
import importlib
import pkgutil
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ml_collections import ConfigDict, config_dict

from ssl_jax import methods
from ssl_jax.errors import UserError, unknown


@dataclass(frozen=True)
class Data:
    name: str = "fashion_mnist"  # fashion_mnist, folder, csv, chexpert, npz, tfds, synthetic or factors
    path: str = ""  # folder, .csv, .npz; the TFDS data set's name for tfds; empty: the usual places for fashion_mnist
    split: str = "train"  # train, test, val or all; any TFDS split
    size: int = 0  # images are resized to size x size px when read; 0: as they are (arrays), 224 (image files)
    channels: int = 0  # 1 or 3; 0: as in the data (arrays), 3 (image files)
    limit: int = 0  # use only the first N images; 0: all
    labels: tuple[str, ...] = ()  # csv: the label column, or several; chexpert: observations, "study" or "competition"
    uncertain: str = "ignore"  # several labels: what -1 becomes: ignore, zeros, ones, smooth_zeros or smooth_ones
    blank: str = "auto"  # several labels: what nothing becomes: ignore (auto of csv) or zeros (auto of chexpert)
    frontal: str = "frontal"  # chexpert: frontal, lateral or all
    group: str = ""  # csv: column that says whose image it is; such images are never parted
    pairs: str = ""  # says which images show one object: folder, patient (chexpert), a column (csv) or a key (npz)
    max_bad_share: float = 0.01  # share of unreadable files that is skipped; above it, an error
    engine: str = "auto"  # memory: decode once, gather on the device; disk: grain, each step; auto: by memory_gb
    memory_gb: float = 2.0  # data sets up to this size are kept in memory under engine=auto
    workers: int = 2  # threads that decode files
    cache: str = ""  # folder for decoded images, made once and then read instead of the files; empty: none
    window: str = "auto"  # black and white of a DICOM: auto (its own window, else percentiles) or percentile


@dataclass(frozen=True)
class View:
    """How one view of an image is drawn. Probabilities and ranges; zero means off."""

    size: int = 0  # side of the view, px; 0: the size of the data
    crop_scale: tuple[float, ...] = (1.0, 1.0)  # share of the area kept, uniform; (1, 1): no crop
    crop_ratio: tuple[float, ...] = (3 / 4, 4 / 3)  # aspect ratio of the crop, log-uniform
    flip: float = 0.0  # probability of a horizontal flip
    rotate: float = 0.0  # largest rotation either way, degrees
    translate: float = 0.0  # largest shift either way, share of the side
    perspective: float = 0.0  # distortion scale, 0 to 1, as in torchvision
    perspective_prob: float = 0.5
    jitter_prob: float = 0.0  # probability of colour jitter as a whole
    brightness: float = 0.0  # factor from [max(0, 1 - s), 1 + s]
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0  # shift from [-s, s], turns of the colour circle
    gray: float = 0.0  # probability of grayscale
    blur: float = 0.0  # probability of a Gaussian blur
    blur_sigma: tuple[float, ...] = (0.1, 2.0)  # px, uniform
    solarize: float = 0.0  # probability of solarize
    solarize_threshold: float = 0.5
    shear: float = 0.0  # largest shear along the rows either way, degrees
    zoom: tuple[float, ...] = (1.0, 1.0)  # factor by which the image is enlarged about its centre, uniform


@dataclass(frozen=True)
class Augment:
    """A preset and what differs from it. In a config file: config.augment.blur=0.5 (all views),
    config.augment.second.blur=0.1 (the second view alone), config.augment.local.size=96 (the local views alone)."""

    preset: str = "natural"  # a name in ssl_jax.augment.PRESETS
    override: Mapping[str, Any] = field(default_factory=dict)
    second: Mapping[str, Any] = field(default_factory=dict)
    local: Mapping[str, Any] = field(default_factory=dict)
    local_views: int = 0  # further, smaller views of each image, for methods with multi-crop

    def changes(self) -> dict[str, Any]:
        """What differs from the preset in the two views, under the keys that set it."""
        return {**self.override, **{f"second.{key}": value for key, value in self.second.items()}}


@dataclass(frozen=True)
class Model:
    name: str = "resnet18"  # resnet18, resnet34, resnet50, resnet_thin, vit_tiny, vit_small or vit_base
    stem: str = "auto"  # imagenet: 7x7 stride 2 and max-pool; small: 3x3 stride 1; auto: small up to 64 px
    width: float = 1.0  # multiplies every channel count; of a ViT the features of each head
    dtype: str = "float32"  # of the computation: float32 or bfloat16; parameters and statistics stay float32
    patch: int = 0  # ViT: side of its patches, px; 0: 16, or up to 64 px the largest that gives 7 or more in a row
    depth: int = 12  # ViT: number of blocks
    positions: str = "fixed"  # ViT: fixed (sines and cosines) or learned
    freeze_patch: bool = False  # ViT: the projection of the patches keeps its initial, random values (MoCo v3)
    pool: str = "cls"  # ViT: the embedding is the class token (cls) or the mean of the patches (mean)
    remat: str = "none"  # blocks: what lies inside a block is computed again for the gradient, not kept: less memory
    conv: str = "auto"  # CPU only: native or patches; auto: native with AVX-512, patches without
    mean: tuple[float, ...] = ()  # per channel, of images in [0, 1]; empty: ImageNet's for 3 channels, else 0.5
    std: tuple[float, ...] = ()  # empty: ImageNet's for 3 channels, else 0.25
    init: str = ""  # start the encoder from this exported encoder (a run folder or a .safetensors); empty: random


@dataclass(frozen=True)
class Optim:
    name: str = "sgd"  # sgd, adamw or lars
    lr: float = 0.06  # at batch `lr_batch`; scaled linearly with the batch
    lr_batch: int = 256  # 0: lr is used as it is
    schedule: str = "cosine"  # cosine, constant, or step (x 0.1 at 60 % and at 80 % of the run)
    warmup: str = "0 steps"
    momentum: float = 0.9  # sgd and lars; beta_1 of adamw
    nesterov: bool = False
    b2: float = 0.999  # adamw
    weight_decay: float = 1e-4
    weight_decay_end: float = -1.0  # reached along a cosine at the end of the run; negative: constant
    vector_lr: float = 1.0  # learning rate of biases and norm scales, as a share of lr
    decay_all: bool = False  # False: biases and norm scales get neither weight decay nor LARS adaptation
    clip_norm: float = 0.0  # largest norm of the gradient; 0: no clipping
    skip_nonfinite: bool = False  # leave out a step whose gradients are not finite (10 in a row end the run)


@dataclass(frozen=True)
class Train:
    batch: int = 256  # images in one step, over all devices
    micro_batch: int = 0  # images embedded at a time, over all devices; the gradient is that of the batch; 0: all
    bn_group: int = 0  # images that share the statistics of BatchNorm; 0: all that are embedded at a time
    duration: str = "100 epochs"
    seed: int = 0
    log_every: str = "10 steps"
    save_every: str = "1 epochs"
    keep: int = 2  # checkpoints kept
    profile: str = "0 steps"  # trace this many steps for the profiler, once the step is compiled: RUN/profile
    devices: int = 0  # devices in the mesh; 0: all
    shard: int = 1  # devices among which parameters and optimizer state are split (FSDP); 1: each holds them whole


@dataclass(frozen=True)
class Eval:
    """What is measured while training, where labels exist. Labels never reach the encoder."""

    every: str = "1 epochs"  # kNN; "0 steps": never
    knn_bank: int = 5000  # training images with labels that vote
    knn_queries: int = 1000  # other training images, to be classified
    knn_k: int = 20
    knn_temperature: float = 0.1
    online_probe: bool = True  # a linear classifier on the stop-gradient of the embedding


@dataclass(frozen=True)
class Finetune:
    """Training a classifier from few labels. Each tuple is a grid; a validation split cut from the labels chooses."""

    steps: int = 400  # at least
    epochs: int = 20  # passes over the labels, at least
    batch: int = 64  # drawn with reshuffling; fewer labels than this: each batch holds them more than once
    lr: tuple[float, ...] = (3e-4, 1e-3)  # AdamW's, for the head
    backbone_ratio: tuple[float, ...] = (1.0,)  # learning rate of the backbone relative to the head's
    weight_decay: float = 1e-2
    head: str = "probe"  # probe: start the head from a linear probe; zero
    batch_norm: str = "train"  # train: statistics of the batch; frozen: those of pretraining
    validation: float = 0.2  # share of the labels held out to choose; then all labels train the final model
    class_weights: str = "none"  # of the loss: none, or balanced, the kinds of labels weigh the same together
    sensitivity: float = 0.9  # multi-label: at which each class's threshold is chosen on the labels held out
    augment: Augment = field(default_factory=lambda: Augment(preset="light"))


@dataclass(frozen=True)
class Study:
    """Arms x label counts x seeds."""

    arms: Mapping[str, Any] = field(default_factory=dict)  # arm -> what differs from the config, nested like it
    baseline: str = "scratch"  # the arm others are compared with; an empty arm is random initialisation
    protocol: str = "finetune"  # finetune or linear
    labels: tuple[int, ...] = (50, 100, 250, 1000)
    seeds: int = 5
    pretrainings: int = 1  # of each arm that pretrains, with seeds of their own; the study's seeds take turns
    test: Data = field(default_factory=lambda: Data(name="", split="test"))  # what differs from config.data


@dataclass(frozen=True)
class Config:
    """One run. `method` is the frozen Config of a module in ssl_jax/methods; `method_name` is that module's name."""

    method_name: str
    method: Any
    data: Data
    augment: Augment
    model: Model
    optim: Optim
    train: Train
    eval: Eval
    finetune: Finetune
    study: Study
    on_collapse: str = "warn"  # warn or stop, when embeddings have collapsed
    log: str = ""  # trackers, comma separated


SECTIONS: dict[str, type] = {
    f.name: f.type for f in dataclasses.fields(Config) if isinstance(f.type, type) and dataclasses.is_dataclass(f.type)
}
# A run that is resumed must agree on these; the others are read only when its encoder is judged.
TRAINING = ("method", "data", "augment", "model", "optim", "train", "eval")
CHOICES = {
    "data.name": ("fashion_mnist", "folder", "csv", "chexpert", "npz", "tfds", "synthetic", "factors"),
    "data.engine": ("auto", "memory", "disk"),
    "data.channels": (0, 1, 3),
    "data.uncertain": ("ignore", "zeros", "ones", "smooth_zeros", "smooth_ones"),
    "data.blank": ("auto", "ignore", "zeros"),
    "data.frontal": ("frontal", "lateral", "all"),
    "data.window": ("auto", "percentile"),
    "model.name": ("resnet18", "resnet34", "resnet50", "resnet_thin", "vit_tiny", "vit_small", "vit_base"),
    "model.stem": ("auto", "imagenet", "small"),
    "model.dtype": ("float32", "bfloat16"),
    "model.conv": ("auto", "native", "patches"),
    "model.positions": ("fixed", "learned"),
    "model.pool": ("cls", "mean"),
    "optim.name": ("sgd", "adamw", "lars"),
    "optim.schedule": ("cosine", "constant", "step"),
    "finetune.head": ("probe", "zero"),
    "finetune.batch_norm": ("train", "frozen"),
    "finetune.class_weights": ("none", "balanced"),
    "study.protocol": ("finetune", "linear"),
}
AT_LEAST_1 = (
    "train.batch",
    "train.keep",
    "train.shard",
    "model.depth",
    "finetune.steps",
    "finetune.batch",
    "study.seeds",
    "study.pretrainings",
    "eval.knn_k",
    "data.workers",
)
NOT_NEGATIVE = (
    "optim.lr",
    "optim.weight_decay",
    "data.size",
    "model.patch",
    "data.limit",
    "data.max_bad_share",
    "train.devices",
    "train.micro_batch",
    "train.bn_group",
    "finetune.epochs",
)


def method_names() -> list[str]:
    """Names of all methods: the modules of ssl_jax/methods but `base`."""
    return sorted(m.name for m in pkgutil.iter_modules(methods.__path__) if m.name != "base")


def method_module(name: str) -> types.ModuleType:
    if name not in method_names():
        raise unknown("config.method.name", name, method_names())
    return importlib.import_module(f"ssl_jax.methods.{name}")


def default(method: str = "byol") -> ConfigDict:
    """A complete config for `method`: every key at its default, then the module's RECIPE ("section.key": value)."""
    module = method_module(method)
    config = ConfigDict({name: _to_dict(kind()) for name, kind in SECTIONS.items()})
    config.on_collapse = Config.on_collapse
    config.method = ConfigDict({"name": method, **_to_dict(module.Config())})
    for key, value in getattr(module, "RECIPE", {}).items():
        config.update_from_flattened_dict({key: value})
    return config


def _to_dict(value: Any) -> Any:
    """A dataclass as nested dicts; the views of an Augment become keys of it, empty until set."""
    if isinstance(value, Augment):
        return {
            "preset": value.preset,
            **_placeholders(value.override),
            "second": _placeholders(value.second),
            "local": _placeholders(value.local),
            "local_views": value.local_views,
        }
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {k: _to_dict(v) for k, v in value.items()}
    return value


def _placeholders(given: Mapping[str, Any]) -> dict[str, Any]:
    def empty(default):
        return config_dict.placeholder(type(default))

    return {f.name: given.get(f.name, empty(f.default)) for f in dataclasses.fields(View)}


def to_json(config: Config) -> dict[str, Any]:
    """Plain nested dicts and lists, from which `from_json` makes an equal Config."""

    def plain(value):
        if dataclasses.is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, Mapping):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, tuple | list) else value

    made = plain(config)
    made["method"]["name"] = made.pop("method_name")
    return made


def from_json(made: Mapping[str, Any]) -> ConfigDict:
    """The ConfigDict of a saved run, so that flags can change it again."""
    config = default(made["method"]["name"])

    def fill(target, source):
        for key, value in source.items():
            if key == "override":
                fill(target, value)
            elif isinstance(value, Mapping) and isinstance(target.get(key), ConfigDict) and key != "arms":
                fill(target[key], value)
            elif key == "arms":
                target[key] = ConfigDict(value)
            else:
                target[key] = tuple(value) if isinstance(value, list) else value

    fill(config, made)
    return config


def resolve(config: ConfigDict) -> Config:
    """The frozen Config of a ConfigDict.

    Raises UserError, one line, for an unknown section, key or method, a wrong type or a value out of range.
    """
    given = config.to_dict()
    method = dict(given.pop("method", {}))
    name = method.pop("name", None)
    if name is None:
        raise UserError(f"config.method.name: missing; available: {', '.join(method_names())}")
    on_collapse = given.pop("on_collapse", Config.on_collapse)
    if on_collapse not in ("warn", "stop"):
        raise unknown("config.on_collapse", on_collapse, ("warn", "stop"))
    for section in given:
        if section not in SECTIONS:
            raise unknown("config", section, [*SECTIONS, "method", "on_collapse"])
    made: dict[str, Any] = {s: _build(kind, given.get(s, {}), s) for s, kind in SECTIONS.items()}
    made["method"] = _build(method_module(name).Config, method, "method")
    resolved = Config(method_name=name, on_collapse=on_collapse, **made)
    _check_values(resolved)
    return resolved


def merge(config: Config, changes: Mapping[str, Any]) -> Config:
    """`config` with nested changes, as an arm of a study: {"method": {"name": "moco"}, "optim": {"lr": 0.1}}.

    A change of method starts from that method's recipe for "method" and "optim".
    """
    made = from_json(to_json(config))
    name = changes.get("method", {}).get("name", config.method_name)
    if name != config.method_name:
        fresh = default(name)
        made.method, made.optim = fresh.method, fresh.optim
    known = made.to_dict()
    for section, values in changes.items():
        if section not in known or not isinstance(values, Mapping):
            raise unknown("config.study.arms", section, [*SECTIONS, "method"])
        for key in values:
            if key not in known[section]:
                raise unknown(f"config.study.arms: {section}", key, known[section])
        made[section].update(values)
    return resolve(made)


def _build(kind: Any, given: Mapping[str, Any], path: str) -> Any:
    if kind is Augment:
        preset = given.get("preset", Augment.preset)
        second, local = (_set_fields(View, given.get(name, {}), f"{path}.{name}") for name in ("second", "local"))
        count = _set_fields(Augment, {"local_views": given.get("local_views")}, path)
        first = {k: v for k, v in given.items() if k not in ("preset", "second", "local", "local_views")}
        return Augment(preset, _set_fields(View, first, path), second, local, **count)
    return kind(**_set_fields(kind, given, path))


def _set_fields(kind: Any, given: Mapping[str, Any], path: str) -> dict[str, Any]:
    """The values of `given` that are set, each converted to its field's type."""
    hints = typing.get_type_hints(kind)
    made = {}
    for key, value in given.items():
        if key not in hints:
            raise unknown(f"config.{path}", key, hints)
        if value is not None:
            made[key] = _convert(hints[key], value, f"{path}.{key}")
    return made


def _convert(hint: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, path)
    origin = typing.get_origin(hint)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_convert(typing.get_args(hint)[0], v, path) for v in value)
    if origin is Mapping and isinstance(value, Mapping):
        return dict(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    wanted = "a tuple" if origin is tuple else getattr(hint, "__name__", str(hint))
    raise UserError(f"config.{path}={value!r}: a {type(value).__name__}; allowed: {wanted}")


def _check_values(config: Config) -> None:
    def get(key):
        section, name = key.split(".")
        return getattr(getattr(config, section), name)

    for key, allowed in CHOICES.items():
        if get(key) not in allowed:
            raise unknown(f"config.{key}", get(key), map(str, allowed))
    for key in AT_LEAST_1:
        if get(key) < 1:
            raise UserError(f"config.{key}={get(key)}: allowed: 1 or more")
    for key in NOT_NEGATIVE:
        if get(key) < 0:
            raise UserError(f"config.{key}={get(key)}: allowed: 0 or more")
    if not 0 < config.finetune.sensitivity <= 1:
        raise UserError(f"config.finetune.sensitivity={config.finetune.sensitivity}: allowed: above 0, at most 1")
    for key in ("train.duration", "train.log_every", "train.save_every", "train.profile", "optim.warmup", "eval.every"):
        to_steps(get(key), 1000, 10, f"config.{key}")


def to_steps(duration: str, examples: int, batch: int, key: str = "duration") -> int:
    """ "10 epochs", "500 steps" or "100000 examples" as steps; an epoch is `examples // batch` steps.

    >>> to_steps("2 epochs", 1000, 100), to_steps("0.5 epochs", 1000, 100), to_steps("950 examples", 1000, 100)
    (20, 5, 10)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(epoch|step|example)s?\s*", duration)
    if not found:
        raise UserError(f'{key}={duration!r}: allowed: "10 epochs", "500 steps" or "100000 examples"')
    number, unit = float(found[1]), found[2]
    if unit == "epoch":
        return round(number * (examples // batch))
    return round(number) if unit == "step" else -int(-number // batch)


def differences(a: Mapping[str, Any], b: Mapping[str, Any], sections=TRAINING) -> list[str]:
    """Keys in which two configs (`to_json`) differ, as "config.optim.lr: 0.1 -> 0.2"."""
    found: list[str] = []

    def walk(x, y, path):
        if isinstance(x, Mapping) and isinstance(y, Mapping):
            for key in sorted({*x, *y}):
                walk(x.get(key), y.get(key), path if key == "override" else f"{path}.{key}")
        elif x != y:
            found.append(f"{path}: {x!r} -> {y!r}")

    for section in sections:
        walk(a.get(section), b.get(section), f"config.{section}")
    return found
