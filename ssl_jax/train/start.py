"""How a run starts: with which images, from which state, and with a compiled step that fits in memory."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from ssl_jax import parallel
from ssl_jax.checkpoint import Checkpoints, steps
from ssl_jax.config import Config, differences, to_json
from ssl_jax.errors import UserError
from ssl_jax.run_folder import RunFolder
from ssl_jax.train import memory
from ssl_jax.train.hooks import Training
from ssl_jax.train.step import TrainState, compile_step, set_up


def check_images(config: Config, now: int, before: int) -> None:
    """Raises UserError if the data have another number of images than when the run began."""
    if before != now:
        began = f"the run began with {before:,}; allowed: the same images, or a new --workdir"
        raise UserError(f"config.data.path={config.data.path!r}: {now:,} images, but {began}")


def first_state(
    config: Config, initial: TrainState, checkpoints: Checkpoints, warn: Callable[[str], None]
) -> TrainState:
    """The state of the last checkpoint, else that of the run in config.train.init, else `initial`."""
    if restored := checkpoints.restore_latest(initial):
        return restored
    return last_state(config, initial, warn) if config.train.init else initial


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
