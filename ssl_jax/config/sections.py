"""Every option of a run, each declared once with its type, choices, range and help (see `ssl_jax.fields`)."""

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ssl_jax import fields
from ssl_jax.config.model import Model
from ssl_jax.errors import UserError
from ssl_jax.fields import Duration, option

FILE_SOURCES = ("folder", "csv", "npz", "chexpert", "fashion_mnist", "webdataset", "parquet")  # with files as data.path


@dataclass(frozen=True)
class Data:
    """Which images to read, and how."""

    name: str = option("", "data source; has to be given", registered="source")
    path: str = option(
        "",
        "folder, .csv or .npz file; webdataset, parquet: file, folder or pattern; also an address such as s3://...; "
        "tfds: name of the data set; fashion_mnist: empty for the usual folders",
    )
    split: str = option("train", "train, test, val or all; tfds: any TFDS split")
    size: int = option(0, "images are resized to size x size px; 0: unchanged (arrays), 224 (image files)", min=0)
    test_side: int = option(
        0,
        "shorter side of a test image in px, of which the central size x size are used; 0: size, so the central square",
        min=0,
    )
    crops: Literal["square", "file"] = option(
        "square", "what pretraining cuts random crops from; square: the test image; file: the file's own pixels"
    )
    channels: int = option(
        0, "1: grayscale, 3: colour, others: those of the data; 0: as in the data, but 3 for gray files", min=0
    )
    bands: tuple[str, ...] = option(
        (), 'folder, csv: ends of the names of files that make one image, one channel each, such as ("_B02", "_B03")'
    )
    limit: int = option(0, "use only the first N images; 0: all", min=0)
    labels: tuple[str, ...] = option(
        (), 'csv: one or more label columns; chexpert: observations, "study" or "competition"'
    )
    uncertain: Literal["ignore", "zeros", "ones", "smooth_zeros", "smooth_ones"] = option(
        "ignore", "multi-label: how to read -1 (uncertain)"
    )
    blank: Literal["auto", "ignore", "zeros"] = option(
        "auto", "multi-label: how to read an empty cell; auto: ignore (csv), zeros (chexpert)"
    )
    frontal: Literal["frontal", "lateral", "all"] = option("frontal", "chexpert: which projections to use")
    group: str = option("", "csv: column with the patient or owner; images of one group always stay together")
    pairs: str = option(
        "", "what says that images show the same object: folder, patient (chexpert), a column or npz key"
    )
    max_bad_share: float = option(0.01, "share of unreadable files that is skipped; more than that is an error", min=0)
    engine: Literal["auto", "memory", "disk"] = option(
        "auto", "memory: decode once and keep on the device; disk: decode in every step; auto: by memory_gb"
    )
    memory_gb: float = option(2.0, "engine=auto: largest data set to keep in memory, in GB")
    workers: int = option(2, "threads that decode files", min=1)
    shuffle_buffer: int = option(
        10_000, "parquet: images that wait in memory to be mixed, as blocks are read in random order", min=1
    )
    retries: int = option(5, "remote: tries after a failed one, with waits of 0.25, 0.5, 1, 2, ... s between", min=0)
    timeout: float = option(30.0, "remote: seconds after which a request without an answer has failed", above=0)
    cache: str = option(
        "", "folder for decoded images, written once and read instead of the files; empty: none", path=True
    )
    window: Literal["auto", "percentile"] = option(
        "auto", "DICOM: what is black and white; auto: the window of the file, else percentiles of the image"
    )
    background: str = option("white", "colour behind the transparent parts of an image file: a name, or '#808080'")
    image_column: str = option(
        "", "csv, table of boxes: column with the path of the image; empty: path, file, filename or image"
    )
    exclude: str = option(
        "", "table of images to leave out, such as check.csv of `ssl-jax check`; empty: none", path=True
    )
    include: str = option(
        "",
        "table, or .txt list of names, of the only images to train on; test data are not reduced; empty: all",
        path=True,
    )

    @classmethod
    def parse(cls, values: Mapping[str, Any], key: str) -> "Data":
        """From a config file or flags. Relative paths become absolute, so that a run is understood from any folder."""
        data = cls(**fields.convert_all(cls, values, key))
        # The path of some sources is a name or a list of options; a section that changes another may leave out `name`.
        is_path = data.name in FILE_SOURCES or (not data.name and Path(data.path).exists())
        is_path &= "://" not in data.path
        return dataclasses.replace(data, path=fields.absolute(data.path)) if is_path else data


@dataclass(frozen=True)
class View:
    """How one view of an image is drawn. A probability or range of zero turns a transform off."""

    size: int = option(0, "side of the view in px; 0: that of the data", min=0)
    crop_scale: tuple[float, ...] = option((1.0, 1.0), "share of the area that a crop keeps, uniform; (1, 1): no crop")
    crop_ratio: tuple[float, ...] = option((3 / 4, 4 / 3), "aspect ratio of the crop, log-uniform")
    flip: float = option(0.0, "probability of a horizontal flip", min=0, max=1)
    rotate: float = option(0.0, "largest rotation in either direction, degrees", min=0, max=180)
    translate: float = option(0.0, "largest shift in either direction, as a share of the side", min=0, max=1)
    perspective: float = option(0.0, "distortion scale of the perspective, as in torchvision", min=0, max=1)
    perspective_prob: float = option(0.5, "probability of the perspective", min=0, max=1)
    jitter_prob: float = option(0.0, "probability of colour jitter as a whole", min=0, max=1)
    brightness: float = option(0.0, "s: factor drawn from [max(0, 1 - s), 1 + s]", min=0)
    contrast: float = option(0.0, "factor, as for brightness", min=0)
    saturation: float = option(0.0, "factor, as for brightness", min=0)
    hue: float = option(0.0, "s: shift drawn from [-s, s], in turns of the colour circle", min=0, max=0.5)
    gray: float = option(0.0, "probability of grayscale", min=0, max=1)
    gray_first: bool = option(False, "grayscale before the colour jitter, not after it (MoCo v1)")
    blur: float = option(0.0, "probability of a Gaussian blur", min=0, max=1)
    blur_sigma: tuple[float, ...] = option((0.1, 2.0), "sigma of the blur in px, uniform")
    solarize: float = option(0.0, "probability of solarize", min=0, max=1)
    solarize_threshold: float = option(0.5, "solarize inverts the pixels above it; images are in [0, 1]", min=0)
    shear: float = option(0.0, "largest shear along the rows in either direction, degrees", min=0, below=90)
    zoom: tuple[float, ...] = option((1.0, 1.0), "factor by which the image is enlarged about its centre, uniform")
    randaugment: int = option(
        0, "operations of RandAugment after crop and flip, each with probability 0.5; 0: none", min=0
    )
    randaugment_magnitude: float = option(9.0, "their mean magnitude", min=0, max=10)
    randaugment_std: float = option(0.5, "the standard deviation of the magnitude, which is cut to 0 to 10", min=0)
    erase: float = option(0.0, "probability of filling a box of 2 to 33 % of the view with noise", min=0, max=1)


@dataclass(frozen=True)
class Augment:
    """A preset and what differs from it. In a config file: config.augment.blur=0.5 (all views),
    config.augment.second.blur=0.1 (only the second view), config.augment.local.size=96 (only the local views)."""

    preset: str = option("auto", "a name in ssl_jax.augment.PRESETS; auto: small up to 64 px, else natural")
    override: Mapping[str, Any] = option(dict)
    second: Mapping[str, Any] = option(dict)
    local: Mapping[str, Any] = option(dict)
    local_views: int = option(0, "number of extra, smaller views of each image, for methods with multi-crop", min=0)

    def changes(self) -> dict[str, Any]:
        """What differs from the preset in the two views, under the keys that set it."""
        return {**self.override, **{f"second.{key}": value for key, value in self.second.items()}}

    @classmethod
    def parse(cls, values: Mapping[str, Any], key: str) -> "Augment":
        """From the form of a config file, in which the keys of a view stand beside `preset`."""
        second, local = (fields.convert_all(View, values.get(v, {}), f"{key}.{v}") for v in ("second", "local"))
        own = {name: values[name] for name in ("preset", "local_views") if name in values}
        rest = {name: value for name, value in values.items() if name not in (*own, "second", "local")}
        views: dict[str, Any] = {"override": fields.convert_all(View, rest, key), "second": second, "local": local}
        return cls(**fields.convert_all(cls, own, key), **views)


@dataclass(frozen=True)
class Optim:
    """The optimizer and its schedule."""

    name: Literal["sgd", "adamw", "lars"] = option("sgd", "optimizer")
    lr: float = option(0.06, "peak learning rate for a batch of `lr_batch`; scales linearly with the batch", min=0)
    lr_batch: int = option(256, "batch that `lr` is meant for; 0: `lr` is used unscaled", min=0)
    schedule: Literal["cosine", "constant", "step"] = option(
        "cosine", "after the warm-up; step: a tenth of the rate after each share of the run in `drops`"
    )
    drops: tuple[float, ...] = option(
        (0.6, 0.8), "schedule=step: shares of the run, its warm-up included", min=0, max=1
    )
    warmup: Duration = option("0 steps", "linear rise of the learning rate before the schedule")
    lr_start: float = option(0.0, "where the warm-up begins, as a share of the peak", min=0, max=1)
    lr_end: float = option(0.0, "schedule=cosine: where it ends, as a share of the peak", min=0, max=1)
    momentum: float = option(0.9, "sgd, lars: momentum; adamw: beta_1")
    nesterov: bool = option(False, "sgd: Nesterov's momentum")
    b2: float = option(0.999, "adamw: beta_2")
    weight_decay: float = option(1e-4, "added to the gradient (sgd, lars) or decoupled from it (adamw)", min=0)
    weight_decay_end: float = option(
        -1.0, "weight decay at the end of the run, reached along a cosine; negative: constant"
    )
    vector_lr: float = option(1.0, "learning rate of biases and norm scales, relative to `lr`")
    decay_all: bool = option(False, "apply weight decay and LARS adaptation to biases and norm scales, too")
    layer_decay: float = option(
        1.0, "factor for the learning rate from each layer of the encoder to the one before it", above=0, max=1
    )
    freeze: int = option(
        0, "first layers of the encoder that keep their weights: 1: what is before its blocks; 2: the first, too", min=0
    )
    clip_norm: float = option(0.0, "largest norm of the gradient; 0: no clipping")
    clip_each: bool = option(
        False, "clip_norm limits the norm of each tensor's gradient, not that of all together (DINO)"
    )
    skip_nonfinite: bool = option(False, "skip steps with non-finite gradients; 10 in a row end the run")


@dataclass(frozen=True)
class Train:
    """Batches, length and devices of the run, and what it writes."""

    batch: int = option(256, "images per step, over all devices", min=1)
    micro_batch: int | Literal["auto"] = option(
        "auto",
        "images embedded at a time, over all devices; same gradient, less memory; 0: all; auto: as many as fit",
        min=0,
    )
    bn_group: int = option(0, "images that share BatchNorm statistics; 0: all that are embedded at a time", min=0)
    duration: Duration = option("100 epochs", "length of the run")
    init: str = option(
        "", "start from the last checkpoint of this run folder, with all its state but the step; empty: none", path=True
    )
    seed: int = option(0, "seed of all randomness: weights, order, views")
    log_every: Duration = option("10 steps", "interval between lines in metrics.jsonl")
    save_every: Duration = option("1 epochs", "interval between checkpoints; the last step is always saved")
    keep: int = option(2, "number of checkpoints to keep", min=1)
    devices: int = option(0, "devices to use; 0: all", min=0)
    shard: int = option(1, "devices that parameters and optimizer state are split among (FSDP); 1: not split", min=1)
    profile: Duration = option("0 steps", 'trace this many steps for the profiler; "0 steps": off')

    @property
    def part(self) -> int:
        """micro_batch; 0, the whole batch, as long as "auto" has not been decided (`train.memory`)."""
        return 0 if self.micro_batch == "auto" else self.micro_batch


@dataclass(frozen=True)
class Eval:
    """What is measured during training if the data have labels. Labels never reach the encoder."""

    every: Duration = option("1 epochs", 'interval between kNN evaluations; "0 steps": never')
    knn_bank: int = option(5000, "labelled training images that vote")
    knn_queries: int = option(1000, "other training images, which are classified")
    knn_k: int = option(
        20, "number of nearest neighbours that vote; DINO: 20, instance discrimination, lightly: 200", min=1
    )
    knn_temperature: float = option(
        0.1, "a vote weighs exp(cosine / temperature); DINO, instance discrimination: 0.07, lightly: 0.1"
    )
    online_probe: bool = option(True, "train a linear classifier on the embedding, without a gradient to the encoder")


# Of `Finetune`: options that came later, or that few use.
OPTIONAL = ("layer_decay", "warmup", "clip_norm", "drop_path", "label_smoothing", "mixup", "cutmix", "ema", "pixels")


@dataclass(frozen=True)
class Finetune:
    """Training a classifier from few labels. Each tuple is a grid; the best entry on held-out labels is used."""

    steps: int = option(600, "smallest number of steps", min=1)
    epochs: int = option(60, "smallest number of passes over the labels", min=0)
    batch: int = option(64, "batch size; images repeat within a batch if there are fewer labels", min=1)
    lr: tuple[float, ...] = option((3e-4, 1e-3, 3e-3), "learning rate of the head (AdamW)")
    backbone_ratio: tuple[float, ...] = option((1.0,), "learning rate of the backbone relative to the head's")
    weight_decay: float = option(1e-2, "weight decay (AdamW)")
    layer_decay: float = option(
        1.0, "factor for the learning rate from each layer of the encoder to the one before it", above=0, max=1
    )
    warmup: float = option(0.05, "share of the steps over which the learning rate rises", min=0, below=1)
    clip_norm: float = option(0.0, "largest norm of the gradient; 0: no clipping", min=0)
    drop_path: float = option(
        -1.0,
        "ViT and ConvNeXt: probability of leaving out a branch, in the last block; negative: as the encoder",
        below=1,
    )
    label_smoothing: float = option(0.0, "share of each label that is spread evenly over the classes", min=0, below=1)
    mixup: float = option(0.0, "alpha of mixup: batches become mixtures of two images; 0: none", min=0)
    cutmix: float = option(
        0.0, "alpha of CutMix: a box comes from another image; 0: none; with mixup: one of both in each batch", min=0
    )
    ema: float = option(
        0.0,
        "decay of an exponential average of weights and statistics, which is the model; 0: none",
        min=0,
        below=1,
    )
    head: Literal["probe", "zero"] = option("probe", "initial head: a linear probe, or zeros")
    batch_norm: Literal["train", "frozen"] = option("train", "statistics: of the batch, or of pretraining (frozen)")
    validation: float = option(0.2, "share of the labels held out to choose by; the final model trains on all labels")
    class_weights: Literal["none", "balanced"] = option("none", "balanced: every class has the same weight in the loss")
    sensitivity: float = option(
        0.9, "multi-label: each class's threshold reaches this sensitivity on the held-out labels", above=0, max=1
    )
    augment: Augment = option(Augment(preset="light"), "views of the images; same keys as config.augment")
    pixels: bool = option(False, "a logistic regression on raw pixels votes, too: the mean of both logits")
    unlabelled: Literal["none", "all"] = option("none", "all: learn from images without a label, too: the run's own")
    teacher: Literal["finetuned", "propagated"] = option(
        "finetuned", "of these; finetuned: the classifier; propagated: labels spread over the embedding's neighbours"
    )
    unlabelled_batch: int = option(64, "images without a label in a batch, beside the labelled ones", min=1)
    unlabelled_weight: float = option(0.5, "their share of the loss; the labelled images have the rest", min=0, max=1)
    temperature: float = option(1.0, "that divides the logits of teacher and student", above=0)
    align: bool | Literal["equal"] = option(False, "make classes as frequent as among the labels, or equally frequent")
    consistency: bool = option(
        False, "the student learns from its own confident answers to weak views (augment), on strong ones"
    )
    confidence: float = option(0.95, "consistency: probability from which on an answer counts", above=0, max=1)
    strong: Augment = option(Augment(preset="small"), "consistency: strong views; same keys as config.augment")

    def inputs(self) -> dict[str, Any]:
        """The options that a classifier depends on: those of OPTIONAL only where they differ from their defaults, and
        those from `unlabelled` on only where it is on."""
        options = dataclasses.asdict(self)
        used = list(options) if self.unlabelled != "none" else itertools.takewhile("unlabelled".__ne__, options)
        usual = {f.name: f.default for f in dataclasses.fields(self) if f.name in OPTIONAL}
        return {key: options[key] for key in used if key not in usual or options[key] != usual[key]}


@dataclass(frozen=True)
class Linear:
    """The protocol `linear`: a linear classifier on frozen features of random crops. Every learning rate is trained
    with every weight decay, all at once; the best on held-out labels is used."""

    optimizer: Literal["sgd", "lars"] = option("sgd", "optimizer; lars: biases have neither its ratio nor weight decay")
    epochs: int = option(100, "passes over the labelled images", min=1)
    batch: int = option(256, "images per step, over all devices; at most as many as there are", min=1)
    lr: tuple[float, ...] = option(
        (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0),
        "peak learning rates for a batch of `lr_batch`; scaled linearly with the batch",
        min=0,
    )
    lr_batch: int = option(256, "batch that `lr` is meant for; 0: `lr` is used unscaled", min=0)
    schedule: Literal["cosine", "constant", "step"] = option(
        "cosine", "after the warm-up, step by step; step: x 0.1 at 60 % and at 80 %"
    )
    warmup: Duration = option("0 epochs", "linear rise of the learning rate from 0 before the schedule")
    momentum: float = option(0.9, "of the optimizer", min=0, below=1)
    nesterov: bool = option(False, "sgd: Nesterov's momentum")
    weight_decay: tuple[float, ...] = option((0.0,), "added to the gradient; each is tried with each lr", min=0)
    augment: Augment = option(Augment(preset="crops"), "views of the images; same keys as config.augment")
    blocks: int = option(
        0, "ViT: the class tokens of its last n blocks side by side, each after the last norm; 0: the embedding", min=0
    )
    patches: bool = option(False, "ViT: and the mean of the last block's patches")
    batch_norm: bool = option(False, "features pass a BatchNorm without scale and shift first, as in MAE's source")
    validation: float = option(
        0.1, "share of the labels held out to choose by, if there is a choice; it is not trained on", above=0, below=1
    )


@dataclass(frozen=True)
class Study:
    """A comparison of arms x label counts x seeds."""

    arms: Mapping[str, Any] = option(
        dict,
        'arm -> what differs from the config, nested like it; {"from": PATH}: encoder of a run, or given weights',
    )
    baseline: str = option("scratch", "arm that the others are compared with; an empty arm starts from random weights")
    protocol: Literal["finetune", "linear_quick"] = option("finetune", "how encoders are evaluated")
    labels: tuple[int, ...] = option((50, 100, 250, 1000), "label counts; each draw contains the smaller ones", min=1)
    draw: Literal["stratified", "random", "typical", "coverage", "kcenter"] = option(
        "stratified",
        "how labels are drawn; stratified: with the shares of the classes; the last three: by an arm's own encoder",
    )
    seeds: int = option(5, "number of label draws, the same for every arm", min=1)
    pretrainings: int = option(
        1, "pretraining runs per arm, each with its own seed; the study's seeds take turns", min=1
    )
    test: Data = option(Data(name="", split="test"), "test data: what differs from config.data")

    @classmethod
    def parse(cls, values: Mapping[str, Any], key: str) -> "Study":
        """From a config file. Relative paths of runs become absolute."""
        if values.get("protocol") == "linear":
            raise UserError(f"{key}.protocol='linear': is called linear_quick now; allowed: finetune, linear_quick")
        study, arms = cls(**fields.convert_all(cls, values, key)), {}
        for arm, changes in study.arms.items():
            if not isinstance(changes, Mapping):
                raise UserError(f"{key}.arms: {arm}={changes!r}: allowed: a mapping, such as {{}}")
            run = changes.get("from", "none")
            if not isinstance(run, str) or not run:
                raise UserError(f"{key}.arms: {arm}: from={run!r}: allowed: the path of a run folder")
            arms[arm] = {**changes, "from": fields.absolute(run)} if "from" in changes else changes
        return dataclasses.replace(study, arms=arms)


@dataclass(frozen=True)
class Config:
    """One run. `method` is the frozen Config of the module that `registry.find("method", method_name)` returns."""

    method_name: str
    method: Any
    data: Data
    augment: Augment
    model: Model
    optim: Optim
    train: Train
    eval: Eval
    finetune: Finetune
    linear: Linear
    study: Study
    on_collapse: Literal["warn", "stop"] = option("warn", "what to do when the embeddings have collapsed")
    log: str = option("", "where metrics go besides metrics.jsonl: tensorboard, wandb, mlflow, separated by commas")


SECTIONS: dict[str, Any] = {
    name: kind for name, kind in fields.types_of(Config).items() if dataclasses.is_dataclass(kind)
}
TOP_LEVEL = ("on_collapse", "log")
# A run can only be continued with the same values here. The other sections matter only when its encoder is evaluated.
TRAINING = ("method", "data", "augment", "model", "optim", "train", "eval")
