"""`gircse demo`: `run` trains and evaluates SmolLM2 on installed code; `smollm2` finds and converts its weights.

It imports `train`, `evaluation`, `data`, `inspect` and what is below them.
"""
