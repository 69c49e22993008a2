"""Options that are declared once: what they accept, and how they are described."""

import doctest
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from ssl_jax import fields
from ssl_jax.config import SECTIONS, describe, method_names
from ssl_jax.errors import UserError
from ssl_jax.fields import Duration, option


@dataclass(frozen=True)
class Inner:
    size: int = option(1, "side", min=1)


@dataclass(frozen=True)
class Options:
    lr: float = option(0.1, "learning rate", min=0)
    share: float = option(0.5, "a share", above=0, max=1)
    mask: float = option(0.5, "a mask", above=0, below=1)
    angle: float = option(0.0, "an angle", min=0, below=90)
    most: int = option(3, "at most ten", max=10)
    kind: Literal["a", "b", "c"] = option("a", "a kind")
    number: Literal[0, 1, 3] = option(0, "a number")
    length: Duration = option("1 epochs", "a length")
    scales: tuple[float, ...] = option((0.1, 1e-6), "scales", above=0)
    pair: tuple[int, int] = option((1, 2), "a pair", min=1)
    factors: tuple[str, ...] = option(("x",), "factors", choices={"x": 1, "y": 2})
    flag: bool = option(False, "a flag")
    source: str = option("", "a source", registered="source")
    rest: Mapping[str, Any] = option(dict, "the rest")
    inner: Inner = option(Inner(2), "more")
    plain: int = 7  # a comment helps, too
    hidden: int = 16


GOOD = {
    "lr": (1, 1.0),
    "share": (1.0, 1.0),
    "angle": (89.5, 89.5),
    "most": (-4, -4),
    "kind": ("c", "c"),
    "length": ("0.5 epochs", "0.5 epochs"),
    "scales": ([1, 2.5], (1.0, 2.5)),
    "pair": ([3, 4], (3, 4)),
    "factors": (("y", "x"), ("y", "x")),
    "source": ("folder", "folder"),
    "rest": ({"a": 1}, {"a": 1}),
    "inner": ({"size": 5}, Inner(5)),
    "flag": (None, False),
}
BAD = {
    "lr": [(-0.1, "k.lr=-0.1: allowed: 0 or more"), ("1", "k.lr='1': wrong type (str); allowed: float, 0 or more")],
    "share": [(0.0, "more than 0, at most 1"), (1.1, "more than 0, at most 1"), (float("nan"), "more than 0")],
    "mask": [(0.0, "allowed: more than 0, less than 1"), (1.0, "allowed: more than 0, less than 1")],
    "angle": [(90.0, "allowed: 0 to less than 90"), (-1.0, "allowed: 0 to less than 90")],
    "most": [(11, "allowed: at most 10"), (True, "wrong type (bool); allowed: int, at most 10"), (1.5, "wrong type")],
    "kind": [("bb", "k.kind='bb': unknown; did you mean 'b'? available: a, b, c"), (1, "k.kind=1: unknown; ")],
    "number": [(2, "k.number=2: unknown; available: 0, 1, 3"), (True, "unknown"), (1.0, "unknown")],
    "length": [("3 weeks", "k.length='3 weeks': allowed: \"10 epochs\""), (3, "wrong type (int); allowed: duration")],
    "scales": [((0.1, 0.0), "k.scales=0.0: allowed: more than 0"), (0.1, "allowed: tuple of float, more than 0")],
    "pair": [((1,), "allowed: 2 values, each int, 1 or more"), ((1, 0), "k.pair=0: allowed: 1 or more")],
    "factors": [(("z",), "k.factors='z': unknown; available: x, y")],
    "flag": [(1, "wrong type (int); allowed: bool")],
    "source": [("foldr", "k.source='foldr': unknown; did you mean 'folder'")],
    "inner": [
        ({"size": 0}, "k.inner.size=0: allowed: 1 or more"),
        ({"side": 0}, "k.inner='side': unknown"),
        (3, "wrong"),
    ],
    "other": [(1, "k='other': unknown; available: angle, ")],
}


@pytest.mark.parametrize("key", GOOD)
def test_values_that_fit_are_converted(key):
    value, expected = GOOD[key]
    built = getattr(fields.build(Options, {key: value}, "k"), key)
    assert built == expected and type(built) is type(expected)
    fields.check(Options(**{key: expected}), "k")


@pytest.mark.parametrize(("key", "value", "message"), [(key, *case) for key, cases in BAD.items() for case in cases])
def test_values_that_do_not_fit_are_one_line(key, value, message):
    with pytest.raises(UserError) as caught:
        fields.build(Options, {key: value}, "k")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_check_of_an_instance():
    with pytest.raises(UserError, match="k.share=2.0: allowed: more than 0, at most 1"):
        fields.check(Options(share=2.0), "k")
    with pytest.raises(UserError, match="k.kind='d': unknown"):
        fields.check(Options(kind="d"), "k")


def test_description():
    shown = {o.name: o[1:] for o in fields.describe(Options)}
    assert shown["lr"] == ("float, 0 or more", "0.1", "learning rate")
    assert shown["kind"] == ("a, b or c", "'a'", "a kind")
    assert shown["length"] == ("duration", "'1 epochs'", "a length")
    assert shown["scales"] == ("tuple of float, more than 0", "(0.1, 1e-06)", "scales")
    assert shown["factors"][:2] == ("tuple of x or y", "('x',)")
    assert shown["source"][0].startswith("chexpert, csv, ")
    assert shown["rest"] == ("mapping", "{}", "the rest")
    assert shown["inner"][1] == "Inner(size=2)"
    assert shown["plain"] == ("int", "7", "a comment helps, too")
    assert shown["hidden"][2] == fields.COMMON_HELP["hidden"]


def test_every_option_has_help_and_a_default_that_is_allowed():
    for topic in ("config", *SECTIONS, *method_names()):
        assert not [o.name for o in describe(topic) if not o.help or not o.allowed]
    for kind in SECTIONS.values():
        fields.check(kind(), "config")


def test_examples_in_docstrings():
    assert doctest.testmod(fields).failed == 0
