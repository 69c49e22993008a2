"""The command line as a shell, a scheduler and a program meet it: short forms, signals, closed pipes, JSON, --quiet."""

import json
import os
import pwd
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ssl_jax import cli, commands, interrupts, plotting, progress
from ssl_jax.config import resolve
from ssl_jax.config_file import load_config
from ssl_jax.data.source import Source
from ssl_jax.errors import UserError
from ssl_jax.outputs import write_predictions
from ssl_jax.start import start_jax
from ssl_jax.train.hooks import Stop

ROOT = Path(__file__).parent.parent


def config_of(*argv):
    """The config and the other flags that `ssl-jax ARGV` gives to its command."""
    values, overrides = cli.parse(argv[0], argv[1:])
    return cli._config_of(argv[0], values, overrides), values


# Short forms.


def test_short_forms_are_options(tmp_path):
    short = ["simclr", str(tmp_path), "--workdir=W", "--epochs=20", "--batch=64", "--size=32", "--model=resnet34"]
    config, values = config_of("pretrain", *short, "--config.optim.lr=0.5")
    long = {"data.name": "folder", "data.path": tmp_path, "train.duration": "20 epochs", "train.batch": 64}
    long |= {"data.size": 32, "model.name": "resnet34", "optim.lr": 0.5}
    flags = [f"--config.{key}={value}" for key, value in long.items()]
    assert config == resolve(load_config("pretrain:simclr", flags))
    assert values["workdir"] == "W" and not {"data", "method", "epochs", "size"} & set(values)
    again = config_of("pretrain", "--method", "simclr", "--workdir", "W", *flags)[0]
    assert again == config
    assert config_of("pretrain", "byol", "fashion_mnist", "--workdir=W", "--steps=7")[0].train.duration == "7 steps"


def test_with_a_config_the_first_word_is_the_data(tmp_path):
    changed = config_of("pretrain", str(tmp_path), "--config=cifar10:simclr", "--method=moco", "--workdir=W")[0]
    assert (changed.data.name, changed.data.path, changed.method_name) == ("folder", str(tmp_path), "moco")
    study = config_of("study", "study_fashion_mnist", str(tmp_path), "--workdir=W")[0]
    assert study.data.path == str(tmp_path) and study.train.duration == "12 epochs"
    assert study == config_of("study", "--config=study_fashion_mnist", str(tmp_path), "--workdir=W")[0]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["pretrain", "simclr", "--workdir=W"], "config.data.name: missing: which images?"),
        (["pretrain", "--workdir=W"], "METHOD or --config: missing; write `ssl-jax pretrain simclr DIR ...`"),
        (["pretrain", "simclr", ".", "more", "--workdir=W"], "'more': not a flag"),
        (["pretrain", "simclr", ".", "--data=.", "--workdir=W"], "'.': not expected beside --data=."),
        (["pretrain", "simclr", "/no/such", "--workdir=W"], "--data=/no/such: not found; allowed: a folder"),
        (["pretrain", "simclr", ".", "--epochs=2", "--steps=3", "--workdir=W"], "--steps=3: not expected beside"),
        (["pretrain", "simclr", ".", "--epochs=two", "--workdir=W"], "config.train.duration='two epochs': allowed"),
        (
            ["pretrain", "simclr", ".", "--batch=x", "--workdir=W"],
            "--config.train.batch=x: wrong type; allowed: int, 1",
        ),
        (["predict", "W", ".", "--out=p.txt"], "--out=p.txt: unknown ending '.txt'; allowed: .csv, .json"),
        (["completion", "fish"], "--shell='fish': unknown; available: bash, zsh"),
        (["help", "pretrian"], "command='pretrian': unknown; did you mean 'pretrain'?"),
    ],
)
def test_mistakes_are_one_line(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(argv) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and told[0].startswith(f"ssl-jax: {message}"), told


# Configs and their flags.


@pytest.mark.parametrize(
    ("flag", "allowed"),
    [
        ("train.batch=x", "int, 1 or more"),
        ("augment.second.blur=x", "float, 0 to 1"),
        ("finetune.augment.hue=x", "float, 0 to 0.5"),
        ("method.hidden=x", "int"),
        ("study.test.size=x", "int, 0 or more"),
    ],
)
def test_a_value_of_the_wrong_type_is_told_what_is_allowed(flag, allowed):
    with pytest.raises(UserError) as caught:
        load_config("pretrain:byol", ["--config.optim.lr=0.1", f"--config.{flag}"])
    assert str(caught.value) == f"--config.{flag}: wrong type; allowed: {allowed}"


def test_a_path_is_only_a_path(tmp_path):
    with pytest.raises(UserError, match="--config=/nonexistent/pretrain.py: no such file"):
        load_config("/nonexistent/pretrain.py:byol", [])
    with pytest.raises(UserError, match="--config.train=3: is a section; write --config.train.KEY=VALUE"):
        load_config("pretrain:byol", ["--config.train=3"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(:\n    pass", "line 1: SyntaxError: invalid syntax"),
        ("\nimport nowhere", "line 2: ModuleNotFoundError: No module named 'nowhere'"),
        ("def f():\n    return {}['key']\n\n\ndef get_config():\n    return f()", "line 2: KeyError: 'key'"),
        ("def get_config():\n    pass", "get_config in FILE returns NoneType; allowed: ConfigDict"),
        ("def get_config(a):\n    pass", "FILE: TypeError: get_config() missing 1 required positional argument: 'a'"),
    ],
)
def test_what_a_config_file_raises_is_one_line(text, message, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(str(file), [])
    assert message.replace("FILE", str(file)) in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"--config={file}: ")


# Output.


def test_json_is_the_last_line_and_quiet_leaves_only_it(capsys, monkeypatch):
    monkeypatch.setattr(commands, "method_names", lambda: ["byol"])
    assert cli.main(["methods", "--json"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) > 1 and [row["name"] for row in json.loads(shown[-1])] == ["byol"]
    assert cli.main(["methods", "--json", "--quiet"]) == 0
    assert capsys.readouterr().out.splitlines() == shown[-1:]
    assert cli.main(["methods", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "") and not progress.QUIET


def test_help_of_a_command(capsys):
    assert cli.main(["help", "pretrain"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: ssl-jax pretrain METHOD DATA --workdir=...\n") and "--epochs" in shown


def test_predictions_as_csv_and_as_json(tmp_path):
    source = Source(["=a.png", "b.png"], (2, 2, 1), lambda index: np.zeros((2, 2, 1), np.uint8))
    for name in ("p.csv", "p.json"):
        scores = [(np.arange(2), np.log([[0.25, 0.75], [0.5, 0.5]]))]
        assert write_predictions(tmp_path / name, source, scores, ["x", "y"], False) == 2
    rows = json.loads((tmp_path / "p.json").read_text())
    assert [row["path"] for row in rows] == ["=a.png", "b.png"] and rows[0]["predicted"] == "y"
    assert rows[0]["probabilities"] == pytest.approx({"x": 0.25, "y": 0.75})
    assert (tmp_path / "p.csv").read_text().startswith("path,predicted,x,y\n")


def test_the_time_left_is_that_of_the_steps_after_the_first(monkeypatch, capsys):
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with progress.Progress(1000, 0, "run") as shown:
        now += 60  # compiling
        shown.begin(1)
        now += 20
        shown.update(11, {"loss": 1.0})
    assert capsys.readouterr().err.splitlines()[-1] == "run 11/1000  loss 1  left 0:32:58"
    with progress.counting("files", "files") as update:
        update(10, 40)
        now += 11
        update(20, 40)
    assert [line.partition("  ")[2] for line in capsys.readouterr().err.splitlines()[1:]] == ["", "  left 0:00:22"]


def test_completion(capsys):
    typed = {
        "ssl-jax pre": "pretrain predict",
        "ssl-jax pretrain sim": "simclr simmim simsiam",
        "ssl-jax pretrain m": "mae moco moco_v3 msn",  # and no module beside the methods
        "ssl-jax pretrain simclr --w": "--workdir=",
        "ssl-jax help st": "study",
        "ssl-jax report runs": "",  # a file, which bash completes by itself
    }
    assert cli.main(["completion", "bash"]) == 0
    lines = [capsys.readouterr().out]
    for words in typed:
        count = words.count(" ")
        lines.append(f'COMP_WORDS=({words}); COMP_CWORD={count}; _ssl_jax; echo "${{COMPREPLY[*]}}"')
    done = subprocess.run(["bash", "-c", "\n".join(lines)], capture_output=True, text=True)
    assert done.stdout.splitlines() == list(typed.values()), done.stderr


# What comes from outside.

# As decoding and compiling do, this holds the main thread in C for a minute, where no handler of Python's runs.
BUSY = "import hashlib; print('busy', flush=True); hashlib.pbkdf2_hmac('sha256', b'', b'', 10**8)"
WATCHED = f"from ssl_jax import interrupts\nwith interrupts.unread(), interrupts.requeued():\n    {BUSY}"


@pytest.fixture
def hangups():
    """Are felt here, and in the processes that a test starts, even if all tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_in_c_code_is_answered_at_once(hangups, number):
    process = subprocess.Popen([sys.executable, "-c", WATCHED], stdout=-1, stderr=-1, text=True)
    assert process.stdout.readline() == "busy\n"
    began = time.monotonic()
    process.send_signal(number)
    _, told = process.communicate(timeout=20)
    assert process.returncode == 75 and time.monotonic() - began < 5
    assert told == f"ssl-jax: {number.name}: nothing to save; the same command goes on from here\n"


def test_once_a_run_steps_signals_are_left_to_it(hangups, monkeypatch):
    ended = []
    monkeypatch.setattr(interrupts.os, "_exit", ended.append)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    with interrupts.requeued():
        stop = Stop()
        stop.on_metrics(1, {"stop": 0})
        for number in before:
            os.kill(os.getpid(), number)
            assert stop.received == number
        time.sleep(0.2)  # for the thread that would end the process
        stop.close()
    assert not ended and before == {number: signal.getsignal(number) for number in before}


def test_under_nohup_a_hangup_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop = Stop()
        os.kill(os.getpid(), signal.SIGHUP)
        stop.close()
        assert stop.received == 0 and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
def test_a_signal_while_compiling_and_another_while_training(hangups, tmp_path):
    """The run that compiles ends at once. The one that trains, whose output nobody reads, saves its state."""
    flags = ["--size=16", "--batch=16", "--steps=400", "--model=resnet_thin", "--config.model.width=0.25"]
    argv = ["pretrain", "simclr", "synthetic:n=96", f"--workdir={tmp_path / 'run'}", *flags]
    command = [sys.executable, "-m", "ssl_jax.cli", *argv, "--config.method.hidden=16", "--config.method.out=8"]
    process = subprocess.Popen(command, stdout=-1, stderr=-1, text=True)
    assert any("compiling" in line for line in process.stderr)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    assert process.wait(20) == 75 and time.monotonic() - began < 5
    process = subprocess.Popen(command, stdout=-1, stderr=-1)
    process.stdout.close()
    process.stderr.close()
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.05)
    process.send_signal(signal.SIGHUP)
    assert process.wait(100) == 75 and list((tmp_path / "run" / "checkpoints").glob("0*"))


def test_a_closed_pipe_is_no_error():
    """The first print fails only when the buffer is full or flushed, the last one when Python ends."""
    code = "from ssl_jax import interrupts\nwith interrupts.unread():\n    for i in range(9): print('x' * 5000)"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, b"")
    done = subprocess.run([sys.executable, "-m", "ssl_jax.cli", "help"], stdout=write, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, b"")
    os.close(write)


def test_without_a_home_folder_there_is_a_temporary_one(monkeypatch):
    import jax

    def nobody(uid):
        raise KeyError(uid)

    monkeypatch.setenv("HOME", "")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    with pytest.raises(RuntimeError):
        Path.home()
    start_jax()
    assert Path.home().is_dir() and "ssl_jax_home_" in str(Path("~").expanduser())
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nobody")  # a cache that cannot be made
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    before = jax.config.jax_compilation_cache_dir
    start_jax()
    assert jax.config.jax_compilation_cache_dir == before


def test_a_picture_is_whole_or_not_there(tmp_path):
    """The disk is full after 1000 bytes: what was there stays."""
    from matplotlib.figure import Figure

    path, limit = tmp_path / "views.png", resource.getrlimit(resource.RLIMIT_FSIZE)
    plotting.save(Figure(figsize=(2, 2)), path)
    whole, ignored = path.read_bytes(), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        with pytest.raises(UserError, match=f"{path}: not written"):
            plotting.save(Figure(figsize=(20, 20)), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, ignored)
    assert path.read_bytes() == whole and len(list(tmp_path.iterdir())) == 1
