"""Methods, data sources and models by name: from this package, from installed packages, or by import path.

A name is looked up in this order:

1. the modules of this package: ssl_jax/methods, ssl_jax/data and ssl_jax/models;
2. the entry points of installed packages, in the groups ssl_jax.methods, ssl_jax.sources and ssl_jax.models;
3. a name with a dot is imported: `--config.method.name=mypackage.mymethod`.

A module counts as a method if it defines `Config` and `make`, as a source if it defines `read`, and as a model if it
defines `build`. A module that lists ARCHITECTURES answers to these names, any other to its own.
"""

import importlib
import importlib.metadata
import pkgutil
from typing import Any, NamedTuple

from ssl_jax.errors import UserError, unknown


class Kind(NamedTuple):
    package: str  # holds the modules that come with ssl_jax
    group: str  # of the entry points
    needs: tuple[str, ...]  # what a module must define
    key: str  # the option that holds the name


KINDS = {
    "method": Kind("ssl_jax.methods", "ssl_jax.methods", ("Config", "make"), "config.method.name"),
    "source": Kind("ssl_jax.data", "ssl_jax.sources", ("read",), "config.data.name"),
    "model": Kind("ssl_jax.models", "ssl_jax.models", ("build",), "config.model.name"),
}


def find(kind: str, name: str, key: str = "") -> Any:
    """The module called `name`; kind: "method", "source" or "model"; key: the option to blame, for errors.

    Raises UserError, one line, for an unknown name, a module that cannot be imported or one that lacks something.
    """
    where = key or KINDS[kind].key
    if module := _own_modules(kind).get(name):
        return module
    try:
        if name in (entries := _entry_points(kind)):
            module = entries[name].load()
        elif "." in name:
            module = importlib.import_module(name)
        else:
            raise unknown(where, name, names(kind))
    except UserError:
        raise
    except Exception as error:  # whatever the code of others raises while it is imported
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{where}={name!r}: cannot be imported ({reason[:300]})") from error
    missing = [attribute for attribute in KINDS[kind].needs if not hasattr(module, attribute)]
    if missing:
        needed = " and ".join(KINDS[kind].needs)
        raise UserError(f"{where}={name!r}: defines no {' and no '.join(missing)}; a {kind} needs {needed}")
    return module


def names(kind: str) -> list[str]:
    """All names that can be found without an import path, sorted."""
    return sorted({*own_names(kind), *_entry_points(kind)})


def own_names(kind: str) -> list[str]:
    """The names that come with this package, sorted."""
    return sorted(_own_modules(kind))


def _own_modules(kind: str) -> dict[str, Any]:
    package = importlib.import_module(KINDS[kind].package)
    modules = [importlib.import_module(f"{package.__name__}.{m.name}") for m in pkgutil.iter_modules(package.__path__)]
    return {
        name: module
        for module in modules
        if all(hasattr(module, attribute) for attribute in KINDS[kind].needs)
        for name in getattr(module, "ARCHITECTURES", [module.__name__.rpartition(".")[2]])
    }


def _entry_points(kind: str) -> dict[str, importlib.metadata.EntryPoint]:
    return {entry.name: entry for entry in importlib.metadata.entry_points(group=KINDS[kind].group)}
