"""Methods, sources and models from other packages: by entry point and by import path, in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import ssl_jax.methods
from ssl_jax import cli, registry
from ssl_jax.config import default, resolve
from ssl_jax.errors import UserError
from ssl_jax.methods import byol

ROOT = Path(__file__).parent.parent
MODULES = {
    "__init__": "",
    "mymethod": '''
"""My method: SimCLR by another name.

Source: https://arxiv.org/abs/2002.05709, section 2.
"""
from dataclasses import dataclass
from typing import Literal

from ssl_jax.fields import option
from ssl_jax.methods import simclr
from ssl_jax.methods.simclr import make

RECIPE = {"optim.lr": 0.05}


@dataclass(frozen=True)
class Config(simclr.Config):
    head: Literal["mlp", "linear"] = option("mlp", "kind of projector")
    share: float = option(0.5, "share of something", above=0, max=1)
''',
    "mysource": """
from ssl_jax.data.synthetic import read
""",
    "mymodel": """
from ssl_jax.testing.model import build
""",
    "plain": "from ssl_jax.methods.simclr import Config, make",
    "empty": "",
    "half": "from ssl_jax.methods.simclr import Config",
    "needs_more": "import nowhere_to_be_found",
    "wrong": "def",
}
ENTRY_POINTS = """
[ssl_jax.methods]
mine = mypackage.mymethod
plain = mypackage.plain
gone = mypackage.no_such_module
byol = mypackage.mymethod
[ssl_jax.sources]
mysource = mypackage.mysource
[ssl_jax.models]
mymodel = mypackage.mymodel
"""
SMALL = [
    "--config.data.path=n=48,test=24",
    "--config.data.size=8",
    "--config.augment.preset=grayscale",
    "--config.method.hidden=16",
    "--config.method.out=8",
    "--config.train.batch=8",
    "--config.train.devices=1",
    "--config.train.duration=4 steps",
    "--config.eval.every=0 steps",
]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A folder with mypackage in it, which can be imported."""
    folder = tmp_path / "packages"
    (folder / "mypackage").mkdir(parents=True)
    for name, text in MODULES.items():
        (folder / "mypackage" / f"{name}.py").write_text(text.lstrip())
    monkeypatch.syspath_prepend(folder)
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "mypackage"]:
        del sys.modules[name]


@pytest.fixture
def installed(package):
    """The same as an installed distribution with entry points."""
    metadata = package / "mypackage-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: mypackage\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(ENTRY_POINTS)
    return package


def pretrain(folder, *flags):
    """`ssl-jax pretrain` in a process that finds packages in `folder`."""
    path = os.pathsep.join([str(folder), str(ROOT)])
    argv = [sys.executable, "-m", "ssl_jax.cli", "pretrain", *flags]
    done = subprocess.run(argv, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, cwd=folder)
    assert done.returncode == 0, done.stderr


def test_what_comes_with_the_package():
    assert {"byol", "moco", "vicregl"} <= set(registry.own_names("method"))
    assert "base" not in registry.own_names("method") and "cache" not in registry.own_names("source")
    assert {"resnet18", "vit_tiny"} <= set(registry.own_names("model")) and registry.find("model", "vit_tiny").build
    assert registry.find("method", "byol") is byol


def test_an_unfinished_method_does_not_stop_the_others(tmp_path, monkeypatch):
    (tmp_path / "unfinished.py").write_text("import nothing_like_it")
    monkeypatch.setattr(ssl_jax.methods, "__path__", [*ssl_jax.methods.__path__, str(tmp_path)])
    assert registry.find("method", "byol") is byol
    with pytest.raises(ModuleNotFoundError, match="nothing_like_it"):  # with its traceback, for who is writing it
        registry.find("method", "unfinished")


def test_entry_points_are_names_like_any_other(installed):
    assert registry.find("method", "mine").__name__ == "mypackage.mymethod"
    assert {"mine", "gone", "byol"} <= set(registry.names("method")) and "mysource" in registry.names("source")
    assert "mine" not in registry.own_names("method")
    assert registry.find("method", "byol") is byol, "a name of the package cannot be taken"
    with pytest.raises(UserError, match=r"config.method.name='mien': unknown; did you mean 'mine'\?"):
        registry.find("method", "mien")


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        (
            "method",
            "mypackage.nothing",
            "config.method.name='mypackage.nothing': cannot be imported (ModuleNotFoundError",
        ),
        ("method", "nopackage.mymethod", "cannot be imported (ModuleNotFoundError: No module named 'nopackage')"),
        ("method", "mypackage.needs_more", "(ModuleNotFoundError: No module named 'nowhere_to_be_found')"),
        ("method", "mypackage.wrong", "cannot be imported (SyntaxError"),
        ("method", "mypackage.empty", "defines no Config and no make; a method needs Config and make"),
        ("method", "mypackage.half", "config.method.name='mypackage.half': defines no make; a method needs"),
        ("method", "gone", "config.method.name='gone': cannot be imported (ModuleNotFoundError"),
        ("method", ".mymethod", "config.method.name='.mymethod': cannot be imported"),
        ("source", "mypackage.empty", "config.data.name='mypackage.empty': defines no read; a source needs read"),
        ("model", "mypackage.empty", "config.model.name='mypackage.empty': defines no build; a model needs build"),
        ("model", "resnet19", "config.model.name='resnet19': unknown; did you mean 'resnet18'"),
    ],
)
def test_mistakes_are_one_line(installed, kind, name, message):
    with pytest.raises(UserError) as caught:
        registry.find(kind, name)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_options_of_a_method_from_outside_are_checked(package):
    config = default("mypackage.mymethod")
    assert config.optim.lr == 0.05 and config.method.name == "mypackage.mymethod"
    for key, value, message in (
        ("head", "x", r"config.method.head='x': unknown; available: linear, mlp"),
        ("share", 0.0, r"config.method.share=0.0: allowed: more than 0, at most 1"),
        ("share", 1.5, r"config.method.share=1.5: allowed: more than 0, at most 1"),
    ):
        changed = config.copy_and_resolve_references()
        changed.method[key] = value
        with pytest.raises(UserError, match=message):
            resolve(changed)


def test_test_data_of_a_study_may_come_from_outside(package):
    config = default("byol")
    config.study.test.name = "mypackage.mysource"
    assert resolve(config).study.test.name == "mypackage.mysource"
    config.study.test.name = "mypackage.empty"
    with pytest.raises(UserError, match="config.study.test.name='mypackage.empty': defines no read"):
        resolve(config)


@pytest.mark.slow
def test_entry_points_on_the_command_line(installed, tmp_path, capsys, monkeypatch):
    flags = ["--config.data.name=mysource", "--config.model.name=mymodel", *SMALL, f"--workdir={tmp_path / 'run'}"]
    pretrain(installed, "--config=pretrain:mine", *flags)
    names = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (names["method"]["name"], names["data"]["name"], names["model"]["name"]) == ("mine", "mysource", "mymodel")
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["methods"]) == 0
    rows = {line.split()[0]: line.rstrip() for line in capsys.readouterr().out.splitlines() if line[:1].isalpha()}
    assert "My method" in rows["mine"] and "arxiv.org/abs/2002.05709 " in rows["mine"]
    assert rows["plain"].split() == ["plain", "images"]  # without a docstring
    assert "config.method.name='gone': cannot be imported" in rows["gone"]
    assert rows["vicregl"].endswith("images") and rows["supervised"].endswith("labels")  # after the broken one
    assert cli.main(["pretrain", "--help=mine"]) == 0
    assert "--config.method.head: mlp or linear (default 'mlp')\n    kind of projector" in capsys.readouterr().out


def test_import_paths_on_the_command_line(package, tmp_path, capsys):
    paths = [f"--config.{key}=mypackage.my{kind}" for key, kind in (("data.name", "source"), ("model.name", "model"))]
    flags = [*paths, "--config.method.name=mypackage.mymethod", *SMALL, f"--workdir={tmp_path / 'run'}"]
    flags = ["--config=pretrain:byol", *flags, "--config.method.share=0.25"]
    pretrain(package, *flags)
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["method"]["name"] == "mypackage.mymethod" and saved["method"]["share"] == 0.25
    assert saved["optim"]["lr"] == 0.05 and saved["optim"]["name"] == "sgd"  # its recipe, and none of byol's
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert cli.main(["pretrain", *flags]) == 0  # again: the run is found finished, with the same options
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == lines
    assert cli.main(["evaluate", f"--workdir={tmp_path / 'run'}", "--data=mypackage.mysource:n=48"]) == 0
    assert "top1" in capsys.readouterr().out
    assert cli.main(["pretrain", "--config=pretrain:mypackage.nothing", "--workdir=W"]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1 and "config.method.name='mypackage.nothing': cannot be imported" in told[0]


def test_config_imports_nothing_above_it():
    code = "import sys, ssl_jax.config; "
    code += "own = {'.'.join(m.split('.')[:2]) for m in sys.modules if m.startswith('ssl_jax')}; "
    code += "print(sorted(own), 'jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    lower = ["ssl_jax", "ssl_jax.config", "ssl_jax.errors", "ssl_jax.fields", "ssl_jax.registry"]
    assert done.stdout.strip() == f"{lower} False"
