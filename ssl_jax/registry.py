"""Methods, data sources and models by name: from this package, from installed packages, or by import path.

A name is looked up in this order:

1. what comes with this package: the modules in ssl_jax/methods and ssl_jax/data, the architectures in ssl_jax/models;
2. the entry points of installed packages, in the groups ssl_jax.methods, ssl_jax.sources and ssl_jax.models;
3. a name with a dot is imported: `--config.method.name=mypackage.mymethod`.

A module counts as a method if it defines `Config` and `make`, as a source if it defines `read`, and as a model if it
defines `build`. ssl_jax/models/build.py answers to the names of all its ARCHITECTURES.
"""

import importlib
import importlib.metadata
import importlib.util
import pkgutil
from typing import Any, NamedTuple

from ssl_jax.errors import UserError, unknown


class Kind(NamedTuple):
    home: str  # the package whose modules come with ssl_jax, or a module with ARCHITECTURES
    group: str  # of the entry points
    needs: tuple[str, ...]  # what a module must define
    key: str  # the option that holds the name


KINDS = {
    "method": Kind("ssl_jax.methods", "ssl_jax.methods", ("Config", "make"), "config.method.name"),
    "source": Kind("ssl_jax.data", "ssl_jax.sources", ("read",), "config.data.name"),
    "model": Kind("ssl_jax.models.build", "ssl_jax.models", ("build",), "config.model.name"),
}


def find(kind: str, name: str, key: str = "") -> Any:
    """The module called `name`; kind: "method", "source" or "model"; key: the option to blame in errors.

    Raises UserError, one line, for an unknown name, a module that cannot be imported or one that lacks something.
    """
    where = key or KINDS[kind].key
    if module := _own_module(kind, name):
        return module
    entries = _entry_points(kind)
    if name not in entries and "." not in name:
        raise unknown(where, name, names(kind))
    try:
        module = entries[name].load() if name in entries else importlib.import_module(name)
    except Exception as error:  # anything that foreign code raises during its import
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{where}={name!r}: cannot be imported ({reason[:300]})") from error
    if not _fits(kind, module):
        missing = " and no ".join(needed for needed in KINDS[kind].needs if not hasattr(module, needed))
        raise UserError(f"{where}={name!r}: defines no {missing}; a {kind} needs {' and '.join(KINDS[kind].needs)}")
    return module


def names(kind: str) -> list[str]:
    """All names that can be found without an import path, sorted."""
    return sorted({*own_names(kind), *_entry_points(kind)})


def own_names(kind: str) -> list[str]:
    """The names that come with this package, sorted."""
    home = importlib.import_module(KINDS[kind].home)
    if hasattr(home, "ARCHITECTURES"):
        return sorted(home.ARCHITECTURES)
    return sorted(m.name for m in pkgutil.iter_modules(home.__path__) if _own_module(kind, m.name))


def _own_module(kind: str, name: str) -> Any:
    """The module that comes with this package, or None. It is imported alone, so errors in others do not matter."""
    home = importlib.import_module(KINDS[kind].home)
    if hasattr(home, "ARCHITECTURES"):
        return home if name in home.ARCHITECTURES else None
    path = f"{home.__name__}.{name}"
    if not name.isidentifier() or not importlib.util.find_spec(path):
        return None
    module = importlib.import_module(path)
    return module if _fits(kind, module) else None


def _fits(kind: str, module: Any) -> bool:
    return all(hasattr(module, needed) for needed in KINDS[kind].needs)


def _entry_points(kind: str) -> dict[str, importlib.metadata.EntryPoint]:
    return {entry.name: entry for entry in importlib.metadata.entry_points(group=KINDS[kind].group)}
