"""What a run folder says."""

import logging
from pathlib import Path
from typing import Any, NamedTuple

from ssl_jax.errors import DamagedError
from ssl_jax.files import read_json, read_lines
from ssl_jax.run_folder import RunFolder, named_as_today

log = logging.getLogger("ssl_jax")
REMADE = "its `ssl-jax evaluate` command makes it anew"
COMPLETE = {"step", "epoch", "loss", "embedding_std"}  # what the report needs of a step


class RunRecord(NamedTuple):
    """What a run folder says. steps: metrics of the logged steps; checks: of the evaluations during training."""

    folder: RunFolder
    config: dict[str, Any]
    steps: list[dict[str, Any]]
    checks: list[dict[str, Any]]
    timing: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    finished: bool

    def curve(self, metric: str) -> tuple[list[float], list[Any]]:
        """(epochs, values) of a metric. Lines that have no epoch get theirs from the step. Empty before the first."""
        lines = [line for lines in (self.steps, self.checks, self.timing) for line in lines if metric in line]
        if not self.steps:
            return [], []
        per_step = self.steps[-1]["epoch"] / self.steps[-1]["step"]
        return [line["step"] * per_step for line in lines], [line[metric] for line in lines]


def read_run(folder: RunFolder) -> RunRecord:
    """Raises UserError if there is no config.json."""
    config = folder.read_config()
    metrics = read_lines(folder.metrics)
    evaluations = sorted(folder.evaluation.glob("*.json"), key=lambda p: (p.stat().st_mtime, p.name))
    steps, finished = [line for line in metrics if line.keys() >= COMPLETE], False
    try:
        finished = folder.exported()
    except DamagedError as error:
        log.warning("%s", error)
    last = steps[-1]["step"] if steps else 0
    if finished and last < (total := read_json(folder.encoder / "encoder.json").get("step", 0)):
        log.warning("%s: ends at step %d of %d; what is missing is lost", folder.metrics, last, total)
    return RunRecord(
        folder,
        config,
        steps,
        [line for line in metrics if "loss" not in line],
        [line for line in read_lines(folder.timing) if "images_per_s" in line],
        [named_as_today(made) for path in evaluations if (made := sound(path, REMADE))],
        finished,
    )


def sound(path: Path, cure: str) -> dict[str, Any]:
    """The content of a JSON file; {} if there is none. A damaged one is left out of the report, with a warning."""
    try:
        return read_json(path, f"left out of the report; {cure}")
    except DamagedError as error:
        log.warning("%s", error)
        return {}
