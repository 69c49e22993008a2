"""UserError, the only exception that users see: one line that says what is wrong and what is allowed."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake by the user or a limit of their machine, printed as one line and never as a traceback."""


class BusyError(UserError):
    """Another process is using the folder."""


class NoPartError(UserError):
    """The data lack the part that was asked for, such as a test split."""


class UnreadableError(Exception):
    """The bytes of an image cannot be decoded; str() says why in one line. The caller decides what to do about it."""


def first_line(error: BaseException) -> str:
    """What another library's error says, on one line of at most 300 characters: for the UserError raised instead."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def unknown(key: str, value: object, allowed: Iterable[str]) -> UserError:
    """The error `key=value: unknown; did you mean ...? available: ...`, for the caller to raise."""
    names = sorted(allowed)
    close = difflib.get_close_matches(str(value), names, n=1, cutoff=0.6)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return UserError(f"{key}={value!r}: unknown; {hint}available: {', '.join(names)}")
