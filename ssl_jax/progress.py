"""The progress of a run: one live line on a terminal, plain lines elsewhere."""

import contextlib
import datetime
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

QUIET = False  # `--quiet`: no progress at all
SLOW = 30  # seconds without a line, after which one tells that the run goes on


class Progress:
    """A context manager that shows step, loss, speed, waiting and time left. `say` prints a line that stays."""

    def __init__(self, total: int, start: int, title: str, unit: str = "steps", note: str = "", quiet: bool = False):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self.total, self.title, self.quiet = total, title, quiet or QUIET
        self.console = Console(stderr=True)
        self.bar = None
        self.begun: tuple[float, int] | None = None
        self.last_line = 0.0
        if sys.stderr.isatty() and not self.quiet:
            columns = [
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(),
            ]
            self.bar = Bar(*columns, console=self.console, transient=False)
            self.task = self.bar.add_task(title, total=total, completed=start, note=note)
        else:
            self.say(f"{title}: {total} {unit}" + (f", {note}" if note else ""))

    def __enter__(self):
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_):
        if self.bar:
            self.bar.stop()

    def say(self, text: str) -> None:
        if self.bar:
            self.console.print(text, highlight=False, markup=False)
        elif not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def begin(self, step: int) -> None:
        """`step` was the first, which had to wait for the compiler: the time left is estimated from here."""
        self.begun = time.monotonic(), step
        if self.bar:
            self.bar.update(self.task, completed=step)

    def update(self, step: int, values: dict[str, Any]) -> None:
        note = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
        if self.bar:
            self.bar.update(self.task, completed=step, note=note)
            return
        now = time.monotonic()
        if not self.begun:
            self.begin(step)
        if now - self.last_line > 10 or step == self.total:  # not every step, to keep log files short
            self.last_line = now
            self.say(f"{self.title} {step}/{self.total}  {note}{self._left(now, step)}")

    def reached(self, step: int) -> None:
        """A step without new values: a line of its own only if steps are slow."""
        now = time.monotonic()
        if self.bar:
            self.bar.update(self.task, completed=step)
        elif self.begun and now - max(self.last_line, self.begun[0]) > SLOW:
            self.last_line = now
            self.say(f"{self.title} {step}/{self.total}{self._left(now, step)}")

    def _left(self, now: float, step: int) -> str:
        since, first = self.begun or (now, step)
        return f"  left {clock((now - since) / (step - first) * (self.total - step))}" if step > first else ""


@contextlib.contextmanager
def counting(title: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """Shows the progress of a long task: call the function that this context manager yields with (done, total)."""
    with contextlib.ExitStack() as stack:
        bars: list[Progress] = []

        def update(done: int, total: int) -> None:
            if not bars:
                bars.append(stack.enter_context(Progress(total, 0, title, unit)))
            bars[0].update(done, {})

        yield update


def clock(seconds: float) -> str:
    """Hours, minutes and seconds.

    >>> clock(61.4), clock(100_000)
    ('0:01:01', '1 day, 3:46:40')
    """
    return str(datetime.timedelta(seconds=round(seconds)))
