from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from examples.soft_thinking import decode, main
from tests.tiny_models import tiny_model, tiny_tokenizer


def generate(model, ids, mask, kinds, **options):
    return model.generate(
        input_ids=ids, attention_mask=mask, custom_generate=decode, thinks=kinds == 0, noise=(kinds == 2).float(),
        warmth=torch.ones(len(ids)), max_new_tokens=5, pad_token_id=0, **options,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_mixed_batch_is_its_requests_one_by_one(name: str) -> None:
    """Left padding, a logits processor; a greedy row is what `generate` itself gives."""
    model = tiny_model(name, attn="eager" if name == "gemma2" else None)
    ids, kinds = torch.randint(5, 60, (3, 7)), torch.tensor([0, 1, 2])
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    options = {"repetition_penalty": 1.5, "eos_token_id": None}
    together = generate(model, ids, mask, kinds, **options)
    assert together.shape == (3, 12)
    plain = model.generate(
        input_ids=ids[1:2, 3:],
        attention_mask=mask[1:2, 3:],
        max_new_tokens=5,
        do_sample=False,
        pad_token_id=0,
        **options,
    )
    assert torch.equal(together[1, 7:], plain[0, 4:])
    alone = generate(model, ids[:1], mask[:1], kinds[:1], **options)
    assert torch.equal(together[0], alone[0])
    runs = [generate(model, ids, mask, kinds, seed=seed, **options) for seed in range(4)]
    assert all(torch.equal(run[:2], together[:2]) for run in runs)  # only the row that samples has noise
    assert len({tuple(run[2].tolist()) for run in runs}) > 1


def test_the_end_of_thinking_and_of_a_row() -> None:
    model, ids = tiny_model("llama"), torch.randint(5, 60, (1, 7))
    mask, soft = torch.ones_like(ids), torch.tensor([0])
    greedy = generate(model, ids, mask, soft + 1, eos_token_id=None)
    first = int(greedy[0, 7])
    assert torch.equal(generate(model, ids, mask, soft, max_thoughts=0, eos_token_id=None), greedy)
    once = generate(model, ids, mask, soft, max_thoughts=1, eos_token_id=None)
    assert torch.equal(generate(model, ids, mask, soft, end_of_thinking=first, eos_token_id=None), once)
    assert not torch.equal(generate(model, ids, mask, soft, eos_token_id=None), once)
    stopped = generate(model, ids, mask, soft, eos_token_id=first)
    assert stopped.shape == (1, 8)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model("gemma2").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    prompts = ["a fox", "--greedy", "a dog", "--sample", "a cow"]
    monkeypatch.setattr(sys, "argv", ["soft_thinking.py", *prompts, "--model", str(tmp_path), "--max-new-tokens", "3"])
    assert main() == 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["thinks", "greedy", "sample"]
