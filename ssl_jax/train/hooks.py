"""What happens between the steps of a run: logging, evaluation, checkpoints, and checks that may end it.

A hook gets the metrics of every step, in order but a few steps late, and the state right after each step at which the
hook is due. All processes of a run call the same hooks at the same steps.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ssl_jax import interrupts, parallel
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

COLLAPSE_PATIENCE = 50  # steps in a row before a warning, because an untrained network looks collapsed too
MAX_SKIPPED = 10  # steps in a row that skip_nonfinite may skip before the run ends


class Clock:
    """Measures the speed between two log lines, without the time for evaluating and saving."""

    def __init__(self) -> None:
        self.waited = 0.0  # seconds for which the devices had nothing to do, because the next batch was not ready
        self.since, self.started = 0, time.monotonic()

    def restart(self, step: int) -> None:
        self.waited, self.since, self.started = 0.0, step, time.monotonic()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.started += time.monotonic() - start

    def speed(self, step: int, batch: int) -> dict[str, float]:
        seconds = max(time.monotonic() - self.started, 1e-9)
        return {"images_per_s": (step - self.since) * batch / seconds, "waiting": min(1.0, self.waited / seconds)}


@dataclasses.dataclass
class Training:
    """What stays the same while a run trains."""

    config: Config
    setup: Setup
    source: Source
    mesh: Mesh
    folder: RunFolder
    out: RunFolder  # the same in the main process; in others a temporary folder
    start: int  # steps that were done before
    clock: Clock = dataclasses.field(default_factory=Clock)
    say: Callable[[str], None] = print  # prints a line that stays above the progress line, if there is one

    def steps(self, duration: str) -> int:
        return to_steps(duration, len(self.source), self.config.train.batch)


class Hook:
    """The base of all hooks, which override what they need."""

    every = 0  # steps between calls of `on_state`, which is also called after the last step; 0: never
    at_start = False  # whether `on_state` is also called before the first step
    at_stop = False  # whether `on_state` is also called when a signal stops the run

    def on_metrics(self, step: int, values: dict[str, Any]) -> None:
        """Gets the metrics of a step as numbers. Later hooks see the entries that it adds or removes."""

    def on_state(self, step: int, state: TrainState) -> None:
        """Gets the state after `step`, whose arrays the next step donates."""

    def close(self) -> None:
        """Called at the end of the run, even after an error."""


class Stop(Hook):
    """Handles SIGTERM, SIGINT and SIGHUP. If only one process gets the signal, the train step passes it on to all.

    Before the first step has ended there is nothing to save: until then `interrupts.requeued` may end the process.
    """

    def __init__(self) -> None:
        self.received = 0  # the signal that this process got
        self.requested = 0  # the signal that any process got; all of them learn of it at the same step
        self.previous = interrupts.handle(self._receive)

    def _receive(self, number: int, frame: Any) -> None:
        del frame
        self.received = number

    def on_metrics(self, step, values):
        interrupts.leave_to_run(True)
        self.requested = values.pop("stop") or self.requested

    def close(self):
        interrupts.leave_to_run(False)
        interrupts.restore(self.previous)


class Finite(Hook):
    """Ends the run if the loss is not finite; with skip_nonfinite, after too many skipped steps in a row."""

    def __init__(self, training: Training, checkpoint: "Checkpoint"):
        self.training, self.checkpoint, self.skipped_in_a_row = training, checkpoint, 0

    def on_metrics(self, step, values):
        skipped = bool(values.pop("skipped", 0))
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if skipped and self.skipped_in_a_row <= MAX_SKIPPED:
            self.training.say(f"step {step}: gradients not finite, step skipped")
        elif not np.isfinite(values["loss"]):
            lr, cause = self.training.config.optim.lr, "a learning rate too high for this batch size and warm-up"
            if step == 1:
                cause = "broken input (config.model.mean, std) or initial weights"
            raise UserError(
                f"step {step}: loss is {values['loss']}, lr {values['lr']:.3g}; likely cause: {cause} "
                f"(config.optim.lr={lr}; config.optim.clip_norm and skip_nonfinite may help); "
                f"{self.checkpoint.newest()}"
            )


class Collapse(Hook):
    """Warns once, or ends the run, after COLLAPSE_PATIENCE steps in a row with collapsed embeddings."""

    def __init__(self, training: Training, checkpoint: "Checkpoint"):
        self.training, self.checkpoint = training, checkpoint
        self.in_a_row, self.warned = 0, False

    def on_metrics(self, step, values):
        reason = self.training.setup.method.collapsed(values)
        if not reason and values["embedding_std"] < STD_COLLAPSED:
            reason = (
                f"embedding std {values['embedding_std']:.2g}: all images get almost the same embedding; "
                "likely cause: a learning rate too high, a batch too small, or transforms too weak"
            )
        if reason:
            values["collapsed"] = reason
        self.in_a_row = self.in_a_row + 1 if reason else 0
        if self.in_a_row != COLLAPSE_PATIENCE or self.warned:
            return
        self.warned = True
        if self.training.config.on_collapse == "stop":
            raise UserError(
                f"step {step}: collapsed: {reason}; stopped by config.on_collapse=stop; {self.checkpoint.newest()}"
            )
        self.training.say(f"warning: step {step}: collapsed: {reason}")


class Log(Hook):
    """Writes metrics.jsonl, timing.jsonl, the trackers of config.log, and the progress line."""

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
        """image: a PNG file, or uint8 [H, W, C], for the trackers."""
        for writer in self.writers:
            writer.image(step, name, image)

    def on_metrics(self, step, values):
        training, clock, batch = self.training, self.training.clock, self.training.config.train.batch
        if step == training.start + 1:  # it included compiling
            clock.restart(step)
            self.progress.begin(step)
        if step % self.log_every and step != self.total:
            self.progress.reached(step)
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
    """Logs RankMe of some training images and, if there are labels, how well other images classify them by kNN."""

    def __init__(self, training: Training, log: Log):
        self.training, self.log = training, log
        self.every = training.steps(training.config.eval.every)
        self.at_start = bool(training.config.model.init)  # what loaded weights can do, to see what is forgotten
        settings, source = training.config.eval, training.source
        candidates = np.arange(len(source)) if source.labels is None else labelled_indices(source.labels)
        indices = np.random.default_rng(training.config.train.seed).permutation(candidates)
        indices = indices[: settings.knn_bank + settings.knn_queries]
        self.queries = min(settings.knn_queries, len(indices) // 2)
        if not self.queries:
            self.every = 0
        if not self.every:
            return
        self.labels = None if source.labels is None else np.asarray(source.labels)[indices]
        self.indices = indices if self.labels is not None else indices[: self.queries]
        self.images = source.load_many(self.indices)

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
        auc = mean_auc(scores, labels[:queries])  # 0 if no class has both labels
        return {"knn_auc": round(auc, 4)} if auc else {}


class Checkpoint(Hook):
    """Saves the whole state, from which a run continues bit by bit. Files are written while training goes on."""

    at_stop = True

    def __init__(self, training: Training, checkpoints: Checkpoints):
        self.checkpoints = checkpoints
        self.every = max(1, training.steps(training.config.train.save_every))

    def on_state(self, step, state):
        self.checkpoints.save(step, state)

    def newest(self) -> str:
        with contextlib.suppress(UserError):  # the caller reports a more important error
            self.checkpoints.wait()
        steps = self.checkpoints.steps()
        return f"last checkpoint: step {steps[-1]} in {self.checkpoints.folder}" if steps else "no checkpoint yet"


class Profile(Hook):
    """Traces config.train.profile, after the step has compiled, to RUN/profile for TensorBoard, XProf or Perfetto."""

    def __init__(self, training: Training):
        self.training, self.folder = training, training.out.profile
        self.steps = training.steps(training.config.train.profile)
        self.last = 0 if self.steps else -1  # the step after which the trace ends; 0: not started; -1: none, or ended

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
    """An image [H, W, C]: each row shows one of the first eight queries and its six nearest neighbours."""
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    bank = queries if len(images) > queries else 0  # without labels, each query is also its own nearest neighbour
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
    """Writes views.png, which shows what the transforms do to six images."""
    from ssl_jax.augment.sheet import view_sheet
    from ssl_jax.data.crops import draws

    path = training.out.views
    if not path.exists():
        indices = np.random.default_rng(training.config.train.seed).permutation(len(training.source))[:6]
        names = [training.source.names[i] for i in indices]
        source, views = training.source, training.setup.views
        cuts = draws(training.config, source, views, indices)
        view_sheet(source.load_many(indices), views, path, names=names, cuts=cuts)
        log.picture(training.start, "views", path)
