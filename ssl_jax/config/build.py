"""From an `ml_collections.ConfigDict` to a frozen `Config`, to config.json and back."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict

from ssl_jax import fields, registry
from ssl_jax.config.sections import SECTIONS, TOP_LEVEL, TRAINING, Augment, Config, View
from ssl_jax.errors import UserError, unknown


def method_names() -> list[str]:
    """Names of all methods, those of installed packages included."""
    return registry.names("method")


def method_module(name: str) -> types.ModuleType:
    """The module of a method; name: one of `method_names`, or an import path."""
    return registry.find("method", name)


def recipe(method: str) -> dict[str, Any]:
    """What a method sets in place of other sections' defaults: "section.key": value."""
    return getattr(method_module(method), "RECIPE", {})


def default(method: str = "byol") -> ConfigDict:
    """A complete config for `method`: every option at its default, then the method's recipe.

    The encoder that a recipe proposes is left open, so that a name in config.model.name is always the user's choice;
    `resolve` takes the proposal where nothing else says which encoder it is.
    """
    config = ConfigDict({name: _to_dict(kind()) for name, kind in SECTIONS.items()})
    for key in TOP_LEVEL:
        config[key] = getattr(Config, key)
    config.method = ConfigDict({"name": method, **_to_dict(method_module(method).Config())})
    for key, value in recipe(method).items():
        if key != "model.name":
            config.update_from_flattened_dict({key: value})
    return config


def _proposed_encoder(method: str) -> str:
    return recipe(method).get("model.name", "")


def _to_dict(value: Any) -> Any:
    """A dataclass as nested dicts; the views of an Augment become keys of it, empty until set."""
    if isinstance(value, Augment):
        return {
            "preset": value.preset,
            **_placeholders(value.override),
            "second": _placeholders(value.second),
            "local": _placeholders(value.local),
            "local_views": value.local_views,
        }
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        hints = fields.types_of(type(value))
        return {name: _any_type(hints[name], _to_dict(getattr(value, name))) for name in hints}
    if isinstance(value, Mapping):
        return {k: _to_dict(v) for k, v in value.items()}
    return value


def _any_type(hint: Any, value: Any) -> Any:
    """The value of an option of several types, such as a number or "auto", as a ConfigDict has to be told of it."""
    is_union = typing.get_origin(hint) in fields.UNIONS
    return config_dict.FieldReference(value, field_type=object) if is_union else value


def _placeholders(values: Mapping[str, Any]) -> dict[str, Any]:
    view = dataclasses.asdict(View())
    return {key: values.get(key, config_dict.placeholder(type(usual))) for key, usual in view.items()}


def resolve(config: ConfigDict) -> Config:
    """The frozen Config of a ConfigDict.

    Raises UserError, one line, for an unknown section, key or method, a wrong type or a value that is not allowed.
    """
    values = config.to_dict()
    method = dict(values.pop("method", {}))
    name = method.pop("name", None)
    if name is None:
        raise UserError(f"config.method.name: missing; available: {', '.join(method_names())}")
    for key in values:
        if key not in SECTIONS and key not in TOP_LEVEL:
            raise unknown("config", key, [*SECTIONS, "method", *TOP_LEVEL])
    values = {**{section: {} for section in SECTIONS}, **values}
    values["method"] = fields.build(method_module(name).Config, method, "config.method")
    config = fields.build(Config, {"method_name": name, **values}, "config")
    if not config.model.name and not config.model.init:  # the encoder that is loaded goes before the proposed one
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, name=_proposed_encoder(name)))
    return config


def merge(config: Config, changes: Mapping[str, Any]) -> Config:
    """`config` with nested changes, as for an arm of a study: {"method": {"name": "moco"}, "optim": {"lr": 0.1}}.

    A change of method starts from that method's recipe for "method" and "optim".
    """
    merged = from_json(to_json(config))
    name = changes.get("method", {}).get("name", config.method_name)
    if name != config.method_name:
        fresh = default(name)
        merged.method, merged.optim = fresh.method, fresh.optim
    known = merged.to_dict()
    for section, values in changes.items():
        if section not in known or not isinstance(values, Mapping):
            raise unknown("config.study.arms", section, [*SECTIONS, "method"])
        for key in values:
            if key not in known[section]:
                raise unknown(f"config.study.arms: {section}", key, known[section])
        merged[section].update(values)
    return resolve(merged)


# To config.json and back.


def to_json(config: Config) -> dict[str, Any]:
    """Plain nested dicts and lists, from which `from_json` restores an equal Config."""

    def plain(value):
        if dataclasses.is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, Mapping):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, tuple | list) else value

    values = plain(config)
    values["method"]["name"] = values.pop("method_name")
    return values


def from_json(values: Mapping[str, Any]) -> ConfigDict:
    """The ConfigDict of a saved run, so that flags can change it again. Keys that it lacks are at their defaults."""
    config = default(values["method"]["name"])

    def fill(target, source):
        for key, value in source.items():
            if key == "override":
                fill(target, value)
            elif isinstance(value, Mapping) and isinstance(target.get(key), ConfigDict) and key != "arms":
                fill(target[key], value)
            elif key == "arms":
                target[key] = ConfigDict(value)
            else:
                target[key] = tuple(value) if isinstance(value, list) else value

    fill(config, values)
    if not config.model.init and config.model.name == _proposed_encoder(config.method.name):
        config.model.name = ""  # open again: weights that an arm or a flag names go before it
    return config


def differences(a: Mapping[str, Any], b: Mapping[str, Any], sections=TRAINING) -> list[str]:
    """Keys in which two configs (`to_json`) differ, as "config.optim.lr: 0.1 -> 0.2"."""
    lines: list[str] = []

    def walk(x, y, path):
        if isinstance(x, Mapping) and isinstance(y, Mapping):
            for key in sorted({*x, *y}):
                walk(x.get(key), y.get(key), path if key == "override" else f"{path}.{key}")
        elif x != y:
            lines.append(f"{path}: {x!r} -> {y!r}")

    for section in sections:
        walk(a.get(section), b.get(section), f"config.{section}")
    return lines


def to_steps(duration: str, examples: int, batch: int, key: str = "duration") -> int:
    """ "10 epochs", "500 steps" or "100000 examples" as steps; an epoch is `examples // batch` steps.

    >>> to_steps("2 epochs", 1000, 100), to_steps("0.5 epochs", 1000, 100), to_steps("950 examples", 1000, 100)
    (20, 5, 10)
    """
    number, unit = fields.parse_duration(duration, key)
    if unit == "epoch":
        return round(number * (examples // batch))
    return round(number) if unit == "step" else -int(-number // batch)


def describe(topic: str) -> list[fields.Option]:
    """The options of a section ("optim") or a method ("byol"), or those of neither ("config"), for --help and docs."""
    if topic == "config":
        return [o for o in fields.describe(Config) if o.name in TOP_LEVEL]
    if topic == "augment":
        own = [o for o in fields.describe(Augment) if o.name in ("preset", "local_views")]
        return [*own, *fields.describe(View)]
    return fields.describe(SECTIONS[topic] if topic in SECTIONS else method_module(topic).Config)
