"""Large pages: a program starts itself again where that helps, once, and gets them."""

import os
import subprocess
import sys

import pytest

from ssl_jax import huge_pages

TUNABLES = "GLIBC_TUNABLES"


@pytest.mark.parametrize(
    ("kernel", "environment", "restarts"),
    [
        ("always [madvise] never", {}, True),
        ("always [madvise] never", {TUNABLES: ""}, False),  # somebody has decided
        ("[always] madvise never", {}, False),
        ("always madvise [never]", {}, False),
        (None, {}, False),  # another system
    ],
)
def test_a_program_is_started_again_only_where_it_helps(tmp_path, monkeypatch, kernel, environment, restarts):
    monkeypatch.setattr(huge_pages, "KERNEL", tmp_path / "enabled")
    monkeypatch.setattr(os, "environ", dict(environment))
    started = []
    monkeypatch.setattr(os, "execv", lambda *call: started.append(call))
    if kernel:
        (tmp_path / "enabled").write_text(kernel)
    huge_pages.restart()
    assert started == ([(sys.executable, sys.orig_argv)] if restarts else [])
    assert os.environ.get(TUNABLES, "") == ("glibc.malloc.hugetlb=1" if restarts else "")


@pytest.mark.skipif(
    not huge_pages.KERNEL.is_file() or "[madvise]" not in huge_pages.KERNEL.read_text(),
    reason="this kernel gives large pages to all programs, or to none",
)
def test_memory_has_large_pages_and_arguments_stay(tmp_path):
    script = tmp_path / "odd name.py"
    script.write_text(
        "import ctypes, sys\n"
        "from ssl_jax.huge_pages import restart\n"
        "restart()\n"
        "libc = ctypes.CDLL(None)\n"
        "libc.malloc.restype = ctypes.c_void_p\n"
        "at = libc.malloc(ctypes.c_size_t(2**28))\n"
        "ctypes.memset(at, 1, 2**28)\n"
        "print(sys.argv[1:], [x for x in open('/proc/self/smaps_rollup') if x.startswith('AnonHuge')][0].split()[1])\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != TUNABLES}
    done = subprocess.run([sys.executable, script, "a b", ""], capture_output=True, text=True, env=environment)
    arguments, kilobytes = done.stdout.rsplit(" ", 1)
    assert arguments == "['a b', '']", done.stderr
    if kilobytes.strip() == "0":
        pytest.skip("an older glibc, or no large page is free")
    assert int(kilobytes) > 100_000
