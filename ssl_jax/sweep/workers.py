"""Processes of one machine that share the trials of a sweep, each with its own devices."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ssl_jax import interrupts
from ssl_jax.errors import UserError

PAUSE = 0.2  # seconds between two looks at the workers


class Workers:
    """`count` processes `ssl-jax sweep ARGV --cells=K/N`. What they print goes to folder/K.log."""

    def __init__(self, argv: Sequence[str], count: int, folder: Path):
        self.argv, self.count, self.folder = list(argv), count, folder

    def run(self, tell: Callable[[], None]) -> None:
        """Starts them and waits until all have ended; calls `tell` meanwhile, from time to time.

        A signal goes on to all of them, which save their state; then SystemExit(75) is raised. Raises UserError if one
        of them has failed, when the others are done.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        received, stopped = list[int](), False
        processes: list[subprocess.Popen] = []
        previous = interrupts.handle(lambda number, frame: received.append(number))
        interrupts.leave_to_run(True)
        try:
            for k in range(1, self.count + 1):
                processes.append(self._start(k))
            while any(process.poll() is None for process in processes):
                while received:
                    number, stopped = received.pop(0), True
                    for process in processes:
                        if process.poll() is None:
                            process.send_signal(number)
                    print(f"{signal.Signals(number).name}: waiting for the workers to save", flush=True)
                time.sleep(PAUSE)
                tell()
        finally:
            for process in processes:
                if process.poll() is None:  # something went wrong here
                    process.terminate()
            interrupts.leave_to_run(False)
            interrupts.restore(previous)
        self._check([process.returncode for process in processes], stopped or bool(received))

    def _start(self, k: int) -> subprocess.Popen:
        command = [sys.executable, "-m", "ssl_jax.cli", "sweep", *self.argv, "--workers=1", f"--cells={k}/{self.count}"]
        environment = {**os.environ, **devices(k, self.count, os.environ)}
        with (self.folder / f"{k}.log").open("w") as log:
            # In a session of its own: Ctrl-C reaches it through this process, once.
            options: Any = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "start_new_session": True}
            return subprocess.Popen(command, env=environment, **options)

    def _check(self, codes: Sequence[int], stopped: bool) -> None:
        if stopped or interrupts.REQUEUE in codes:
            raise SystemExit(interrupts.REQUEUE)
        for k, code in enumerate(codes, 1):
            if code:
                log = self.folder / f"{k}.log"
                last = (log.read_text(errors="replace").strip().splitlines() or ["it printed nothing"])[-1]
                ended = f"ended with code {code}: {last.removeprefix('ssl-jax: ')[:1000]}"
                raise UserError(f"worker {k} of {self.count} {ended} (all it printed: {log})")


def devices(k: int, count: int, environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that give worker k of `count` its share of the GPUs; {} without GPUs.

    With fewer GPUs than workers, several share one, and its memory.

    >>> devices(2, 2, {"CUDA_VISIBLE_DEVICES": "0,1,2"}), devices(3, 3, {"CUDA_VISIBLE_DEVICES": "4,5"})
    ({'CUDA_VISIBLE_DEVICES': '1'}, {'CUDA_VISIBLE_DEVICES': '4', 'XLA_PYTHON_CLIENT_MEM_FRACTION': '0.45'})
    """
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    found = [str(number) for number in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]
    gpus = found if visible is None else [name for name in visible.split(",") if name]
    if not gpus:
        return {}
    if len(gpus) >= count:
        return {"CUDA_VISIBLE_DEVICES": ",".join(gpus[k - 1 :: count])}
    place = (k - 1) % len(gpus)
    sharing = len(range(place, count, len(gpus)))
    memory = environment.get("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{0.9 / sharing:.3g}")
    return {"CUDA_VISIBLE_DEVICES": gpus[place], **({"XLA_PYTHON_CLIENT_MEM_FRACTION": memory} if sharing > 1 else {})}
