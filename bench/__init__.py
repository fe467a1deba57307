"""Benchmarks. `python bench/run.py` is the entry point; nothing here is installed with the package."""
