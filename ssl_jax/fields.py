"""What an option is: a dataclass field that declares its type, choices, range and help in one place.

    lr: float = option(0.06, "peak learning rate", min=0)
    schedule: Literal["cosine", "constant"] = option("cosine", "how the learning rate falls")
    warmup: Duration = option("0 steps", "linear rise of the learning rate")

The checks (`build`, `check`) and the text of `--help` and docs/configuration.md (`describe`) come from this. Choices
and ranges of a tuple hold for each of its items.
"""

import contextlib
import dataclasses
import inspect
import operator
import re
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from ssl_jax import registry
from ssl_jax.errors import UserError, unknown

Duration = Annotated[str, "duration"]  # "10 epochs", "500 steps" or "100000 examples"

UNIONS = (typing.Union, types.UnionType)
LIMITS = {"min": operator.ge, "above": operator.gt, "max": operator.le, "below": operator.lt}
# Help for options that most methods have and that need no words of their own.
COMMON_HELP = {
    "hidden": "hidden width of the head",
    "out": "dimensions of the projection",
    "predictor_hidden": "hidden width of the predictor",
}


def option(
    default: Any,
    help: str = "",
    *,
    min: float | None = None,
    above: float | None = None,
    max: float | None = None,
    below: float | None = None,
    choices: Iterable[Any] | None = None,
    registered: str | None = None,
    path: bool = False,
) -> Any:
    """A dataclass field with its help and its range.

    default: a value, or a function that returns it (`dict`). min and max are allowed themselves, above and below are
    not. choices: for values that a table lists, where a Literal would repeat it. registered: the value is a name that
    `registry.find` knows; "method", "source" or "model". path: a relative path, which becomes absolute.
    """
    listed = None if choices is None else tuple(choices)
    declared: dict[str, Any] = {"help": help, "min": min, "above": above, "max": max, "below": below}
    declared |= {"choices": listed, "registered": registered, "path": path or None}
    metadata = {key: value for key, value in declared.items() if value is not None}
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def types_of(kind: type) -> dict[str, Any]:
    """The type of each field of a dataclass."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {f.name: hints[f.name] for f in dataclasses.fields(kind)}


# Values in.


def build(kind: type, values: Mapping[str, Any], key: str) -> Any:
    """An instance of the dataclass `kind` from plain values; None leaves a field at its default.

    key: where the values come from ("config.optim"), for errors. A class with a method `parse` reads them itself.
    Raises UserError, one line, for an unknown field, a wrong type, a wrong choice or a value out of range.
    """
    parse = getattr(kind, "parse", None)
    return parse(values, key) if parse else kind(**convert_all(kind, values, key))


def convert_all(kind: type, values: Mapping[str, Any], key: str) -> dict[str, Any]:
    """`values` without what is None, each converted to the type of its field of `kind` and checked."""
    types, metadata = types_of(kind), {f.name: f.metadata for f in dataclasses.fields(kind)}
    converted = {}
    for name, value in values.items():
        if name not in types:
            raise unknown(key, name, types)
        if value is not None:
            value = _convert(types[name], metadata[name], value, f"{key}.{name}")
            _check(types[name], metadata[name], value, f"{key}.{name}")
            converted[name] = absolute(value) if metadata[name].get("path") else value
    return converted


def absolute(path: str) -> str:
    """`path` as it is understood from any folder; "" stays, and so does what begins with ~."""
    return str(Path(path).absolute()) if path and not path.startswith("~") else path


def check(instance: Any, key: str) -> None:
    """Raises UserError, one line, if a field of a dataclass has a wrong choice or a value out of range."""
    types = types_of(type(instance))
    for f in dataclasses.fields(instance):
        _check(types[f.name], f.metadata, getattr(instance, f.name), f"{key}.{f.name}")


def _convert(hint: Any, metadata: Mapping[str, Any], value: Any, key: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return build(typing.cast(type, hint), value, key)
    if hint is Any or origin is Literal:
        return value
    if origin is Annotated and isinstance(value, arguments[0]):
        return value
    if origin in UNIONS:
        kind = next((kind for kind in arguments if value in typing.get_args(kind)), arguments[0])
        with contextlib.suppress(UserError):
            return _convert(kind, metadata, value, key)
    if origin is tuple and isinstance(value, list | tuple):
        items = arguments[:1] * len(value) if arguments[-1] is ... else arguments
        if len(items) == len(value):
            return tuple(_convert(item, metadata, v, key) for item, v in zip(items, value))
    if origin is Mapping and isinstance(value, Mapping):
        return dict(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise UserError(f"{key}={value!r}: wrong type ({type(value).__name__}); allowed: {allowed(hint, metadata)}")


def _check(hint: Any, metadata: Mapping[str, Any], value: Any, key: str) -> None:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        for item, v in zip(arguments[:1] * len(value) if arguments[-1] is ... else arguments, value):
            _check(item, metadata, v, key)
    elif choices := arguments if origin is Literal else metadata.get("choices"):
        if not any(value == choice and type(value) is type(choice) for choice in choices):
            raise unknown(key, value, map(str, choices))
    elif hint == Duration:
        parse_duration(value, key)
    elif origin in UNIONS and any(value in typing.get_args(kind) for kind in arguments):
        return
    elif metadata.get("registered"):
        if value:  # empty means another option decides
            registry.find(metadata["registered"], value, key)
    elif not all(fits(value, metadata[name]) for name, fits in LIMITS.items() if name in metadata):
        raise UserError(f"{key}={value}: allowed: {_range(metadata)}")


def parse_duration(text: str, key: str = "duration") -> tuple[float, str]:
    """ "10 epochs" as (10.0, "epoch").

    >>> parse_duration("0.5 epochs"), parse_duration("500 steps"), parse_duration("100000 examples")
    ((0.5, 'epoch'), (500.0, 'step'), (100000.0, 'example'))
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(epoch|step|example)s?\s*", text)
    if not match:
        raise UserError(f'{key}={text!r}: allowed: "10 epochs", "500 steps" or "100000 examples"')
    return float(match[1]), match[2]


# Words out.


class Option(NamedTuple):
    name: str
    allowed: str  # "int, 1 or more", "cosine, constant or step"
    default: str
    help: str


def describe(kind: type) -> list[Option]:
    """The fields of a dataclass as `--help` and the docs show them.

    The help of a field that is not an `option` is the comment at the end of its line.
    """
    types, comments = types_of(kind), _comments(kind)
    options = []
    for f in dataclasses.fields(kind):
        help = f.metadata.get("help") or comments.get(f.name) or COMMON_HELP.get(f.name, "")
        default = f.default_factory() if callable(f.default_factory) else f.default
        options.append(Option(f.name, allowed(types[f.name], f.metadata), show(default), help))
    return options


def allowed(hint: Any, metadata: Mapping[str, Any]) -> str:
    """The values that an option takes, in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        each = allowed(arguments[0], metadata)
        return f"tuple of {each}" if arguments[-1] is ... else f"{len(arguments)} values, each {each}"
    if choices := arguments if origin is Literal else metadata.get("choices"):
        return _either([str(choice) for choice in choices])
    if hint == Duration:
        return "duration"
    if kind := metadata.get("registered"):
        return _either([*registry.own_names(kind), f"a {kind} of another package"])
    if origin is Mapping:
        return "mapping"
    if origin in UNIONS:
        return _either([allowed(kind, metadata) for kind in arguments])
    limits = _range(metadata)
    name = getattr(hint, "__name__", str(hint))
    return f"{name}, {limits}" if limits else name


def _either(words: list[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _range(metadata: Mapping[str, Any]) -> str:
    low, above, high, below = (metadata.get(key) for key in ("min", "above", "max", "below"))
    upper = f"at most {high:g}" if high is not None else f"less than {below:g}" if below is not None else ""
    if above is not None:
        return f"more than {above:g}" + (f", {upper}" if upper else "")
    if low is None:
        return upper
    return f"{low:g} to {upper.removeprefix('at most ')}" if upper else f"{low:g} or more"


def show(value: Any) -> str:
    """A default as a config file would write it, without what is at its own default."""
    if isinstance(value, float):
        return repr(value) if len(repr(value)) <= 8 else f"{value:.4g}"
    if isinstance(value, tuple):
        return f"({', '.join(map(show, value))}{',' * (len(value) == 1)})"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [(f, getattr(value, f.name)) for f in dataclasses.fields(value)]
        changed = [
            f"{f.name}={show(v)}" for f, v in fields if f.default_factory is dataclasses.MISSING and v != f.default
        ]
        return f"{type(value).__name__}({', '.join(changed)})"
    return repr(value)


def _comments(kind: type) -> dict[str, str]:
    try:
        lines = inspect.getsource(kind).splitlines()
    except OSError:  # a class that was not read from a file
        return {}
    return {match[1]: match[2] for line in lines if (match := re.match(r"\s+(\w+): .*?  # (.+)$", line))}
