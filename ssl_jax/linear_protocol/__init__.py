"""The protocol `linear`: linear classifiers trained by SGD or LARS on frozen features of random crops."""

from ssl_jax.linear_protocol.run import Trained, finished, train

__all__ = ["Trained", "finished", "train"]
