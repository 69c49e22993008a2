"""Self-supervised learning for vision in JAX: pretrain on unlabelled images, then win on few labels."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssl_jax.classifier import load_classifier as load_classifier
    from ssl_jax.load import load_encoder as load_encoder

__version__ = "0.1.0"
__all__ = ["__version__", "load_classifier", "load_encoder"]

_HOMES = {"load_classifier": "ssl_jax.classifier", "load_encoder": "ssl_jax.load"}


def __getattr__(name: str) -> Any:
    """Imports what it takes on first use: `import ssl_jax` alone stays quick, and needs no JAX."""
    if name not in _HOMES:
        raise AttributeError(f"module 'ssl_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
