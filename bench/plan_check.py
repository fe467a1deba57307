"""`gircse train --plan` against measured memory of a training step with random weights; `bench/gpu_suite.py` runs it.

On CUDA the whole plan is compared with what PyTorch's allocator holds at the peak of the second step, AdamW included.
cuBLAS' workspaces are left out: the first product of a process leaves them there, and the plan counts them with the
context. On a CPU a rollout and its backward are compared with what the profiler counts, which is exact for tensors.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from bench.batches import random_batch
from bench.memory import give_back, peak_extra_bytes
from bench.shapes import SHAPES, random_model
from bench.timing import seconds
from bench.training import checkpointed, with_lora
from gircse import ops
from gircse.lm.causal_lm import CausalLM
from gircse.lm.rollout import rollout
from gircse.train.config import TrainConfig
from gircse.train.plan.extrapolate import TracedModel
from gircse.train.plan.meta_step import PromptShape
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
    soft_token_gradient: float = 1.0
    layers: int | None = None
    dtype: str = "bfloat16"

    def config(self) -> TrainConfig:
        return TrainConfig(
            batch_size=self.queries,
            num_steps=self.num_steps,
            soft_token_gradient=self.soft_token_gradient,
            gradient_checkpointing=self.checkpointing,
            cuda_graphs=False,  # the steps here are single kernels
            dtype=self.dtype,
            query_max_length=self.length,
            passage_max_length=self.length,
        )

    def trainable(self, device: torch.device) -> CausalLM:
        """The model with LoRA and dropout as in training."""
        base = SHAPES[self.shape].config(self.layers)
        return with_lora(random_model(base, dtype=getattr(torch, self.dtype), device=device), self.config())


CASES = [
    PlanCase("qwen2.5-0.5b", 8, 512, 5, checkpointing=False),
    PlanCase("qwen2.5-0.5b", 16, 512, 5, checkpointing=True),
    PlanCase("qwen2.5-0.5b", 8, 128, 10, checkpointing=False),
    PlanCase("qwen2.5-0.5b", 8, 128, 20, checkpointing=False, soft_token_gradient=0.0),
    PlanCase("mistral-7b", 2, 512, 5, checkpointing=False),
    PlanCase("mistral-7b", 8, 512, 5, checkpointing=True),
    PlanCase("mistral-7b", 8, 512, 20, checkpointing=True, soft_token_gradient=0.0),
]
SMOKE_CASES = [
    PlanCase("smollm2-135m", 2, 16, 2, checkpointing, float(checkpointing), layers=4, dtype="float32")
    for checkpointing in (False, True)
]


def check(case: PlanCase, device: torch.device) -> dict[str, Any]:
    """One case's prediction beside what was measured: `error` is the prediction over it, minus 1."""
    return check_on_cuda(case, device) if device.type == "cuda" else check_on_cpu(case, device)


def check_on_cuda(case: PlanCase, device: torch.device) -> dict[str, Any]:
    """The whole plan against the allocator's peak in the second of two steps, whose time stands beside its floor."""
    _make_workspaces(case, device)
    give_back(device)
    before = torch.cuda.memory_allocated(device)
    lm = case.trainable(device)
    predicted = plan(case.config(), gpu="h100", negatives=1, model_config=SHAPES[case.shape].config(case.layers))
    optimizer = torch.optim.AdamW(p for p in lm.model.parameters() if p.requires_grad)
    batch = random_batch(lm.embed_weight.shape[0], [case.length] * 3 * case.queries, seed=0, device=device)

    def step() -> None:
        states = rollout(lm, *batch, case.num_steps, soft_token_gradient=case.soft_token_gradient).steps
        sides = states[: case.queries], states[case.queries :]
        ops.icr_objective(ops.stepwise_info_nce(*sides)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    with checkpointed(lm, case.checkpointing):
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
    traced = TracedModel.of(case.config(), SHAPES[case.shape].config(case.layers))
    prompts = [PromptShape(case.queries, case.length)]
    predicted = traced.memory(prompts, case.num_steps, case.soft_token_gradient, cuda=False).peak
    lm = case.trainable(device)
    batch = random_batch(lm.embed_weight.shape[0], [case.length] * case.queries, seed=0, device=device)
    for parameter in lm.model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None

    def step() -> None:
        states = rollout(lm, *batch, case.num_steps, soft_token_gradient=case.soft_token_gradient).steps
        states.backward(torch.ones_like(states))

    with checkpointed(lm, case.checkpointing):
        step()
        return _point(case, predicted, peak_extra_bytes(step, device))


def _point(case: PlanCase, predicted: int, measured: int) -> dict[str, Any]:
    error = predicted / measured - 1
    return {**asdict(case), "predicted_bytes": predicted, "measured_bytes": measured, "error": error}
