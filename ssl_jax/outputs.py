"""The files that `predict`, `embed` and `finetune --test` write. In all of them, `path` says which image it is."""

import contextlib
import io
import json
import math
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssl_jax import files
from ssl_jax.config import Finetune
from ssl_jax.data import Source
from ssl_jax.data.labelled import Labelled
from ssl_jax.errors import UserError
from ssl_jax.evaluate.finetuning import Classifier, length, probabilities, trainings
from ssl_jax.progress import counting

PIECE = 1_024  # images that are decoded and classified at a time


def predictions(classifier: Classifier, source: Source) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(indices [n], logits [n, K]) of the images that can be read, PIECE at a time."""
    images, several = source.all_images(), len(source) > PIECE
    with counting("predictions", "images") as progress:
        for start in range(0, len(source), PIECE):
            logits = classifier.logits(images[start : start + PIECE], fixed=several)
            rows = np.arange(start, start + len(logits))
            kept = np.array([i not in source.replaced for i in rows.tolist()])  # a stand-in shows another image
            yield rows[kept], logits[kept]
            if several:
                progress(start + len(logits), len(source))


def write_predictions(
    path: Path,
    source: Source,
    scores: Iterable[tuple[np.ndarray, np.ndarray]],
    classes: Sequence[str],
    multilabel: bool,
) -> int:
    """Writes a .csv file: path, patient (if the data name one), predicted class (unless an image can have several), and
    one probability per class. Or a .json file: a list of such rows, the probabilities under "probabilities". Rows are
    written as they come. Returns their number.

    scores: (indices [n], logits [n, K]) of parts of the images.
    """
    first = ["path", *["patient"] * (source.groups is not None), *["predicted"] * (not multilabel)]
    count = 0

    def rows() -> Iterator[tuple[list[Any], list[float]]]:
        nonlocal count
        for indices, logits in scores:
            shares = probabilities(logits, multilabel)
            # With every digit: rounded probabilities near 0 and 1 would tie, which changes AUCs and thresholds.
            for i, best, each in zip(indices.tolist(), shares.argmax(axis=1).tolist(), shares.tolist(), strict=True):
                patient = [] if source.groups is None else [source.groups[i].item()]
                yield [source.names[i], *patient, *[classes[best]] * (not multilabel)], each
                count += 1

    if path.suffix != ".json":
        files.write_csv(path, [*first, *classes], ([*about, *p] for about, p in rows()), end="\r\n")
        return count
    with files.writing(path) as file:
        for about, p in rows():
            row = dict(zip(first, about, strict=True)) | {"probabilities": dict(zip(classes, p, strict=True))}
            start = ",\n" if count else "[\n"
            file.write((start + textwrap.indent(json.dumps(row, indent=1), " ")).encode())
        file.write(b"\n]\n" if count else b"[]\n")
    return count


def write_embeddings(
    path: Path, names: Sequence[str], features: np.ndarray, labels: np.ndarray | None, classes: Sequence[str]
) -> None:
    """Writes a .npz file with the arrays embeddings, float32 [N, D], and path [N]; or a .csv or .parquet file with the
    columns path, e0, e1, ...

    labels: int [N], -1 where unknown, or float [N, K], NaN where unknown; None: there are none. A .npz file holds them
    as they are, beside classes, the names [K]. A table has a column label or, if an image can have several, one for
    each class; its cells are empty where a label is unknown.
    """
    if path.suffix == ".npz":
        known = {} if labels is None else {"labels": labels, "classes": np.array(classes, str)}
        files.write_npz(path, embeddings=features, path=np.array(names), **known)
        return
    columns = {"path": names, **_label_columns(labels, classes)}
    (_write_csv if path.suffix == ".csv" else _write_parquet)(path, columns, features)


def _label_columns(labels: np.ndarray | None, classes: Sequence[str]) -> dict[str, list[Any]]:
    """Columns of a table: the class of each image or, if it can have several, a number for each; None where unknown."""
    if labels is None:
        return {}
    if labels.ndim == 1:
        return {"label": [classes[label] if label >= 0 else None for label in labels]}
    known = labels.astype(object)
    known[np.isnan(labels)] = None
    return {name: column.tolist() for name, column in zip(classes, known.T, strict=True)}


def _write_csv(path: Path, columns: Mapping[str, Sequence[Any]], features: np.ndarray) -> None:
    rows = [
        [*(f"{v:g}" if isinstance(v, float) else v for v in first), *(f"{v:.7g}" for v in f)]
        for *first, f in zip(*columns.values(), features, strict=True)
    ]
    files.write_csv(path, [*columns, *_dimensions(features)], rows, end="\r\n")


def _write_parquet(path: Path, columns: Mapping[str, Sequence[Any]], features: np.ndarray) -> None:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"--out={path}: needs pyarrow: pip install pyarrow (or write .npz or .csv)") from None
    buffer = io.BytesIO()
    table = pyarrow.table([*columns.values(), *features.T.copy()], names=[*columns, *_dimensions(features)])
    pyarrow.parquet.write_table(table, buffer)
    files.write_bytes(path, buffer.getvalue())


def _dimensions(features: np.ndarray) -> list[str]:
    return [f"e{i}" for i in range(features.shape[1])]


def write_test(
    classifier: Classifier,
    test: Labelled,
    classes: list[str],
    thresholds: Mapping[str, Mapping[str, Any]],
    folder: Path,
    title: str,
) -> dict[str, Any]:
    """Writes test.csv and, for multi-label data, reliability.png with this title; prints and returns the metrics."""
    from ssl_jax.evaluate.classification_report import evaluate_on_test, format_report
    from ssl_jax.evaluation import print_left_out
    from ssl_jax.report.figures import reliability

    scores, groups, multilabel = classifier.logits(test.source.all_images()), test.source.groups, classifier.multilabel
    write_predictions(folder / "test.csv", test.source, [(np.arange(len(scores)), scores)], classes, multilabel)
    result = evaluate_on_test(scores, test.labels, classes, groups=groups, thresholds=thresholds)
    print_numbers(result)
    if multilabel:
        print("\n".join(format_report(result)))
        print_left_out(result)
        reliability(result["reliability"], folder / "reliability.png", title=title)
    return result


def print_numbers(values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if isinstance(value, float):
            print(f"  {name:20} {value:.4g}")


@contextlib.contextmanager
def trainings_watched(settings: Finetune, labels: int) -> Iterator[Callable[[float], None]]:
    """Shows the progress of `train_classifier` on that many labels; yields its `watch`."""
    count, steps, finished = sum(trainings(settings)), length(settings, labels), 0
    with counting(f"{count} training{'s' * (count > 1)}", "steps") as update:

        def watch(share: float) -> None:
            nonlocal finished
            update(finished + math.ceil(share * steps), count * steps)
            finished += steps if share == 1 else 0

        yield watch
