"""From a config file and flags to the ConfigDict that `ssl_jax.config.resolve` checks."""

import functools
import operator
import runpy
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from ssl_jax.config import SECTIONS, default, describe, method_names, recipe
from ssl_jax.errors import UserError, first_line, unknown


def find_config(spec: str) -> tuple[Path, list[str]]:
    """The file that --config names, and its argument: a path, or the name of a config that ships with the package."""
    name, *argument = spec.split(":", 1)
    path, package = Path(name), Path(__file__).parent
    shipped = next((d for d in (package / "configs", package.parent / "configs") if d.is_dir()), package / "configs")
    own = [] if len(path.parts) != 1 else [shipped / name, shipped / f"{name}.py"]
    for candidate in (path, *own):
        if candidate.is_file() and candidate.suffix == ".py":
            return candidate, argument
    if own:
        raise unknown("--config", name, [p.stem for p in shipped.glob("*.py") if p.stem != "__init__"])
    raise UserError(f"--config={name}: {'not a .py file' if path.exists() else 'no such file'}; allowed: a .py file")


def load_config(spec: str, overrides: Sequence[str]) -> ConfigDict:
    """The ConfigDict of --config=SPEC with its overrides applied. The file is executed."""
    config = _call(spec, "get_config")
    if not isinstance(config, ConfigDict):
        path, _ = find_config(spec)
        raise UserError(f"--config={spec}: get_config in {path} returns {type(config).__name__}; allowed: ConfigDict")
    return override(config, overrides)


def load_published(spec: str) -> list[dict[str, Any]]:
    """The published numbers that the config file of SPEC gives for its recipe (get_published). The file is executed."""
    return _call(spec, "get_published")


def _call(spec: str, function: str) -> Any:
    """What a function of the config file returns, called with its argument."""
    path, argument = find_config(spec)
    try:
        module = runpy.run_path(str(path))
        if function not in module:
            raise UserError(f"--config={spec}: {path} has no function {function}")
        return module[function](*argument)
    except UserError:
        raise
    except Exception as error:  # anything that the file raises
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        reason = first_line(error)
        if isinstance(error, SyntaxError) and error.filename == str(path):
            lines, reason = [error.lineno], error.msg
        where = f"{path}, line {lines[-1]}" if lines else path
        raise UserError(f"--config={spec}: {where}: {type(error).__name__}: {reason}") from error


def override(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    """`config` changed by "--config.key=value" flags, as ml_collections parses them. A method brings its recipe."""
    methods = [item.partition("=")[2] for item in overrides if item.startswith("--config.method.name=")]
    if methods and "method" in config:
        config = _change_method(config, methods[-1])
    for item in overrides:
        parts, place = _key(item), config
        for depth, part in enumerate(parts):
            if not isinstance(place, ConfigDict) or part not in place:
                known = list(place) if isinstance(place, ConfigDict) else []
                raise unknown(f"--{'.'.join(['config', *parts[:depth]])}", part, known)
            place = place[part]
        if isinstance(place, ConfigDict):
            raise UserError(f"{item}: is a section; write {item.partition('=')[0]}.KEY=VALUE")
    try:
        return _parse(config, overrides)
    except (flags.Error, TypeError, ValueError):
        for item in overrides:  # which one is it?
            try:
                _parse(config, [item])
            except (flags.Error, TypeError, ValueError):
                raise UserError(f"{item}: wrong type; allowed: {_allowed(config, _key(item))}") from None
        raise


def _key(item: str) -> list[str]:
    return item.removeprefix("--config.").partition("=")[0].split(".")


def _parse(config: ConfigDict, items: Sequence[str]) -> ConfigDict:
    values = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=list(items))
    values(["ssl-jax", *items])
    return values["config"].value


def _allowed(config: ConfigDict, parts: Sequence[str]) -> str:
    """What may stand after --config.PARTS=, in words."""
    *sections, name = parts
    for section in reversed(sections or ["config"]):  # finetune.augment.blur is an option of augment
        topic = {"method": config.method.name, "test": "data"}.get(section, section)
        if topic in ("config", *SECTIONS, *method_names()):
            for option in describe(topic):
                if option.name == name:
                    return option.allowed
    return f"a value like {functools.reduce(operator.getitem, parts, config)!r}"


def _change_method(config: ConfigDict, name: str) -> ConfigDict:
    """`config` with the options of another method, and its recipe where the config still follows the old recipe."""
    if config.method.name == name:
        return config
    old, new = default(config.method.name), default(name)

    def get(source: ConfigDict, key: str) -> Any:
        return functools.reduce(operator.getitem, key.split("."), source)

    changed = ConfigDict(config)
    for key in {*recipe(config.method.name), *recipe(name)}:
        if get(config, key) == get(old, key):
            changed.update_from_flattened_dict({key: get(new, key)})
    changed.method = new.method
    return changed
