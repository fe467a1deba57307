#!/usr/bin/env python
"""What the gradient through the soft tokens costs: forward and backward of a rollout, one step after the other (the
paper's gradient) and by the block (soft tokens are constants in backward).

    python bench/soft_token_gradient.py --out bench/results/soft-token-gradient-cpu.json

Seconds of SmolLM2-135M with LoRA and random weights, all runs in turn; and the operators that PyTorch dispatches for
Qwen2.5-0.5B cut to 4 layers, 4 rows, bfloat16, counted on the meta device: on a GPU each is at least one launch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.batches import random_batch
from bench.provenance import provenance
from bench.records import save
from bench.shapes import SHAPES, random_model
from bench.tables import Column, column, table
from bench.timing import interleaved
from bench.training import with_lora
from gircse.lm.attention import ATTENTION_NAME
from gircse.lm.causal_lm import CausalLM
from gircse.lm.lora import fuse_lora
from gircse.lm.rollout import rollout
from gircse.train.config import TrainConfig
from gircse.train.lora import add_lora

STEPS = (0, 5, 20)
FACTORS = {"sequential": 1.0, "block": 0.0}
TOLERANCE = 1e-4  # of the states of one to those of the other, in float32


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0, 1 the two do not agree, 2 bad options."""
    parser = argparse.ArgumentParser(prog="bench/soft_token_gradient.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=32, help="tokens of each text (default: %(default)s)")
    parser.add_argument("--layers", type=int, help="cut the timed model to so many")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="file of the record")
    options = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base = random_model(SHAPES["smollm2-135m"].config(options.layers), dtype=torch.float32, device=device)
    lm = with_lora(base, TrainConfig(lora_dropout=0.0))
    batch = random_batch(lm.vocabulary, [options.length] * options.rows, seed=0, device=device)
    error = max(disagreement(lm, batch, steps) for steps in STEPS if steps)
    if not error <= TOLERANCE:
        print(f"states by the block differ from the sequential ones by {error:.1e}")
        return 1
    runs = {
        f"{steps} {name}": lambda steps=steps, factor=factor: step(lm, batch, steps, factor)
        for steps in STEPS
        for name, factor in FACTORS.items()
    }
    timings = interleaved(runs, device, options.repeats)
    points = [
        {
            "num_steps": steps,
            "seconds": {name: timings[f"{steps} {name}"].seconds for name in FACTORS},
            "runs": {name: timings[f"{steps} {name}"].runs for name in FACTORS},
            "operators": {name: operators(steps, factor) for name, factor in FACTORS.items()},
        }
        for steps in STEPS
    ]
    record = {"benchmark": "soft-token-gradient", "rows": options.rows, "length": options.length, "points": points}
    record |= {"error": error, "repeats": options.repeats, "layers": options.layers}
    record["provenance"] = provenance(device, "soft-token-gradient")
    print(table(COLUMNS, points))
    if options.out:
        save(record, options.out)
    return 0


def step(lm: CausalLM, batch: Sequence[Any], num_steps: int, factor: float) -> torch.Tensor:
    """Forward and backward, with a random upstream gradient -> the states."""
    found = rollout(lm, *batch, num_steps, soft_token_gradient=factor)
    states = found.steps if num_steps else found.prompt
    states.backward(torch.randn_like(states))
    lm.model.zero_grad(set_to_none=True)
    return states.detach()


def disagreement(lm: CausalLM, batch: Sequence[Any], num_steps: int) -> float:
    """The largest relative difference of a state by the block to the sequential one; warms both up."""
    ours, theirs = (step(lm, batch, num_steps, FACTORS[name]) for name in ("block", "sequential"))
    return ((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).max().item()


class Operators(TorchDispatchMode):
    """Counts operators other than views."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        returns = func._schema.returns
        is_view = any(item.alias_info is not None and not item.alias_info.is_write for item in returns)
        self.count += not is_view and func.overloadpacket is not torch.ops.aten._unsafe_view
        return func(*args, **(kwargs or {}))


def operators(num_steps: int, factor: float) -> int:
    """Of forward and backward of one rollout."""
    base = random_model(SHAPES["qwen2.5-0.5b"].config(4), dtype=torch.bfloat16, device="meta")
    fuse_lora(add_lora(base, TrainConfig(lora_dropout=0.0)).train())
    base.set_attn_implementation(ATTENTION_NAME)
    lm = CausalLM(model=base, body=base.base_model, attention_calls=4)
    ids = torch.zeros(4, 32, dtype=torch.long, device="meta")
    with Operators() as counted:
        step(lm, (ids, torch.ones_like(ids)), num_steps, factor)
    return counted.count


COLUMNS: list[Column] = [
    column("K", "num_steps"),
    column("seconds, sequential", "seconds.sequential", "{:.2f}"),
    column("by the block", "seconds.block", "{:.2f}"),
    ("block / sequential", lambda point: f"{point['seconds']['block'] / point['seconds']['sequential']:.2f}"),
    column("operators, sequential", "operators.sequential", "{:,}"),
    column("by the block", "operators.block", "{:,}"),
]


if __name__ == "__main__":
    sys.exit(main())
