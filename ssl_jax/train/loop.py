"""`fit` starts or continues a run, and feeds the compiled step. See `hooks` for what happens between steps."""

import contextlib
import functools
import itertools
import signal
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Any

import jax

from ssl_jax import parallel
from ssl_jax.checkpoint import Checkpoints
from ssl_jax.config import Config, to_steps
from ssl_jax.data import Source, open_source
from ssl_jax.encoder import Encoder, export, load_encoder
from ssl_jax.interrupts import REQUEUE
from ssl_jax.network import Network
from ssl_jax.run_folder import RunFolder
from ssl_jax.train import memory
from ssl_jax.train.hooks import Stop, Training, make_hooks
from ssl_jax.train.start import check_images, compiled_step, first_state
from ssl_jax.train.step import TrainState, batches, encoder_of, init_state, set_up

AHEAD = 2  # steps sent to the devices before an earlier one's metrics are read, so that they never wait for the host


def fit(config: Config, workdir: Path, source: Source | None = None, encoder: Network | None = None) -> Encoder:
    """Starts or continues the run in `workdir`, and returns its encoder. A finished run is only loaded.

    encoder: see `set_up`. Raises UserError for mistakes and for a loss that is not finite. After SIGTERM, SIGINT or
    SIGHUP it saves the state and raises SystemExit(75).
    """
    folder, source = RunFolder(workdir), source or open_source(config.data)
    total = to_steps(config.train.duration, len(source), config.train.batch)
    decisions = memory.decisions(config, source, encoder)
    with contextlib.ExitStack() as stack:
        entry = parallel.run_on_main(lambda: folder.enter(config, total, stack, **decisions))
        if entry["finished"]:
            return load_encoder(workdir)
        check_images(config, len(source), entry["data"]["images"])
        may_shrink = config.train.micro_batch == "auto" and "micro_batch" in entry["decided"]
        given, config = config, memory.with_decisions(config, entry)
        # All processes run the same code. Only the first one's files are kept, and every process's part of checkpoints.
        main = parallel.is_main_process()
        out = folder if main else RunFolder(stack.enter_context(tempfile.TemporaryDirectory()))
        setup = set_up(config, source, encoder)
        mesh = parallel.make_mesh(config.train.devices, config.train.batch, config.train.part, config.train.shard)
        warn = functools.partial(print, flush=True) if main else lambda _: None
        checkpoints = stack.enter_context(Checkpoints(folder.checkpoints, config.train.keep, warn))
        state = first_state(given, init_state(setup, config.train.seed, mesh), checkpoints, warn)
        if (start := int(state.step)) < total:
            state = train(Training(config, setup, source, mesh, folder, out, start), state, checkpoints, may_shrink)
        export(out.encoder, trained := encoder_of(setup, config, state))
        return trained


def train(training: Training, state: TrainState, checkpoints: Checkpoints, may_shrink: bool = False) -> TrainState:
    """Runs the remaining steps. After a stop signal, every process raises SystemExit(75) after the same step."""
    config, mesh, total, clock = training.config, training.mesh, training.setup.steps, training.clock
    setup = training.setup
    feed = batches(config, training.source, mesh, training.start, total, setup.views, setup.method.shares)
    with contextlib.ExitStack() as stack:
        hooks = [stack.enter_context(contextlib.closing(hook)) for hook in make_hooks(training, checkpoints)]
        stop = next(hook for hook in hooks if isinstance(hook, Stop))
        first = next(feed)
        step_fn, feed = compiled_step(training, state, first, may_shrink), itertools.chain([first], feed)
        del first  # its memory is free once it has been used
        if config.train.init and not checkpoints.steps():
            checkpoints.save(0, state)  # from now on the run needs no other folder
        with clock.paused():
            for hook in hooks if training.start == 0 else ():
                if hook.every and hook.at_start:
                    hook.on_state(0, state)
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
            due += [hook for hook in hooks if stop.requested and hook.at_stop and hook not in due]
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
