"""Which form the plan chooses for which problem, and what it costs. Needs no GPU.

    PYTHONPATH=.:kernels python -m bench.static.plans --arch 90

One line for each of 46 problems: the matrices of seven models, rows of a decoding step up to those of a training
step, bfloat16, and float32 for one model. docs/kernels.md shows the same lines.
"""

from __future__ import annotations

import argparse
import sys
from typing import NamedTuple

from gircse_kernels.plan import Device, FewRows, OneRow, Problem, TwoProducts, cdiv

from bench.cases import MODELS
from bench.static import traffic
from bench.static.launches import DEVICES
from bench.tables import Column, markdown

_MODELS = ("smollm2-135m", "qwen2.5-0.5b", "qwen3-0.6b", "llama-3.2-1b", "qwen3-4b", "mistral-7b", "qwen2.5-7b")
_ROWS = (1, 16, 32, 64, 256, 1024)
PROBLEMS = [
    *((model, rows, "bf16") for model in _MODELS for rows in _ROWS),
    *(("smollm2-135m", rows, "fp32") for rows in (1, 16, 64, 1024)),
]


class Line(NamedTuple):
    """A problem and the plan of its forward."""

    model: str
    dtype: str
    problem: Problem
    plan: OneRow | FewRows | TwoProducts
    work: list[traffic.Work]

    @property
    def floor(self) -> traffic.Floor:
        return traffic.forward_floor(self.problem)

    @property
    def launches(self) -> int:
        """Kernels of ours and of cuBLAS."""
        return sum(work.launches for work in self.work)


def line(model: str, rows: int, dtype: str, device: Device) -> Line:
    """What a call for the result alone would run on that device."""
    problem = problem_of(model, rows, 4 if dtype == "fp32" else 2)
    work = traffic.forward_work(problem, device)
    return Line(model, dtype, problem, traffic.forward_plan(problem, device), work)


def given_logits(model: str, rows: int, device: Device) -> Line:
    """The same where the logits are given, bfloat16."""
    problem = problem_of(model, rows)._replace(width=0, tied=False)
    work = traffic.forward_work(problem, device)
    return Line(model, "bf16", problem, traffic.forward_plan(problem, device), work)


def problem_of(model: str, rows: int, itemsize: int = 2) -> Problem:
    matrices = MODELS[model]
    return Problem(rows, matrices.vocab, matrices.width, matrices.width, matrices.tied, itemsize)


def describe(plan: OneRow | FewRows | TwoProducts, problem: Problem) -> str:
    """The form and its shares of the work, in words."""
    if isinstance(plan, OneRow):
        return f"one row, {plan.splits} splits"
    if isinstance(plan, FewRows):
        return f"few rows, {plan.splits} splits x {plan.row_blocks}"
    how = "epilogue" if plan.product else "cuBLAS, half scores" if plan.half_scores else "cuBLAS, float32 scores"
    blocks = cdiv(problem.rows, plan.row_block)
    return f"many rows, {cdiv(problem.vocab, plan.chunk)} chunks{f' x {blocks}' if blocks > 1 else ''}, {how}"


COLUMNS: list[Column] = [
    ("model", lambda x: x.model),
    ("T", lambda x: str(x.problem.rows)),
    ("dtype", lambda x: x.dtype),
    ("form", lambda x: describe(x.plan, x.problem)),
    ("launches", lambda x: str(x.launches)),
    ("floor MB", lambda x: f"{x.floor.bytes / 1e6:,.0f}"),
    ("matrices and rows / floor", lambda x: f"{sum(w.matrix_bytes + w.row_bytes for w in x.work) / x.floor.bytes:.2f}"),
    ("partials / floor", lambda x: f"{sum(w.partial_bytes for w in x.work) / x.floor.bytes:.2f}"),
    ("FLOPs / floor", lambda x: f"{sum(w.flops for w in x.work) / x.floor.flops:.2f}"),
    ("scratch MiB", lambda x: f"{x.plan.scratch(x.problem) / 2**20:.1f}"),
]


def lines(device: Device) -> list[Line]:
    return [line(*problem, device) for problem in PROBLEMS]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.static.plans", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, default=90, choices=list(DEVICES), help="compute capability (default 90)")
    print(markdown(COLUMNS, lines(DEVICES[parser.parse_args(argv).arch])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
