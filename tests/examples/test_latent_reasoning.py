from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from examples.latent_reasoning import main, reason, think_fused, think_plain
from tests.script import run_script
from tests.tiny_models import tiny_model, tiny_tokenizer

OPTIONS = {"steps": 4, "temperature": 0.7, "max_new_tokens": 3}


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_both_forms_think_the_same(name: str) -> None:
    model = tiny_model(name, dtype=torch.float64)
    ids = torch.randint(5, 60, (2, 7))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    fused, plain = (reason(model, ids, mask, think=think, **OPTIONS) for think in (think_fused, think_plain))
    torch.testing.assert_close(fused.soft_tokens, plain.soft_tokens, rtol=1e-6, atol=1e-6)
    assert torch.equal(fused.answers, plain.answers)
    alone = reason(model, ids[1:, 3:], mask[1:, 3:], **OPTIONS)
    torch.testing.assert_close(fused.soft_tokens[:, 1:], alone.soft_tokens, rtol=1e-5, atol=1e-5)
    assert torch.equal(fused.answers[1:], alone.answers)


def test_every_option_of_soft_embed_and_every_model() -> None:
    """A soft-cap and an embedding scale, truncated and drawn at random; another seed thinks otherwise."""
    model, ids = tiny_model("gemma2", attn="eager"), torch.randint(5, 60, (2, 7))
    options = {**OPTIONS, "top_p": 0.8, "gumbel_seed": 3}
    runs = [reason(model, ids, torch.ones_like(ids), **{**options, "gumbel_seed": seed}) for seed in (3, 3, 4)]
    assert torch.equal(runs[0].soft_tokens, runs[1].soft_tokens)
    assert not torch.equal(runs[0].soft_tokens, runs[2].soft_tokens)
    hard = reason(model, ids, torch.ones_like(ids), **options, hard=True)
    table = model.get_input_embeddings()(torch.arange(131))
    nearest = (hard.soft_tokens[0][:, None] - table).abs().amax(-1).amin(1)
    assert nearest.max() < 1e-5


def test_the_options_of_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model("gemma2").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    options = ["--model", str(tmp_path), "--steps", "2", "--top-p", "0.9", "--top-k", "40", "--gumbel-seed", "1"]
    monkeypatch.setattr(sys, "argv", ["latent_reasoning.py", "a fox", *options])
    assert main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if "thought" in line]) == 2
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--plain"])
    with pytest.raises(SystemExit):
        main()


@pytest.mark.smollm2
def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As a user starts it, and its plain form in this process."""
    arguments = ["--max-new-tokens", "6", "The capital of France is", "Water"]
    printed = run_script("examples/latent_reasoning.py", arguments, tmp_path)
    monkeypatch.setattr(sys, "argv", ["latent_reasoning.py", *arguments, "--plain"])
    assert main() == 0
    fused, plain = (
        [line for line in text.splitlines() if "answer:" in line] for text in (printed, capsys.readouterr().out)
    )
    assert len(fused) == 2
    assert fused == plain
