"""The command line: `ssl-jax COMMAND --flag=value ...`. It parses the arguments; `commands` does the work."""

import contextlib
import importlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ssl_jax import __version__, huge_pages, interrupts, progress
from ssl_jax.command_table import COMMANDS, ELSEWHERE, OVERRIDES, POSITIONAL, QUIET, REQUEUED, SEVERAL, SHORT
from ssl_jax.errors import UserError, unknown, visible


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
    left_out = [n for n in POSITIONAL.get(command, ()) if n not in ("method", "config") or not given["config"]]
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
            spec = values["config"]
            values["config"] = _config_of(command, values, overrides)
            if command == "reproduce":
                values["recipe"] = spec
            if command == "sweep":  # whose workers get the same arguments
                values["argv"] = argv
        elif overrides:
            raise UserError(f"{overrides[0]}: `ssl-jax {command}` has no config options")
        home = importlib.import_module(ELSEWHERE[command]) if command in ELSEWHERE else commands
        work: Callable[..., Any] = getattr(home, command)
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


def start(*first: str) -> int:
    """`main` as a process of its own, whose arguments are `first` and those of the command line."""
    huge_pages.restart()
    return main([*first, *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(start())
