"""Runs the trials of a sweep, or a share of them, and keeps their scores."""

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from ssl_jax import files
from ssl_jax.config import Config, from_json, resolve, to_json, to_steps
from ssl_jax.data import Source, open_source
from ssl_jax.errors import BusyError, DamagedError, UserError, first_line
from ssl_jax.run_folder import Folder, RunFolder, compared
from ssl_jax.sweep import grid, table
from ssl_jax.sweep.grid import Trial, identity
from ssl_jax.sweep.judge import SCORES, ByLabels, ByRun
from ssl_jax.sweep.workers import Workers
from ssl_jax.train import fit
from ssl_jax.train.step import set_up

VERSION = 1  # of the scores; raise it when a change to the code changes them
AGAIN = "remove it; no trial is lost"


class Sweep:
    """The trials of one command in one folder. To make one is to check all that can be checked before a trial runs."""

    def __init__(
        self,
        config: Config,
        workdir: str | Path,
        over: str,
        labels: str = "",
        search: str = "grid",
        trials: int = 0,
        seed: int = 0,
    ):
        """labels: data to judge by; "": the run's own kNN or RankMe. trials: their number, as of `grid.trials`.

        Raises UserError for any mistake, also if the folder holds something else.
        """
        self.folder, self.config, self.search = Path(workdir), config, search
        chosen = grid.trials(config, over, search, trials, seed)
        self.keys = list(chosen[0].values)
        self.source = open_source(config.data)
        self.other = config.data, self.source  # the last one of a trial with other data
        self.judge = ByLabels(labels, config.data, seed) if labels else ByRun(self.source)
        self.judged = files.json_digest({"version": VERSION, "inputs": self.judge.inputs})
        self.asked = {"over": over, "search": search, "trials": trials, "seed": seed, "labels": labels}
        self._check_folder()
        self.names = {identity(to_json(trial.config)): trial.name for trial in self._there()}
        self.told = set[str]()  # names of trials whose score a worker found and this process has printed
        self.trials = [self._placed(trial) for trial in chosen]
        for trial in self.trials:
            self._check(trial)

    # Which trials there are.

    def rungs(self) -> Iterator[list[Trial]]:
        """The trials that may run side by side: all, or of successive halving those of a rung. Ask for the next rung
        when all of this one are scored."""
        chosen = self.trials
        for part in grid.rungs(len(chosen)) if self.search == "halving" else [1]:
            rung = [self._placed(grid.shorter(t, part, len(self.source_of(t.config)))) for t in chosen]
            yield rung
            scores = [(self.result(trial) or {}).get("score") for trial in rung]
            best = [i for _, i in sorted((-score, i) for i, score in enumerate(scores) if score is not None)]
            chosen = [chosen[i] for i in sorted(best[: -(-len(rung) // grid.ETA)])]  # those that failed never go on
            if not chosen:
                return

    def run_of(self, trial: Trial) -> RunFolder:
        return RunFolder(self.folder / "trials" / trial.name)

    def source_of(self, config: Config) -> Source:
        if config.data == self.config.data:
            return self.source
        if self.other[0] != config.data:
            self.other = config.data, open_source(config.data)
        return self.other[1]

    def _there(self) -> Iterator[Trial]:
        """The trials that have a run folder, those of earlier commands, too."""
        for path in sorted((self.folder / "trials").glob("*/config.json")):
            with contextlib.suppress(UserError):  # damaged, or with a method that is not installed any more
                trial = Trial(path.parent.name, {}, resolve(from_json(RunFolder(path.parent).read_config())))
                saved = self._saved(trial)
                yield trial._replace(values=saved.get("values", {}), part=saved.get("part", 1))

    def _placed(self, trial: Trial) -> Trial:
        """The trial under the name of a run that has its config already, even if it was a trial of other values."""
        return trial._replace(name=self.names.get(identity(to_json(trial.config)), trial.name))

    # Checks.

    def _check_folder(self) -> None:
        """Raises UserError if the folder holds something else, or a sweep with another config."""
        folder, where = self.folder, f"--workdir={self.folder}"
        # In this order: a task of an array that starts at the same time writes sweep.json first.
        taken = folder.exists() and (not folder.is_dir() or any(p.name[0] != "." for p in folder.iterdir()))
        before = files.read_json(folder / "sweep.json", AGAIN) if taken else {}
        if not before:
            if taken and not (folder / "trials").is_dir():
                raise UserError(f"{where}: not empty and not the folder of a sweep; allowed: a new folder")
            return
        self.keys = list(dict.fromkeys([*before["keys"], *self.keys]))
        changed = _changed(before["config"], self.config)
        changed = [line for line in changed if line.removeprefix("config.").partition(": ")[0] not in self.keys]
        if changed:
            allowed = "allowed: the same config, with any --over, or another folder"
            raise UserError(f"{where}: holds a sweep of another config ({'; '.join(changed)}); {allowed}")

    def _check(self, trial: Trial) -> None:
        """Raises UserError if the folder of a trial holds another run, or if the trial cannot be set up."""
        run = self.run_of(trial)
        if run.begun() and run.config.is_file():
            with contextlib.suppress(DamagedError):  # `fit` knows what to do
                if changed := _changed(run.read_config(), trial.config):
                    holds = f"holds a run of another config ({'; '.join(changed)})"
                    raise UserError(f"{run.path}: {holds}; allowed: the same config, or another --workdir")
            return
        source = self.source_of(trial.config)
        try:
            set_up(trial.config, source)
        except UserError as error:
            raise UserError(f"--over: {trial.name}: {error}") from error
        if isinstance(self.judge, ByRun):
            self.judge.check(trial.config, len(source))

    # Scores.

    def _file(self, trial: Trial) -> Path:
        return self.folder / "scores" / f"{trial.name}.json"

    def _saved(self, trial: Trial) -> dict[str, Any]:
        try:
            return files.read_json(self._file(trial))
        except DamagedError as error:
            print(f"{error.damage}; scored again", flush=True)
            return {}

    def result(self, trial: Trial) -> dict[str, Any] | None:
        """The score of a trial, or why it failed. None if it has to run first: it never has, was judged by something
        else, or its folder was removed, as is done to try a failed one again."""
        saved = self._saved(trial)
        same = saved.get("run") == identity(to_json(trial.config)) and saved.get("judge") == self.judged
        return saved if same and self.run_of(trial).path.exists() else None

    def run(self, trial: Trial) -> dict[str, Any]:
        """Trains a trial, or continues or loads it, and scores it. Raises BusyError if another process is in it."""
        run, config, source = self.run_of(trial), trial.config, self.source_of(trial.config)
        steps = to_steps(config.train.duration, len(source), config.train.batch)
        before, start = self._saved(trial).get("seconds") if run.finished(steps) else None, time.monotonic()
        found: dict[str, Any] = {"state": "finished", "reason": "", **dict.fromkeys(SCORES)}
        try:
            encoder = fit(config, run.path, source)
            found["seconds"] = round(time.monotonic() - start, 1) if before is None else before
            found |= self.judge.score(config, run, encoder)
        except BusyError:
            raise
        except (UserError, jax.errors.JaxRuntimeError, MemoryError) as error:
            found |= {"state": "failed", "reason": first_line(error), "seconds": round(time.monotonic() - start, 1)}
        found |= {"values": trial.values, "part": trial.part, "steps": steps, "score_of": self.judge.title}
        files.write_json(self._file(trial), {**found, "run": identity(to_json(config)), "judge": self.judged})
        return found

    # The work.

    def search_all(self, part: tuple[int, int] | None = None, workers: Workers | None = None) -> None:
        """Runs the trials that are not scored yet. part=(k, n): of the first rung that has some, only the k-th of n
        shares. workers: processes that do so, rung by rung."""
        self._begin()
        for number, rung in enumerate(self.rungs(), 1):
            todo = [trial for trial in rung if self.result(trial) is None]
            if self.search == "halving":
                steps = f"1/{rung[0].part} of the steps" if rung[0].part > 1 else "all steps"
                print(f"rung {number}: {len(rung)} with {steps}", flush=True)
            if part and todo:
                k, n = part
                self._run_each(rung[k - 1 :: n], skip_busy=True)
                return
            if workers and todo:
                self._wait_for(workers, todo)
            self._run_each(rung)

    def _begin(self) -> None:
        files.remove_leftovers(self.folder, self.folder / "scores")
        value = {"config": to_json(self.config), "keys": self.keys, **self.asked}
        files.write_json(self.folder / "sweep.json", value)

    def _run_each(self, rung: Sequence[Trial], skip_busy: bool = False) -> None:
        for number, trial in enumerate(rung, 1):
            if (known := self.result(trial)) and trial.name in self.told:
                continue
            try:
                told = table.told(known or self.run(trial)) + ", known already" * bool(known)
            except BusyError:
                if not skip_busy:
                    raise
                told = "another process is working on it; skipped"
            print(f"[{number}/{len(rung)}] {trial.name}: {told}", flush=True)

    def _wait_for(self, workers: Workers, todo: Sequence[Trial]) -> None:
        """Tells of each trial as soon as a worker has scored it."""

        def tell() -> None:
            for trial in todo:
                if trial.name not in self.told and (result := self.result(trial)):
                    self.told.add(trial.name)
                    print(f"[{len(self.told)}] {trial.name}: {table.told(result)}", flush=True)

        workers.run(tell)
        tell()

    def rows(self) -> list[dict[str, Any]]:
        """Every trial of the folder that is scored, those of earlier commands, too: whole ones first, the best first.

        Earlier trials are scored again if they were judged by something else.
        """
        known = {trial.name: trial for rung in self.rungs() for trial in rung}
        known = {trial.name: trial for trial in self._there()} | known
        found = []
        for trial in known.values():
            result = self.result(trial) or (self.run(trial) if self.run_of(trial).finished() else None)
            if result:
                values = {key: table.value(trial, key) for key in self.keys}
                row = {key: each for key, each in result.items() if key not in ("run", "judge")}
                found.append({**row, "trial": trial.name, "values": values, "part": trial.part})
        return sorted(found, key=lambda row: (row["score"] is None, row["part"], -(row["score"] or 0), row["trial"]))


def sweep(
    config: Config,
    workdir: str,
    over: str,
    workers: int = 1,
    part: tuple[int, int] | None = None,
    argv: Sequence[str] = (),
    **options: Any,
) -> dict[str, Any]:
    """Runs a sweep or, with part=(k, n), the k-th of n shares; without it, prints, writes and returns the table.

    workers: processes that share the trials; argv: the arguments of this command, which each of them gets. All else:
    see `Sweep`.
    """
    if workers < 1 or (workers > 1 and part):
        raise UserError(f"--workers={workers}: allowed: 1 or more; with --cells only 1")
    if workers > 1:  # to them belong the devices
        jax.config.update("jax_platforms", "cpu")
    made, folder = Sweep(config, workdir, over, **options), Folder(workdir)
    with folder.lock(shared=part is not None or workers > 1):
        made.search_all(part, Workers(argv, workers, made.folder / "workers") if workers > 1 else None)
        if part:
            return {}
        return table.write(made.folder, made.rows(), made.keys, made.judge)


def dry_run(
    config: Config, workdir: str, over: str, workers: int = 1, argv: Sequence[str] = (), **options: Any
) -> Iterator[str]:
    """Lines about the trials, and about the first of them as `dry_runs.pretraining` has them. options: of `Sweep`."""
    from ssl_jax import dry_runs

    del workers, argv
    made = Sweep(config, workdir, over, **options)
    count = len(made.trials)
    parts = grid.rungs(count) if made.search == "halving" else [1]
    yield f"sweep     {count} trials: {', '.join(trial.name for trial in made.trials)}"
    if len(parts) > 1:
        shares = ", ".join(f"1/{part}" for part in parts[:-1])
        yield f"rungs     with {shares} and all of the steps; the best third goes on"
    yield f"score     {made.judge.meaning}"
    first = made.trials[0]
    yield f"\n{first.name}, of whole length:"
    yield from dry_runs.pretraining(first.config, made.run_of(first).path, made.source_of(first.config))


def _changed(saved: dict[str, Any], config: Config) -> list[str]:
    return compared(saved, json.loads(json.dumps(to_json(config))))[0]
