"""`tiny_encoder` by name (--config.model.name=ssl_jax.testing.model): for runs whose network does not matter."""

from ssl_jax.config import Model
from ssl_jax.network import Network
from ssl_jax.testing.tiny import tiny_encoder


def build(model: Model, channels: int, size: int) -> Network:
    """The same network for all options."""
    del model, channels, size
    return tiny_encoder()
