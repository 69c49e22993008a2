"""The contract that every method keeps, as tests: `python -m ssl_jax.testing mypackage.mymethod`."""
