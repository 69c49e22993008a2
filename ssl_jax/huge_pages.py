"""Memory in pages of 2 MB, which Linux gives only to programs that ask for them when they start."""

import os
import sys
from pathlib import Path

KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def restart() -> None:
    """Starts this process again, as it was called and with the same number, so that its memory has large pages.

    A training step on a CPU fills hundreds of megabytes; in pages of 4 kB, that takes the kernel 10 to 20 % of the time
    (benchmarks/). Nothing happens on other systems, where all programs have large pages or none may have them, and
    where GLIBC_TUNABLES is set already, by the user or by this function.
    """
    if "GLIBC_TUNABLES" in os.environ or not sys.executable or not KERNEL.is_file():
        return
    if "[madvise]" in KERNEL.read_text():
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, sys.orig_argv)
