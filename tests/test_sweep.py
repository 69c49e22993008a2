"""Sweeps of tiny runs: the grid, resumption, halving, failures, scores, and processes that share the work."""

import csv
import dataclasses
import json
import os
import shlex
import shutil
import signal
import threading
import time

import forked
import numpy as np
import pytest
from PIL import Image

from ssl_jax import checkpoint, cli
from ssl_jax.config import resolve
from ssl_jax.config_file import load_config
from ssl_jax.data import open_source
from ssl_jax.encoder import load_encoder, random_encoder
from ssl_jax.errors import UserError
from ssl_jax.evaluate.cross_validation import cross_validated, folds, mean_and_error
from ssl_jax.evaluate.references import MAX_ITER, STRENGTHS, pixels
from ssl_jax.evaluate.scores import selection_score
from ssl_jax.evaluate.subsets import holdout
from ssl_jax.files import read_lines, write_json
from ssl_jax.run_folder import RunFolder
from ssl_jax.settings import data_of
from ssl_jax.sweep import command, grid
from ssl_jax.sweep.judge import ByLabels
from ssl_jax.sweep.workers import Workers
from ssl_jax.testing.tiny import tiny_config
from ssl_jax.train import hooks

TINY = [
    "simclr", "synthetic:n=96", "--size=12", "--model=ssl_jax.testing.model", "--batch=16", "--config.data.channels=1",
    "--config.augment.preset=none", "--config.augment.flip=0.5", "--config.augment.brightness=0.4",
    "--config.augment.jitter_prob=1.0", "--config.method.hidden=16", "--config.method.out=8",
    "--config.train.devices=1", "--config.train.save_every=2 steps", "--config.train.log_every=1 steps",
    "--config.train.micro_batch=0", "--config.eval.online_probe=False",
]  # fmt: skip
FEW = "synthetic:n=40,seed=5"


@pytest.fixture(autouse=True)
def no_sheet(monkeypatch):
    monkeypatch.setattr(hooks, "write_views", lambda *_: None)


def arguments(folder, over, *more, steps=6):
    return ["sweep", *TINY, f"--workdir={folder}", f"--over={over}", f"--steps={steps}", *more]


def sweep(*args, **kwargs):
    return cli.main(arguments(*args, **kwargs))


def table(folder, without=("seconds",)):
    with (folder / "sweep.csv").open() as file:
        return [{key: cell for key, cell in row.items() if key not in without} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A sweep of four trials, judged by labels, and what it printed as JSON."""
    folder = tmp_path_factory.mktemp("sweep") / "a"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hooks, "write_views", lambda *_: None)
        assert sweep(folder, "optim.lr=0.01,0.1;train.seed=0,1", f"--labels={FEW}") == 0
    return folder


# Which trials?


def test_commas_within_brackets_and_quotes_separate_nothing():
    over = "config.augment.crop_scale=(0.2, 1.0),(0.5,1); data.path='classes=3,n=64',x;optim.lr=0.1;"
    assert grid.parse(over) == {
        "augment.crop_scale": ["(0.2, 1.0)", "(0.5,1)"],
        "data.path": ["classes=3,n=64", "x"],
        "optim.lr": ["0.1"],
    }


def test_a_method_comes_with_its_recipe():
    config = resolve(load_config("pretrain:simclr", ["--config.data.name=synthetic", "--config.optim.momentum=0.8"]))
    found = {t.values["method.name"]: t.config for t in grid.trials(config, "method.name=simclr,byol,moco")}
    for name, own in found.items():
        assert own == resolve(
            load_config(f"pretrain:{name}", ["--config.data.name=synthetic", "--config.optim.momentum=0.8"])
        )


def test_draws_are_nested_and_of_the_grid():
    config, over = tiny_config("simclr"), "optim.lr=0.1,0.2,0.3;train.seed=0,1,2"
    every = [t.name for t in grid.trials(config, over)]
    draws = [[t.name for t in grid.trials(config, over, "random", n, seed=3)] for n in (3, 6, 20)]
    assert len(draws[0]) == 3 and set(draws[0]) < set(draws[1]) < set(draws[2]) and draws[2] == every
    assert every[1] == "optim.lr=0.1+train.seed=1"
    assert [t.name for t in grid.trials(config, over, "random", 3, seed=4)] != draws[0]


def test_names_are_paths_anywhere():
    config, over = tiny_config("simclr"), "augment.crop_scale=(0.2, 1.0),(0.2,0.9);train.duration=10 epochs"
    names = [trial.name for trial in grid.trials(config, over)]
    assert len(set(names)) == 2 and all(name == shlex.quote(name).strip("'") and "/" not in name for name in names)


def test_a_shorter_trial_has_a_whole_schedule():
    config = tiny_config("simclr", train__duration="9 epochs", optim__warmup="0.9 epochs")
    trial = grid.Trial("a", {}, config)
    short = grid.shorter(trial, 9, images=1600)  # 100 steps an epoch
    assert (short.config.train.duration, short.config.optim.warmup, short.name) == ("100 steps", "10 steps", "a+1of9")
    assert dataclasses.replace(short.config, train=config.train, optim=config.optim) == config


@pytest.mark.parametrize(
    ("over", "more", "message"),
    [
        ("optm.lr=0.1", [], "--over: --config='optm': unknown; did you mean 'optim'?"),
        ("optim.lr", [], "--over: 'optim.lr': allowed: \"KEY=VALUE,VALUE;KEY=VALUE\""),
        ("optim.lr=0.1,", [], "--over: optim.lr: value missing"),
        ("optim.lr=0.1;optim.lr=0.2", [], "--over: optim.lr: is there twice"),
        ("optim.lr=0.1,0.1", [], "--over: optim.lr: 0.1 is there twice"),
        ("optim.lr=0.1,1e-1", [], "--over: optim.lr=0.1 and optim.lr=1e-1 are the same run"),
        ("optim.lr=0.1,x", [], "--over: --config.optim.lr=x: wrong type; allowed: float, 0 or more"),
        ("optim.lr=0.1,-1", [], "--over: config.optim.lr=-1.0: allowed: 0 or more"),
        ("augment.preset=light,grey", [], "--over: augment.preset=grey: config.augment.preset='grey': unknown"),
        ("train.batch=16,1000", [], "--over: train.batch=1000: config.train.batch=1000: larger than the data set"),
        ("finetune.steps=1,2", [], "--over: finetune.steps: does not change a pretraining"),
        (";", [], "--over: no key"),
        ("optim.lr=0.1", ["--search=gird"], "--search='gird': unknown; did you mean 'grid'?"),
        ("optim.lr=0.1", ["--search=random"], "--trials=0: with --search=random; allowed: 1 or more"),
        ("optim.lr=0.1", ["--trials=3"], "--trials=3: with --search=grid; allowed: no number"),
        ("train.duration=2 steps", ["--search=halving"], "--over: train.duration: not expected with --search=halving"),
        ("optim.lr=0.1", ["--cells=0/2"], "--cells=0/2: allowed: K/N with K from 1 to N"),
        ("optim.lr=0.1", ["--workers=0"], "--workers=0: allowed: 1 or more"),
        ("optim.lr=0.1", ["--labels=/no/where"], "--labels=/no/where: not found"),
        ("optim.lr=0.1", ["--labels=synthetic:n=4"], "--labels=synthetic:n=4: labels: no class has two images"),
        ("optim.lr=0.1", ["--config.eval.every=0 steps"], "config.eval.every='0 steps': the runs measure nothing"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_trained(over, more, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "fit", lambda *_: pytest.fail("trained"))
    assert sweep(tmp_path / "a", over, *more) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and told[0].startswith(f"ssl-jax: {message}"), told
    assert not (tmp_path / "a").exists()


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    over = "optim.lr=0.1,0.2,0.3"
    assert sweep(tmp_path / "a", over, "--dry-run", "--search=halving") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "sweep     3 trials: optim.lr=0.1, optim.lr=0.2, optim.lr=0.3" and "1/3 and all" in lines[1]
    assert any(line.startswith("length    6 steps") for line in lines) and not (tmp_path / "a").exists()


# Scores.


def independent(features, labels, splits):
    """The same with scikit-learn's own pipeline."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    def model(strength):
        return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=MAX_ITER))

    def score(train, test):
        kept, held = (train[part] for part in holdout(labels[train], 0.2, 0, None))
        each = []
        for strength in STRENGTHS:
            logits = model(strength).fit(features[kept], labels[kept]).decision_function(features[held])
            each.append((*selection_score(logits, labels[held]), -strength))
        chosen = model(-max(each)[2]).fit(features[train], labels[train])
        return chosen.score(features[test], labels[test])

    with threadpool_limits(1):
        return np.array([score(*split) for split in splits])


def test_the_score_is_that_of_scikit_learn(whole):
    """Of embeddings and of pixels, on folds that hold each image once and have the shares of the classes."""
    source = open_source(data_of(FEW, "--labels", tiny_config("simclr").data))
    labels = np.asarray(source.labels)
    splits = folds(labels)
    assert sorted(np.concatenate([test for _, test in splits]).tolist()) == list(range(40))
    assert all(np.bincount(labels[test]).tolist() == [2, 2, 2, 2] for _, test in splits) and len(splits) == 5
    rows = table(whole)
    assert len(rows) == 4 and [float(row["score"]) for row in rows] == sorted(float(r["score"]) for r in rows)[::-1]
    for row in rows[:2]:
        encoder = load_encoder(whole / "trials" / row["trial"])
        images = open_source(encoder.data(data_of(FEW, "--labels", tiny_config("simclr").data))).arrays()
        expected = independent(encoder.embed(images), labels, splits)
        assert float(row["score"]) == pytest.approx(expected.mean())
        assert float(row["standard_error"]) == pytest.approx(expected.std(ddof=1) / np.sqrt(5))
        assert float(row["raw_pixels"]) == pytest.approx(independent(pixels(images), labels, splits).mean())


def test_groups_are_in_one_fold_and_rare_classes_are_spread():
    rng = np.random.default_rng(0)
    groups, labels = np.repeat(np.arange(20), 3), rng.integers(0, 3, 60)
    for train, test in folds(labels, groups=groups):
        assert not set(groups[train]) & set(groups[test])
    several = np.zeros((60, 2), np.float32)
    several[:30, 0] = several[rng.permutation(60)[:10], 1] = 1
    splits = folds(several)
    assert [several[test, 1].sum() for _, test in splits] == [2] * 5
    features = several + rng.normal(0, 0.1, several.shape)
    assert cross_validated(features, several, splits, classes=2).tolist() == [1] * 5
    assert abs(mean_and_error(cross_validated(rng.normal(size=(60, 2)), several, splits, classes=2))[0] - 0.5) < 0.2


def test_several_labels_per_image_and_patients(tmp_path):
    """The macro AUC is nearly 1 for pixels that show the classes, and no patient is on both sides."""
    rng, rows = np.random.default_rng(0), ["path,patient,A,B"]
    for i in range(60):
        a, b = rng.integers(0, 2, 2)
        image = rng.integers(0, 60, (8, 8)).astype(np.uint8)
        image[:4] += np.uint8(150 * a)
        image[4:] += np.uint8(150 * b)
        Image.fromarray(image).save(tmp_path / f"{i}.png")
        rows.append(f"{i}.png,p{i // 3},{a},{'' if i % 7 == 0 else b}")
    (tmp_path / "few.csv").write_text("\n".join(rows))
    config = tiny_config("simclr", model__name="ssl_jax.testing.model")
    like = dataclasses.replace(config.data, labels=("A", "B"), group="patient", channels=1)
    judge = ByLabels(str(tmp_path / "few.csv"), like, seed=0)
    assert (judge.title, len(judge.splits), len(judge.labels)) == ("macro AUC", 5, 60)
    assert not any(set(judge.groups[train]) & set(judge.groups[test]) for train, test in judge.splits)
    found = judge.score(config, RunFolder(tmp_path), random_encoder(config.model, 8, 1, 0))
    assert found["pixels"] > 0.99 and 0.9 < found["score"] <= 1 and found["error"] < 0.1
    (tmp_path / "few.csv").write_text("\n".join(row.replace(",1", ",0") for row in rows))
    with pytest.raises(UserError, match="no class has positive and negative images in a fold"):
        ByLabels(str(tmp_path / "few.csv"), like, seed=0)


def test_without_labels_at_hand_a_run_is_judged_by_its_own_metrics(tmp_path, capsys):
    np.savez(tmp_path / "images.npz", images=np.random.default_rng(0).integers(0, 256, (96, 12, 12, 1), np.uint8))
    for data, metric, words in (
        ("synthetic:n=96", "knn_accuracy", "It takes the labels of all 96 labelled images"),
        (str(tmp_path / "images.npz"), "rank_me", "a higher rank need not be a better encoder"),
    ):
        folder = tmp_path / metric
        argv = arguments(folder, "optim.lr=0.1", "--json", steps=2)
        assert cli.main([data if word == "synthetic:n=96" else word for word in argv]) == 0
        told = capsys.readouterr().out
        (row,), trial = table(folder), RunFolder(folder / "trials" / "optim.lr=0.1")
        assert words in told and float(row["score"]) == read_lines(trial.metrics)[-1][metric]
        error = json.loads(told.splitlines()[-1])["trials"][0]["error"]
        p = float(row["score"])
        assert error == (pytest.approx(np.sqrt(p * (1 - p) / 48)) if metric == "knn_accuracy" else None)


# Folders.


def test_a_trial_is_an_ordinary_run_and_the_best_has_a_command(whole, capsys, monkeypatch):
    monkeypatch.setattr(command, "fit", lambda *_: pytest.fail("trained"))
    before = (whole / "sweep.csv").read_bytes()
    assert sweep(whole, "optim.lr=0.01,0.1;train.seed=0,1", f"--labels={FEW}", "--json") == 0
    told = capsys.readouterr().out
    assert told.count("known already") == 4 and (whole / "sweep.csv").read_bytes() == before
    found = json.loads(told.splitlines()[-1])
    trial = whole / "trials" / found["best"]
    assert f"the best is a finished run: {trial}" in told and found["command"] in told
    assert found["best"] == table(whole)[0]["trial"] == found["within"][0]
    values, overrides = cli.parse("pretrain", shlex.split(found["command"])[2:])
    config = cli._config_of("pretrain", values, overrides)
    saved = cli._config_of(
        "pretrain", *cli.parse("pretrain", [*TINY, "--workdir=W", "--config.train.duration=100 epochs"])
    )
    best = table(whole)[0]
    optim = dataclasses.replace(saved.optim, lr=float(best["optim.lr"]))
    assert config == dataclasses.replace(
        saved, optim=optim, train=dataclasses.replace(saved.train, seed=int(best["train.seed"]))
    )
    assert cli.main(["report", str(whole)]) == 0 and found["best"] in (whole / "report.html").read_text()


def test_another_call_extends_the_table(whole, tmp_path, capsys):
    """Trials are known by what they compute, whatever the values were that led to them."""
    folder = shutil.copytree(whole, tmp_path / "a")
    assert sweep(folder, "optim.lr=0.1,0.3", f"--labels={FEW}") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    assert lines[0].startswith("[1/2] optim.lr=0.1+train.seed=0: ") and lines[0].endswith("known already")
    assert lines[1].startswith("[2/2] optim.lr=0.3: top-1 ") and not lines[1].endswith("known already")
    rows = {row["trial"]: row for row in table(folder)}
    assert len(rows) == 5 and (rows["optim.lr=0.3"]["optim.lr"], rows["optim.lr=0.3"]["train.seed"]) == ("0.3", "0")
    assert {name: row for name, row in rows.items() if name != "optim.lr=0.3"} == {r["trial"]: r for r in table(whole)}
    # Judged by something else, the old ones are scored again, but not trained.
    times = {p: p.stat().st_mtime_ns for p in folder.glob("trials/*/metrics.jsonl")}
    assert sweep(folder, "optim.lr=0.3") == 0
    assert {row["score_of"] for row in table(folder)} == {"kNN accuracy"} and len(table(folder)) == 5
    assert times == {p: p.stat().st_mtime_ns for p in folder.glob("trials/*/metrics.jsonl")}
    # Another config, and a run where a trial should be.
    assert sweep(folder, "optim.lr=0.1", "--config.optim.momentum=0.5") == 2
    assert "holds a sweep of another config (config.optim.momentum: 0.9 -> 0.5)" in capsys.readouterr().err
    (folder / "trials" / "optim.lr=0.3").rename(folder / "trials" / "optim.lr=0.7")
    assert sweep(folder, "optim.lr=0.7") == 2
    assert "holds a run of another config (config.optim.lr: 0.3 -> 0.7)" in capsys.readouterr().err
    assert sweep(tmp_path, "optim.lr=0.7") == 2
    assert "not empty and not the folder of a sweep" in capsys.readouterr().err


def test_a_failed_trial_is_noted_and_not_tried_again(tmp_path, capsys):
    over = "optim.lr=0.1,1e38"
    assert sweep(tmp_path / "a", over, "--config.optim.lr_batch=0") == 0
    assert "1 of 2 trials failed" in capsys.readouterr().out
    good, bad = table(tmp_path / "a")
    assert (good["trial"], good["state"], bad["trial"], bad["state"]) == (
        "optim.lr=0.1",
        "finished",
        "optim.lr=1e38",
        "failed",
    )
    assert bad["reason"].startswith("step ") and "loss is" in bad["reason"] and bad["score"] == ""
    for known in (2, 1):
        assert sweep(tmp_path / "a", over, "--config.optim.lr_batch=0") == 0
        assert capsys.readouterr().out.count("known already") == known
        shutil.rmtree(tmp_path / "a" / "trials" / "optim.lr=1e38")


def test_halving_trains_the_best_third_anew_for_longer(tmp_path, monkeypatch, capsys):
    """With nine trials in three rungs; what the runs would give is made up."""
    trained = []

    def fit(config, workdir, source):
        run = RunFolder(workdir)
        run.start(config)
        if not run.finished():
            trained.append((run.path.name, config.train.duration, config.optim.warmup))
            write_json(run.encoder / "encoder.json", {"step": int(config.train.duration.split()[0])})
        return config

    monkeypatch.setattr(command, "fit", fit)
    monkeypatch.setattr(RunFolder, "exported", lambda self, steps=None: (self.encoder / "encoder.json").exists())
    score = {f"0.{i}": round(abs(i - 5.2), 1) for i in range(1, 10)}  # the best are 0.1, 0.9 and 0.2

    def scored(self, config, run, encoder):
        return {**dict.fromkeys(command.SCORES), "score": score[str(config.optim.lr)]}

    monkeypatch.setattr(command.ByRun, "score", scored)
    over = f"optim.lr={','.join(score)}"
    argv = ("--search=halving", "--config.optim.warmup=9 steps")
    assert sweep(tmp_path / "a", over, *argv, steps=90) == 0
    assert trained[:9] == [(f"optim.lr={lr}+1of9", "10 steps", "1 steps") for lr in score]
    assert [name for name, *_ in trained[9:12]] == [f"optim.lr={lr}+1of3" for lr in (0.1, 0.2, 0.9)]
    assert trained[12:] == [("optim.lr=0.1", "90 steps", "9 steps")]
    rows = table(tmp_path / "a")
    assert [row["part"] for row in rows] == ["1"] + ["3"] * 3 + ["9"] * 9 and rows[0]["trial"] == "optim.lr=0.1"
    # Shares: each call has its part of the first rung that is not done.
    for share, count in (("1/2", 5), ("2/2", 4), ("2/2", 1), ("1/1", 2), ("1/1", 1)):
        before = len(trained)
        assert sweep(tmp_path / "b", over, *argv, f"--cells={share}", steps=90) == 0
        assert len(trained) - before == count, (share, trained[before:])
    assert sweep(tmp_path / "b", over, *argv, steps=90) == 0
    assert table(tmp_path / "b") == table(tmp_path / "a")


# Interruptions and processes.


def test_killed_in_the_middle_of_a_trial_it_ends_the_same(tmp_path):
    over = "optim.lr=0.05,0.1"
    process = forked.Python(forked.SLOWLY, *arguments(tmp_path / "a", over, steps=30))
    second, end = RunFolder(tmp_path / "a" / "trials" / "optim.lr=0.1"), time.monotonic() + 200
    while len(read_lines(second.metrics)) < 5 and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert 5 <= len(read_lines(second.metrics)) < 30 and not (tmp_path / "a" / "sweep.csv").exists()
    for folder in ("a", "b"):
        assert sweep(tmp_path / folder, over, steps=30) == 0
    assert table(tmp_path / "a") == table(tmp_path / "b")
    for path in (tmp_path / "a" / "trials").glob("*/encoder/encoder.safetensors"):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()


@pytest.fixture
def forked_workers(monkeypatch):
    """Workers that need not import anything first."""

    def start(self, k):
        argv = ["sweep", *self.argv, "--workers=1", f"--cells={k}/{self.count}"]
        started.append(forked.Python(forked.SLOWLY, *argv))
        return started[-1]

    started = []
    monkeypatch.setattr(Workers, "_start", start)
    return started


def test_two_workers_write_the_same_table(whole, tmp_path, capsys, forked_workers):
    over = "optim.lr=0.01,0.1;train.seed=0,1"
    assert sweep(tmp_path / "a", over, f"--labels={FEW}", "--workers=2") == 0
    told = capsys.readouterr().out
    assert table(tmp_path / "a") == table(whole) and told.count(" steps, ") == 4
    assert all(process.communicate()[0].count("top-1") == 2 for process in forked_workers)


@pytest.mark.slow
def test_a_signal_ends_all_workers_which_save(tmp_path, forked_workers):
    runs = [RunFolder(tmp_path / "a" / "trials" / f"train.seed={seed}") for seed in (0, 1)]

    def interrupt():
        while not all(len(read_lines(run.metrics)) > 2 for run in runs):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(SystemExit) as ended:
        sweep(tmp_path / "a", "train.seed=0,1", "--workers=2", steps=1000)
    assert ended.value.code == 75 and [process.returncode for process in forked_workers] == [75, 75]
    assert all(checkpoint.steps(run.checkpoints) for run in runs) and not (tmp_path / "a" / "sweep.csv").exists()


def test_a_worker_that_fails_is_told_in_one_line(tmp_path):
    crew = Workers(["--help=nothing"], 2, tmp_path / "logs")
    with pytest.raises(UserError, match=r"worker 1 of 2 ended with code 2: --help='nothing': unknown; .*1.log\)"):
        crew.run(lambda: None)
