"""The command line: `ssl-jax COMMAND --flag=value ...`. Parsing only; the work is done in `commands`."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from ssl_jax.errors import UserError, unknown

CONFIG = "config file, name[:argument] or path/to/file.py[:argument]; then --config.section.key=value"
RUN = "run folder, made by `ssl-jax pretrain`"
OVERRIDES = ("evaluate", "finetune", "predict", "embed")  # take --config.key=value without a --config
DATA = "folder of images or with CheXpert's tables, .csv or .npz file, fashion_mnist, or tfds:NAME"
MASKS = "folder of masks (IMAGE/CLASS.png or IMAGE.png), or table of boxes (path,left,top,right,bottom,class)"

# command: (one line, {flag: (default, help)}); a default of ... marks a flag that must be given
COMMANDS: dict[str, tuple[str, dict[str, tuple[Any, str]]]] = {
    "pretrain": (
        "train an encoder (the same command continues an interrupted run)",
        {
            "config": (..., CONFIG),
            "workdir": (..., "run folder to make or to continue"),
            "cluster": (False, "join the hosts of a TPU pod (SLURM, Open MPI and GKE are noticed without it)"),
        },
    ),
    "evaluate": (
        "judge an encoder: kNN, linear probe or fine-tuning, on all or few labels",
        {
            "workdir": (..., RUN),
            "protocol": ("knn", "knn, linear or finetune"),
            "labels": (0, "labels per draw; 0: all"),
            "seeds": (1, "draws of the labels"),
            "data": ("", f"labelled data, if not the run's own: {DATA}"),
            "test": ("", "test data; default: the data's test split, else 20 % held out"),
        },
    ),
    "study": (
        "compare methods over label counts and seeds (can be stopped and continued)",
        {
            "config": (..., CONFIG),
            "workdir": (..., "study folder to make or to continue"),
            "cells": ("", "K/N: only share K of N of the cells, K from 1 to N; 0/N: only the pretraining"),
        },
    ),
    "finetune": (
        "train a classifier from labelled images, starting from an encoder",
        {
            "workdir": (..., RUN),
            "data": (..., f"labelled data: {DATA}"),
            "out": (..., "folder for the classifier"),
            "test": ("", "labelled data to test on"),
            "seed": (0, "random seed"),
        },
    ),
    "predict": (
        "class probabilities for images",
        {
            "workdir": (..., "classifier folder, made by `ssl-jax finetune`"),
            "data": (..., DATA),
            "out": (..., ".csv file to write"),
        },
    ),
    "embed": (
        "embeddings for images, with their file names",
        {"workdir": (..., RUN), "data": (..., DATA), "out": (..., ".npz, .csv or .parquet file to write")},
    ),
    "views": (
        "a picture of what a config's transforms do to your images",
        {
            "config": (..., CONFIG),
            "out": ("views.png", ".png file to write"),
            "images": (6, "number of images"),
            "masks": ("", f"{MASKS}; outlines are drawn, of images that have some"),
        },
    ),
    "audit": (
        "choose transforms: what they do to lesions (--lesions), or what an encoder ignores (--invariance)",
        {
            "lesions": (False, "how often views of a --config lose a lesion; needs --masks"),
            "invariance": (False, "how far transforms move the embeddings of --workdir, and whether it shows them"),
            "config": ("", f"{CONFIG}; for --invariance without --workdir: random or imported weights (config.model)"),
            "masks": ("", MASKS),
            "workdir": ("", RUN),
            "data": ("", f"for --invariance, images, if not the run's own: {DATA}"),
            "out": ("audit", "folder for a table and a picture"),
            "images": (200, "number of images"),
        },
    ),
    "report": (
        "one self-contained HTML page about a run or a study",
        {"workdir": (..., "run or study folder"), "out": ("", ".html file; default: report.html in the folder")},
    ),
    "plan": (
        "predict memory, speed and hours of a run on a TPU slice, from its program compiled here",
        {
            "config": (..., CONFIG),
            "topology": ("", "slice: version and sides, such as v5e:4x8 or v5p:2x2x4"),
            "sweep": ("", "several slices with commas between: a table"),
            "images": (0, "images in the data set, if it is not on this machine"),
            "classes": (0, "and their classes, 0 without labels"),
            "out": ("", "folder for a table and a figure"),
        },
    ),
    "phantom": (
        "draw chest radiographs with known findings, in CheXpert's layout, to try things out on",
        {
            "out": (..., "folder to make, or to finish"),
            "patients": (10_000, "training patients, about two images each"),
            "seed": (0, "random seed; patient i of a seed is always the same"),
            "size": (128, "side of the images, px"),
            "test": (300, "test images, with clean labels"),
        },
    ),
    "methods": ("list the methods: name, one line, source, needs", {}),
}


def usage(command: str | None = None) -> str:
    """Help of one command, or of all."""
    if command is None:
        lines = "\n".join(f"  {name:10} {line}" for name, (line, _) in COMMANDS.items())
        return (
            "usage: ssl-jax COMMAND --flag=value ...\n\n"
            f"{lines}\n\n  ssl-jax COMMAND --help   flags of one command\n  ssl-jax --version"
        )
    line, flags = COMMANDS[command]
    shown = [
        f"  --{name:9} {text}" + ("" if default is ... or default in ("", False) else f" (default {default})")
        for name, (default, text) in flags.items()
    ]
    if command in ("evaluate", "finetune"):
        shown.append("  --config.finetune.KEY=VALUE changes how classifiers are trained")
    if command in OVERRIDES:
        shown.append("  --config.data.KEY=VALUE changes how the data are read")
    needed = " ".join(f"--{n}=..." for n, (d, _) in flags.items() if d is ...)
    return "\n".join([f"usage: ssl-jax {command} {needed}", f"\n{line}\n", *shown])


def parse(command: str, argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Values of a command's flags, and the `--config.key=value` overrides among argv."""
    from absl import flags

    values, table = flags.FlagValues(), COMMANDS[command][1]
    for name, (default, text) in table.items():
        kinds: dict[type, Any] = {bool: flags.DEFINE_boolean, int: flags.DEFINE_integer}
        define = kinds.get(type(default), flags.DEFINE_string)
        define(name, None if default is ... else default, text, flag_values=values)
    overrides = _overrides(argv)
    rest = [a for a in argv if a not in overrides]
    try:
        left = values([f"ssl-jax {command}", *rest])[1:]
    except flags.UnrecognizedFlagError as error:
        raise unknown("flag", f"--{error.flagname}", (f"--{n}" for n in table)) from None
    except flags.Error as error:
        raise UserError(" ".join(str(error).split())) from None
    if left:
        raise UserError(f"{left[0]!r}: not a flag; allowed: {', '.join(f'--{n}=' for n in table) or 'none'}")
    for name, (default, text) in table.items():
        if default is ... and not values[name].value:
            raise UserError(f"--{name}: missing; allowed: {text}")
    return {name: values[name].value for name in table}, overrides


def _overrides(argv: Sequence[str]) -> list[str]:
    """The --config.key=value arguments; "--config.key value" is joined."""
    found, items = [], iter(argv)
    for item in items:
        if item.startswith("--config."):
            found.append(item)
            if "=" not in item:
                raise UserError(f"{item}: value missing; allowed: {item}=VALUE")
    return found


def _tell_warnings() -> None:
    """The library's warnings (a file that is skipped, say) as plain lines on stderr."""
    import logging

    from absl import logging as absl_logging

    absl_logging.set_verbosity(absl_logging.FATAL)  # orbax logs a traceback for what we tell in one line
    log, handler = logging.getLogger("ssl_jax"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("ssl-jax: %(message)s"))
    log.handlers, log.propagate = [handler], False


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code. A user's mistake is one line on stderr and code 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if argv[0] == "--version":
        from ssl_jax import __version__

        print(__version__)
        return 0
    try:
        if argv[0] not in COMMANDS:
            raise unknown("command", argv[0], COMMANDS)
        if any(a in ("-h", "--help") for a in argv[1:]):
            print(usage(argv[0]))
            return 0
        values, overrides = parse(argv[0], argv[1:])
        from ssl_jax import commands
        from ssl_jax.settings import load_config

        _tell_warnings()
        commands.start_jax()
        if values.get("config"):
            values["config"] = load_config(values["config"], overrides)
        elif argv[0] in OVERRIDES:
            values["overrides"] = overrides
        elif overrides:
            raise UserError(f"{overrides[0]}: `ssl-jax {argv[0]}` takes no config")
        work: Callable[..., None] = getattr(commands, argv[0])
        work(**values)
    except UserError as error:
        print(f"ssl-jax: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 1
    except OSError as error:  # a full disk, a folder without permission
        print(f"ssl-jax: {error.filename or argv[0]}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ssl-jax: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
