"""What happens beside the steps of a run: logging, evaluation, checkpoints, and the reasons to end it.

A hook sees the metrics of every step, in order, a few steps after the devices were given them; and the state right
after the steps at which it is due. All processes of a run call the same hooks at the same steps.
"""

import contextlib
import dataclasses
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ssl_jax import parallel
from ssl_jax.checkpoint import Checkpoints
from ssl_jax.collapse import STD_COLLAPSED, rank_me
from ssl_jax.config import Config, to_json, to_steps
from ssl_jax.data import Source
from ssl_jax.data.labelled import labelled_indices
from ssl_jax.errors import UserError
from ssl_jax.evaluate.knn import knn_predict
from ssl_jax.evaluate.multilabel import mean_auc
from ssl_jax.progress import Progress
from ssl_jax.run_folder import RunFolder
from ssl_jax.train.step import Setup, TrainState, encoder_of
from ssl_jax.train.writers import open_writers

REQUEUE = 75  # exit code after SIGTERM or SIGINT: "try again later" (EX_TEMPFAIL), for schedulers
COLLAPSE_PATIENCE = 50  # steps in a row that must show a collapse before a warning: untrained networks look alike, too
MAX_SKIPPED = 10  # steps in a row without finite gradients, before a run with skip_nonfinite gives up


class Clock:
    """Speed between two log lines. Evaluating and saving do not count as training."""

    def __init__(self) -> None:
        self.waited = 0.0  # seconds in which the devices had nothing to do because the next batch was not there
        self.since, self.started = 0, time.monotonic()

    def restart(self, step: int) -> None:
        self.waited, self.since, self.started = 0.0, step, time.monotonic()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.started += time.monotonic() - began

    def speed(self, step: int, batch: int) -> dict[str, float]:
        seconds = max(time.monotonic() - self.started, 1e-9)
        return {"images_per_s": (step - self.since) * batch / seconds, "waiting": min(1.0, self.waited / seconds)}


@dataclasses.dataclass
class Training:
    """What is open and fixed while a run trains."""

    config: Config
    setup: Setup
    source: Source
    mesh: Mesh
    folder: RunFolder
    out: RunFolder  # the same in the main process; elsewhere one that is thrown away
    start: int  # steps done before
    clock: Clock = dataclasses.field(default_factory=Clock)
    say: Callable[[str], None] = print  # prints a line that stays, beside the progress line if there is one

    def steps(self, duration: str) -> int:
        return to_steps(duration, len(self.source), self.config.train.batch)


class Hook:
    """Does nothing; hooks override what they need."""

    every = 0  # steps between calls of `on_state`, which also comes after the last step; 0: never
    at_stop = False  # whether `on_state` is called when the run is stopped, too

    def on_metrics(self, step: int, values: dict[str, Any]) -> None:
        """The metrics of a step as numbers; entries that are added or removed are so for the hooks behind this one."""

    def on_state(self, step: int, state: TrainState) -> None:
        """The state after `step`; its arrays are given away in the next one."""

    def close(self) -> None:
        """At the end of the run, however it comes."""


class Stop(Hook):
    """SIGTERM and SIGINT. One process may get the signal alone: the step tells all of them."""

    def __init__(self) -> None:
        self.received = 0  # what this process got
        self.requested = 0  # what any process got, known in all of them at the same step
        self.previous = {s: signal.signal(s, self._receive) for s in (signal.SIGTERM, signal.SIGINT)}

    def _receive(self, number: int, frame: Any) -> None:
        del frame
        self.received = number

    def on_metrics(self, step, values):
        self.requested = values.pop("stop") or self.requested

    def close(self):
        for number, handler in self.previous.items():
            signal.signal(number, handler)


class Finite(Hook):
    """Ends the run at a loss that is not finite, or with skip_nonfinite after too many skipped steps in a row."""

    def __init__(self, training: Training, checkpoint: "Checkpoint"):
        self.training, self.checkpoint, self.skipped_in_a_row = training, checkpoint, 0

    def on_metrics(self, step, values):
        skipped = bool(values.pop("skipped", 0))
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if skipped and self.skipped_in_a_row <= MAX_SKIPPED:
            self.training.say(f"step {step}: gradients not finite, step skipped")
        elif not np.isfinite(values["loss"]):
            lr, likely = self.training.config.optim.lr, "a learning rate too high for this batch size and warm-up"
            if step == 1:
                likely = "broken input (config.model.mean, std) or initial weights"
            raise UserError(
                f"step {step}: loss is {values['loss']}, lr {values['lr']:.3g}; likely cause: {likely} "
                f"(config.optim.lr={lr}; config.optim.clip_norm and skip_nonfinite may help); "
                f"{self.checkpoint.newest()}"
            )


class Collapse(Hook):
    """Warns once, or ends the run, when embeddings have looked collapsed for COLLAPSE_PATIENCE steps in a row."""

    def __init__(self, training: Training, checkpoint: "Checkpoint"):
        self.training, self.checkpoint = training, checkpoint
        self.in_a_row, self.warned = 0, False

    def on_metrics(self, step, values):
        sign = self.training.setup.method.collapsed(values)
        if not sign and values["embedding_std"] < STD_COLLAPSED:
            sign = (
                f"embedding std {values['embedding_std']:.2g}: all images get almost the same embedding; "
                "likely cause: a learning rate too high, a batch too small, or transforms too weak"
            )
        if sign:
            values["collapsed"] = sign
        self.in_a_row = self.in_a_row + 1 if sign else 0
        if self.in_a_row != COLLAPSE_PATIENCE or self.warned:
            return
        self.warned = True
        if self.training.config.on_collapse == "stop":
            raise UserError(
                f"step {step}: collapsed: {sign}; stopped by config.on_collapse=stop; {self.checkpoint.newest()}"
            )
        self.training.say(f"warning: step {step}: collapsed: {sign}")


class Log(Hook):
    """metrics.jsonl, timing.jsonl, the trackers of config.log, and the progress line."""

    def __init__(self, training: Training):
        self.training, config = training, training.config
        self.log_every = max(1, training.steps(config.train.log_every))
        self.total, start = training.setup.steps, training.start
        title = f"{config.method_name} {config.model.name}" + (f" (from step {start})" if start else "")
        main = parallel.is_main_process()
        self.progress = Progress(self.total, start, title, note="compiling", quiet=not main)
        training.say = self.progress.say
        trackers = config.log if main else ""
        self.writers = open_writers(trackers, training.out.path, to_json(config), start, training.say)
        self.progress.__enter__()

    def write(self, step: int, values: Mapping[str, Any], group: str = "metrics") -> None:
        for writer in self.writers:
            writer.scalars(step, values, group)

    def picture(self, step: int, name: str, image: Path | np.ndarray) -> None:
        """image: a PNG file, or uint8 [H, W, C]. Only the trackers take it."""
        for writer in self.writers:
            writer.image(step, name, image)

    def on_metrics(self, step, values):
        training, clock, batch = self.training, self.training.clock, self.training.config.train.batch
        if step == training.start + 1:  # compiled
            clock.restart(step)
        if step % self.log_every and step != self.total:
            return
        self.write(step, {"epoch": round(step * batch / len(training.source), 4), **values})
        note: dict[str, Any] = {k: values[k] for k in ("loss", "probe_accuracy", "probe_loss") if k in values}
        note |= {"images": "-", "waiting": "-"}
        if step > clock.since:
            speed = clock.speed(step, batch)
            self.write(step, {k: round(v, 4) for k, v in speed.items()}, "timing")
            note |= {"images": f"{speed['images_per_s']:.0f}/s", "waiting": f"{speed['waiting']:.0%}"}
        self.progress.update(step, note)
        clock.restart(step)

    def close(self):
        self.progress.__exit__()
        for writer in self.writers:
            writer.close()


class Evaluate(Hook):
    """RankMe of some training images, and with labels a kNN vote: others of them vote, these are classified."""

    def __init__(self, training: Training, log: Log):
        self.training, self.log = training, log
        self.every = training.steps(training.config.eval.every)
        settings, source = training.config.eval, training.source
        known = np.arange(len(source)) if source.labels is None else labelled_indices(source.labels)
        chosen = np.random.default_rng(training.config.train.seed).permutation(known)
        chosen = chosen[: settings.knn_bank + settings.knn_queries]
        self.queries = min(settings.knn_queries, len(chosen) // 2)
        if not self.queries:
            self.every = 0
        if not self.every:
            return
        self.labels = None if source.labels is None else np.asarray(source.labels)[chosen]
        self.chosen = chosen if self.labels is not None else chosen[: self.queries]
        self.images = source.load_many(self.chosen)

    def on_state(self, step, state):
        features = encoder_of(self.training.setup, self.training.config, state).embed(self.images)
        values = {"rank_me": round(float(rank_me(jnp.asarray(features[: self.queries]))), 4)}
        if self.labels is not None:
            values |= self._knn(features, self.labels)
        self.log.write(step, values)
        if step == self.training.setup.steps:
            self.log.picture(step, "neighbours", _neighbours(self.images, features, self.queries))

    def _knn(self, features: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        settings, queries = self.training.config.eval, self.queries
        scores = np.asarray(
            knn_predict(
                features[queries:],
                labels[queries:],
                features[:queries],
                classes=len(self.training.source.classes),
                k=min(settings.knn_k, len(features) - queries),
                temperature=settings.knn_temperature,
            )
        )
        if labels.ndim == 1:
            return {"knn_accuracy": float((scores.argmax(axis=1) == labels[:queries]).mean())}
        auc = mean_auc(scores, labels[:queries])  # the mean over classes; 0 if none has both labels
        return {"knn_auc": round(auc, 4)} if auc else {}


class Checkpoint(Hook):
    """Saves the whole state, from which the run can be continued to the last bit; the files are written meanwhile."""

    at_stop = True

    def __init__(self, training: Training, checkpoints: Checkpoints):
        self.checkpoints = checkpoints
        self.every = max(1, training.steps(training.config.train.save_every))

    def on_state(self, step, state):
        self.checkpoints.save(step, state)

    def newest(self) -> str:
        with contextlib.suppress(UserError):  # the error that asks for this comes first
            self.checkpoints.wait()
        steps = self.checkpoints.steps()
        return f"last checkpoint: step {steps[-1]} in {self.checkpoints.folder}" if steps else "no checkpoint yet"


class Profile(Hook):
    """A trace of config.train.profile, once the step is compiled: RUN/profile, for TensorBoard, XProf or Perfetto."""

    def __init__(self, training: Training):
        self.training, self.folder = training, training.out.profile
        self.steps = training.steps(training.config.train.profile)
        self.last = 0 if self.steps else -1  # the step with which the trace ends; -1: no trace, or it has ended

    def on_metrics(self, step, values):
        if self.last == 0:
            jax.profiler.start_trace(str(self.folder))
            self.last = step + self.steps
        elif step == self.last:
            self.close()

    def close(self):
        if self.last > 0:
            jax.profiler.stop_trace()
            self.training.say(f"profile: {self.folder}")
        self.last = -1


def _neighbours(images: np.ndarray, features: np.ndarray, queries: int) -> np.ndarray:
    """A picture [H, W, C]: each row shows one of the first eight queries, then its six nearest neighbours."""
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    bank = queries if len(images) > queries else 0  # without labels all images are queries, and each finds itself first
    nearest = bank + np.argsort(-(unit[: min(8, queries)] @ unit[bank:].T), axis=1)[:, :6]
    return np.concatenate([np.concatenate([images[i], *images[row]], axis=1) for i, row in enumerate(nearest)])


def make_hooks(training: Training, checkpoints: Checkpoints) -> Iterator[Hook]:
    """All hooks of a run, in the order in which they are called."""
    yield Stop()
    log, checkpoint = Log(training), Checkpoint(training, checkpoints)
    yield Finite(training, checkpoint)
    yield Collapse(training, checkpoint)
    yield log
    write_views(training, log)
    yield Profile(training)
    yield Evaluate(training, log)
    yield checkpoint


def write_views(training: Training, log: Log) -> None:
    """views.png: what the transforms do to six images."""
    from ssl_jax.augment.sheet import view_sheet

    path = training.out.views
    if not path.exists():
        chosen = np.random.default_rng(training.config.train.seed).permutation(len(training.source))[:6]
        view_sheet(training.source.load_many(chosen), training.setup.views, path)
        log.picture(training.start, "views", path)
