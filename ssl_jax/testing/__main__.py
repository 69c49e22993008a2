"""`python -m ssl_jax.testing NAME ...` runs the contract test on these methods; flags go to pytest."""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    # Before JAX is imported: four simulated devices, on which every method must do the same as on one.
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    import pytest

    names = [arg for arg in sys.argv[1:] if not arg.startswith("-")]
    flags = [arg for arg in sys.argv[1:] if arg.startswith("-")]
    if not names:
        sys.exit("usage: python -m ssl_jax.testing METHOD ... [PYTEST FLAGS]")
    os.environ["SSL_JAX_METHODS"] = ",".join(names)
    sys.exit(pytest.main([str(Path(__file__).parent / "test_contract.py"), "-q", *flags]))
