"""The packages of a wheel: configs/ travels in it as `mvit_jax.configs`."""

from setuptools import find_namespace_packages, setup

setup(
    packages=[*find_namespace_packages(include=["mvit_jax*"]), "mvit_jax.configs"],
    package_dir={"mvit_jax.configs": "configs"},
)
