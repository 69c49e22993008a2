"""Every option of a run, and how an `ml_collections.ConfigDict` becomes a `Config`.

`default(method)` returns a complete ConfigDict, which a config file or flags change (`ssl_jax.config_file`); `resolve`
checks every key and value and returns a frozen `Config`. `ssl-jax pretrain --help=optim` and docs/configuration.md
show the options.
"""

from ssl_jax.config.build import (
    default,
    describe,
    differences,
    from_json,
    merge,
    method_module,
    method_names,
    recipe,
    resolve,
    to_json,
    to_steps,
)
from ssl_jax.config.model import Model
from ssl_jax.config.sections import (
    FILE_SOURCES,
    SECTIONS,
    TOP_LEVEL,
    TRAINING,
    Augment,
    Config,
    Data,
    Eval,
    Finetune,
    Linear,
    Optim,
    Study,
    Train,
    View,
)

__all__ = [
    "FILE_SOURCES",
    "SECTIONS",
    "TOP_LEVEL",
    "TRAINING",
    "Augment",
    "Config",
    "Data",
    "Eval",
    "Finetune",
    "Linear",
    "Model",
    "Optim",
    "Study",
    "Train",
    "View",
    "default",
    "describe",
    "differences",
    "from_json",
    "merge",
    "method_module",
    "method_names",
    "recipe",
    "resolve",
    "to_json",
    "to_steps",
]
