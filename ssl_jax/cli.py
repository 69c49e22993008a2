"""The command line: `ssl-jax COMMAND --flag=value ...`. It parses the arguments; `commands` does the work."""

import contextlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ssl_jax import __version__, interrupts, progress
from ssl_jax.errors import UserError, unknown, visible

CONFIG = "config: NAME[:ARGUMENT] or FILE.py[:ARGUMENT]; change options with --config.SECTION.KEY=VALUE"
METHOD = "method with its recipe, such as simclr (`ssl-jax methods` lists them); instead of --config, or to change it"
RUN = "run folder, written by `ssl-jax pretrain`"
ENCODER = f"{RUN}, or a classifier folder, written by `ssl-jax finetune`"
STEP = ("", "checkpoint to use instead of the finished encoder: its step, or latest; the run may go on meanwhile")
# These accept --config.KEY=VALUE but have no --config.
OVERRIDES = ("evaluate", "finetune", "predict", "embed", "export", "select", "check", "search")
DATA = "folder of images or of CheXpert, .csv or .npz file, or a source such as fashion_mnist or tfds:NAME"
JSON = (False, "end the output with one line of JSON, for programs")
DRY_RUN = (False, "say what this would read, need and write, after a few steps; write nothing")
QUIET = (False, "print nothing but warnings and errors")
MASKS = "folder of masks (IMAGE/CLASS.png or IMAGE.png) or table of boxes (path,left,top,right,bottom,class)"
LENGTH = {
    "epochs": ("", "length of the run: train.duration"),
    "steps": ("", "the same, in steps"),
    "batch": ("", "images per step: train.batch"),
    "size": ("", "side to which images are resized, in px: data.size"),
    "model": ("", "architecture: model.name"),
}

# command: (summary, {flag: (default, help)}); the default ... marks a required flag
COMMANDS: dict[str, tuple[str, dict[str, tuple[Any, str]]]] = {
    "pretrain": (
        "train an encoder; the same command continues an interrupted run",
        {
            "method": ("", METHOD),
            "data": ("", f"images to train on: {DATA}"),
            "workdir": (..., "run folder to create or continue"),
            **LENGTH,
            "config": ("", CONFIG),
            "cluster": (False, "join the other hosts of a TPU pod; SLURM, Open MPI and GKE need no flag"),
            "dry_run": DRY_RUN,
        },
    ),
    "evaluate": (
        "evaluate an encoder: kNN, linear probe or fine-tuning, on all or few labels",
        {
            "workdir": (..., ENCODER),
            "step": STEP,
            "protocol": ("knn", "knn, linear, finetune, or propagate (labels spread to all images, then linear)"),
            "labels": (0, "number of labelled images to train on; 0: all"),
            "seeds": (1, "number of times these images are drawn"),
            "data": ("", f"labelled data (default: the run's own): {DATA}"),
            "test": ("", "test data (default: the test split of the data, or 20 % held out)"),
            "unlabelled": ("", "images without a label, to learn from as well (propagate: default: all of the data)"),
            "json": JSON,
        },
    ),
    "study": (
        "compare methods over label counts and seeds; the same command continues an interrupted study",
        {
            "config": (..., CONFIG),
            "data": ("", f"images, some of them labelled (default: the config's): {DATA}"),
            "workdir": (..., "study folder to create or continue"),
            "cells": ("", "K/N: run only the K-th of N parts; 0/N: only pretrain"),
            "dry_run": DRY_RUN,
        },
    ),
    "sweep": (
        "try settings, such as views and learning rates, in short runs that are scored alike",
        {
            "method": ("", METHOD),
            "data": ("", f"images to train on: {DATA}"),
            "workdir": (..., "sweep folder to create, continue or extend"),
            "over": (..., 'options and their values: "augment.preset=natural,light;optim.lr=0.03,0.1"'),
            "labels": ("", f"the labelled images to judge by (default: the run's own kNN, or RankMe): {DATA}"),
            "search": (
                "grid",
                "grid (all), random (--trials of them) or halving (the best third of short runs goes on)",
            ),
            "trials": (0, "random, halving: number of combinations to draw; 0: all"),
            "seed": (0, "of the draw of combinations and of the folds of the labels"),
            **LENGTH,
            "config": ("", CONFIG),
            "cells": ("", "K/N: run only the K-th of N shares, without the table"),
            "workers": (1, "processes that share the trials, each with its share of the GPUs"),
            "dry_run": DRY_RUN,
            "json": JSON,
        },
    ),
    "finetune": (
        "train a classifier on labelled images, starting from an encoder",
        {
            "workdir": (..., ENCODER),
            "step": STEP,
            "data": (..., f"labelled data: {DATA}"),
            "out": (..., "folder for the classifier"),
            "test": ("", "labelled data to test on"),
            "unlabelled": ("", f"images without a label, to learn from as well: {DATA}"),
            "seed": (0, "random seed"),
            "dry_run": DRY_RUN,
            "json": JSON,
        },
    ),
    "predict": (
        "write class probabilities for images",
        {
            "workdir": (..., "classifier folder, written by `ssl-jax finetune`"),
            "data": (..., DATA),
            "out": (..., ".csv or .json file to write"),
            "json": JSON,
        },
    ),
    "embed": (
        "write embeddings of images, with their paths and, where the data have them, their labels",
        {
            "workdir": (..., ENCODER),
            "step": STEP,
            "data": (..., DATA),
            "features": ("cls", "cls (the embedding), patch (the last feature map) or both"),
            "out": (..., ".npz, .csv or .parquet file; or a folder, for many images: written in parts, resumable"),
        },
    ),
    "export": (
        "write an encoder or classifier as a file for other programs, run and compared before it is said to be written",
        {
            "workdir": (..., ENCODER),
            "step": STEP,
            "format": (..., "onnx, stablehlo, timm, torchvision or huggingface"),
            "features": ("cls", "of an encoder: cls (the embedding), patch (the last feature map) or both"),
            "opset": (18, "of ONNX: 18 or more"),
            "out": (..., "folder to create, with the file, a model card and the names of the classes"),
            "json": JSON,
        },
    ),
    "select": (
        "choose the images that are worth labelling, and write a table to fill in",
        {
            "workdir": (..., ENCODER),
            "labels": (50, "number of images to choose"),
            "out": ("to_label.csv", ".csv file to write"),
            "data": ("", f"images to choose from (default: the run's own): {DATA}"),
            "have": ("", f"images that are labelled already: {DATA}"),
            "strategy": (
                "typical",
                "typical, coverage, kcenter, random; with labels or a classifier uncertain, margin",
            ),
            "page": (False, "also write a page to label with, OUT with the ending .html"),
            "classes": ("", "names of the classes, separated by commas, for the page (default: those of --have)"),
            "seed": (0, "random seed"),
            "json": JSON,
        },
    ),
    "check": (
        "find what is wrong with images: unreadable, odd, copies, leaks into a test set, outliers, doubtful labels",
        {
            "data": (..., DATA),
            "workdir": ("", f"{ENCODER}; without it, outliers and labels are not judged"),
            "test": ("", "test data to compare with (default: the test part of the data, if there is one)"),
            "out": ("check", "folder for check.csv and check.html"),
            "json": JSON,
        },
    ),
    "search": (
        "find the images that look most like a query to an encoder",
        {
            "workdir": (..., ENCODER),
            "query": (..., f"image file, or {DATA}"),
            "data": (..., f"images to search: {DATA}"),
            "out": ("neighbours.html", ".html file to write; a table of the same name in .csv lies beside it"),
            "k": (10, "number of images for each query"),
            "json": JSON,
        },
    ),
    "compare": (
        "compare runs: options, curves, and scores on the same test images with paired intervals",
        {
            "runs": (..., "run folders, two or more; each after a space"),
            "out": ("compare.html", ".html file to write"),
            "json": JSON,
        },
    ),
    "views": (
        "draw what a config's transforms do to your images",
        {
            "method": ("", METHOD),
            "data": ("", f"images to draw: {DATA}"),
            "out": ("views.png", ".png file to write"),
            "size": LENGTH["size"],
            "config": ("", CONFIG),
            "images": (6, "number of images"),
            "masks": ("", f"{MASKS}; draws only images with masks, and their outlines"),
        },
    ),
    "audit": (
        "audit transforms: do they cut off lesions (--lesions), and what does an encoder ignore (--invariance)?",
        {
            "lesions": (False, "measure how often the views of --config lose a lesion; needs --masks"),
            "invariance": (False, "measure how far transforms move the embeddings of --workdir"),
            "config": ("", f"{CONFIG}; --invariance without --workdir audits the encoder that it describes"),
            "masks": ("", MASKS),
            "workdir": ("", RUN),
            "data": ("", f"images for --invariance (default: the run's own): {DATA}"),
            "out": ("audit", "folder for a table and a figure"),
            "images": (200, "number of images"),
        },
    ),
    "report": (
        "write one self-contained HTML page about a run or a study",
        {
            "workdir": (..., "run or study folder"),
            "out": ("", ".html file (default: report.html in the folder)"),
        },
    ),
    "plan": (
        "predict memory, speed and hours of a run on a TPU slice by compiling it here",
        {
            "config": (..., CONFIG),
            "topology": ("", "version and shape of the slice, such as v5e:4x8 or v5p:2x2x4"),
            "sweep": ("", "several slices to compare in a table, separated by commas"),
            "images": (0, "number of training images, if the data are not on this machine"),
            "classes": (0, "their number of classes; 0: no labels"),
            "out": ("", "folder for a table and a figure"),
        },
    ),
    "phantom": (
        "generate artificial chest radiographs with known findings, in CheXpert's layout",
        {
            "out": (..., "folder to create or finish"),
            "patients": (10_000, "number of training patients, about two images each"),
            "seed": (0, "random seed; each patient depends only on the seed and its number"),
            "size": (128, "side of the images in px"),
            "test": (300, "number of test images, with clean labels"),
        },
    ),
    "weights": (
        "say what a file of weights is, what of it would be used, and how to start from it",
        {
            "file": (..., "run folder, .safetensors or .pth file, its folder, or OWNER/NAME in Hugging Face's cache"),
            "size": (0, "side of your images in px"),
            "channels": (3, "their channels"),
            "json": JSON,
        },
    ),
    "methods": ("list the methods, their sources and the data they need", {"json": JSON}),
    "completion": (
        'complete commands and flags with the tab key: eval "$(ssl-jax completion bash)" in ~/.bashrc',
        {"shell": (..., "bash or zsh")},
    ),
}
# The flags whose names may be left out: ssl-jax pretrain METHOD DATA. With --config, a method is not expected.
POSITIONAL: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("pretrain", "views", "sweep"), ("method", "data")),
    **dict.fromkeys(("evaluate", "finetune", "predict", "embed", "select"), ("workdir", "data")),
    "study": ("config", "data"),
    "plan": ("config",),
    **dict.fromkeys(("report", "export"), ("workdir",)),
    "check": ("data",),
    "search": ("workdir", "query", "data"),
    "compare": ("runs",),
    "phantom": ("out",),
    "weights": ("file",),
    "completion": ("shell",),
}
SEVERAL = {"compare": "runs"}  # the flag that takes all bare words
# Flags that are short for an option of the config.
SHORT = {
    "method": "method.name={}",
    "epochs": "train.duration={} epochs",
    "steps": "train.duration={} steps",
    "batch": "train.batch={}",
    "size": "data.size={}",
    "model": "model.name={}",
}
REQUEUED = ("pretrain", "study", "sweep")  # a signal ends them with exit code 75, and the same command goes on


def usage(command: str | None = None) -> str:
    """The help text of one command, or the list of all commands."""
    if command is None:
        lines = "\n".join(f"  {name:10} {line}" for name, (line, _) in COMMANDS.items())
        return (
            "usage: ssl-jax COMMAND --flag=value ...\n\n"
            f"{lines}\n\n  ssl-jax help COMMAND   flags of one command\n  ssl-jax --version"
        )
    line, flags = COMMANDS[command][0], flags_of(command)
    shown = [
        f"  --{name:9} {text}" + ("" if default is ... or default in ("", False) else f" (default {default})")
        for name, (default, text) in flags.items()
    ]
    if command in ("evaluate", "finetune"):
        shown.append("  --config.finetune.KEY=VALUE changes how a classifier is trained")
    if command in OVERRIDES:
        shown.append("  --config.data.KEY=VALUE changes how the data are read")
    if _takes_options(command):
        from ssl_jax.config import SECTIONS

        shown.append("  --exclude=FILE leaves out the images that a table lists, such as check.csv: data.exclude")
        shown.append(f"\n  --help=SECTION lists options: config, {', '.join(SECTIONS)}, or the name of a method")
    bare = POSITIONAL.get(command, ())
    words = [n.upper() if flags[n][0] is ... or n in ("method", "data") else f"[{n.upper()}]" for n in bare]
    words += [f"--{name}=..." for name, (default, _) in flags.items() if default is ... and name not in bare]
    return "\n".join([" ".join(["usage: ssl-jax", command, *words]), f"\n{line}\n", *shown])


def option_help(topic: str) -> str:
    """The options of a section or method: type or choices, range, default and meaning of each."""
    from ssl_jax.config import SECTIONS, describe, method_module, method_names, recipe

    lines, section = [], topic
    if topic not in ("config", *SECTIONS):
        if topic not in (methods := method_names()) and "." not in topic:
            raise unknown("--help", topic, ["config", *SECTIONS, *methods])
        module, section = method_module(topic), "method"
        lines = [" ".join((module.__doc__ or topic).partition("\n\n")[0].split())]
        settings = ", ".join(f"{key}={value!r}" for key, value in recipe(topic).items())
        lines += [f"Recipe: {settings}"] * bool(settings) + [""]
    for option in describe(topic):
        key = option.name if section == "config" else f"{section}.{option.name}"
        lines += [f"--config.{key}: {option.allowed} (default {option.default})", f"    {option.help}"]
    return "\n".join(lines)


def flags_of(command: str) -> dict[str, tuple[Any, str]]:
    """The flags of a command, with their defaults and help."""
    return {**COMMANDS[command][1], "quiet": QUIET}


def _takes_options(command: str) -> bool:
    return command in OVERRIDES or "config" in COMMANDS[command][1]


def parse(command: str, argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The values of a command's flags, and the `--config.key=value` overrides in argv."""
    from absl import flags

    values, table = flags.FlagValues(), flags_of(command)
    for name, (default, text) in table.items():
        kinds: dict[type, Any] = {bool: flags.DEFINE_boolean, int: flags.DEFINE_integer}
        define = kinds.get(type(default), flags.DEFINE_string)
        define(name, None if default is ... else default, text, flag_values=values)
    overrides, rest = _overrides(argv)
    values.set_gnu_getopt(True)  # flags may follow other words
    try:
        words = values([f"ssl-jax {command}", *("--dry_run" if item == "--dry-run" else item for item in rest)])[1:]
    except flags.UnrecognizedFlagError as error:
        raise unknown("flag", f"--{error.flagname}", (f"--{n}" for n in table)) from None
    except flags.Error as error:
        raise UserError(" ".join(str(error).split())) from None
    given = {name: values[name].value for name in table}
    if command in SEVERAL and words:
        given[SEVERAL[command]], words = words, []
    left_out = [n for n in POSITIONAL.get(command, ()) if not (n == "method" and given["config"])]
    for word, name in zip(words, left_out):
        if values[name].present:
            raise UserError(f"{word!r}: not expected beside --{name}={given[name]}")
        given[name] = word
    if len(words) > len(left_out):
        raise UserError(f"{words[len(left_out)]!r}: not a flag; available: {', '.join(f'--{n}' for n in table)}")
    for name, (default, text) in table.items():
        if default is ... and not given[name]:
            raise UserError(f"--{name}: missing ({text})")
    return given, overrides


def _overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(overrides, all other arguments). "--config.key value" becomes "--config.key=value"; --exclude is one, too."""
    overrides, rest, items = [], [], list(argv)
    while items:
        item = re.sub("^--exclude(?==|$)", "--config.data.exclude", items.pop(0))
        if not item.startswith("--config."):
            rest.append(item)
        elif "=" in item:
            overrides.append(item)
        elif items and not items[0].startswith("--"):
            overrides.append(f"{item}={items.pop(0)}")
        else:
            raise UserError(f"{item}: value missing; write {item}=VALUE")
    return overrides, rest


def _print_warnings() -> None:
    """Prints warnings of the library, about a skipped file for example, as plain lines on stderr."""
    import logging

    from absl import logging as absl_logging

    absl_logging.set_verbosity(absl_logging.FATAL)  # Orbax logs a traceback where we print one line
    log, handler = logging.getLogger("ssl_jax"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("ssl-jax: %(message)s"))
    log.handlers, log.propagate = [handler], False


def _config_of(command: str, values: dict[str, Any], overrides: Sequence[str]) -> Any:
    """The Config that the flags describe. Takes what is short for one of its options out of `values`."""
    from ssl_jax.config import Data, resolve
    from ssl_jax.config_file import load_config
    from ssl_jax.settings import data_of

    spec, method = values["config"], values.get("method")
    if not spec and not method:
        how = f"`ssl-jax {command} simclr DIR ...`"
        raise UserError(f"METHOD or --config: missing; write {how}; `ssl-jax methods` lists the methods")
    if values.get("epochs") and values.get("steps"):
        raise UserError(f"--steps={values['steps']}: not expected beside --epochs={values['epochs']}")
    short = [f"--config.{text.format(values.pop(flag))}" for flag, text in SHORT.items() if values.get(flag)]
    if "data" in POSITIONAL.get(command, ()) and (text := values.pop("data")):
        data = data_of(text, "--data", Data())
        short += [f"--config.data.name={data.name}", f"--config.data.path={data.path}"]
    for flag in SHORT:
        values.pop(flag, None)
    return resolve(load_config(spec or f"pretrain:{method}", [*short, *overrides]))


@contextlib.contextmanager
def _silent(quiet: bool) -> Iterator[None]:
    """With `quiet`, prints nothing but warnings and errors."""
    if not quiet:
        yield
        return
    progress.QUIET = True
    try:
        with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
            yield
    finally:
        progress.QUIET = False


def run(command: str, argv: Sequence[str]) -> None:
    """Runs a command, or prints its help."""
    if command not in COMMANDS:
        raise unknown("command", command, COMMANDS)
    for argument in argv:
        if argument in ("-h", "--help"):
            print(usage(command))
            return
        if argument.startswith("--help="):
            if not _takes_options(command):
                raise UserError(f"{argument}: `ssl-jax {command}` has no config options; use --help")
            print(option_help(argument.removeprefix("--help=")))
            return
    values, overrides = parse(command, argv)
    as_json, quiet = values.pop("json", False), values.pop("quiet")
    if command == "completion":
        from ssl_jax.completion import script

        flags = {
            name: [f"--{flag}" if default is False else f"--{flag}=" for flag, (default, _) in flags_of(name).items()]
            for name in COMMANDS
        }
        words = {"help": "command", **{name: first for name, (first, *_) in POSITIONAL.items()}}
        print(script(values["shell"], flags, words))
        return
    with _silent(quiet):
        from ssl_jax import commands
        from ssl_jax.start import start_jax

        _print_warnings()
        start_jax()
        if command in OVERRIDES:
            values["overrides"] = overrides
        elif command != "audit" and "config" in values or values.get("config"):
            values["config"] = _config_of(command, values, overrides)
            if command == "sweep":  # whose workers get the same arguments
                values["argv"] = argv
        elif overrides:
            raise UserError(f"{overrides[0]}: `ssl-jax {command}` has no config options")
        work: Callable[..., Any] = getattr(commands, command)
        result = work(**values)
    if as_json:
        print(json.dumps(result, sort_keys=True))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 2, after one line on stderr, if the user has made a mistake."""
    argv = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if argv[0] == "help":
        argv = [*argv[1:2], "--help"]
    with interrupts.unread(), interrupts.requeued() if argv[0] in REQUEUED else contextlib.nullcontext():
        try:
            if argv[0] in ("-h", "--help"):
                print(usage())
            elif argv[0] == "--version":
                print(__version__)
            else:
                run(argv[0], argv[1:])
        except UserError as error:
            print(f"ssl-jax: {error}", file=sys.stderr)
            return 2
        except OSError as error:  # a full disk, a folder without permission
            line = visible(f"ssl-jax: {error.filename or argv[0]}: {error.strerror or error}")
            print(line, file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("ssl-jax: interrupted", file=sys.stderr)
            return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
