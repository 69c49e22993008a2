"""Pretraining: the compiled step, the loop that feeds it, and the hooks that run between steps."""

from ssl_jax.interrupts import REQUEUE
from ssl_jax.train.loop import fit
from ssl_jax.train.step import Setup, TrainState, init_state, make_step, set_up

__all__ = ["REQUEUE", "Setup", "TrainState", "fit", "init_state", "make_step", "set_up"]
