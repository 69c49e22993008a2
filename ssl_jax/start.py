"""What is set before a command starts: the folder of compiled programs, a home folder, the platform."""

import atexit
import contextlib
import os
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

import jax


def start_jax() -> None:
    """Keeps compiled programs in the user's cache folder, unless the environment names another one.

    A user without a home folder gets a temporary one, which other libraries want to write to as well. If libtpu is
    installed, as `plan` needs it, but the machine has no accelerator, JAX is told not to look for a TPU.
    """
    try:
        Path.home()
    except RuntimeError:  # HOME is not set, and the user is not in /etc/passwd: common in containers
        os.environ["HOME"] = tempfile.mkdtemp(prefix="ssl_jax_home_")
        atexit.register(shutil.rmtree, os.environ["HOME"], ignore_errors=True)
    if find_spec("libtpu") and "JAX_PLATFORMS" not in os.environ and not _accelerators():
        jax.config.update("jax_platforms", "cpu")
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        home = os.environ.get("XDG_CACHE_HOME") or str(Path("~/.cache").expanduser())
        folder = Path(home) / "ssl_jax" / "xla"
        with contextlib.suppress(OSError):  # a home that nobody may write to: then programs are not kept
            folder.mkdir(parents=True, exist_ok=True)
            jax.config.update("jax_compilation_cache_dir", str(folder))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _accelerators() -> list[Path]:
    return [path for name in ("accel*", "nvidia*", "vfio") for path in Path("/dev").glob(name)]
