"""Work and floors: FLOPs against PyTorch's counter, and the floors of a step on an H100."""

from __future__ import annotations

import pytest
import torch

from bench.shapes import SHAPES, meta_model
from gircse.roofline import Ceilings, ModelFacts
from tests.tiny_models import tiny_model

H100 = Ceilings(flops_per_s=790e12, bytes_per_s=3.0e12)


@pytest.mark.parametrize(
    ("name", "rows", "length", "milliseconds"),
    [
        ("mistral-7b", 1, 64, 4.83),
        ("mistral-7b", 256, 512, 10.55),
        ("qwen2.5-7b", 64, 64, 5.16),
        ("qwen2.5-0.5b", 1, 64, 0.330),
        ("qwen2.5-0.5b", 64, 512, 0.464),
        ("smollm2-135m", 64, 64, 0.121),
        ("smollm2-135m", 256, 512, 1.11),
    ],
)
def test_floor_of_a_step_on_an_h100(name, rows, length, milliseconds):
    """The figures worked out by hand for the engine (3.0 TB/s, 790 TFLOP/s, bfloat16)."""
    facts = ModelFacts.of(meta_model(SHAPES[name].config(), torch.bfloat16))
    step = H100.seconds(facts.inference([length] * rows, 1)[1:])
    assert step * 1e3 == pytest.approx(milliseconds, rel=0.04)


def test_flops_of_the_prompt_and_of_a_training_step():
    """Against PyTorch's own counter of what a tiny model multiplies (attention apart, which it counts uncausally)."""
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny_model("llama", attn="eager")
    facts = ModelFacts.of(model)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.base_model(torch.ones(2, 7, dtype=torch.long))
    attention = 4 * facts.layers * facts.heads * facts.head_dim
    causal = counter.get_total_flops() - attention * (2 * 7 * 7 - 2 * 28)
    assert facts.prompt([7, 7]).flops == pytest.approx(causal, rel=1e-3)  # some versions count the rotary angles
    forward, whole = facts.inference([7, 7], 2), facts.training([7, 7], 2)
    assert whole[: len(forward)] == forward
    assert len(whole) == 2 * len(forward)
    by_block, backward = facts.training_passes([7, 7], 2, by_block=True)
    assert by_block[:-1] == forward[:-1]
    assert by_block[-1].flops == forward[2].flops + forward[4].flops
    assert len(backward) == 2  # of the prompt and of the block


def test_sliding_window_limits_the_pairs():
    facts = ModelFacts.of(tiny_model("mistral"))
    assert facts.window == 5
    assert facts._pairs(4) == 10
    assert facts._pairs(8) == sum(min(i, 5) for i in range(1, 9))
