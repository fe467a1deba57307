from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from examples import soft_prompt
from examples.soft_prompt import main, search
from tests.tiny_models import tiny_model, tiny_tokenizer


@pytest.mark.parametrize(("name", "hard"), [("llama", True), ("gemma2", False)])
def test_the_search_finds_a_better_prefix(name: str, hard: bool) -> None:
    """On a frozen random model; what it was before, bitwise, it is afterwards."""
    model = tiny_model(name, attn="eager" if name == "gemma2" else None).requires_grad_(False)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    prompt, target = torch.randint(5, 60, (5,)), torch.randint(5, 60, (2,))
    found = search(model, prompt, target, length=4, steps=40, hard=hard, other_table=torch.randn(131, 12))
    assert found.after < found.before - 0.1
    assert found.tokens.shape == (4,)
    assert sum(found.losses[-10:]) < sum(found.losses[:10])
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_another_table_draws_the_same_tokens() -> None:
    model = tiny_model("llama").requires_grad_(False)
    prompt, target = torch.randint(5, 60, (5,)), torch.randint(5, 60, (2,))
    one, other = (
        search(model, prompt, target, length=4, steps=5, other_table=table, fluency=0.0)
        for table in (None, torch.randn(131, 12))
    )
    torch.testing.assert_close(one.losses, other.losses, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("what", ["draws", "model"])
def test_under_checkpointing(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same losses when the draws, or the model's layers, are computed again in backward."""
    model = tiny_model("llama").requires_grad_(False)
    prompt, target = torch.randint(5, 60, (5,)), torch.randint(5, 60, (2,))
    expected = search(model, prompt, target, length=4, steps=5).losses
    if what == "draws":
        plain = soft_prompt.soft_embed
        monkeypatch.setattr(
            soft_prompt, "soft_embed", lambda *a, **options: checkpoint(plain, *a, use_reentrant=False, **options)
        )
    else:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        model.train()
    assert search(model, prompt, target, length=4, steps=5).losses == expected


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    options = ["--model", str(tmp_path), "--steps", "20", "--length", "4"]
    monkeypatch.setattr(sys, "argv", ["soft_prompt.py", "a fox", " sleeps", *options])
    assert main() == 0
    before, after = capsys.readouterr().out.splitlines()[-1].split(": ")[-1].split(" nats a token, ")
    assert float(after.removesuffix(" with it")) < float(before)
