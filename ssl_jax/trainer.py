"""The training loop: one jitted step for every method, and `fit`, which feeds it.

A batch travels: data.order -> raw uint8 images -> (inside the step) views -> method.forward -> method.loss -> gradient
-> optimizer -> method.post_update. The data order and all randomness are functions of (seed, step), so a run is
continued from its TrainState alone.
"""

import contextlib
import dataclasses
import functools
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ssl_jax import checkpoint, parallel
from ssl_jax.augment import make_views
from ssl_jax.augment import resolve as resolve_views
from ssl_jax.collapse import embedding_std, rank_me
from ssl_jax.config import Config, View, method_module, to_steps
from ssl_jax.data import batches as host_batches
from ssl_jax.data import open_source
from ssl_jax.encoder import Encoder, build, describe, export, load_encoder, started_from
from ssl_jax.errors import UserError
from ssl_jax.evaluate.knn import knn_predict
from ssl_jax.evaluate.multilabel import rank
from ssl_jax.evaluate.subsets import labelled
from ssl_jax.files import Lines, read_json
from ssl_jax.gradient import make_gradient
from ssl_jax.losses import binary_cross_entropy, cross_entropy
from ssl_jax.methods.base import Method, RunInfo
from ssl_jax.models import resolve_conv
from ssl_jax.network import Network
from ssl_jax.parallel import batch_sharding, make_mesh, replicated, state_sharding
from ssl_jax.progress import Progress
from ssl_jax.run_folder import RunFolder
from ssl_jax.transforms import learning_rate, optimizer, target_of

REQUEUE = 75  # exit code after SIGTERM or SIGINT: "try again later" (EX_TEMPFAIL), for schedulers
COLLAPSED = 50  # steps in a row that must show a collapse before it is named: untrained networks look alike, too
MAX_SKIPPED = 10  # steps without finite gradients in a row, before a run with skip_nonfinite gives up


class TrainState(NamedTuple):
    step: jax.Array
    params: Any
    opt_state: Any
    extra: Any  # the method's own: batch statistics, queue ...
    probe: Any  # the online linear probe and its optimizer; () without labels


class Setup(NamedTuple):
    """What a config means for one data set."""

    method: Method
    encoder: Network
    tx: optax.GradientTransformation
    schedule: Callable[[Any], Any]
    views: tuple[View, ...]
    steps: int
    shape: tuple[int, int, int]
    classes: int  # of the labels, 0 without


def set_up(config: Config, source: Any) -> Setup:
    """Builds method and optimizer; every demand that the data does not meet is an error here, before compiling."""
    examples, batch, shape = len(source), config.train.batch, source.shape
    if batch > examples:
        raise UserError(f"config.train.batch={batch}: larger than the data set; allowed: 1 to {examples}")
    _check_parts(config)
    module = method_module(config.method_name)
    classes = len(source.classes) if source.labels is not None else 0
    steps = to_steps(config.train.duration, examples, batch)
    if steps < 1:
        raise UserError(f"config.train.duration={config.train.duration!r}: no step at all; allowed: at least one")
    size = min(shape[:2])
    in_parts = 0 < config.train.micro_batch < batch
    conv = resolve_conv(config.model.conv, in_loop=in_parts)
    encoder = build(dataclasses.replace(config.model, conv=conv), shape[2], size)
    if config.model.init:
        encoder = started_from(encoder, config.model.init)
    method = module.make(config.method, encoder, RunInfo(steps, examples // batch, examples, classes))
    if "label" in method.needs and not classes:
        raise UserError(
            f"config.method.name={config.method_name!r}: needs labels, which the data set "
            f"{config.data.path or config.data.name!r} has not; allowed: data with class folders or a label column"
        )
    schedule = learning_rate(config.optim, batch, steps, to_steps(config.optim.warmup, examples, batch))
    tx = optimizer(config.optim, schedule, method.transform, steps, method.constant_lr)
    views = resolve_views(config.augment, method.views, size, method.local_views)
    return Setup(method, encoder, tx, schedule, views, steps, shape, classes if config.eval.online_probe else 0)


def _check_parts(config: Config) -> None:
    of = "batch"
    for key in ("micro_batch", "bn_group"):
        whole, part = getattr(config.train, of), getattr(config.train, key)
        if part and whole % part:
            raise UserError(f"config.train.{key}={part}: allowed: 0, or a divisor of config.train.{of}={whole}")
        of = key if part else of


PROBE = optax.adam(1e-3)


def init_state(setup: Setup, seed: int, mesh: Any = None) -> TrainState:
    """Parameters, optimizer and state of step 0, a function of the seed alone; laid out over `mesh`, if there is."""
    views = [jnp.zeros((2, v.size, v.size, setup.shape[2])) for v in setup.views]

    def init(key):
        params, extra = setup.method.init(key, views)
        probe: Any = ()
        if setup.classes:
            width = jax.eval_shape(setup.encoder.init, key, views[0])
            features = jax.eval_shape(lambda p, s: setup.encoder.apply(p, s, views[0], train=True)[0], *width)
            linear = {"w": jnp.zeros((features.shape[1], setup.classes)), "b": jnp.zeros(setup.classes)}
            probe = (linear, PROBE.init(linear))
        return TrainState(jnp.zeros([], jnp.int32), params, setup.tx.init(params), extra, probe)

    # A generator of its own: the data order and the views use fold_in(key(seed), step).
    key = jax.random.fold_in(jax.random.key(seed), 2**31 - 1)
    return jax.jit(init, out_shardings=mesh and state_sharding(mesh, jax.eval_shape(init, key)))(key)


def make_step(setup: Setup, config: Config, mesh: Any) -> Callable[[TrainState, dict], tuple[TrainState, dict]]:
    """The train step, to be jitted: (state, {"image" uint8 [B, H, W, C], "index" [B], ...}) -> state, metrics.

    The batch holds "label" [B] if the data have labels, and "pair" [B, H, W, C] if config.data.pairs says so.
    """
    method, augment = setup.method, make_views(setup.views, setup.method.shares)
    train = config.train
    gradient = make_gradient(method, augment, micro_batch=train.micro_batch, bn_group=train.bn_group, mesh=mesh)

    def step(state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(config.train.seed), state.step)
        inputs = {name: batch[name] for name in ("image", "pair", *method.needs) if name in batch}
        inputs = jax.lax.with_sharding_constraint(inputs, batch_sharding(mesh))
        target = target_of(state.opt_state)
        (loss, (outputs, extra, metrics)), grads = gradient(state.params, target, state.extra, inputs, key)
        updates, opt_state = setup.tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        params, extra = method.post_update(params, extra, outputs, state.step)
        after = TrainState(state.step, params, opt_state, extra, state.probe)

        embedding = jax.lax.stop_gradient(outputs["embedding"])
        norm = optax.tree.norm(grads)
        metrics |= {"loss": loss, "grad_norm": norm, "embedding_std": embedding_std(embedding)}
        metrics["lr"] = jnp.asarray(setup.schedule(state.step), jnp.float32)
        if setup.classes and "label" in batch:
            probe, told = _probe_step(state.probe, embedding, batch["label"])
            metrics, after = metrics | told, after._replace(probe=probe)
        if config.optim.skip_nonfinite:
            # The whole state stays, or a queue and statistics of the broken batch would remain.
            finite = jnp.isfinite(loss) & jnp.isfinite(norm)
            after = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, state)
            metrics["skipped"] = 1 - finite.astype(jnp.int32)
        return after._replace(step=state.step + 1), metrics

    return step


def _probe_step(probe, embedding, label):
    """One step of the online linear probe, and what to tell: its accuracy, or of several labels an image its loss.

    `embedding` carries no gradient, so labels never reach the encoder.
    """
    linear, opt_state = probe
    several = label.ndim == 2

    def objective(linear):
        logits = embedding @ linear["w"] + linear["b"]
        return (binary_cross_entropy if several else cross_entropy)(logits, label), logits

    (loss, logits), grads = jax.value_and_grad(objective, has_aux=True)(linear)
    updates, opt_state = PROBE.update(grads, opt_state, linear)
    probe = optax.apply_updates(linear, updates), opt_state
    if several:
        return probe, {"probe_loss": loss}
    known = label >= 0
    right = (logits.argmax(axis=-1) == label) & known
    return probe, {"probe_accuracy": right.sum() / jnp.maximum(known.sum(), 1)}


def batches(config: Config, source: Any, mesh: Any, start: int, stop: int, gather: bool) -> Iterator[dict]:
    """Batches of steps start to stop - 1 on the devices: indices into the store in memory, or images from disk.

    Each process makes the rows of its own devices only.
    """
    size, rows = config.train.batch, parallel.local_rows(mesh, config.train.batch)
    options: Any = {"seed": config.train.seed, "workers": config.data.workers, "decode": not gather}
    for batch in host_batches(source, batch=size, start=start, stop=stop, rows=rows, **options):
        yield parallel.global_batch(mesh, size, rows, batch)


def fit(config: Config, workdir: Path, source: Any = None) -> Encoder:
    """Trains, or continues to train, the run in `workdir`; returns its encoder. A finished run is only loaded.

    Raises UserError for mistakes and for a loss that is not finite; SystemExit(75) after SIGTERM or SIGINT, saved.
    """
    source = source or open_source(config.data)
    total = to_steps(config.train.duration, len(source), config.train.batch)
    with contextlib.ExitStack() as held:

        def finished() -> bool:
            return RunFolder(workdir).finished(total)

        def enter() -> None:
            # A finished run is only read: tasks of one study that start together all want its encoder.
            held.enter_context(RunFolder(workdir).lock(shared=finished()))
            RunFolder(workdir).start(config)

        parallel.run_on_main(enter)

        def look() -> dict[str, Any]:
            done = finished()
            # How convolutions are written changes the last bits: a continued run keeps what it began with.
            conv = read_json(RunFolder(workdir).environment).get("conv") or resolve_conv(config.model.conv)
            if not done:
                RunFolder(workdir).record_environment(conv=conv)
            return {"done": done, "conv": conv}

        found = parallel.run_on_main(look)
        if found["done"]:
            return load_encoder(workdir)
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, conv=found["conv"]))
        # All processes do the same; what others than the first write is thrown away, but for their part of checkpoints.
        out = workdir if parallel.is_main_process() else Path(held.enter_context(tempfile.TemporaryDirectory()))
        return _Loop(config, workdir, out, source).run()


class _Loop:
    """The state of `fit`: what is open and running around the pure step."""

    def __init__(self, config: Config, workdir: Path, out: Path, source: Any):
        self.config, self.workdir, self.out, self.source = config, workdir, out, source
        self.setup = set_up(config, source)
        train = config.train
        self.mesh = make_mesh(train.devices, train.batch, train.micro_batch, train.shard)
        self.state = init_state(self.setup, train.seed, self.mesh)
        self.gather = in_memory(config, source)
        self.stopped_by = 0  # the signal that this process got; all end after the same step
        self.pending: list[tuple[int, dict]] = []  # metrics of steps not looked at yet, still on the device
        self.skipped_in_a_row = self.collapsed_in_a_row = 0
        self.warned = False

    def every(self, duration: str) -> int:
        return to_steps(duration, len(self.source), self.config.train.batch)

    def run(self) -> Encoder:
        config, total = self.config, self.setup.steps
        say = functools.partial(print, flush=True) if parallel.is_main_process() else lambda _: None
        restored = checkpoint.restore_latest(RunFolder(self.workdir).checkpoints, self.state, say)
        self.state = self.state if restored is None else restored
        start = self.saved = int(self.state.step)
        self.metrics = Lines(RunFolder(self.out).metrics, start)
        self.timing = Lines(RunFolder(self.out).timing, start)
        if start < total:
            self._sheet()
            title = f"{config.method_name} {config.model.name}"
            title += f" (from step {start})" if start else ""
            previous = {s: signal.signal(s, self._stop) for s in (signal.SIGTERM, signal.SIGINT)}
            try:
                with Progress(
                    total, start, title, note="compiling", quiet=not parallel.is_main_process()
                ) as self.progress:
                    self._steps(start, total)
            finally:
                for number, handler in previous.items():
                    signal.signal(number, handler)
        encoder = self._encoder(total)
        export(RunFolder(self.out).encoder, encoder)
        return encoder

    def _steps(self, start: int, total: int) -> None:
        config, fetch, step_fn = self.config, self._fetch(), self._jitted()
        log_every = max(1, self.every(config.train.log_every))
        save_every = max(1, self.every(config.train.save_every))
        eval_every = self.every(config.eval.every)
        evaluate = self._evaluation() if eval_every else None
        before, stopped, waited, since, marked = None, 0, 0.0, start, time.monotonic()
        source = batches(config, self.source, self.mesh, start, total, self.gather)
        for step in range(start + 1, total + 1):
            asked = time.monotonic()
            batch = next(source)
            if before is not None:
                # The device was idle at most while we waited, and only if its step had ended when the batch came.
                waited += (time.monotonic() - asked) * before["loss"].is_ready()
                jax.block_until_ready(before)
                stopped = int(before["stop"])
            stop = parallel.per_device(self.mesh, self.stopped_by)
            self.state, before = step_fn(self.state, fetch(batch), stop)
            self.pending.append((step, before))
            if step == start + 1:  # compiled: the clock starts
                jax.block_until_ready(before)
                waited, since, marked = 0.0, step, time.monotonic()
            last = step == total
            if step % log_every == 0 or last or stopped:
                values = self._check()
                now = time.monotonic()
                seconds = max(now - marked, 1e-9)
                speed = {"images_per_s": (step - since) * config.train.batch / seconds, "waiting": waited / seconds}
                if step % log_every == 0 or last:
                    epoch = step * config.train.batch / len(self.source)
                    self.metrics.append({"step": step, "epoch": round(epoch, 4), **values})
                    if step > since:
                        self.timing.append({"step": step, **{k: round(v, 4) for k, v in speed.items()}})
                shown: dict[str, Any] = {k: values[k] for k in ("loss", "probe_accuracy", "probe_loss") if k in values}
                images = f"{speed['images_per_s']:.0f}/s" if step > since else "-"
                self.progress.update(step, {**shown, "images": images, "waiting": f"{speed['waiting']:.0%}"})
                waited, since, marked = 0.0, step, now
            if evaluate and (step % eval_every == 0 or last):
                began = time.monotonic()
                self.metrics.append({"step": step, **evaluate()})
                marked += time.monotonic() - began  # neither evaluating nor saving counts as training
            if step % save_every == 0 or last or stopped:
                self._check()
                began = time.monotonic()
                checkpoint.save(RunFolder(self.workdir).checkpoints, step, self.state, config.train.keep)
                self.saved = step
                marked += time.monotonic() - began
            if stopped and not last:
                name = signal.Signals(stopped).name
                self.progress.say(f"{name}: saved step {step} in {self.workdir}; the same command continues it")
                raise SystemExit(REQUEUE)

    def _jitted(self):
        step = make_step(self.setup, self.config, self.mesh)

        def told(state, batch, stop):
            state, metrics = step(state, batch)
            return state, {**metrics, "stop": stop.max()}

        placed = state_sharding(self.mesh, self.state)
        return jax.jit(told, donate_argnums=0, out_shardings=(placed, replicated(self.mesh)))

    def _fetch(self) -> Callable[[dict[str, Any]], dict[str, Any]]:
        """What puts the images into a batch: nothing if they come with it, else their numbers find them on the devices.

        That is a program of its own, so that the step is the same to the last digit wherever images come from.
        """
        if not self.gather:
            return lambda batch: batch
        arrays: dict[str, Any] = {"image": self.source.arrays()}
        if self.source.labels is not None:
            arrays["label"] = self.source.labels
        store = parallel.replicate(self.mesh, arrays)

        def gather(store, batch):
            found = {name: values[batch["index"]] for name, values in store.items()}
            if "partner" in batch:
                found["pair"] = store["image"][batch["partner"]]
            return {"index": batch["index"], **found}

        return functools.partial(jax.jit(gather, out_shardings=parallel.batch_sharding(self.mesh)), store)

    def _check(self) -> dict[str, Any]:
        """Looks at every step since the last look; returns the newest step's metrics, {} where there was none.

        A step that shows a collapse has "collapsed" among them, in words.
        """
        values: dict[str, Any] = {}
        sign = ""
        for step, metrics in self.pending:
            values = {k: np.asarray(v).item() for k, v in metrics.items() if k != "stop"}
            skipped = bool(values.pop("skipped", 0))
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
            if skipped and self.skipped_in_a_row <= MAX_SKIPPED:
                self.progress.say(f"step {step}: gradients not finite, step left out")
            elif not np.isfinite(values["loss"]):
                self._not_finite(step, values)
            sign = self._look_for_collapse(step, values)
        self.pending.clear()
        shown = {k: v if np.isfinite(v) else None for k, v in values.items()}  # JSON knows no NaN
        return {**shown, "collapsed": sign} if sign else shown

    def _look_for_collapse(self, step: int, values: dict[str, float]) -> str:
        """The sign of a collapse in these metrics; named once a run, if it has stood for COLLAPSED steps in a row."""
        sign = self.setup.method.collapsed(values)
        if values["embedding_std"] < 0.01:
            sign = sign or (
                f"embedding std {values['embedding_std']:.2g}: all images get almost the same embedding; "
                "likely a learning rate too high, a batch too small, or too weak transforms"
            )
        self.collapsed_in_a_row = self.collapsed_in_a_row + 1 if sign else 0
        if self.collapsed_in_a_row != COLLAPSED or self.warned:
            return sign
        self.warned = True
        if self.config.on_collapse == "stop":
            kept = f"last checkpoint: step {self.saved}" if self.saved else "no checkpoint yet"
            raise UserError(f"step {step}: collapsed: {sign}; stopped by config.on_collapse=stop; {kept}")
        self.progress.say(f"warning: step {step}: collapsed: {sign}")
        return sign

    def _not_finite(self, step: int, values: dict[str, float]) -> None:
        cause = (
            "a learning rate too high for this batch and warm-up"
            if step > 1
            else "broken input (mean, std) or initial weights"
        )
        good = (
            f"last good checkpoint: step {self.saved} in {RunFolder(self.workdir).checkpoints}"
            if self.saved
            else "no checkpoint yet"
        )
        raise UserError(
            f"step {step}: loss is {values['loss']}, lr {values['lr']:.3g}; likely cause: {cause} "
            f"(config.optim.lr={self.config.optim.lr}; config.optim.clip_norm and skip_nonfinite may help); {good}"
        )

    def _stop(self, number: int, frame: Any) -> None:
        del frame
        self.stopped_by = number

    def _encoder(self, step: int) -> Encoder:
        state = self.state
        params, stats = self.setup.method.encoder(state.params, target_of(state.opt_state), state.extra)
        params, stats = parallel.to_local((params, stats))
        size, channels = min(self.setup.shape[:2]), self.setup.shape[2]
        about = describe(self.config, size, channels, step)
        return Encoder(self.setup.encoder, params, stats, size, channels, about)

    def _evaluation(self) -> Callable[[], dict[str, float]]:
        """RankMe of some training images, and with labels a kNN vote: others of them vote, these are classified."""
        settings, labels = self.config.eval, self.source.labels
        known = np.arange(len(self.source)) if labels is None else labelled(labels)
        chosen = np.random.default_rng(self.config.train.seed).permutation(known)
        chosen = chosen[: settings.knn_bank + settings.knn_queries]
        queries = min(settings.knn_queries, len(chosen) // 2)
        if not queries:
            return dict
        if labels is None:
            chosen = chosen[:queries]
        else:
            truth = np.asarray(labels)[chosen]
        images = self.source.load_many(chosen)

        def evaluate() -> dict[str, float]:
            features = self._encoder(0).embed(images)
            found = {"rank_me": round(float(rank_me(jnp.asarray(features[:queries]))), 4)}
            if labels is not None:
                scores = knn_predict(
                    features[queries:],
                    truth[queries:],
                    features[:queries],
                    classes=len(self.source.classes),
                    k=min(settings.knn_k, len(chosen) - queries),
                    temperature=settings.knn_temperature,
                )
                if truth.ndim == 2:  # by the mean AUC over classes, which is all of `rank` that there is of votes
                    auc = rank(np.asarray(scores), truth[:queries])[0]
                    found |= {"knn_auc": round(auc, 4)} if auc else {}  # 0: no class of which there are both labels
                else:
                    found["knn_accuracy"] = float((np.asarray(scores).argmax(axis=1) == truth[:queries]).mean())
            return found

        return evaluate

    def _sheet(self) -> None:
        from ssl_jax.augment.sheet import view_sheet

        out = RunFolder(self.out).views
        if not out.exists():
            chosen = np.random.default_rng(self.config.train.seed).permutation(len(self.source))[:6]
            view_sheet(self.source.load_many(chosen), self.setup.views, out)


def in_memory(config: Config, source: Any) -> bool:
    """Whether the whole data set is decoded once and lies on the devices."""
    if config.data.engine == "auto":
        return len(source) * int(np.prod(source.shape)) <= config.data.memory_gb * 1e9
    return config.data.engine == "memory"
