"""Image data sets prepared by TensorFlow Datasets. Reading them needs no TensorFlow."""

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ssl_jax.config import Data
from ssl_jax.data.central import check_side
from ssl_jax.data.decoding import SIZE, check_background, decode
from ssl_jax.data.source import Source
from ssl_jax.errors import NoPartError, UserError, first_line


def command(name: str) -> str:
    """The shell command that prepares a data set."""
    return f"pip install tensorflow && tfds build {name} --file_format=array_record"


def read(data: Data) -> Source:
    """A prepared data set.

    data.path: a name ("cifar10", "cifar10:3.0.2"), looked up in TFDS_DATA_DIR or ~/tensorflow_datasets, or the folder
    of a prepared version, which contains dataset_info.json. data.split: in TFDS's syntax, such as "train[:10%]"; "all"
    means all splits. The image is the feature "image", or the only feature that is an image. The label is the feature
    "label", or the only class label.
    """
    if not data.path:
        raise UserError("config.data.path='': missing; set it to the name of a TFDS data set, such as cifar10")
    check_background(data.background)
    with _quiet():
        records, info = _open(data)
    image_name, label_name = _features(info, data.path)
    feature = info.features[image_name]
    height, width, depth = feature.shape
    fixed = height and width and not data.size
    shape = (height, width) if fixed else (data.size or SIZE, data.size or SIZE)
    channels, size = data.channels or (1 if depth == 1 else 3), 0 if fixed else shape[0]
    check_side(data, size)
    count = min(len(records), data.limit or len(records))

    def labels() -> np.ndarray | None:
        numbers = np.array([records[i][label_name] for i in range(count)], np.int32)
        return None if numbers.max() < 0 else numbers  # a test part whose labels are secret

    return Source(
        [str(i) for i in range(count)],
        (*shape, channels),
        lambda i: decode(records[i][image_name], size, channels, background=data.background, side=data.test_side),
        labels=labels if label_name else None,
        classes=info.features[label_name].names if label_name else (),
        max_bad_share=data.max_bad_share,
        workers=data.workers,
        content=lambda i: records[i][image_name],
    )


def _open(data: Data) -> tuple[Any, Any]:
    """(records, with images still encoded; the description of the data set)."""
    where = f"config.data.path={data.path!r}"
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError(f"config.data.name='tfds': {error}; pip install tensorflow-datasets") from error
    try:
        if (Path(data.path).expanduser() / "dataset_info.json").is_file():
            builder = tfds.builder_from_directory(Path(data.path).expanduser())
        else:
            builder = tfds.builder(data.path, data_dir=os.environ.get("TFDS_DATA_DIR"))
    except tfds.core.DatasetNotFoundError as error:
        raise UserError(f"{where}: TFDS knows no data set of this name, and no prepared folder is there") from error
    except (ValueError, ImportError, OSError) as error:
        raise UserError(f"{where}: TFDS cannot open it: {first_line(error)}") from error
    info = builder.info
    if not info.splits:
        raise UserError(f"{where}: not prepared in {builder.data_path.parent.parent}; {command(data.path)}")
    split = "+".join(info.splits) if data.split == "all" else data.split
    available = f"available: {', '.join([*info.splits, 'all'])}, or a split in TFDS's syntax"
    image_name, label_name = _features(info, data.path)
    try:
        if split == "test" and not (split := _test_part(builder, info, label_name)):
            raise NoPartError(f"{where}: no test part; {available}")
        records = builder.as_data_source(split, decoders={image_name: tfds.decode.SkipDecoding()})
    except NotImplementedError as error:
        raise UserError(
            f"{where}: prepared as {info.file_format.value}, which cannot be read in random order; "
            f"{command(data.path)} --overwrite"
        ) from error
    except ValueError as error:
        reason = "no images" if "length" in str(error) else "unknown or malformed"
        raise UserError(f"config.data.split={data.split!r}: {reason}; {available}") from error
    return records, info


def _test_part(builder: Any, info: Any, label_name: str | None) -> str:
    """The part to test on: test, or the validation part if there is no test part or, as in ImageNet, its labels are
    secret; "" if there is none."""
    import tensorflow_datasets as tfds

    parts = [name for name in ("test", "validation", "valid", "val") if name in info.splits]
    image_name, _ = _features(info, builder.name)
    for part in parts if label_name else ():
        first = builder.as_data_source(part, decoders={image_name: tfds.decode.SkipDecoding()})
        if len(first) and first[0][label_name] >= 0:
            return part
    return parts[0] if parts else ""


def _features(info: Any, where: str) -> tuple[str, str | None]:
    """(name of the image, name of the label or None)."""
    import tensorflow_datasets as tfds

    def find(kind: type, name: str) -> str | None:
        names = [key for key, feature in info.features.items() if type(feature) is kind]
        return name if name in names else names[0] if len(names) == 1 else None

    image_name = find(tfds.features.Image, "image")
    if image_name is None or info.features[image_name].np_dtype == np.float32:
        raise UserError(
            f"config.data.path={where!r}: features are {', '.join(info.features)}; there must be one uint8 image"
        )
    return image_name, find(tfds.features.ClassLabel, "label")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps TFDS from logging what our own errors explain better."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
