"""The command line as a person meets it: every command once on real files, every mistake one line."""

import csv
import json
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from ssl_jax import cli
from ssl_jax.command_table import COMMANDS
from ssl_jax.config import TOP_LEVEL, default, method_names

ROOT = Path(__file__).parent.parent


def ssl_jax(*args):
    """Exit code, stdout and stderr of the command line in this process."""
    return cli.main([str(a) for a in args])


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of JPEGs in three classes, a CSV with labels of some, and one file that is broken."""
    from PIL import Image

    root = tmp_path_factory.mktemp("images")
    generator, rows = np.random.default_rng(0), [["path", "label"]]
    for i in range(90):
        shade = generator.integers(0, 60, (20, 20)) + 20
        shade[(i % 3) * 6 : (i % 3) * 6 + 7] += 150
        path = root / "scans" / f"kind {'abc'[i % 3]}" / f"Aufnahme ü {i:02d}.JPG"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(shade.astype(np.uint8)).save(path, "JPEG")
        if i % 2:
            rows.append([path.relative_to(root), f"kind {'abc'[i % 3]}"])
    (root / "scans" / "kind a" / "broken.jpg").write_bytes(b"nothing")
    with (root / "labelled.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return root


SMALL = [
    "--config.data.name=folder",
    "--config.data.size=16",
    "--config.data.channels=1",
    "--config.data.max_bad_share=0.1",
    "--config.augment.preset=grayscale",
    "--config.model.name=ssl_jax.testing.model",
    "--config.method.hidden=16",
    "--config.method.out=8",
    "--config.train.batch=16",
    "--config.train.duration=12 steps",
    "--config.train.devices=1",
]


@pytest.fixture(scope="module")
def trained(images):
    workdir = images / "run"
    assert (
        ssl_jax(
            "pretrain",
            "--config=pretrain:simclr",
            f"--config.data.path={images / 'scans'}",
            *SMALL,
            f"--workdir={workdir}",
        )
        == 0
    )
    return workdir


def test_views(images, capsys):
    out = images / "sheet.png"
    assert (
        ssl_jax("views", "--config=pretrain:byol", f"--config.data.path={images / 'scans'}", *SMALL, f"--out={out}")
        == 0
    )
    assert out.stat().st_size > 1000


@pytest.mark.parametrize("protocol", ["knn", "linear", "linear_quick", "finetune"])
def test_evaluate_and_recompute_from_saved_predictions(trained, protocol, capsys):
    more = ["--config.finetune.steps=5", "--config.finetune.lr=(0.001,)", "--config.linear.epochs=3"]
    assert ssl_jax("evaluate", f"--workdir={trained}", f"--protocol={protocol}", "--labels=12", "--seeds=2", *more) == 0
    changed = "-settings-??????" * (protocol in ("finetune", "linear"))  # others than the run's own
    name = f"{protocol}-12{changed}"
    (path,) = (trained / "evaluation").glob(f"{name}.json")
    made, saved = json.loads(path.read_text()), np.load(path.with_suffix(".npz"))
    again = [(scores.argmax(axis=1) == saved["labels"]).mean() for scores in saved["scores"]]
    np.testing.assert_allclose(made["mean"]["top1"], np.mean(again), atol=1e-9)
    assert made["interval"]["top1"] is not None and len(saved["names"]) == len(saved["labels"])
    assert f"{made['mean']['top1']:.4f}" in capsys.readouterr().out


def test_finetune_then_predict(images, trained, capsys):
    """In a folder where an earlier fine-tuning was killed."""
    out = images / "classifier"
    out.mkdir()
    (out / "classifier.safetensors").write_bytes(b"cut sh")
    (out / ".unfinished").mkdir()
    more = [f"--config.finetune.{key}" for key in ("steps=60", "epochs=20", "batch=16")]
    assert ssl_jax("finetune", f"--workdir={trained}", f"--data={images / 'labelled.csv'}", f"--out={out}", *more) == 0
    assert not (out / ".unfinished").exists()
    table = images / "predictions.csv"
    assert ssl_jax("predict", f"--workdir={out}", f"--data={images / 'scans'}", f"--out={table}") == 0
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 90  # the broken file is left out
    assert all(abs(sum(float(r[f"kind {c}"]) for c in "abc") - 1) < 1e-4 for r in rows)
    right = np.mean([r["path"].startswith(r["predicted"] + "/") for r in rows])
    assert right > 0.8  # bright bands are easy
    capsys.readouterr()
    assert ssl_jax("finetune", f"--workdir={trained}", f"--data={images / 'labelled.csv'}", f"--out={out}") == 2
    assert "exists already" in capsys.readouterr().err
    # Test data whose classes have other names: known before the training, which would be lost.
    (images / "other.csv").write_text((images / "labelled.csv").read_text().replace("kind a\n", "a\n"))
    flags = f"--data={images / 'labelled.csv'}", f"--out={images / 'other'}", f"--test={images / 'other.csv'}"
    assert ssl_jax("finetune", f"--workdir={trained}", *flags) == 2
    told = capsys.readouterr()
    assert "class='a': unknown" in told.err and "fine-tuning" not in told.out


def test_a_class_of_damaged_files_only_is_left_out(images, trained, tmp_path, capsys):
    whole = next((images / "scans" / "kind a").glob("*.JPG")).read_bytes()
    for name, content in (("a/whole.jpg", whole), ("b/cut.jpg", whole[:-40])):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(content)
    assert ssl_jax("embed", f"--workdir={trained}", f"--data={tmp_path}", f"--out={tmp_path / 'e.npz'}") == 0
    assert np.load(tmp_path / "e.npz")["path"].tolist() == ["a/whole.jpg"]


def test_embed_in_every_format(images, trained):
    import pyarrow.parquet

    files = {ending: images / f"embeddings{ending}" for ending in (".npz", ".csv", ".parquet")}
    for path in files.values():
        assert ssl_jax("embed", f"--workdir={trained}", f"--data={images / 'scans'}", f"--out={path}") == 0
    packed = np.load(files[".npz"])
    with files[".csv"].open() as file:
        rows = list(csv.reader(file))[1:]
    table = pyarrow.parquet.read_table(files[".parquet"])
    assert packed["embeddings"].shape == (90, 12) and not any("broken" in n for n in packed["path"])
    assert [r[0] for r in rows] == list(packed["path"]) == table["path"].to_pylist()
    assert [r[1] for r in rows] == [n.split("/")[0] for n in packed["path"]] == table["label"].to_pylist()
    np.testing.assert_allclose(np.array([r[2:] for r in rows], float), packed["embeddings"], rtol=1e-5)
    np.testing.assert_allclose(table["e3"].to_numpy(), packed["embeddings"][:, 3])


def test_report_and_methods(trained, capsys):
    assert ssl_jax("report", f"--workdir={trained}") == 0
    assert "<html" in (trained / "report.html").read_text()
    assert ssl_jax("methods") == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in method_names()) and "labels" in shown


def test_study_runs_resumes_and_reports(tmp_path, capsys):
    config = tmp_path / "study.py"
    config.write_text(
        """
from ssl_jax.config import default
def get_config():
    config = default("simclr")
    config.data.update({"name": "synthetic", "size": 16, "channels": 1, "limit": 120})
    config.study.test.update({"name": "synthetic", "split": "test", "limit": 60})
    config.augment.preset = "grayscale"
    config.model.name = "ssl_jax.testing.model"
    config.method.update({"hidden": 16, "out": 8})
    config.train.update({"batch": 16, "duration": "10 steps", "devices": 1})
    config.finetune.update({"steps": 4, "epochs": 20, "batch": 8, "lr": (1e-3,)})
    config.study.arms = {"scratch": {}, "simclr": {"train": {"duration": "12 steps"}}}
    config.study.update({"labels": (12, 24), "seeds": 2})
    return config
"""
    )
    args = ("study", f"--config={config}", f"--workdir={tmp_path / 'study'}")
    assert ssl_jax(*args) == 0
    names = {p.name for p in (tmp_path / "study").iterdir()}
    assert {"results.csv", "summary.csv", "summary.md", "curve.png", "gain_by_class.png", "report.html"} <= names
    before = (tmp_path / "study" / "results.csv").read_bytes()
    capsys.readouterr()
    assert ssl_jax(*args) == 0
    assert (tmp_path / "study" / "results.csv").read_bytes() == before
    assert capsys.readouterr().out.count("reused") == 8


PRETRAIN = ["pretrain", "--config=pretrain", "--workdir=W"]
MISTAKES = [
    (["pretrian"], "command='pretrian': unknown; did you mean 'pretrain'?"),
    (["pretrain", "--config=pretrain:byoll", "--workdir=W"], "='byoll': unknown; did you mean 'byol'? available: "),
    (["pretrain", "--config=nothing.py", "--workdir=W"], "--config='nothing.py': unknown"),
    (["pretrain", "--workdir=W"], "--config: missing"),
    (["pretrain", "--config=pretrain", "--wrkdir=W"], "did you mean '--workdir'?"),
    ([*PRETRAIN, "--config.optim.lrr=1"], "--config.optim='lrr': unknown"),
    ([*PRETRAIN, "--config.train.batch=x"], "--config.train.batch=x"),
    ([*PRETRAIN, "--config.train.batch", "x"], "--config.train.batch=x"),
    ([*PRETRAIN, "--config.train.batch", "--config.train.keep=1"], "--config.train.batch: value missing"),
    ([*PRETRAIN, "--config.train.batch"], "--config.train.batch: value missing; write --config.train.batch=VALUE"),
    ([*PRETRAIN, "--config.optim.schedule=cosin"], "config.optim.schedule='cosin': unknown; did you mean 'cosine'?"),
    ([*PRETRAIN, "--config.data.name=no.source"], "config.data.name='no.source': cannot be imported"),
    (["pretrain", "--help=optimm"], "--help='optimm': unknown; did you mean 'optim'? available: "),
    (["report", "--help=optim"], "--help=optim: `ssl-jax report` has no config options; use --help"),
    ([*PRETRAIN, "--config.data.name=synthetic", "--config.augment.preset=chestxray"], "did you mean 'chest_xray'?"),
    ([*PRETRAIN, "--config.data.name=folder", "--config.data.path=/no/such"], "/no/such"),
    ([*PRETRAIN, "--config.data.name=folder", "--config.data.path=EMPTY"], "no images"),
    ([*PRETRAIN, "--config.data.name=synthetic", "--config.train.batch=999999"], "larger"),
    ([*PRETRAIN, "--config.data.name=synthetic", "--config.train.batch=33"], "devices"),
    (
        [*PRETRAIN, "--config=pretrain:supervised", "--config.data.name=npz", "--config.data.path=UNLABELLED"],
        "needs labels",
    ),
    ([*PRETRAIN, "--config.data.name=tfds", "--config.data.path=mnist"], "tfds build mnist"),
    (["evaluate", "--workdir=/no/such"], "/no/such: no encoder.json"),
    (["evaluate", "--workdir=EMPTY", "--protocol=nn"], "--protocol='nn': unknown; did you mean 'knn'?"),
    (["embed", "--workdir=EMPTY", "--data=EMPTY", "--out=x.txt"], "allowed: .npz, .csv, .parquet"),
    (["predict", "--workdir=EMPTY", "--data=EMPTY", "--out=x.csv"], "no classifier.json"),
    (["report", "--workdir=/no/such"], "/no/such"),
    (["views", "--config=pretrain", "extra"], "--data=extra: not found"),
]  # fmt: skip


@pytest.mark.parametrize(("argv", "message"), MISTAKES, ids=[" ".join(m[0])[:60] for m in MISTAKES])
def test_a_mistake_is_one_line(argv, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    (tmp_path / "EMPTY").mkdir()
    np.savez(tmp_path / "UNLABELLED.npz", images=np.zeros((300, 8, 8), np.uint8))
    places = {"EMPTY": tmp_path / "EMPTY", "UNLABELLED": tmp_path / "UNLABELLED.npz", "=W": f"={tmp_path / 'run'}"}
    for word, place in places.items():
        argv = [a.replace(word, str(place)) if a.endswith(word) else a for a in argv]
    assert ssl_jax(*argv) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1 and told[0].startswith("ssl-jax: ") and message in told[0], told


def test_help_is_quick_and_imports_are_light():
    times = []
    for _ in range(3):
        began = time.monotonic()
        done = subprocess.run([sys.executable, "-m", "ssl_jax.cli", "--help"], capture_output=True, text=True)
        times.append(time.monotonic() - began)
    assert "pretrain" in done.stdout and min(times) < 1.5
    heavy = "{'tensorflow', 'sklearn', 'matplotlib', 'tensorflow_datasets', 'grain', 'PIL'}"
    code = f"import sys, ssl_jax, ssl_jax.losses, ssl_jax.train; print({heavy} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def test_help_of_every_command(capsys):
    for command, (_, flags) in COMMANDS.items():
        assert ssl_jax(command, "--help") == 0
        shown = capsys.readouterr().out
        assert all(f"--{flag}" in shown for flag in flags)


def test_help_of_options(capsys):
    """Every option that a config has is listed, with what is allowed, its default and what it means."""
    for topic, section in (("optim", "optim"), ("augment", "augment"), ("moco", "method"), ("config", "")):
        assert ssl_jax("pretrain", f"--help={topic}") == 0
        shown = capsys.readouterr().out
        values = default("moco")[section] if section else {key: None for key in TOP_LEVEL}
        wanted = [f"--config.{section}.{key}: ".replace("..", ".") for key in values]
        wanted = [key for key in wanted if key.split(".")[-1] not in ("name: ", "second: ", "local: ")]
        assert all(key in shown for key in wanted)
        assert topic != "optim" or "--config.optim.lr: float, 0 or more (default 0.06)\n    peak learning rate" in shown
        assert topic != "moco" or "Recipe: optim.lr=0.03, optim.decay_all=True" in shown
    assert ssl_jax("pretrain", "--help") == 0
    assert "--help=SECTION" in capsys.readouterr().out


def test_an_option_may_be_two_arguments():
    argv = ["--config=pretrain", "--config.optim.lr", "-0.1", "--config.train.batch=8", "--workdir", "W"]
    values, overrides = cli.parse("pretrain", argv)
    assert overrides == ["--config.optim.lr=-0.1", "--config.train.batch=8"]
    assert (values["config"], values["workdir"]) == ("pretrain", "W")


def test_scripts_at_the_top():
    for script, command in (("train.py", "pretrain"), ("eval.py", "evaluate")):
        done = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True)
        assert done.returncode == 0 and f"usage: ssl-jax {command}" in done.stdout


def test_the_wheel_holds_code_and_configs(tmp_path):
    # From a copy: a build leaves build/ behind, and what lies there would get into the next wheel.
    source = shutil.copytree(ROOT, tmp_path / "source", ignore=shutil.ignore_patterns(".*", "runs", "build"))
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, source]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    wanted = {f"ssl_jax/configs/{p.name}" for p in (ROOT / "configs").glob("*.py")}
    wanted |= {str(p.relative_to(ROOT)) for p in (ROOT / "ssl_jax").rglob("*") if p.suffix in (".py", ".html")}
    assert wanted <= set(names)
    code = "from ssl_jax.config_file import find_config; print(find_config('pretrain:byol'))"
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(tmp_path / "installed")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path / "installed")
    assert re.search(r"installed/ssl_jax/configs/pretrain.py", done.stdout), done
