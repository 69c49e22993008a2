"""Four simulated devices and a compilation cache, for this process and every process that a test starts.

TEST_DEVICES=8 in the environment: eight.
"""

import atexit
import gc
import os
import re
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest

# Most of the time goes into compiling; programs this small gain nothing from LLVM's optimizations.
DEVICES = os.environ.get("TEST_DEVICES", "4")
FLAGS = [f"--xla_force_host_platform_device_count={DEVICES}", "--xla_backend_optimization_level=0"]
FLAGS.append("--xla_cpu_parallel_codegen_split_count=1")  # both cores are busy with other tests
# The older way of making loops compiles small networks in half the time; later versions do not know the flag.
if tuple(map(int, version("jax").split(".")[:2])) < (0, 11):
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join(FLAGS)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["MPLBACKEND"] = "Agg"
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="ssl_jax_tests_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# The longest files first, and many short groups last, so that all workers end at about the same time.
FIRST = (
    "test_processes.py",
    "test_train.py",
    "test_methods_negative_free.py",
    "test_methods_pretext.py",
    "test_cli.py",
)
LAST = "test_contract.py"

# Tracing makes millions of objects that stay: with Python's defaults the collector looks at them all every few steps.
gc.set_threshold(100_000, 50, 100)


def group(nodeid):
    """A file's tests share a worker and what they made; those of one method share another, as they take the longest."""
    file, _, test = nodeid.partition("::")
    return " ".join(re.split(r"[\[\]-]", test)[1:2]) if file.endswith("test_contract.py") else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """One more than cores: tests that wait for other processes leave theirs idle."""
    return (os.cpu_count() or 1) + 1


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(FIRST)} | {LAST: len(FIRST) + 1}
    items.sort(key=lambda item: places.get(item.path.name, len(FIRST)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    # xdist_group marks (--dist loadgroup) are without effect under pytest 9.2: xdist 3.8 sets Item._nodeid, now unread.
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return group(nodeid)

    return ByGroup(config, log)


def pytest_runtest_teardown():
    """Compiled programs are dropped before they reach Linux's limit of 65,530 pieces of memory in a process."""
    pieces = Path("/proc/self/maps")
    if pieces.exists() and pieces.read_bytes().count(b"\n") > 50_000:
        import jax

        jax.clear_caches()
