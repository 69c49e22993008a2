"""What comes from outside while a command works: signals that end it, and readers of its output that go away."""

import contextlib
import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, TextIO

REQUEUE = 75  # exit code after a signal: "try again later" for schedulers (EX_TEMPFAIL)
SECONDS = 2.0  # for printing what is left before the process ends
AFTER_BAR = "\x1b[?25h\n"  # shows the cursor, which a progress line hides, and leaves the line

_saving = threading.Event()  # set while signals are left to a run, which saves its state


def handle(handler: Callable[[int, Any], None]) -> dict[int, Any]:
    """Lets `handler` handle SIGTERM, SIGINT and SIGHUP; returns the previous handlers.

    SIGHUP stays ignored if it is ignored, as nohup does it.
    """
    numbers = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    return {number: signal.signal(number, handler) for number in numbers}


def restore(handlers: dict[int, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


def leave_to_run(run: bool) -> None:
    """Whether a run has begun to step, so that it saves its state after a signal, instead of ending at once."""
    _saving.set() if run else _saving.clear()


@contextlib.contextmanager
def requeued() -> Iterator[None]:
    """Signals end the process with exit code 75, at once unless a run saves its state first (`leave_to_run`).

    Python calls handlers between two of its own instructions, minutes late if a compiler or decoder is at work. So a
    thread reads the numbers of signals from a pipe, into which they are written at once.
    """
    if threading.current_thread() is not threading.main_thread():  # where Python lets nobody handle signals
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    previous, wakeup = handle(_ignore), signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(reader, frozenset(previous)), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        restore(previous)
        os.close(writer)
        watcher.join()
        os.close(reader)


def take_back() -> None:
    """For `requeued`, after jax.distributed.initialize, which handles SIGTERM in its own way."""
    if signal.getsignal(signal.SIGTERM) is _ignore:
        handle(_ignore)


def _ignore(number: int, frame: Any) -> None:
    del number, frame


def _watch(reader: int, numbers: frozenset[int]) -> None:
    while received := os.read(reader, 1):
        if received[0] in numbers and not _saving.is_set():
            end = threading.Timer(SECONDS, os._exit, [REQUEUE])  # a terminal that is stopped takes no output
            end.daemon = True
            end.start()
            with contextlib.suppress(Exception):
                name = signal.Signals(received[0]).name
                sys.stdout.flush()
                start = AFTER_BAR if os.isatty(2) else ""
                os.write(2, f"{start}ssl-jax: {name}: nothing to save; the same command goes on from here\n".encode())
            os._exit(REQUEUE)


class _Tolerant:
    """A stream of text that goes nowhere once its reader has gone: a pipe that was closed, a terminal that hung up."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, work: Callable[..., Any], *args: Any) -> None:
        try:
            work(*args)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            discard(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def discard(stream: TextIO) -> None:
    """Sends what the stream still holds, and all that follows, nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


@contextlib.contextmanager
def unread() -> Iterator[None]:
    """Output that nobody reads any more is no error."""
    streams = sys.stdout, sys.stderr
    tolerant: Any = [_Tolerant(stream) for stream in streams]
    sys.stdout, sys.stderr = tolerant
    try:
        yield
    finally:
        for stream in tolerant:
            with contextlib.suppress(OSError):  # a full disk
                stream.flush()
        sys.stdout, sys.stderr = streams
