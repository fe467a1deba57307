#!/usr/bin/env python
"""The operators that PyTorch dispatches in one step of `train`, by kind, without views: on a GPU each is at least one
launch, unless a CUDA graph holds it.

    python bench/step_operators.py

Qwen2 of 4 layers in bfloat16 on the CPU, LoRA with dropout on seven projections, 4 rows of three texts. Half the
difference between runs of 4 and of 2 steps leaves out what a run does once.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from gircse import GIRCSE
from gircse.data.rows import Row
from gircse.train.config import TrainConfig
from gircse.train.loop import train
from tests.tiny_models import tiny_tokenizer

CASES = ((0, 0.0), (5, 0.0), (20, 0.0), (5, 1.0))  # K and the factor of the soft tokens' gradient


class OperatorCounts(TorchDispatchMode):
    """Counts operators other than views, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        returns = func._schema.returns
        is_view = any(item.alias_info is not None and not item.alias_info.is_write for item in returns)
        if not is_view and func.overloadpacket is not torch.ops.aten._unsafe_view:
            self.counts[str(func.overloadpacket).removeprefix("aten.")] += 1
        return func(*args, **(kwargs or {}))


def operators_of_a_step(num_steps: int, factor: float) -> Counter[str]:
    """Of one training step, by name."""
    few, many = (_of_a_run(steps, num_steps, factor) for steps in (2, 4))
    return Counter({name: (count - few[name]) // 2 for name, count in many.items()})


def _of_a_run(steps: int, num_steps: int, factor: float) -> Counter[str]:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen2", tie_word_embeddings=True, max_position_embeddings=512, hidden_size=32, intermediate_size=48,
        num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, vocab_size=131,
    )  # fmt: skip
    model = GIRCSE(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), tiny_tokenizer())
    rows = [Row("", f"q {i}", (f"p {i}",), (f"n {i}",)) for i in range(8)]
    with tempfile.TemporaryDirectory() as folder, OperatorCounts() as counted:
        settings = TrainConfig(
            output=f"{folder}/run", num_steps=num_steps, soft_token_gradient=factor, batch_size=4, max_steps=steps,
            micro_batch_tokens=100_000, save_every=100, progress=False,
        )  # fmt: skip
        train(settings, rows=rows, model=model)
    return counted.counts


def main() -> int:
    for num_steps, factor in CASES:
        counts = operators_of_a_step(num_steps, factor)
        kinds = ", ".join(f"{name} {count:,}" for name, count in counts.most_common(8))
        print(f"K = {num_steps}, soft_token_gradient {factor:g}: {counts.total():,} operators; {kinds}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
