#!/usr/bin/env python
"""`gircse train --plan` against reality: predicted and measured peak memory of a training step, random weights.

    PYTHONPATH=.:kernels python bench/plan_check.py --out plan.json

On CUDA: all that PyTorch's allocator holds at the peak of the second step, AdamW included, but for cuBLAS' workspaces,
which the first product of a process leaves there and the plan counts with the context. On the CPU (`--smoke`): a
rollout and its backward by the profiler, which is exact for tensors. A prediction off by more than 15% makes the exit
code 1; the floor of the step stands beside its time.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench.batches import random_batch
from bench.memory import give_back, peak_extra_bytes
from bench.provenance import provenance
from bench.records import save
from bench.shapes import SHAPES, random_model
from bench.timing import seconds
from gircse import ops
from gircse.lm.causal_lm import CausalLM
from gircse.lm.quiet import quiet_peft
from gircse.lm.rollout import rollout
from gircse.show.tables import text_table
from gircse.train.config import TrainConfig
from gircse.train.lora import lora_targets
from gircse.train.plan.extrapolate import TracedModel
from gircse.train.plan.meta_step import Batch
from gircse.train.plan.predict import plan

TOLERANCE = 0.15


@dataclass(frozen=True)
class PlanCase:
    """A training step of `queries` rows with one negative each, all texts `length` tokens long."""

    shape: str
    queries: int
    length: int
    num_steps: int
    checkpointing: bool
    layers: int | None = None
    dtype: str = "bfloat16"

    def config(self) -> TrainConfig:
        return TrainConfig(
            batch_size=self.queries,
            num_steps=self.num_steps,
            gradient_checkpointing=self.checkpointing,
            dtype=self.dtype,
            query_max_length=self.length,
            passage_max_length=self.length,
        )


CASES = [
    PlanCase("qwen2.5-0.5b", 8, 512, 5, checkpointing=False),
    PlanCase("qwen2.5-0.5b", 16, 512, 5, checkpointing=True),
    PlanCase("qwen2.5-0.5b", 8, 128, 10, checkpointing=False),
    PlanCase("mistral-7b", 2, 512, 5, checkpointing=False),
    PlanCase("mistral-7b", 8, 512, 5, checkpointing=True),
]
SMOKE_CASES = [
    PlanCase("smollm2-135m", 2, 16, 2, checkpointing=checkpointing, layers=4, dtype="float32")
    for checkpointing in (False, True)
]
# On a GPU also with so many tokens that activations are most of the memory: a plan that is off in them is seen.
SMOKE_CUDA_CASES = [
    *SMOKE_CASES,
    *(replace(case, queries=16, length=256, dtype="bfloat16") for case in SMOKE_CASES),
]


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0, 1 a prediction is off, 2 bad options."""
    parser = argparse.ArgumentParser(prog="bench/plan_check.py", description=__doc__.split("\n")[0])
    parser.add_argument("--device", help="default: cuda, with --smoke cpu")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, on the CPU by default")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the record")
    options = parser.parse_args(argv)
    device = torch.device(options.device or ("cpu" if options.smoke else "cuda"))
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device: got {str(device)!r}, but PyTorch sees no GPU; --smoke is a dry run without one")
    if device.type == "cpu" and not options.smoke:
        parser.error("--device: got 'cpu', expected cuda, or cpu with --smoke")
    smoke = SMOKE_CUDA_CASES if device.type == "cuda" else SMOKE_CASES
    points = [check(case, device) for case in (smoke if options.smoke else CASES)]
    record = {
        "benchmark": "plan",
        "tolerance": TOLERANCE,
        "points": points,
        "met": all(abs(point["error"]) <= TOLERANCE for point in points),
        "provenance": provenance(device),
    }
    print(_table(points))
    print(f"predictions within {TOLERANCE:.0%}: {'yes' if record['met'] else 'NO'}")
    if options.out:
        save(record, options.out)
    print(json.dumps(record))
    return 0 if record["met"] else 1


def check(case: PlanCase, device: torch.device) -> dict[str, Any]:
    """One case's prediction beside what was measured."""
    return check_on_cuda(case, device) if device.type == "cuda" else check_on_cpu(case, device)


def check_on_cuda(case: PlanCase, device: torch.device) -> dict[str, Any]:
    """The whole plan against the allocator's peak over two steps."""
    _make_workspaces(case, device)
    give_back(device)
    config = case.config()
    before = torch.cuda.memory_allocated(device)
    lm, parameters = trainable(case, device)
    predicted = plan(config, gpu="h100", negatives=1, model_config=SHAPES[case.shape].config(case.layers))
    optimizer = torch.optim.AdamW(parameters)
    vocab = lm.embed_weight.shape[0]
    batches = [
        random_batch(vocab, [case.length] * rows, seed=seed, device=str(device))
        for seed, rows in enumerate((case.queries, 2 * case.queries))
    ]

    def step() -> None:
        states = [rollout(lm, *batch, case.num_steps).steps for batch in batches]
        ops.icr_objective(ops.stepwise_info_nce(*states)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    torch.cuda.reset_peak_memory_stats(device)
    took = seconds(step, device)
    measured = torch.cuda.max_memory_allocated(device) - before
    return _point(case, predicted.allocated_bytes, measured) | {
        "seconds": took,
        "floor_seconds": predicted.step_seconds,
        "time_over_floor": took / predicted.step_seconds,
        "memory": predicted.memory,
    }


def _make_workspaces(case: PlanCase, device: torch.device) -> None:
    """Has cuBLAS take its workspaces, forward's and backward's: only the first case of a process would count them."""
    ones = torch.ones(64, 64, dtype=getattr(torch, case.dtype), device=device, requires_grad=True)
    for bias in (None, ones[0]):
        torch.nn.functional.linear(ones, ones, bias).sum().backward()


def check_on_cpu(case: PlanCase, device: torch.device) -> dict[str, Any]:
    """The activations alone, of one batch and its backward."""
    model = TracedModel.of(case.config(), SHAPES[case.shape].config(case.layers))
    predicted = model.memory([Batch(case.queries, case.length)], case.num_steps, cuda=False).peak
    lm, parameters = trainable(case, device)
    batch = random_batch(lm.embed_weight.shape[0], [case.length] * case.queries, seed=0, device=str(device))
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)

    def step() -> None:
        states = rollout(lm, *batch, case.num_steps).steps
        states.backward(torch.ones_like(states))

    step()
    return _point(case, predicted, peak_extra_bytes(step, device))


def trainable(case: PlanCase, device: torch.device) -> tuple[CausalLM, list[torch.nn.Parameter]]:
    """The model with LoRA and dropout as in training, and its trainable parameters."""
    from peft import LoraConfig, get_peft_model

    config = case.config()
    dtype = getattr(torch, case.dtype)
    base = random_model(SHAPES[case.shape].config(case.layers), dtype=dtype, device=device)
    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=lora_targets(base),
        task_type="CAUSAL_LM",
    )
    with quiet_peft():
        adapted: Any = get_peft_model(base, lora)
    lm = CausalLM.from_model(adapted.get_base_model())
    if case.checkpointing:
        model: Any = lm.model
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)({"use_reentrant": False})
    lm.model.train()
    return lm, [parameter for parameter in adapted.parameters() if parameter.requires_grad]


def _point(case: PlanCase, predicted: int, measured: int) -> dict[str, Any]:
    return {
        **asdict(case),
        "predicted_bytes": predicted,
        "measured_bytes": measured,
        "error": predicted / measured - 1,
    }


def _table(points: Sequence[dict[str, Any]]) -> str:
    rows = [
        [
            f"{p['shape']}, {p['queries']} x (1 + 2), N = {p['length']}, K = {p['num_steps']}"
            + (", checkpointed" if p["checkpointing"] else ""),
            f"{p['predicted_bytes'] / 2**20:,.0f}",
            f"{p['measured_bytes'] / 2**20:,.0f}",
            f"{p['error']:+.1%}",
            f"{p['time_over_floor']:.2f}" if "time_over_floor" in p else "-",
        ]
        for p in points
    ]
    return text_table(["training step", "predicted MiB", "measured MiB", "error", "time / floor"], rows)


if __name__ == "__main__":
    sys.exit(main())
