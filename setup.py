"""The one setting that pyproject.toml cannot hold: `gircse_kernels` lies in a folder that must not be a package."""

from setuptools import setup

# Hugging Face has a distribution named `kernels`, so the folder of that name must not become importable.
setup(package_dir={"gircse_kernels": "kernels/gircse_kernels"})
