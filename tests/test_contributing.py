"""The example of CONTRIBUTING.md is a method like any other."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

import ssl_jax.methods
from ssl_jax.config import method_names

ROOT = Path(__file__).parent.parent


def test_the_method_of_contributing_trains(tmp_path, monkeypatch):

    from ssl_jax.testing.tiny import Images, batch_of, start, tiny_config

    text = (ROOT / "CONTRIBUTING.md").read_text()
    name, code = re.search(r"<!-- method: (\w+) -->\n```python\n(.*?)```", text, re.DOTALL).groups()
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.setattr(ssl_jax.methods, "__path__", [*ssl_jax.methods.__path__, str(tmp_path)])
    assert name in method_names()
    config, source, losses = tiny_config(name, train__duration="200 steps"), Images(), []
    state, step_fn, mesh = start(config, source)
    for step in range(40):
        state, metrics = step_fn(state, batch_of(config, source, step, mesh))
        losses.append(float(metrics["loss"]))
    assert np.all(np.isfinite(losses)) and np.mean(losses[-5:]) < np.mean(losses[:5])


def logical_lines(block):
    return block.replace("\\\n", " ").splitlines()


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))])
def test_commands_in_the_docs_parse(page, tmp_path, monkeypatch):
    """Each `ssl-jax ...` line of a shell block names a command, flags and config keys that exist."""
    from ssl_jax import cli
    from ssl_jax.config_file import load_config

    text = (ROOT / page).read_text()
    for name, code in re.findall(r"[Ss]ave this as `(\w+\.py)`:\n\n```python\n(.*?)```", text, re.DOTALL):
        (tmp_path / name).write_text(code)
        monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line for kind, block in blocks if kind in ("", "sh", "console") for line in logical_lines(block)]
    commands = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("ssl-jax ")]
    for name, *argv in commands:
        argv = [a for a in argv if not a.startswith("(")]
        values, overrides = cli.parse(name, argv)
        if spec := values.get("config") or values.get("method"):
            load_config(spec if values.get("config") else f"pretrain:{spec}", overrides)
