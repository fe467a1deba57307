"""pyproject.toml says everything but this: an import package that lies in a folder which must not be a package."""

from setuptools import setup

# `kernels` is the name of a distribution of Hugging Face's: the folder of that name is never importable itself
setup(package_dir={"gircse_kernels": "kernels/gircse_kernels"})
