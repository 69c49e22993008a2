"""`ssl-jax transfer`: several data sets, each with its own metric; what is there already is not computed again."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssl_jax import evaluation, transfer
from ssl_jax.cli import main
from ssl_jax.config import Model
from ssl_jax.encoder import export, random_encoder

TFDS = Path(__file__).parent / "data" / "tfds"
SQUARES = f"tfds:{TFDS / 'tiny_squares' / '1.0.0'}"


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    export(folder / "encoder", random_encoder(Model(name="ssl_jax.testing.model"), 8, 3, 0))
    return folder


@pytest.fixture
def colours(tmp_path):
    """A folder without a test part, in which one class is three times as frequent as the other."""
    for number in range(40):
        path = tmp_path / "colours" / ("red" if number % 4 else "blue") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
        pixels[..., 0 if number % 4 else 2] = 255
        Image.fromarray(pixels).save(path)
    return tmp_path / "colours"


def table_of(run, protocol):
    return json.loads((run / f"evaluation/transfer/table-{protocol}.json").read_text())["rows"]


def test_a_table_of_two_data_sets(run, colours, capsys):
    assert main(["transfer", str(run), f"--data={SQUARES},{colours}", "--config.eval.knn_k=3", "--protocol=knn"]) == 0
    squares, own = table_of(run, "knn")
    assert (squares["train"], squares["test"], squares["classes"], squares["metric"]) == (9, 3, 3, "top1")
    assert squares["tested_on"] == "its test part" and own["tested_on"] == "20 % of its images, held out"
    assert (own["train"], own["test"], own["metric"]) == (32, 8, "balanced_accuracy")  # classes are unequal
    saved = json.loads(next((run / "evaluation/transfer").glob("*colours-knn.json")).read_text())
    assert own["encoder"] == saved["mean"]["balanced_accuracy"]
    assert own["raw pixels, linear"] == saved["references"]["raw pixels, linear"]["mean"]["balanced_accuracy"]
    text = (run / "evaluation/transfer/table-knn.md").read_text()
    assert text in capsys.readouterr().out and f"{100 * own['encoder']:.1f}" in text


def test_what_is_there_is_read_and_other_conditions_are_not(run, colours, monkeypatch):
    counted = []
    monkeypatch.setattr(
        evaluation, "evaluate", lambda *args, own=evaluation.evaluate, **more: counted.append(1) or own(*args, **more)
    )
    arguments = ["transfer", str(run), str(colours), "--protocol=knn"]
    for more, count in (([], 1), ([], 1), (["--config.eval.knn_k=3"], 2)):
        assert main([*arguments, *more]) == 0 and len(counted) == count


def test_the_benchmarks_have_their_own_split_and_metric(run, monkeypatch, capsys):
    """tiny_squares under the name of a data set of the table: its parts and its metric are taken."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(TFDS))
    monkeypatch.setattr(
        transfer, "BENCHMARKS", {"tiny_squares": transfer.Benchmark("train[:6]", "train[6:]", "macro_auc"), "dtd": None}
    )
    monkeypatch.setitem(transfer.BENCHMARKS, "dtd", transfer.Benchmark())
    assert main(["transfer", str(run)]) == 0
    (row,) = table_of(run, "linear_quick")
    assert (row["data"], row["train"], row["test"], row["metric"]) == ("tfds:tiny_squares", 6, 3, "macro_auc")
    assert "left out: config.data.path='dtd'" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments,line",
    [
        (["--data=/no/such"], "--data=/no/such: not found"),
        (["--protocol=finetune"], "--protocol='finetune'"),
        ([], "--data: none of food101, cifar10"),
    ],
)
def test_mistakes_are_one_line(run, tmp_path, monkeypatch, capsys, arguments, line):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert main(["transfer", str(run), *arguments]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"ssl-jax: {line}")
