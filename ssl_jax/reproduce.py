"""`ssl-jax reproduce`: a recipe is pretrained, evaluated by the protocol of its source, and compared with the published
number. Of a run that is not the recipe's, it says which settings differ, and gives no difference."""

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ssl_jax import commands, dry_runs, files, interrupts, parallel, plan
from ssl_jax.config import Config, differences, from_json, resolve, to_json
from ssl_jax.config_file import load_config, load_published
from ssl_jax.data import Source, open_source
from ssl_jax.errors import DamagedError, UserError, unknown
from ssl_jax.evaluate.scores import interval
from ssl_jax.report.html import write_report
from ssl_jax.run_folder import RunFolder
from ssl_jax.train import fit
from ssl_jax.train.memory import with_decisions
from ssl_jax.train.step import set_up

# "protocol" of a published number: the protocol of `ssl-jax evaluate`, and the section of the config with its settings.
PROTOCOLS = {"linear": ("linear", "linear"), "knn": ("knn", "eval"), "finetune": ("finetune", "finetune")}
# What may differ from the recipe: where images and results lie, where and how fast it computes, and the seed.
FREE = {
    *(f"config.data.{key}" for key in ("path", "cache", "workers", "engine", "memory_gb", "retries", "timeout")),
    *(f"config.train.{key}" for key in ("devices", "shard", "micro_batch", "seed", "profile", "log_every")),
    *(f"config.train.{key}" for key in ("save_every", "keep")),
    *(f"config.eval.{key}" for key in ("every", "knn_bank", "knn_queries", "online_probe")),
    "config.model.conv",
    "config.model.remat",
}
IMAGES = {"imagenet2012": (1_281_167, 50_000), "cifar10": (50_000, 10_000)}  # by data.path: to train on, to test on
SECTIONS = ("method", "data", "augment", "model", "optim", "train")


def reproduce(
    config: Config,
    recipe: str,
    workdir: str,
    test: str = "",
    seeds: int = 1,
    topology: str = "",
    cluster: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Writes workdir/reproduce.json and returns its content; prints published number, ours and the difference.

    Args:
      config: of the run: the recipe's, or changed by flags.
      recipe: the config file and its argument, as of --config, with a function get_published.
      workdir: the run folder to create, continue or, if its run has ended, use.
      test: labelled test images; "": the test part of the data.
      seeds: number of runs, each with its own train.seed; run 1 lies in workdir, run n in workdir-seed<n>.
      topology: dry_run: a TPU slice for which hours are predicted.
      cluster: as of `commands.pretrain`.
    """
    published = _published(recipe)
    if seeds < 1:
        raise UserError(f"--seeds={seeds}: allowed: 1 or more")
    if topology and not dry_run:
        raise UserError(f"--topology={topology}: only with --dry-run, which predicts hours on it")
    theirs = resolve(load_config(recipe, []))
    runs = [_run(config, workdir, number) for number in range(seeds)]
    if dry_run:
        for line in _plan(recipe, published, theirs, config, runs, topology):
            print(line, flush=True)
        return {}
    parallel.join_processes(cluster)
    interrupts.take_back()
    source = open_source(config.data)
    for run, folder in runs:
        fit(run, folder, source)
        if parallel.is_main_process():
            _check_evaluation(run, folder)
            print(f"report:  {write_report(folder)}", flush=True)
    if not parallel.is_main_process():
        return {}
    path = Path(workdir) / "reproduce.json"
    before: dict[tuple[Any, ...], Any] = {}
    with contextlib.suppress(DamagedError):  # then everything is evaluated again
        before = {_key(entry): entry for entry in files.read_json(path).get("results", [])}
    results = []
    for entry in published:
        protocol, _ = PROTOCOLS[entry["protocol"]]
        each, known = list[dict[str, Any]](), before.get(_key(entry), {}).get("runs", [])
        for number, (run, folder) in enumerate(runs):
            inputs = _inputs(run, folder, test)
            if number < len(known) and known[number]["inputs"] == inputs:
                each.append(known[number])
                continue
            result = commands.evaluate(str(folder), protocol, test=test)
            if entry["metric"] not in result["mean"]:
                raise unknown(f"{recipe}: get_published: metric", entry["metric"], result["mean"])
            value = 100 * result["mean"][entry["metric"]]
            images = sum(result["per_seed"][0]["support"].values())
            each.append({"inputs": inputs, "value": value, "tested_on": result["test"], "test_images": images})
            # So that it is not evaluated again if a later one fails.
            before[_key(entry)] = {**entry, "runs": each + known[number + 1 :]}
            files.write_json(path, {"recipe": recipe, "results": list(before.values())})
        mean, half = interval([run["value"] for run in each])
        differs = _differs(theirs, config, entry, source, runs, each)
        difference = None if differs else mean - entry["value"]
        spread = half if seeds > 1 else None
        ours: dict[str, Any] = {"ours": mean, "interval": spread, "difference": difference, "differs": differs}
        results.append({**entry, **ours, "runs": each})
    found = {"recipe": recipe, "results": results}
    for line in _summary(found):  # first, so that a full disk loses no number
        print(line, flush=True)
    files.write_json(path, found)
    return found


def _published(recipe: str) -> list[dict[str, Any]]:
    """The published numbers of a recipe. UserError if there is none, or if one is not understood."""
    published = load_published(recipe)
    if not published:
        raise UserError(
            f"{recipe}: no published number to compare with; allowed: a recipe whose get_published gives one"
        )
    for entry in published:
        missing = {"protocol", "metric", "value", "source"} - set(entry)
        if missing:
            raise UserError(f"{recipe}: get_published: {', '.join(sorted(missing))} missing")
        if entry["protocol"] not in PROTOCOLS:
            raise unknown(f"{recipe}: get_published: protocol", entry["protocol"], PROTOCOLS)
    return list(published)


def _run(config: Config, workdir: str, number: int) -> tuple[Config, Path]:
    train = dataclasses.replace(config.train, seed=config.train.seed + number)
    folder = Path(workdir)
    return dataclasses.replace(config, train=train), folder.with_name(
        f"{folder.name}-seed{number + 1}"
    ) if number else folder


def _check_evaluation(config: Config, folder: Path) -> None:
    """UserError if the run in a folder was begun with other settings of the evaluation: `evaluate` would use those."""
    sections = sorted({section for _, section in PROTOCOLS.values()})
    if changed := differences(to_json(resolve(from_json(RunFolder(folder).read_config()))), to_json(config), sections):
        raise UserError(
            f"--workdir={folder}: its run has other settings ({'; '.join(changed)}); allowed: these, or another folder"
        )


def _key(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(entry[key] for key in ("protocol", "metric"))


def _inputs(run: Config, folder: Path, test: str) -> dict[str, str]:
    """What an evaluation depends on, so that one that is there already is not made again."""
    with (RunFolder(folder).encoder / "encoder.safetensors").open("rb") as file:
        weights = hashlib.file_digest(file, "sha256").hexdigest()
    return {"config": files.json_digest(to_json(run)), "weights": weights, "test": test}


def _changed(theirs: Config, config: Config, entry: Mapping[str, Any]) -> list[str]:
    """The settings in which a config differs from its recipe, but for FREE ones, as `config.differences` has them."""
    free = FREE
    if theirs.data.path in IMAGES:  # their number tells whether they are the same, whatever reads them
        free = FREE | {"config.data.name"}
    section = PROTOCOLS[entry["protocol"]][1]
    lines = differences(to_json(theirs), to_json(config), (*SECTIONS, section))
    return [line for line in lines if line.partition(":")[0] not in free]


def _differs(
    theirs: Config,
    config: Config,
    entry: Mapping[str, Any],
    source: Source,
    runs: Sequence[tuple[Config, Path]],
    each: Sequence[Mapping[str, Any]],
) -> list[str]:
    """Why the run is not the recipe's, a line for each reason."""
    lines = _changed(theirs, config, entry)
    train, test = IMAGES.get(theirs.data.path, (None, None))
    if train not in (None, len(source)):
        lines.append(f"images: {len(source):,}, not the {train:,} of {theirs.data.path}")
    if test not in (None, each[0]["test_images"]):
        lines.append(f"test images: {each[0]['test_images']:,} ({each[0]['tested_on']}), not {test:,}")
    elif each[0]["tested_on"].startswith("20 %"):
        lines.append(f"test images: {each[0]['tested_on']}")
    parts = (RunFolder(folder).read_environment().get("micro_batch", 0) for _, folder in runs)
    batch, part = config.train.batch, min(filter(None, parts), default=0)
    if 0 < part < batch and not config.train.bn_group and _has_batch_norm(config, source, runs[0][1]):
        lines.append(f"BatchNorm: over {part} images at a time (config.train.micro_batch), not over {batch}")
    return lines


def _has_batch_norm(config: Config, source: Source, folder: Path) -> bool:
    """Whether the method keeps statistics of BatchNorm anywhere, in the encoder or in a head."""
    setup = set_up(with_decisions(config, RunFolder(folder).read_environment()), source)
    views = [jnp.zeros((2, view.size, view.size, setup.shape[2])) for view in setup.views]
    _, state = jax.eval_shape(setup.method.init, jax.random.key(0), views)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(state.stats)[0]]
    return any("'mean'" in name for name in names)  # a frozen projection is kept there, too


def _summary(found: Mapping[str, Any]) -> Iterator[str]:
    for result in found["results"]:
        yield f"{found['recipe']}, {result['protocol']}, {result['metric']}:"
        yield f"  published   {result['value']:.2f} %  ({result['source']})"
        spread = "" if result["interval"] is None else f" ± {result['interval']:.2f} (95 %, {len(result['runs'])} runs)"
        yield f"  ours        {result['ours']:.2f} %{spread}"
        if not result["differs"]:
            yield f"  difference  {result['difference']:+.2f}"
            continue
        yield "  difference  not given: this run is not the recipe's; it differs in"
        yield from (f"    {line}" for line in result["differs"])


def _plan(
    recipe: str,
    published: Sequence[Mapping[str, Any]],
    theirs: Config,
    config: Config,
    runs: Sequence[tuple[Config, Path]],
    topology: str,
) -> Iterator[str]:
    """What the command would do, for --dry-run."""
    yield f"recipe    {recipe}, {len(runs)} run{'s' * (len(runs) > 1)}: {', '.join(str(folder) for _, folder in runs)}"
    for entry in published:
        how = f"--protocol={PROTOCOLS[entry['protocol']][0]}"
        yield f"published {entry['value']} % {entry['metric']} ({entry['source']}), by {how}"
        if changed := _changed(theirs, config, entry):
            yield f"          no difference will be given: {'; '.join(changed)}"
    try:
        source = open_source(config.data)
    except UserError as error:
        yield f"data      not here: {error}"
        if config.data.path not in plan.KNOWN_DATA:
            return
        source = plan.open_or_describe(config.data)
        steps = set_up(config, source).steps
        yield f"length    {steps:,} steps of {config.train.batch} images ({config.train.duration})"
    else:
        yield from dry_runs.pretraining(config, runs[0][1], source)
    if topology:
        made = plan.estimate(config, topology, source)
        if made.fits:
            yield plan.summary(made)
        else:
            yield f"{topology}: does not fit: needs {made.memory / 2**30:.1f} GiB per chip"
