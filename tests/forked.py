"""Python processes that begin with everything imported: forked from one that has nothing but imports behind it.

Importing takes a process longer than what most tests ask of it. No thread and no device has begun in the process that
is forked, so its children are what `python -c` starts, in every other respect: they have their own signals, files,
devices and ends.
"""

import atexit
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile

CLI = "import sys; from ssl_jax import cli; sys.exit(cli.main(sys.argv[1:]))"

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["forked", "ssl_jax.commands", "ssl_jax.report.html", "ssl_jax.audit.figures"])

# The command line, where a step of a network that takes no time takes 20 ms, so that a signal can come between any two.
# No views.png: half of the time of a short run. The fixture `uninterrupted` of test_train.py has it.
SLOWLY = """
import sys, time
from ssl_jax import cli
from ssl_jax.train import hooks, loop
hooks.write_views = lambda *_: None
batches = loop.batches
def slowly(*args):
    for batch in batches(*args):
        time.sleep(0.02)
        yield batch
loop.batches = slowly
sys.exit(cli.main(sys.argv[1:]))
"""


class Python:
    """`python -c code *argv`, with what tests need of subprocess.Popen."""

    def __init__(self, code, *argv, env=None):
        self._files = [tempfile.NamedTemporaryFile("r") for _ in range(2)]  # noqa: SIM115  # closed with this object
        names = [file.name for file in self._files]
        given = code, list(map(str, argv)), dict(os.environ if env is None else env), names
        self._process = _context.Process(target=_run, args=given)
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self):
        return self._process.exitcode

    poll = returncode.fget

    def send_signal(self, number):
        os.kill(self.pid, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout=300):
        self._process.join(timeout)
        if self.returncode is None:
            self.kill()
            raise subprocess.TimeoutExpired("forked", timeout)
        return self.returncode

    def communicate(self, timeout=300):
        """What it printed, once it has ended: (stdout, stderr)."""
        self.wait(timeout)
        return tuple(file.read() for file in self._files)


def _run(code, argv, env, names):
    for number, name in enumerate(names, start=1):
        os.dup2(os.open(name, os.O_WRONLY), number)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = ["-c", *argv]
    try:
        exec(code, {"__name__": "__main__"})
    finally:
        atexit._run_exitfuncs()
