"""`ssl-jax transfer`: one encoder on many data sets, each scored by the metric that its own literature uses."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ssl_jax import evaluation, files
from ssl_jax.config import Config, Data
from ssl_jax.data import open_source
from ssl_jax.data.labelled import Labelled, labelled_part
from ssl_jax.encoder import Encoder
from ssl_jax.errors import NoPartError, UserError, unknown
from ssl_jax.evaluate.subsets import without_test_part
from ssl_jax.load import load_with_settings
from ssl_jax.run_folder import RunFolder
from ssl_jax.settings import data_of

PROTOCOLS = ("linear_quick", "knn")


class Benchmark(NamedTuple):
    """The splits of a TFDS data set that are learnt from and tested on, and the metric that is reported for it."""

    train: str = "train"
    test: str = "test"
    metric: str = "top1"


MEAN_PER_CLASS = "balanced_accuracy"
# Kornblith, Shlens and Le, arXiv 1805.08974, table 1 and appendix A.1; SimCLR, arXiv 2002.05709, appendix B.8, has the
# same. differs: VOC 2007 (several labels per image), Birdsnap and FGVC Aircraft (not in TFDS) are missing; Caltech-101
# and SUN397 have TFDS's split.
BENCHMARKS = {
    "food101": Benchmark(test="validation"),
    "cifar10": Benchmark(),
    "cifar100": Benchmark(),
    "sun397": Benchmark(),
    "cars196": Benchmark(),
    "dtd": Benchmark(train="train+validation"),
    "oxford_iiit_pet": Benchmark(metric=MEAN_PER_CLASS),
    "caltech101": Benchmark(metric=MEAN_PER_CLASS),
    "oxford_flowers102": Benchmark(train="train+validation", metric=MEAN_PER_CLASS),
}


class Opened(NamedTuple):
    name: str
    metric: str  # "": what suits the classes
    data: Data
    train: Labelled
    test: Labelled
    described: str  # the test images


def transfer(
    workdir: str,
    data: str = "",
    protocol: str = "linear_quick",
    step: int | str = "",
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Evaluates an encoder on each data set, prints a table, and writes it to evaluation/transfer/table-PROTOCOL.md
    and .json in the run folder. What an earlier call has evaluated under the same conditions is read, not repeated.

    data: data sets, separated by commas; "": those of BENCHMARKS that TFDS has prepared on this machine. Returns the
    rows of the table. Raises UserError before anything is computed if one of `data` cannot be opened.
    """
    if protocol not in PROTOCOLS:
        raise unknown("--protocol", protocol, PROTOCOLS)
    encoder, config = load_with_settings(workdir, step, overrides)
    names = [name.strip() for name in data.split(",") if name.strip()]
    opened, missing = _open_all(encoder, config, names)
    for line in missing:
        print(f"left out: {line}")
    if not opened:
        raise UserError(f"--data: none of {', '.join(BENCHMARKS)} is prepared here; name data sets, or prepare one")
    folder, rows = RunFolder(workdir).evaluation / "transfer", []
    for number, each in enumerate(opened, 1):
        print(f"{number} of {len(opened)}: {each.name}", flush=True)
        rows.append(_row(each, _evaluated(encoder, config, protocol, each, folder)))
    lines = table(rows)
    print("\n".join(lines))
    about = {"protocol": protocol, "step": encoder.about.get("step"), "rows": rows}
    files.write_bytes(folder / f"table-{protocol}.md", ("\n".join(lines) + "\n").encode())
    files.write_json(folder / f"table-{protocol}.json", about)
    print(f"table: {folder / f'table-{protocol}.md'}")
    return about


def _open_all(encoder: Encoder, config: Config, names: Sequence[str]) -> tuple[list[Opened], list[str]]:
    """The data sets, and why others of BENCHMARKS are left out."""
    found, missing = [], []
    for text in names or [f"tfds:{name}" for name in BENCHMARKS]:
        try:
            found.append(_open(encoder, config, text))
        except UserError as error:
            if names:
                raise
            missing.append(str(error))
    return found, missing


def _open(encoder: Encoder, config: Config, text: str) -> Opened:
    source, _, name = text.partition(":")
    benchmark = BENCHMARKS.get(name.partition(":")[0]) if source == "tfds" else None
    splits = benchmark or Benchmark(metric="")
    spec = encoder.data(data_of(text, "--data", config.data))
    train = open_source(dataclasses.replace(spec, split=splits.train))
    labelled = labelled_part(train, train, text)
    try:
        test, described = labelled_part(open_source(spec, splits.test), train, text), f"its {splits.test} part"
    except NoPartError:
        (labelled, test), described = without_test_part(labelled), "20 % of its images, held out"
    return Opened(text, splits.metric, spec, labelled, test, described)


def _evaluated(encoder: Encoder, config: Config, protocol: str, each: Opened, folder: Path) -> dict[str, Any]:
    conditions = evaluation.conditions(config, protocol, each.data, None)
    path = folder / f"{re.sub(r'[^A-Za-z0-9]+', '_', each.name)}-{protocol}"
    made = files.read_json(path.with_name(f"{path.name}.json"), "remove it, and run the command again")
    if made and made["conditions"] == conditions and made["step"] == encoder.about.get("step"):
        return made
    about = {"test": each.described, "conditions": conditions}
    return evaluation.evaluate(
        encoder, config, protocol, each.train, each.test, labels=0, seeds=1, about=about, path=path
    )


def _row(each: Opened, result: dict[str, Any]) -> dict[str, Any]:
    metric = each.metric or result["metric"]
    beside = {name: values["mean"].get(metric) for name, values in result["references"].items()}
    return {
        "data": each.name,
        "metric": metric,
        "encoder": result["mean"].get(metric),
        **{name: beside[name] for name in beside if name.endswith("linear")},
        "classes": len(result["classes"]),
        "train": len(each.train.labels),
        "test": len(each.test.labels),
        "tested_on": result["test"],
    }


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The lines of a Markdown table, scores in %."""
    columns = list(rows[0])

    def shown(value: Any) -> str:
        return "–" if value is None else f"{100 * value:.1f}" if isinstance(value, float) else f"{value}"

    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    return lines + [f"| {' | '.join(shown(row[name]) for name in columns)} |" for row in rows]
