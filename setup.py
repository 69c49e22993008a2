"""Packages and their files; everything else is in pyproject.toml. The top-level configs/ ships as ssl_jax.configs."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["ssl_jax", "ssl_jax.*"]), "ssl_jax.configs"],
    package_dir={"ssl_jax.configs": "configs"},
    package_data={"ssl_jax": ["labelling.html"]},
)
