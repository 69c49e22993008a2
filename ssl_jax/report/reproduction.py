"""How to repeat a run, in HTML: options, environment, commands."""

import json
import shlex
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ssl_jax import config as configs
from ssl_jax.errors import UserError
from ssl_jax.report.page import fold, note, table


def configuration(config: Mapping[str, Any]) -> str:
    try:
        usual = configs.to_json(configs.resolve(configs.default(config["method"]["name"])))
    except UserError as error:  # a method of another version of the library
        return note(f"Defaults unknown: {error}.") + table(["key", "value"], list(flat(config).items()))
    values, defaults = flat(config), flat(usual)
    rows = [[key, value, defaults.get(key, "from the preset")] for key, value in values.items()]
    changed = [row for row in rows if row[1] != row[2]]
    head = ["key", "value", "default"]
    text = f"Method {config['method']['name']}. {len(changed)} of {len(rows)} options differ from its defaults."
    full = table(head, rows, marked={row[0] for row in changed})
    return note(text) + (table(head, changed) if changed else "") + fold("All options", full)


def flat(config: Mapping[str, Any], path: str = "config") -> dict[str, str]:
    """Each option under the name of its flag."""
    found: dict[str, str] = {}
    for key, value in config.items():
        # Flags set the options of a view without naming `override`.
        name = path if key == "override" else f"{path}.{key}"
        found |= flat(value, name) if isinstance(value, Mapping) else {name: json.dumps(value, ensure_ascii=False)}
    return found


def environment(environment: Mapping[str, Any]) -> str:
    rows = [[k, _join(v)] for k, v in environment.items() if k not in ("commands", "config", "packages")]
    rows += [[k, str(v)] for k, v in environment.get("packages", {}).items()]
    return table(["", "version or kind"], rows) if rows else ""


def _join(value: Any) -> str:
    if not isinstance(value, list):
        return str(value)
    return ", ".join(f"{value.count(v)} × {v}" if value.count(v) > 1 else str(v) for v in dict.fromkeys(value))


def commands(environment: Mapping[str, Any]) -> str:
    lines = [f"{c['time'][:19]}  {_command(c['argv'])}" for c in environment.get("commands", []) if c.get("argv")]
    text = (
        "Every command that has worked in this folder (times in UTC). On the same machine, the same commands give the "
    )
    text += "same weights."
    return note(text) + f"<pre>{escape(chr(10).join(lines))}</pre>" if lines else ""


def _command(argv: Sequence[str]) -> str:
    program = Path(argv[0]).name
    return shlex.join([*(["python", argv[0]] if program.endswith(".py") else [program]), *argv[1:]])
