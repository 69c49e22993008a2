"""UserError, the only exception that users see: one line that says what is wrong and what is allowed."""

import difflib
import unicodedata
from collections.abc import Iterable


class UserError(Exception):
    """A mistake by the user or a limit of their machine, printed as one line and never as a traceback."""

    def __str__(self) -> str:
        return visible(super().__str__())


class BusyError(UserError):
    """Another process is using the folder."""


class NoPartError(UserError):
    """The data lack the part that was asked for, such as a test split."""


class DamagedError(UserError):
    """A file that this library wrote has changed since, or is cut short. damage: the error without the way out."""

    def __init__(self, path: object, problem: str, cure: str):
        self.damage = f"{path}: damaged ({problem})"
        super().__init__(f"{self.damage}; {cure}")


class UnreadableError(Exception):
    """The bytes of an image cannot be decoded; str() says why in one line. The caller decides what to do about it."""


def visible(text: str) -> str:
    """Text whose control characters, line breaks and marks of direction are written as escapes, such as \\x1b.

    Names of files and classes come from anywhere; without this they could steer the terminal that prints them.
    """
    if text.isprintable():
        return text
    return "".join(c.encode("unicode_escape").decode() if _is_control(c) else c for c in text)


def _is_control(character: str) -> bool:
    # The two joiners belong to words of several scripts.
    hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")
    return hidden and character not in "\u200c\u200d"


def first_line(error: BaseException) -> str:
    """What another library's error says, on one line of at most 300 characters: for the UserError raised instead."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def unknown(key: str, value: object, allowed: Iterable[str]) -> UserError:
    """The error `key=value: unknown; did you mean ...? available: ...`, for the caller to raise."""
    names = sorted(allowed)
    close = difflib.get_close_matches(str(value), names, n=1, cutoff=0.6)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return UserError(f"{key}={value!r}: unknown; {hint}available: {', '.join(names)}")
