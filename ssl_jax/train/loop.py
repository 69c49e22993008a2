"""`fit` starts or continues a run, and feeds the compiled step. See `hooks` for what happens between steps."""

import contextlib
import functools
import itertools
import signal
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from ssl_jax import parallel
from ssl_jax.checkpoint import Checkpoints, steps
from ssl_jax.config import Config, differences, to_json, to_steps
from ssl_jax.data import Source, open_source
from ssl_jax.encoder import Encoder, export, load_encoder
from ssl_jax.errors import UserError
from ssl_jax.interrupts import REQUEUE
from ssl_jax.network import Network
from ssl_jax.run_folder import RunFolder
from ssl_jax.train import memory
from ssl_jax.train.hooks import Stop, Training, make_hooks
from ssl_jax.train.step import TrainState, batches, compile_step, encoder_of, init_state, set_up

AHEAD = 2  # steps sent to the devices before an earlier one's metrics are read, so that they never wait for the host


def fit(config: Config, workdir: Path, source: Source | None = None, encoder: Network | None = None) -> Encoder:
    """Starts or continues the run in `workdir`, and returns its encoder. A finished run is only loaded.

    encoder: see `set_up`. Raises UserError for mistakes and for a loss that is not finite. After SIGTERM, SIGINT or
    SIGHUP it saves the state and raises SystemExit(75).
    """
    source = source or open_source(config.data)
    images, total = len(source), to_steps(config.train.duration, len(source), config.train.batch)
    folder = RunFolder(workdir)
    decisions = memory.decisions(config, source, encoder) | {"data": lambda: measures(source)}
    with contextlib.ExitStack() as stack:
        entry = parallel.run_on_main(lambda: folder.enter(config, total, stack, **decisions))
        if entry["finished"]:
            return load_encoder(workdir)
        if (before := entry["data"]["images"]) != images:
            began = f"the run began with {before:,}; allowed: the same images, or a new --workdir"
            raise UserError(f"config.data.path={config.data.path!r}: {images:,} images, but {began}")
        may_shrink = config.train.micro_batch == "auto" and "micro_batch" in entry["decided"]
        given, config = config, memory.with_decisions(config, entry)
        # All processes run the same code. Only the first one's files are kept, and every process's part of checkpoints.
        main = parallel.is_main_process()
        out = folder if main else RunFolder(stack.enter_context(tempfile.TemporaryDirectory()))
        setup = set_up(config, source, encoder)
        options = config.train
        mesh = parallel.make_mesh(options.devices, options.batch, options.part, options.shard)
        state = init_state(setup, config.train.seed, mesh)
        warn = functools.partial(print, flush=True) if main else lambda _: None
        checkpoints = stack.enter_context(Checkpoints(folder.checkpoints, config.train.keep, warn))
        if restored := checkpoints.restore_latest(state):
            state = restored
        elif config.train.init:
            state = last_state(given, state, warn)
        if int(state.step) < total:
            training = Training(config, setup, source, mesh, folder, out, int(state.step))
            state = train(training, state, checkpoints, may_shrink)
        trained = encoder_of(setup, config, state)
        export(out.encoder, trained)
        return trained


def measures(source: Source) -> dict[str, Any]:
    """What a run's state depends on in its data: with this, a checkpoint can be read without them (`ssl_jax.load`)."""
    classes = 0 if source.labels is None else len(source.classes)
    return {"images": len(source), "shape": list(source.shape), "classes": classes}


def last_state(config: Config, like: TrainState, warn: Callable[[str], None]) -> TrainState:
    """The last state of the run that config.train.init names, but at the step of `like`, and laid out like it.

    Raises UserError if there is no such run, if it is at work, or if it has another method or other arrays.
    """
    folder, hint = RunFolder(Path(config.train.init).expanduser()), ""
    state: Any
    try:
        with contextlib.ExitStack() as stack:
            parallel.run_on_main(lambda: _enter_other(folder, config, stack))
            changed = differences(folder.read_config(), to_json(config), ("method", "model", "optim"))
            hint = f" ({'; '.join(changed)})" if changed else ""
            state = Checkpoints(folder.checkpoints, 1, warn).restore_latest(like)
    except UserError as error:
        raise UserError(f"config.train.init={config.train.init}: {error}{hint}") from error
    warn(f"starting from step {int(state.step)} of {folder.path}")
    return state._replace(step=like.step)


def _enter_other(folder: RunFolder, config: Config, stack: contextlib.ExitStack) -> None:
    if not steps(folder.checkpoints):
        raise UserError("no checkpoint; allowed: the folder of a run that has saved one")
    stack.enter_context(folder.lock(shared=True))
    method = folder.read_config()["method"]["name"]
    if method != config.method_name:
        raise UserError(f"a run of the method {method!r}; allowed: one of {config.method_name!r}")


def train(training: Training, state: TrainState, checkpoints: Checkpoints, may_shrink: bool = False) -> TrainState:
    """Runs the remaining steps. After a stop signal, every process raises SystemExit(75) after the same step.

    may_shrink: see `compiled_step`.
    """
    config, mesh, total, clock = training.config, training.mesh, training.setup.steps, training.clock
    feed = batches(config, training.source, mesh, training.start, total)
    with contextlib.ExitStack() as stack:
        hooks = [stack.enter_context(contextlib.closing(hook)) for hook in make_hooks(training, checkpoints)]
        stop = next(hook for hook in hooks if isinstance(hook, Stop))
        first = next(feed)
        step_fn = compiled_step(training, state, first, may_shrink)
        feed = itertools.chain([first], feed)
        del first  # its memory is free once it has been used
        if config.train.init and not checkpoints.steps():
            checkpoints.save(0, state)  # from now on the run needs no other folder
        pending: deque[tuple[int, dict[str, Any]]] = deque()  # steps whose metrics are still on the devices
        for step in range(training.start + 1, total + 1):
            started = time.monotonic()
            batch = next(feed)
            if pending and pending[-1][1]["loss"].is_ready():  # the devices became idle meanwhile
                clock.waited += time.monotonic() - started
            state, metrics = step_fn(state, batch, parallel.per_device(mesh, stop.received))
            pending.append((step, metrics))
            due = [hook for hook in hooks if hook.every and (step % hook.every == 0 or step == total)]
            # Before a state is evaluated or saved, its metrics have been checked, so nothing broken is saved.
            while len(pending) > (0 if due or stop.requested else AHEAD):
                earlier, on_device = pending.popleft()
                values = {name: value.item() for name, value in jax.device_get(on_device).items()}
                for hook in hooks:
                    hook.on_metrics(earlier, values)
            if stop.requested:
                due += [hook for hook in hooks if hook.at_stop and hook not in due]
            with clock.paused():
                for hook in due:
                    hook.on_state(step, state)
            if stop.requested:
                break
        checkpoints.wait()  # while a second signal is still without effect
    if step < total:
        name = signal.Signals(stop.requested).name
        training.say(f"{name}: saved step {step} in {training.folder.path}; the same command continues it")
        raise SystemExit(REQUEUE)
    return state


def compiled_step(training: Training, state: TrainState, batch: dict[str, jax.Array], may_shrink: bool) -> Callable:
    """The compiled step, whose memory, as the compiler counts it, is compared with what is free.

    If it does not fit in any process and the micro-batch may shrink, because it was chosen at this start, the next
    smaller one is compiled and recorded; otherwise one line warns. Changes `training` accordingly.
    """
    while True:
        config, stop = training.config, parallel.per_device(training.mesh, 0)
        step_fn = compile_step(training.setup, config, training.mesh, state, batch, stop)
        need, free = memory.beside_arguments(step_fn, state), memory.free_memory()
        if not parallel.any_process(need > free):
            return step_fn
        told = f"a step needs {need / 1e9:.1f} GB more on each device, and {free / 1e9:.1f} GB are free"
        smaller = memory.shrink(config, training.source, training.setup.encoder)
        if not smaller or not may_shrink:
            option = f"config.train.micro_batch={smaller.train.part}" if smaller else "a smaller model or data.size"
            training.say(f"warning: {told}; if it fails, start a new run with {option}")
            return step_fn
        part = smaller.train.part
        statistics = f"BatchNorm's statistics are those of {smaller.train.bn_group or part} images"
        training.say(f"{told}: the batch is embedded in parts of {part} instead; {statistics}")
        training.config, training.setup = smaller, set_up(smaller, training.source, training.setup.encoder)
        if parallel.is_main_process():
            training.folder.decide_again(micro_batch=part)
