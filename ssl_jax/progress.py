"""What a person sees while a run works: one live line on a terminal, plain lines elsewhere."""

import sys
import time
from typing import Any


class Progress:
    """Shows step, loss, speed, waiting and time left. Use as a context; `say` prints a line that stays."""

    def __init__(self, total: int, start: int, title: str):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self.total, self.title = total, title
        self.console = Console(stderr=True)
        self.bar = None
        self.began, self.first, self.said = time.monotonic(), start, 0.0
        if sys.stderr.isatty():
            columns = [
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(),
            ]
            self.bar = Bar(*columns, console=self.console, transient=False)
            self.task = self.bar.add_task(title, total=total, completed=start, note="compiling")
        else:
            self.say(f"{title}: {total} steps, compiling")

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
        else:
            print(text, file=sys.stderr, flush=True)

    def update(self, step: int, values: dict[str, Any]) -> None:
        note = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
        if self.bar:
            self.bar.update(self.task, completed=step, note=note)
        elif time.monotonic() - self.said > 10 or step == self.total:  # a log file needs no line a second
            self.said = time.monotonic()
            left = (self.said - self.began) / max(step - self.first, 1) * (self.total - step)
            self.say(f"{self.title} {step}/{self.total}  {note}  left {_clock(left)}")


def _clock(seconds: float) -> str:
    return time.strftime("%H:%M:%S", time.gmtime(seconds))
