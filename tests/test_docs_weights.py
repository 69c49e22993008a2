"""docs/weights.md and docs/exporting.md: every command and every line of Python there runs, on 24 pictures of 16 px."""

import csv
import importlib.util
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssl_jax import cli, load_encoder
from ssl_jax.config import Model
from ssl_jax.encoder import published_encoder
from ssl_jax.files import read_json
from ssl_jax.report import figures
from ssl_jax.train import hooks

DOCS = Path(__file__).parents[1] / "docs"
TRAIN = ["--size=16", "--batch=8", "--steps=2", "--config.train.devices=1"]
TUNE = ["--config.finetune.steps=2", "--config.finetune.epochs=0", "--config.finetune.lr=(0.001,)"]
SHORT = {  # what is added to the commands of the pages, so that they end soon
    "pretrain": TRAIN,
    "study": ["--config.data.size=16", "--config.study.labels=(8,)", "--config.study.seeds=1", *TUNE],
}
VIT = ["--model=vit_tiny", "--config.model.width=0.25", "--config.model.depth=2", "--config.model.patch=8"]


def ssl_jax(*argv):
    assert cli.main([str(arg) for arg in argv]) == 0, argv


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with what the pages name: DIR, model.safetensors (a ViT, as timm has it), runs/a and its classifier."""
    root, rng = tmp_path_factory.mktemp("pages"), np.random.default_rng(0)
    for i in range(24):
        picture = rng.integers(0, 120, (16, 16, 3))
        picture[8 * (i % 2) : 8 * (i % 2) + 8] += 100
        path = root / "DIR" / ("train" if i < 16 else "test") / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.astype(np.uint8)).save(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(hooks, "write_views", lambda *_: None)  # pictures, which take long
        for name in ("curve", "gain_by_class"):
            patch.setattr(figures, name, lambda *args, **options: None)
        ssl_jax("pretrain", "simclr", "DIR", *VIT, *TRAIN, "--workdir=runs/a")
        ssl_jax("finetune", "runs/a", "DIR", *TUNE, "--out=runs/a/classifier")
        ssl_jax("export", "runs/a", "--format=timm", "--out=timm")
        for name in ("model.safetensors", "config.json"):
            shutil.copy(root / "timm" / name, root / name)
        yield root


def execute(page, **names):
    """Runs the blocks of a page in their order, in this folder; returns the names that its Python made.

    A block of Python after "Save this as `FILE`" becomes that file. names: what its Python is given.
    """
    blocks = re.findall(r"^([^\n]*)\n+^```(\w*)\n(.*?)^```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)
    assert blocks and {kind for _, kind, _ in blocks} == {"sh", "python"}
    for before, kind, block in blocks:
        if saved := re.search(r"[Ss]ave this as `([\w.]+)`", before):
            Path(saved[1]).write_text(block)
        elif kind == "python":
            exec(compile(block, page, "exec"), names)
        else:
            for line in filter(None, block.replace("\\\n", " ").splitlines()):
                program, command, *argv = shlex.split(line, comments=True)
                assert program == "ssl-jax"
                ssl_jax(command, *argv, *SHORT.get(command, []))
    return names


def test_weights_in_adapted_compared_and_out(place, capsys):
    names = execute("weights.md", images=np.zeros((1, 16, 16, 3), np.uint8))
    assert names["features"].shape == (1, 48) and np.isfinite(names["features"]).all()
    assert "model.safetensors: ViT (timm" in capsys.readouterr().out
    # What was adapted is what was compared, and what was exported; it is no longer what it started from.
    images = np.random.default_rng(1).integers(0, 256, (3, 16, 16, 3), np.uint8)
    adapted, start = load_encoder("runs/adapted"), published_encoder(Model(init="model.safetensors"), 16, 3)
    again = published_encoder(Model(init="exported/adapted"), 16, 3)
    np.testing.assert_allclose(again.embed(images), adapted.embed(images), atol=1e-5)
    assert np.abs(start.embed(images) - adapted.embed(images)).max() > 1e-4
    np.testing.assert_allclose(start.embed(images), load_encoder("runs/a").embed(images), atol=1e-5)
    with Path("runs/worth/results.csv").open() as file:
        assert [row["arm"] for row in csv.DictReader(file)] == ["finetuned", "adapted", "frozen", "scratch"]
    assert "random encoder of" not in Path("runs/worth/summary.md").read_text()  # all arms have the same network


@pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="needs pip install '.[onnx]'")
def test_weights_out(place):
    images = np.random.default_rng(0).integers(0, 256, (2, 20, 30, 3), np.uint8)
    names = execute("exporting.md", images=images)
    assert names["probabilities"].shape == (2, 2) and names["predicted"].shape == (2,)
    wanted = load_encoder("runs/a").embed(images)
    np.testing.assert_allclose(names["embedding"], wanted, atol=0.05 * np.abs(wanted).max())  # resized images
    assert read_json(Path("exported/stablehlo/export.json"))["compared"] == "a new process"
    hugging = {path.name for path in Path("exported/huggingface").iterdir()}
    assert {"model.safetensors", "config.json", "README.md", "export.json"} <= hugging
    with np.load("features/part-00000.npz") as part:
        assert part["patches"].shape == (24, 2, 2, 48)
