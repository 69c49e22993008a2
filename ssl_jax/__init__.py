"""Self-supervised learning for vision in JAX: pretrain on unlabelled images, then win on few labels."""

__version__ = "0.1.0"
