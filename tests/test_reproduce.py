"""`ssl-jax reproduce`: a recipe of this test's own, on tiny data."""

import json

import pytest

from ssl_jax import commands, reproduce
from ssl_jax.cli import main
from ssl_jax.config import resolve
from ssl_jax.config_file import load_config
from ssl_jax.encoder import export, random_encoder
from ssl_jax.errors import UserError
from ssl_jax.run_folder import RunFolder

RECIPE = """
from ssl_jax.config import default

ENTRIES = {
    "tiny": [
        {"protocol": "knn", "metric": "top1", "value": 40.0, "source": "a drawing"},
        {"protocol": "linear", "metric": "top1", "value": 50.0, "source": "another one"},
    ],
    "nothing": [],
    "odd": [{"protocol": "guess", "metric": "top1", "value": 1.0, "source": "nobody"}],
    "short": [{"protocol": "knn", "value": 1.0}],
    "metric": [{"protocol": "knn", "metric": "top2", "value": 1.0, "source": "nobody"}],
}


def get_published(name="tiny"):
    return ENTRIES[name]


def get_config(name="tiny"):
    config = default("simclr")
    config.data.update({"name": "synthetic", "limit": 48, "size": 8, "channels": 1})
    config.model.name = "ssl_jax.testing.model"
    config.train.update({"batch": 16, "duration": "4 steps", "devices": 1, "log_every": "1 steps"})
    config.method.update({"hidden": 16, "out": 8})
    config.augment.preset = "grayscale"
    config.eval.knn_k = 5
    return config
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    file = tmp_path_factory.mktemp("recipe") / "tiny.py"
    file.write_text(RECIPE)
    return str(file)


@pytest.fixture
def quick(monkeypatch):
    """Without training and evaluating: a run folder with random weights, and a number that depends on the seed."""

    def fit(config, workdir, source):
        folder = RunFolder(workdir)
        folder.start(config)
        if not folder.finished():
            export(folder.encoder, random_encoder(config.model, 8, 1, 0))
            part = 0 if config.train.micro_batch == "auto" else config.train.micro_batch
            folder.record_environment(micro_batch=part, model=config.model.name, conv="native")

    def evaluate(workdir, protocol, test=""):
        asked.append((protocol, test))
        value = 0.375 + 0.02 * RunFolder(workdir).read_config()["train"]["seed"]
        return {"mean": {"top1": value}, "per_seed": [{"support": {"a": 3, "b": 4}}], "test": test or "test split"}

    asked = []
    monkeypatch.setattr(reproduce, "fit", fit)
    monkeypatch.setattr(reproduce, "write_report", lambda folder: folder)
    monkeypatch.setattr(commands, "evaluate", evaluate)
    return asked


@pytest.mark.slow
def test_a_recipe_is_run_and_compared(recipe, tmp_path, capsys, monkeypatch):
    """Without anything in place of the run or the evaluation."""
    run = tmp_path / "a"
    assert main(["reproduce", recipe, f"--workdir={run}"]) == 0
    found = json.loads((run / "reproduce.json").read_text())
    assert [r["protocol"] for r in found["results"]] == ["knn", "linear"]
    for result in found["results"]:
        with (run / "evaluation" / f"{result['protocol']}-all.json").open() as file:
            ours = 100 * json.load(file)["mean"]["top1"]
        assert result["ours"] == pytest.approx(ours) and not result["differs"] and result["interval"] is None
        assert result["difference"] == pytest.approx(ours - result["value"])
        assert result["runs"][0]["tested_on"] == "test split"


def test_a_second_call_evaluates_nothing_and_says_the_same(recipe, tmp_path, capsys, quick):
    run, files = tmp_path / "a", []
    for _ in range(2):
        assert main(["reproduce", recipe, f"--workdir={run}"]) == 0
        files.append((run / "reproduce.json").read_text())
        printed = capsys.readouterr().out
        assert "tiny.py, knn, top1:\n  published   40.00 %  (a drawing)\n  ours        37.50 %\n" in printed
        assert "  difference  -2.50\n" in printed and "  difference  -12.50\n" in printed
    assert files[0] == files[1] and quick == [("knn", ""), ("linear", "")]
    found = json.loads(files[0])["results"]
    assert [(r["ours"], r["difference"], r["interval"], r["differs"]) for r in found] == [
        (37.5, -2.5, None, []),
        (37.5, -12.5, None, []),
    ]
    # Other test images, or other weights: the number is another one.
    assert main(["reproduce", recipe, f"--workdir={run}", "--test=synthetic"]) == 0
    assert quick[2:] == [("knn", "synthetic"), ("linear", "synthetic")]
    export(run / "encoder", random_encoder(resolve(load_config(recipe, [])).model, 8, 1, 1))
    assert main(["reproduce", recipe, f"--workdir={run}", "--test=synthetic"]) == 0
    assert len(quick) == 6
    (run / "reproduce.json").write_text(
        (run / "reproduce.json").read_text().replace("37.5", "99.5")
    )  # no longer its digest
    assert main(["reproduce", recipe, f"--workdir={run}", "--test=synthetic"]) == 0
    assert len(quick) == 8 and "99.5" not in (run / "reproduce.json").read_text()


def test_what_was_evaluated_before_a_failure_is_kept(recipe, tmp_path, quick, monkeypatch):
    evaluate = commands.evaluate

    def fail(workdir, protocol, test=""):
        if protocol == "linear":
            raise UserError("no more disk")
        return evaluate(workdir, protocol, test)

    with monkeypatch.context() as patch:
        patch.setattr(commands, "evaluate", fail)
        assert main(["reproduce", recipe, f"--workdir={tmp_path / 'a'}", "--seeds=2"]) == 2
    assert quick == [("knn", "")] * 2
    assert main(["reproduce", recipe, f"--workdir={tmp_path / 'a'}", "--seeds=2"]) == 0
    assert quick[2:] == [("linear", "")] * 2
    results = json.loads((tmp_path / "a" / "reproduce.json").read_text())["results"]
    assert [len(result["runs"]) for result in results] == [2, 2]


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--steps=2"], "config.train.duration: '4 steps' -> '2 steps'"),
        (["--batch=8"], "config.train.batch: 16 -> 8"),
        (["--config.optim.lr=0.1"], "config.optim.lr: 0.3 -> 0.1"),
        (["--config.data.limit=32"], "config.data.limit: 48 -> 32"),
        (["--config.eval.knn_k=7"], "config.eval.knn_k: 5 -> 7"),
        (["--config.augment.flip=0.1"], "config.augment.flip: None -> 0.1"),
    ],
)
def test_a_changed_run_gets_no_difference(recipe, tmp_path, capsys, quick, flags, why):
    assert main(["reproduce", recipe, f"--workdir={tmp_path / 'a'}", *flags]) == 0
    printed = capsys.readouterr().out
    knn = printed[printed.rindex("tiny.py, knn") : printed.rindex("tiny.py, linear")]
    assert f"difference  not given: this run is not the recipe's; it differs in\n    {why}\n" in knn
    assert "+" not in knn.partition("difference")[2] and "ours        " in knn
    result = json.loads((tmp_path / "a" / "reproduce.json").read_text())["results"][0]
    assert result["difference"] is None and result["differs"] == [why]


def test_where_and_how_fast_it_computes_changes_nothing(recipe, tmp_path, capsys, quick):
    flags = [
        "--config.data.workers=1",
        "--config.train.log_every=2 steps",
        "--config.data.engine=disk",
        "--config.train.seed=3",
    ]
    assert main(["reproduce", recipe, f"--workdir={tmp_path / 'a'}", *flags]) == 0
    assert "not given" not in capsys.readouterr().out


def test_micro_batches_matter_to_batch_norm_alone(recipe, tmp_path, quick):
    """The test's encoder has none, but SimCLR's projector has: its statistics are those of 8 images, not of 16."""
    flags = ["--config.train.micro_batch=8"]
    assert main(["reproduce", recipe, f"--workdir={tmp_path / 'a'}", *flags]) == 0
    differs = json.loads((tmp_path / "a" / "reproduce.json").read_text())["results"][0]["differs"]
    assert differs == ["BatchNorm: over 8 images at a time (config.train.micro_batch), not over 16"]


def test_several_runs_have_an_interval(recipe, tmp_path, capsys, quick):
    run = tmp_path / "a"
    assert main(["reproduce", recipe, f"--workdir={run}", "--seeds=2"]) == 0
    result = json.loads((run / "reproduce.json").read_text())["results"][0]
    assert [r["value"] for r in result["runs"]] == [37.5, 39.5] and result["ours"] == 38.5
    # t of one degree of freedom x deviation / sqrt(2): 12.706 times half the distance.
    assert result["interval"] == pytest.approx(12.706, rel=1e-3)
    assert "ours        38.50 % ± 12.71 (95 %, 2 runs)" in capsys.readouterr().out
    assert RunFolder(f"{run}-seed2").read_config()["train"]["seed"] == 1


def test_images_that_are_not_imagenet_s_are_noticed(tmp_path, recipe):
    theirs = resolve(load_config("imagenet:simclr", []))
    entry = {"protocol": "linear"}
    here = resolve(load_config("imagenet:simclr", ["--config.data.name=folder", f"--config.data.path={tmp_path}"]))
    assert reproduce._changed(theirs, here, entry) == []
    source, each = [None] * 1000, [{"test_images": 50, "tested_on": "20 % of the labelled images, held out"}]
    folder = tmp_path / "run"
    lines = reproduce._differs(theirs, here, entry, source, [(here, folder)], each)
    assert lines == [
        "images: 1,000, not the 1,281,167 of imagenet2012",
        "test images: 50 (20 % of the labelled images, held out), not 50,000",
    ]


def test_a_dry_run_says_what_it_would_do(recipe, tmp_path, capsys):
    assert main(["reproduce", recipe, f"--workdir={tmp_path / 'a'}", "--dry-run", "--epochs=2"]) == 0
    printed = capsys.readouterr().out
    assert "published 40.0 % top1 (a drawing), by --protocol=knn" in printed
    assert "no difference will be given: config.train.duration: '4 steps' -> '2 epochs'" in printed
    assert "6 steps of 16 images" in printed and not (tmp_path / "a").exists()


def test_a_dry_run_without_the_data_knows_imagenet(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert main(["reproduce", "imagenet:mae", f"--workdir={tmp_path / 'a'}", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "data      not here: config.data.path='imagenet2012'" in printed
    assert "length    499,200 steps of 4096 images (1600 epochs)" in printed  # 312 whole batches x 1600


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "no published number to compare with"),
        ("odd", "get_published: protocol='guess': unknown; available: finetune, knn, linear"),
        ("short", "get_published: metric, source missing"),
    ],
)
def test_what_cannot_be_compared_is_one_line(recipe, tmp_path, capsys, name, message):
    assert main(["reproduce", f"{recipe}:{name}", f"--workdir={tmp_path / 'a'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and not (tmp_path / "a").exists()


def test_a_metric_that_nobody_measures_is_one_line(recipe, tmp_path, capsys, quick):
    assert main(["reproduce", f"{recipe}:metric", f"--workdir={tmp_path / 'a'}"]) == 2
    assert "get_published: metric='top2': unknown; did you mean 'top1'?" in capsys.readouterr().err


def test_a_config_without_published_numbers_is_one_line(tmp_path, capsys):
    assert main(["reproduce", "small", f"--workdir={tmp_path / 'a'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "has no function get_published" in line


def test_settings_of_an_evaluation_that_the_run_does_not_have(recipe, tmp_path, capsys, quick):
    run = tmp_path / "a"
    assert main(["reproduce", recipe, f"--workdir={run}"]) == 0
    assert main(["reproduce", recipe, f"--workdir={run}", "--config.finetune.steps=7"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "its run has other settings (config.finetune.steps: 600 -> 7)" in line
