"""The one exception a user ever sees, UserError: a single line that says what is wrong and what is allowed."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake of the user's or a limit of their machine: printed as one line, never as a traceback."""


class BusyError(UserError):
    """Another process is working in the folder."""


class NoPartError(UserError):
    """Data without the part that was asked for: no test split, for example."""


class UnreadableError(Exception):
    """The bytes of an image can't be decoded; str() says why, on one line. Whoever reads decides what that means."""


def unknown(key: str, value: object, allowed: Iterable[str]) -> UserError:
    """`key=value: unknown; did you mean ...? available: ...`, to be raised by the caller."""
    names = sorted(allowed)
    close = difflib.get_close_matches(str(value), names, n=1, cutoff=0.6)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return UserError(f"{key}={value!r}: unknown; {hint}available: {', '.join(names)}")
