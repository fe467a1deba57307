from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from examples.soft_prompt import search
from tests.tiny_models import tiny_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_the_search_finds_a_better_prefix(name: str) -> None:
    """On a frozen random model; what it was before, bitwise, it is afterwards."""
    model = tiny_model(name, attn="eager" if name == "gemma2" else None).requires_grad_(False)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    prompt, target = torch.randint(5, 60, (5,)), torch.randint(5, 60, (2,))
    found = search(model, prompt, target, length=4, steps=60, other_table=torch.randn(131, 12))
    assert found.after < found.before - 0.1
    assert found.tokens.shape == (4,)
    assert sum(found.losses[-10:]) < sum(found.losses[:10])
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    again = search(model, prompt, target, length=4, steps=60, other_table=torch.randn(131, 12), fluency=0.0)
    once_more = search(model, prompt, target, length=4, steps=60, fluency=0.0)
    assert torch.equal(again.tokens, once_more.tokens)  # the other table draws the same tokens


@pytest.mark.smollm2
def test_the_command() -> None:
    command = [sys.executable, str(ROOT / "examples" / "soft_prompt.py"), "The capital of France is", " Berlin."]
    done = subprocess.run(
        [*command, "--steps", "12", "--length", "4"], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    before, after = done.stdout.splitlines()[-1].split(": ")[-1].split(" nats a token, ")
    assert float(after.removesuffix(" with it")) < float(before)
