"""Where metrics and images of a run go: always to JSON lines, and to the trackers that config.log names.

A tracker is imported only if it is used. It runs in a thread of its own, so a slow or lost connection neither delays
nor ends training. A continued run stays in the same TensorBoard folder, W&B run or MLflow run.
"""

import contextlib
import json
import logging
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ssl_jax.errors import UserError, first_line, unknown
from ssl_jax.files import read_json, read_lines, write_bytes, write_json

GROUPS = ("metrics", "timing")
REMOVE = "remove it, and the run goes on as a new one there"  # what to do about a damaged wandb.json or mlflow.json
CLOSE_SECONDS = 60  # how long the end of a run waits for a tracker to send the rest

Values = Mapping[str, float | str | None]  # None: not finite, as in JSON; text: a problem
Picture = str | Path | np.ndarray  # a PNG file, or uint8 [H, W, C] with 1 or 3 channels


class Writer(Protocol):
    def scalars(self, step: int, values: Values, group: str = "metrics") -> None:
        """group: one of GROUPS; "timing" is for values that differ between reruns."""

    def image(self, step: int, name: str, image: Picture) -> None: ...

    def close(self) -> None: ...


def open_writers(
    names: str, folder: Path, config: Mapping[str, Any] | None, start: int, say: Callable[[str], None] = print
) -> list[Writer]:
    """Opens JSON lines in the run folder, and the trackers in `names`, such as "tensorboard,wandb", at step `start`.

    config: the resolved options, recorded once as parameters. say: prints a warning when a tracker fails.
    Only the main process of a run may use trackers. Raises UserError for an unknown name, a missing package, and W&B
    without a login; a tracker that cannot be reached is left out, with a warning.
    """
    trackers = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    for name in trackers:
        if name not in TRACKERS:
            raise unknown("config.log", name, TRACKERS)
    writers: list[Writer] = [JsonLines(folder, start)]
    with contextlib.ExitStack() as on_error:
        for name in trackers:
            try:
                tracker = TRACKERS[name](folder, flatten(config or {}), start)
            except ImportError as error:
                reason = "" if isinstance(error, ModuleNotFoundError) else f" ({first_line(error)})"
                raise UserError(f"config.log={name!r}: needs {name}: pip install 'ssl_jax[{name}]'{reason}") from error
            except UserError:
                raise
            except Exception as error:
                say(_warning(name, error))
                continue
            writers.append(Background(name, tracker, say))
            on_error.callback(writers[-1].close)
        on_error.pop_all()
    return writers


class JsonLines:
    """metrics.jsonl and timing.jsonl. Opening them at a step drops later lines, which a killed run may have left."""

    def __init__(self, folder: Path, start: int):
        self.folder = folder
        for group in GROUPS:
            kept = [line for line in read_lines(self._path(group)) if line["step"] <= start and start]
            write_bytes(self._path(group), "".join(json.dumps(line) + "\n" for line in kept).encode())

    def _path(self, group: str) -> Path:
        return self.folder / f"{group}.jsonl"

    def scalars(self, step: int, values: Values, group: str = "metrics") -> None:
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        try:
            with self._path(group).open("a") as file:
                file.write(json.dumps({"step": step, **finite}) + "\n")
        except OSError as error:
            raise UserError(f"{self._path(group)}: not written ({error.strerror})") from error

    def image(self, step: int, name: str, image: Picture) -> None:
        """Does nothing: images are files in the run folder already."""

    def close(self) -> None:
        pass


class TensorBoard:
    """RUN/tensorboard. TensorBoard itself drops the steps that a killed run wrote after its last checkpoint."""

    def __init__(self, folder: Path, config: dict[str, Any], start: int):
        from tensorboardX import SummaryWriter
        from tensorboardX.summary import hparams

        logging.getLogger("tensorboardX.x2num").setLevel(logging.ERROR)  # it would report every NaN
        path = folder / "tensorboard"
        count = len(list(path.glob("events*")))
        self.writer = SummaryWriter(
            str(path),
            purge_step=start + 1 if start else 0,
            flush_secs=10,
            filename_suffix=f".{count}",  # file names contain only the second: keeps two files apart and in order
        )
        if not start or not count:
            for summary in hparams(config, {"loss": 0.0}):
                self.writer.file_writer.add_summary(summary)

    def scalars(self, step: int, values: Values, group: str = "metrics") -> None:
        numbers, texts = _split(values, group)
        for name, number in numbers.items():
            self.writer.add_scalar(name, number, step)
        for name, text in texts.items():
            self.writer.add_text(name, text, step)

    def image(self, step: int, name: str, image: Picture) -> None:
        self.writer.add_image(name, pixels(image), step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class WandB:
    """A run of Weights & Biases. Its id is in RUN/wandb.json, and its local files are in RUN/wandb.

    W&B's own environment variables apply: WANDB_MODE=offline, WANDB_DIR, WANDB_PROJECT, WANDB_ENTITY and so on. W&B
    cannot take back a step. But a continued run repeats steps exactly, so those that W&B already has are not sent
    again. After SIGKILL it may lack the steps of the last seconds, which metrics.jsonl has. Offline, each continuation
    is a segment of the same run, and `wandb sync` uploads them in order.
    """

    def __init__(self, folder: Path, config: dict[str, Any], start: int):
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # no crash reports to W&B
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", str(CLOSE_SECONDS))
        import wandb

        self.to_image, self.file = wandb.Image, folder / "wandb.json"
        saved = read_json(self.file, REMOVE)
        try:
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "ssl_jax"),
                dir=os.environ.get("WANDB_DIR", str(folder)),
                name=folder.absolute().name,
                id=saved.get("id"),
                resume="allow",
                config=config,
                reinit="create_new",  # leaves alone a run that the caller has open
            )
        except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
            hint = "WANDB_MODE=offline keeps the run on this machine"
            raise UserError(f"config.log='wandb': {first_line(error)} {hint}") from error
        # The first step that W&B does not have yet: known to the server or, offline, from RUN/wandb.json.
        self.start = saved.get("step", -1) + 1 if self.run.offline else self.run.starting_step
        self.recorded = self.start - 1
        if not self.run.disabled:
            write_json(self.file, {**saved, "id": self.run.id})

    def scalars(self, step: int, values: Values, group: str = "metrics") -> None:
        if step >= self.start:
            numbers, texts = _split(values, group)
            self._log(step, {**numbers, **texts})

    def image(self, step: int, name: str, image: Picture) -> None:
        self._log(max(step, self.start), {name: self.to_image(pixels(image))})

    def _log(self, step: int, values: dict[str, Any]) -> None:
        self.run.log(values, step=step)
        if self.run.offline and step > self.recorded:
            write_json(self.file, {"id": self.run.id, "step": step})
            self.recorded = step

    def close(self) -> None:
        self.run.finish()


class MLflow:
    """A run of MLflow, whose id is in RUN/mlflow.json.

    It is stored at MLFLOW_TRACKING_URI, by default the database RUN/mlflow.db. MLflow keeps every value that it gets:
    after a kill, steps past the last checkpoint appear twice, with the same numbers.
    """

    MAX_PARAMS, MAX_CHARS = 100, 6000  # per call; per value

    def __init__(self, folder: Path, config: dict[str, Any], start: int):
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # no usage reports to MLflow
        from mlflow import MlflowClient
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException

        folder = folder.absolute()
        uri, location = os.environ.get("MLFLOW_TRACKING_URI"), None
        if not uri:
            uri, location = f"sqlite:///{folder / 'mlflow.db'}", (folder / "mlflow").as_uri()
        self.client = MlflowClient(uri)
        self.id = str(read_json(folder / "mlflow.json", REMOVE).get("id", ""))
        if self.id:
            try:
                self.client.update_run(self.id, status="RUNNING")
                return
            except MlflowException as error:  # another server, or a deleted run
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "ssl_jax")
        try:
            experiment = self.client.create_experiment(name, location)
        except MlflowException as error:
            exists = error.error_code == "RESOURCE_ALREADY_EXISTS"
            existing = self.client.get_experiment_by_name(name) if exists else None
            if existing is None:
                raise
            experiment = existing.experiment_id
        self.id = self.client.create_run(experiment, run_name=folder.name).info.run_id
        write_json(folder / "mlflow.json", {"id": self.id})
        params = [Param(key, str(value)[: self.MAX_CHARS]) for key, value in config.items()]
        for i in range(0, len(params), self.MAX_PARAMS):
            self.client.log_batch(self.id, params=params[i : i + self.MAX_PARAMS])

    def scalars(self, step: int, values: Values, group: str = "metrics") -> None:
        from mlflow.entities import Metric, RunTag

        numbers, texts = _split(values, group)
        now = int(time.time() * 1000)
        metrics = [Metric(name, number, now, step) for name, number in numbers.items()]
        self.client.log_batch(self.id, metrics=metrics, tags=[RunTag(name, text) for name, text in texts.items()])

    def image(self, step: int, name: str, image: Picture) -> None:
        self.client.log_image(self.id, pixels(image), key=name, step=step)

    def close(self) -> None:
        self.client.set_terminated(self.id)


TRACKERS: dict[str, Callable[[Path, dict[str, Any], int], Writer]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
}


class Background:
    """Passes everything on to a tracker in a thread. If the tracker fails, it warns once and goes on."""

    def __init__(self, name: str, tracker: Writer, say: Callable[[str], None]):
        self.name, self.tracker, self.say = name, tracker, say
        self.calls: queue.SimpleQueue[tuple[Any, ...] | None] = queue.SimpleQueue()
        self.warned = False
        self.thread = threading.Thread(target=self._work, name=f"config.log={name}", daemon=True)
        self.thread.start()

    def scalars(self, step: int, values: Values, group: str = "metrics") -> None:
        self.calls.put((self.tracker.scalars, step, dict(values), group))

    def image(self, step: int, name: str, image: Picture) -> None:
        self.calls.put((self.tracker.image, step, name, pixels(image)))

    def close(self) -> None:
        self.calls.put((self.tracker.close,))
        self.calls.put(None)
        self.thread.join(CLOSE_SECONDS + 5)
        if self.thread.is_alive():
            self._warn(TimeoutError(f"not everything could be sent within {CLOSE_SECONDS} s"))

    def _work(self) -> None:
        for call, *arguments in iter(self.calls.get, None):
            try:
                call(*arguments)
            except Exception as error:
                self._warn(error)

    def _warn(self, error: Exception) -> None:
        if not self.warned:
            self.warned = True
            self.say(_warning(self.name, error))


def _warning(name: str, error: Exception) -> str:
    return f"warning: config.log={name!r}: {first_line(error)}; training continues without it"


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Options under dotted keys, such as "train.batch"; values other than numbers and strings become strings."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat


def pixels(image: Picture) -> np.ndarray:
    """The picture as uint8 [H, W, 3]."""
    from PIL import Image

    if isinstance(image, np.ndarray):
        loaded = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    else:
        loaded = Image.open(image)
    return np.asarray(loaded.convert("RGB"))


def _split(values: Values, group: str) -> tuple[dict[str, float], dict[str, str]]:
    """(numbers, texts). A missing number becomes NaN; names of "timing" get a prefix, which groups their charts."""
    prefix = "" if group == "metrics" else f"{group}/"
    numbers = {prefix + k: math.nan if v is None else float(v) for k, v in values.items() if not isinstance(v, str)}
    return numbers, {prefix + k: v for k, v in values.items() if isinstance(v, str)}
