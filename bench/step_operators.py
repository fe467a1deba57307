#!/usr/bin/env python
"""The operators that PyTorch dispatches in one step of `train`, by kind, without views: on a GPU each is at least one
launch, unless a CUDA graph holds it.

    python bench/step_operators.py

Qwen2 of 4 layers in bfloat16 on the CPU, LoRA with dropout on seven projections, 4 rows of three texts. It is
the third step, because a run on a GPU captures its passes in the second.

"cuda" is the path that a run on a GPU takes: captured micro-batches with fused layers, soft tokens drafted on the
engine's decoder. Each start of a kernel counts, by the kernel's name, inside of our operators too, and so does each
product that they leave to cuBLAS; an allocation starts nothing. So PyTorch's own operators are the only ones that may
start more than one. No kernel runs here: what would be its result is ones, on which no count depends.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from gircse import GIRCSE
from gircse.data.rows import Row
from gircse.engine import draft as engine_draft
from gircse.engine import pool
from gircse.engine.body import decoder, probe
from gircse.ops import info_nce_op, soft_embed_op
from gircse.train import step as train_step
from gircse.train.capture import CapturedPasses, layers
from gircse.train.config import TrainConfig
from gircse.train.loop import train
from gircse.train.step_monitor import StepMonitor
from tests.tiny_models import tiny_tokenizer

CASES = ((0, 0.0), (5, 0.0), (20, 0.0), (5, 1.0))  # K and the factor of the soft tokens' gradient
ALLOCATIONS = ("empty", "new_empty", "empty_like")
NO_KERNEL = (
    *ALLOCATIONS,
    "set_",
    "promote_types",
    "profiler._record_function_enter_new",
    "profiler._record_function_exit",
)


class OperatorCounts(TorchDispatchMode):
    """Counts operators other than views, by name.

    Args:
        inside: count those that our operators are made of in their place, and none that starts no kernel. What they
            allocate is filled with ones.
    """

    def __init__(self, *, inside: bool = False) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.looks_on = inside  # see `gircse.ops.observers`

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        returns = func._schema.returns
        is_view = any(item.alias_info is not None and not item.alias_info.is_write for item in returns)
        name = str(func.overloadpacket).removeprefix("aten.")
        if not is_view and name != "_unsafe_view" and not (self.looks_on and name in NO_KERNEL):
            self.counts[name] += 1
        result = func(*args, **(kwargs or {}))
        if self.looks_on and name in ALLOCATIONS and result.is_floating_point():
            result.fill_(1)
        return result


@contextmanager
def as_on_cuda(counted: OperatorCounts) -> Iterator[None]:
    """Inside, a run on the CPU goes the way of one on a GPU, and the starts of kernels are counted."""
    from gircse_kernels import launching

    def in_place(captured):  # what a capture does with a pass, without a graph
        captured.warm_up()
        return captured.forward, captured.backward

    with ExitStack() as stack:

        def replace(owner: Any, name: str, value: Any) -> None:
            stack.enter_context(patch.object(owner, name, value))

        for module in (decoder, info_nce_op, layers, soft_embed_op):
            replace(module, "resolve_backend", lambda *_: "triton")
        replace(engine_draft, "decode_kernel", lambda *_: "triton")
        replace(pool, "_zeros", lambda count, like: like.new_zeros(count))
        replace(train_step, "drafter_of", lambda model, _: engine_draft.fused_drafter(model.causal_lm))
        replace(train_step.CapturedPasses, "of", lambda model, _: CapturedPasses(model, record=in_place))
        replace(probe, "tolerance_of", lambda _: math.inf)
        replace(launching, "launch", lambda kernel, *_, **__: counted.counts.update([kernel.fn.__name__]))
        for name in ("product", "batched_product"):
            replace(launching, name, lambda *_, name=name, **__: counted.counts.update([name]))
        yield


def operators_of_a_step(num_steps: int, factor: float, *, cuda: bool = False) -> Counter[str]:
    """Of one training step, by name."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen2", tie_word_embeddings=True, max_position_embeddings=512, hidden_size=32, intermediate_size=48,
        num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, vocab_size=131,
    )  # fmt: skip
    model = GIRCSE(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), tiny_tokenizer())
    rows = [Row("", f"q {i}", (f"p {i}",), (f"n {i}",)) for i in range(8)]
    counted, until = OperatorCounts(inside=cuda), []
    start = StepMonitor.start

    def noted(monitor: StepMonitor) -> None:
        until.append(counted.counts.copy())
        start(monitor)

    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        settings = TrainConfig(
            output=f"{folder}/run", num_steps=num_steps, soft_token_gradient=factor, batch_size=4, max_steps=4,
            micro_batch_tokens=100_000, save_every=100, progress=False, device="cpu",
        )  # fmt: skip
        stack.enter_context(patch.object(StepMonitor, "start", noted))
        if cuda:
            stack.enter_context(as_on_cuda(counted))
        stack.enter_context(counted)
        train(settings, rows=rows, model=model)
    return until[3] - until[2]


def main() -> int:
    """Prints the rows of the table in docs/training.md."""
    for num_steps, factor in CASES:
        name = f"K = {num_steps}" + (", the paper's gradient" if factor else " by the block" if num_steps else "")
        paths = [operators_of_a_step(num_steps, factor, cuda=cuda) for cuda in (False, True)]
        kinds = (", ".join(f"{kind} {count:,}" for kind, count in counts.most_common(6)) for counts in paths)
        cells = (f"{counts.total():,}: {kind}" for counts, kind in zip(paths, kinds, strict=True))
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
