"""What a sweep found, as a table, in words and as a command."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from ssl_jax import files
from ssl_jax.config import TRAINING, Config, default, from_json, resolve, to_json
from ssl_jax.evaluate.references import PIXELS
from ssl_jax.sweep.grid import Trial
from ssl_jax.sweep.judge import ByLabels, ByRun

Row = Mapping[str, Any]
HEAD = ("score", "standard_error", "raw_pixels", "score_of", "part", "steps", "seconds", "state", "reason")
NONE = "–"


def write(folder: Path, rows: Sequence[Row], keys: Sequence[str], judge: ByLabels | ByRun) -> dict[str, Any]:
    """Writes sweep.csv and prints the rows, the best first, with what follows from them. Returns what it printed."""
    names = {"standard_error": "error", "raw_pixels": "pixels"}
    cells = [[row["values"][key] for key in keys] + [row[names.get(name, name)] for name in HEAD] for row in rows]
    table = [[row["trial"], *("" if cell is None else cell for cell in each)] for row, each in zip(rows, cells)]
    files.write_csv(folder / "sweep.csv", ["trial", *keys, *HEAD], table)
    _print(rows, keys)
    scored = [row for row in rows if row["score"] is not None]
    found: dict[str, Any] = {"trials": list(rows), "best": None, "within": [], "command": None}
    lines = [f"score: {judge.meaning}"]
    if scored:
        best = scored[0]
        like = [row["trial"] for row in scored if row["part"] == best["part"] and _as_good(row, best)]
        command = command_for(resolve(from_json(files.read_json(folder / "trials" / best["trial"] / "config.json"))))
        found |= {"best": best["trial"], "within": like, "command": command}
        lines += _about(scored, best, like)
        lines += [
            f"the best is a finished run: {folder / 'trials' / best['trial']}",
            f"its settings at length: {command}",
        ]
    if failed := len(rows) - len(scored):
        lines.append(f"{failed} of {len(rows)} trials failed, and are tried again only if their folders are removed")
    print("\n".join([*lines, f"table: {folder / 'sweep.csv'}"]), flush=True)
    return found


def _as_good(row: Row, best: Row) -> bool:
    return row["score"] >= best["score"] - (best["error"] or 0)


def _about(scored: Sequence[Row], best: Row, like: Sequence[str]) -> list[str]:
    lines = []
    if best["pixels"] is not None:
        above = "" if best["score"] - (best["error"] or 0) > best["pixels"] else "; no setting is clearly above them"
        lines.append(f"{PIXELS}, on the same folds: {_number(best['pixels'], best['pixels_error'])}{above}")
    if len(like) > 1:
        lines.append(f"these {len(like)} are within one standard error of the best: {', '.join(like)}")
    elif best["error"] is not None and len(scored) > 1:
        lines.append("no other is within one standard error of the best")
    if len(scored) > 1:
        lines.append("the best score is somewhat too good, as it is the highest of several: test with other labels")
    return lines


def value(trial: Trial, key: str) -> str | None:
    """The value of an option in a trial, as it was written in --over, or else as its config has it; None if it has
    none, as of another method."""
    if key in trial.values:
        return trial.values[key]
    found: Any = from_json(to_json(trial.config))
    for name in key.split("."):
        found = found.get(name) if isinstance(found, ConfigDict) else None
    return None if found is None else str(found)


def told(row: Row) -> str:
    """The score of a trial, or why it failed, on a line."""
    if row["score"] is None:
        return f"failed: {row['reason']}"
    return f"{row['score_of']} {_number(row['score'], row['error'])}, {row['steps']} steps, {row['seconds']} s"


def _number(score: float, error: float | None) -> str:
    digits = 4 if abs(score) <= 1 else 1
    return f"{score:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def _print(rows: Sequence[Row], keys: Sequence[str]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

    title = rows[0]["score_of"] if rows else "score"
    columns = [Column(escape(key), overflow="fold") for key in keys]
    columns += [Column(head, no_wrap=True) for head in (title, "steps", "seconds")]
    table = Table(*columns, Column(overflow="fold"), box=None, pad_edge=False)
    for row in rows:
        score = NONE if row["score"] is None else _number(row["score"], row["error"])
        state = (
            row["reason"] if row["state"] == "failed" else "" if row["part"] == 1 else f"1/{row['part']} of the steps"
        )
        values = [NONE if row["values"][key] is None else row["values"][key] for key in keys]
        cells = [*values, score, str(row["steps"]), str(row["seconds"]), state]
        table.add_row(*map(escape, cells))
    Console().print(table)


def command_for(config: Config) -> str:
    """The command that trains these settings for the usual length of a run of their method."""
    usual, own = to_json(resolve(default(config.method_name))), to_json(config)
    own["train"]["duration"] = usual["train"]["duration"]
    flags = _flags({section: own[section] for section in TRAINING}, usual)
    duration = f"--config.train.duration={own['train']['duration']}"  # said, so that it is seen where to change it
    words = ["ssl-jax", "pretrain", config.method_name, "--workdir=runs/best", duration]
    return shlex.join([*words, *(f"--config.{key}={text}" for key, text in flags)])


def _flags(values: Mapping[str, Any], usual: Mapping[str, Any], path: str = "") -> list[tuple[str, str]]:
    """(key, value) of each option that is not at its default."""
    found = []
    for key, each in values.items():
        name = path if key == "override" else f"{path}.{key}".lstrip(".")  # flags name the options of a view without it
        if isinstance(each, Mapping):
            found += _flags(each, usual.get(key) or {}, name)
        elif each != usual.get(key):
            found.append((name, str(tuple(each)) if isinstance(each, list) else str(each)))
    return found
