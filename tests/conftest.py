"""Four simulated devices and a compilation cache, for this process and every process that a test starts."""

import os
import tempfile

import pytest

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="ssl_jax_tests_"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")


def group(item):
    """A file's tests share a worker and what they made; those of one method share another, as they take the longest."""
    return f"{item.path.name} {item.callspec.params.get('name', '') if hasattr(item, 'callspec') else ''}"


def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.xdist_group(group(item)))


def pytest_runtest_teardown(item, nextitem):
    """Compiled programs of tests gone by are dropped: a process may not hold more than 65,530 pieces of memory."""
    if nextitem is not None and group(nextitem) != group(item):
        import jax

        jax.clear_caches()
