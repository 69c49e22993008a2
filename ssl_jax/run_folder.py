"""The folder of a run and the folder of a study: where everything in them lies, who may write, what may be resumed."""

import contextlib
import datetime
import errno
import fcntl
import importlib.metadata
import json
import logging
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ssl_jax.config import Config, differences, from_json, resolve, to_json
from ssl_jax.errors import BusyError, DamagedError, UserError
from ssl_jax.files import COPY, json_digest, read_json, read_weights, remove_leftovers, write_json

log = logging.getLogger("ssl_jax")
PACKAGES = ("ssl_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "scikit-learn")
# These say where a run computes, how it reads and what is recorded of it, not what it computes: they may change when it
# resumes.
FREE = {"train": ("devices", "shard", "profile"), "data": ("workers", "retries", "timeout")}
# These name files, which may be moved together with a run.
PATHS = (("data", "path"), ("data", "cache"), ("model", "init"), ("train", "init"), ("method", "teacher"))


class Folder:
    """What every folder that a command works in has.

    config.json   every option, resolved      environment.json   versions, devices, machine, commands
    report.html   everything on one page

    again: the command that makes damaged files of the folder anew, in words
    """

    again = ""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.environment = self.path / "environment.json"
        self.report = self.path / "report.html"

    def read_config(self) -> dict[str, Any]:
        """The saved config, as `config.to_json` wrote it. Raises UserError if there is none or it is damaged."""
        if not self.config.exists():
            raise UserError(f"--workdir={self.path}: no config.json; allowed: a folder made by `ssl-jax pretrain`")
        return read_json(self.config, self.again)

    def read_environment(self) -> dict[str, Any]:
        """The content of environment.json; a damaged one is begun anew, with a warning."""
        try:
            return read_json(self.environment)
        except DamagedError as error:
            lost = "its versions and commands are lost, and what depends on the machine is decided again"
            log.warning("%s; begun anew: %s", error.damage, lost)
            write_json(self.environment, {})
            return {}

    @contextlib.contextmanager
    def lock(self, *, shared: bool = False) -> Iterator[None]:
        """Keeps other processes out of the folder. The operating system releases the lock of a killed process.

        shared: processes that all ask for a shared lock may enter together. Raises BusyError if the folder is taken.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # Others may write in a shared folder: no link is followed to a file elsewhere, and no pipe is waited for.
            flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
            file = os.fdopen(os.open(self.path / ".lock", flags, 0o666), "w")
        except OSError as error:
            linked = error.errno == errno.ELOOP
            problem = ".lock is a link; remove it" if linked else f"cannot be created ({error.strerror})"
            raise UserError(f"--workdir={self.path}: {problem}") from error
        with file:
            try:
                fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except OSError:
                raise BusyError(f"--workdir={self.path}: another process is working in this folder") from None
            yield

    def record_environment(self, **more: Any) -> None:
        """Writes environment.json: versions, devices, and every command that has worked in this folder."""
        import jax

        now = {
            "packages": {p: importlib.metadata.version(p) for p in PACKAGES if _is_installed(p)},
            "python": platform.python_version(),
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
            "devices": [d.device_kind for d in jax.devices()],
            **more,
        }
        command = {"time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "argv": sys.argv}
        now["commands"] = [*self.read_environment().get("commands", []), command]
        write_json(self.environment, now)


class RunFolder(Folder):
    """The folder of one training run.

    metrics.jsonl   one line per logged step       timing.jsonl   images/s and waiting time, which differ between reruns
    checkpoints/    full state, to resume from     encoder/       safetensors + json, to use
    evaluation/     one file per evaluation        views.png      what the transforms do
    profile/        config.train.profile's trace
    """

    again = "run its `ssl-jax pretrain` command again, which makes it anew"

    def __init__(self, path: str | Path):
        super().__init__(path)
        self.metrics = self.path / "metrics.jsonl"
        self.timing = self.path / "timing.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.encoder = self.path / "encoder"
        self.evaluation = self.path / "evaluation"
        self.views = self.path / "views.png"
        self.profile = self.path / "profile"

    def start(self, config: Config) -> None:
        """Creates the folder, or checks that an existing one belongs to the same config.

        A run that ended before its first step has nothing worth keeping: its config is replaced.
        Files that the config names may have been moved: config.json then takes over where they are now.
        Raises UserError if the folder holds something else or another config, naming the keys that differ.
        """
        new = json.loads(json.dumps(to_json(config)))
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--workdir={self.path}: is a file; allowed: a folder, new or of an earlier run")
        try:
            saved = read_json(self.config, f"{COPY}, or remove the folder to start again")
        except DamagedError as error:
            if self.begun() and not self._began_with(new):
                raise
            log.warning("%s; written anew", error.damage)
            saved = new
            write_json(self.config, new)
        if saved:
            changed, moved = compared(saved, new)
            if changed and self.begun():
                raise UserError(
                    f"--workdir={self.path}: holds a run of another config ({'; '.join(changed)}); "
                    "allowed: the same config, to resume it, or another folder"
                )
            for line in moved:
                print(line, flush=True)
            if changed or moved:
                write_json(self.config, new)
            return
        empty = not self.path.is_dir() or all(p.name.startswith(".") for p in self.path.iterdir())
        if not empty and not self._began_with(new):
            raise UserError(f"--workdir={self.path}: not empty and not a run folder; allowed: a new folder")
        write_json(self.config, new)

    def begun(self) -> bool:
        """Whether a step has been saved or logged here. Until then, nothing in the folder is worth keeping."""
        return self.checkpoints.exists() or (self.metrics.exists() and self.metrics.stat().st_size > 0)

    def _began_with(self, config: dict[str, Any]) -> bool:
        """Whether the run here began with this config, as environment.json tells where config.json is lost."""
        with contextlib.suppress(DamagedError):
            return read_json(self.environment).get("config") == _digest(config)
        return False

    def enter(
        self, config: Config, steps: int, stack: contextlib.ExitStack, **settings: Callable[[], Any]
    ) -> dict[str, Any]:
        """Locks the folder until `stack` closes, and starts or continues the run in it.

        settings: functions of what depends on the machine. Their values are recorded in environment.json when a run
        begins, and it keeps them. Returns {"finished": True} for a complete run, else False, these values, and in
        "decided" the names of those that are new. A run whose export is damaged is not complete: the export is made
        anew.
        """
        damage = ""
        try:
            finished = self.exported(steps)
        except DamagedError as error:
            finished, damage = False, error.damage
        # A finished run is only read: tasks of a study that start at the same time all need its encoder.
        stack.enter_context(self.lock(shared=finished))
        self.start(config)
        remove_leftovers(self.path, self.encoder, self.evaluation)
        if finished:
            return {"finished": True}
        if damage:
            kept = any(self.checkpoints.glob("[0-9]*"))
            log.warning("%s; made anew from %s", damage, "a checkpoint" if kept else "the start, without a checkpoint")
        before = self.read_environment() if self.begun() else {}
        values = {key: before[key] if key in before else decide() for key, decide in settings.items()}
        self.record_environment(config=_digest(to_json(config)), **values)
        return {**values, "finished": False, "decided": [key for key in settings if key not in before]}

    def decide_again(self, **values: Any) -> None:
        """Replaces values that `enter` has recorded."""
        write_json(self.environment, {**self.read_environment(), **values})

    def finished(self, steps: int | None = None) -> bool:
        """As `exported`; a damaged export counts as none."""
        with contextlib.suppress(DamagedError):
            return self.exported(steps)
        return False

    def exported(self, steps: int | None = None) -> bool:
        """Whether the run has exported its encoder; with `steps`, whether that encoder trained for so many.

        Raises DamagedError if the export is damaged or a part of it is lost.
        """
        about = read_json(self.encoder / "encoder.json", self.again)
        if not about or steps not in (None, about.get("step")):
            return False
        read_weights(self.encoder / "encoder.safetensors", self.again)
        return True


class StudyFolder(Folder):
    """The folder of a label-efficiency study.

    pretrain/<arm>[-<n>]   run folders                cells/<arm>/<labels>/<seed>.json, .npz   results of each cell
    study.json   classes, their frequencies, sizes    test.npz   labels, names and patients of the test images
    results.csv, summary.csv, summary.md, classes.csv, patients.csv, curve.png, gain_by_class.png: see `report.summary`
    """

    again = "run its `ssl-jax study` command again, which makes it anew"

    def __init__(self, path: str | Path):
        super().__init__(path)
        self.about = self.path / "study.json"
        self.test = self.path / "test.npz"
        self.results = self.path / "results.csv"
        self.references_csv = self.path / "references.csv"
        self.cautions = self.path / "cautions.json"
        self.summary_csv = self.path / "summary.csv"
        self.summary_md = self.path / "summary.md"
        self.classes = self.path / "classes.csv"
        self.patients = self.path / "patients.csv"
        self.curve = self.path / "curve.png"
        self.gain_by_class = self.path / "gain_by_class.png"

    def cell(self, arm: str, labels: int, seed: int) -> Path:
        """The .json file of a cell; its scores lie beside it, in a .npz file."""
        return self.path / "cells" / arm / str(labels) / f"{seed}.json"

    def references(self, labels: int, seed: int) -> Path:
        """The scores of what costs nothing, on one draw of labels."""
        return self.path / "references" / str(labels) / f"{seed}.json"

    def pretraining(self, arm: str, number: int = 0) -> RunFolder:
        """The run folder of pretraining `number` of an arm, counted from 0."""
        return RunFolder(self.path / "pretrain" / (f"{arm}-{number + 1}" if number else arm))

    def pretrainings(self) -> list[RunFolder]:
        """The run folders of the pretrainings that have started."""
        return [RunFolder(path.parent) for path in sorted((self.path / "pretrain").glob("*/config.json"))]

    def exists(self) -> bool:
        """Whether this is the folder of a study rather than of a run."""
        return self.about.is_file() or bool(self.pretrainings())


def compared(saved: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """(the options in which a saved config and a new one differ, a line about each file that has been moved). Options
    that change nothing of what is computed (FREE) may differ."""
    # The config of an older version lacks newer keys: they take their defaults.
    before = json.loads(json.dumps(to_json(resolve(from_json(saved)))))
    moved = _follow(before, new)
    return differences(without_free(before), without_free(new)), moved


def without_free(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without the options in FREE."""
    kept = {name: {k: v for k, v in config[name].items() if k not in free} for name, free in FREE.items()}
    return {**config, **kept}


def named_as_today(evaluation: dict[str, Any]) -> dict[str, Any]:
    """The content of an evaluation's file. The protocol linear_quick was called linear at first: files
    from then have none of today's options of linear."""
    settings = evaluation.get("conditions", {}).get("settings", {})
    older = evaluation.get("protocol") == "linear" and "optimizer" not in settings
    return {**evaluation, "protocol": "linear_quick"} if older else evaluation


def _follow(saved: dict[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Takes over into `saved` the new place of files that are gone from the old one; returns a line about each."""
    lines = []
    for section, key in PATHS:
        before, now = saved[section].get(key, ""), new[section].get(key, "")
        absolute = Path(before).is_absolute() and Path(now).is_absolute()
        if absolute and Path(now).exists() and not Path(before).exists():
            saved[section][key] = now
            lines.append(f"config.{section}.{key}: {before} is gone; reading {now} instead")
    return lines


def _digest(config: dict[str, Any]) -> str:
    """Of a config without FREE. In environment.json it tells later whether a command has the config of the run."""
    return json_digest(without_free(config))


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
