"""Any method on any data, with the method's own recipe.

    ssl-jax pretrain byol DIR --workdir=runs/a      in full: --config=pretrain:byol --config.data.name=folder
                                                            --config.data.path=DIR --workdir=runs/a

The transforms decide what the encoder ignores: look at them first (`ssl-jax views byol DIR`) and
choose a preset (`--config.augment.preset=chest_xray`). Every key: docs/configuration.md.
"""

from ssl_jax.config import default


def get_config(method="byol"):
    return default(method)
