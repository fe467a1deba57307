"""`include_prompt_state`: K states are h_0, g_1..g_{K-1}, in rollout, encoding, training, against the plain method."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from gircse import GIRCSE, GircseConfig
from gircse.data.rows import Row
from gircse.train import train
from gircse.train.config import TrainConfig
from tests.plain import plain_losses, plain_objective, plain_rollout
from tests.tiny_models import definition, tiny_model, tiny_tokenizer

K = 4
TEXTS = ["a fox", "the sea is blue", "x", "hills"]


def model_of(name="llama", dtype=torch.float64, **config):
    model = tiny_model(name, dtype=dtype, attn=definition(name))
    return GIRCSE(model, tiny_tokenizer(), GircseConfig(num_steps=K, include_prompt_state=True, **config)).eval()


def plain_states(name, ids, num_states):
    """[K, D]: h_0, g_1..g_{K-1}."""
    model = tiny_model(name, dtype=torch.float64, attn=definition(name))
    prompt, steps = plain_rollout(model, ids, num_states - 1)
    return torch.cat([prompt[None], steps])


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_rollout_and_gradient(name, no_downcast):
    model = model_of(name)
    ids = torch.randint(3, 131, (2, 6))
    ours = model.rollout(ids, torch.ones_like(ids))
    expected = torch.stack([plain_states(name, row, K) for row in ids])
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
    stock = tiny_model(name, dtype=torch.float64, attn=definition(name))
    target = torch.tensor([1, 0])
    states = torch.stack([torch.cat([(r := plain_rollout(stock, row, K - 1))[0][None], r[1]]) for row in ids])
    plain_objective(plain_losses(states, states.flip(0), target)).backward()
    plain_objective(plain_losses(ours, ours.flip(0), target)).backward()
    weight = "model.layers.0.self_attn.q_proj.weight"
    theirs = dict(stock.named_parameters())[weight].grad
    torch.testing.assert_close(dict(model.base.named_parameters())[weight].grad, theirs, rtol=1e-6, atol=1e-9)
    for steps in (0, 1):  # no soft token at all
        torch.testing.assert_close(
            model.rollout(ids, torch.ones_like(ids), steps), expected[:, :1], rtol=1e-9, atol=1e-9
        )


@pytest.mark.parametrize("pooling", ["mean", "last", "weighted"])
def test_encode_is_the_plain_formula(pooling, no_downcast):
    """Every prefix z_1..z_K, in float64; z_1 is the prompt's state."""
    model = model_of(pooling=pooling)
    curve = model.encode(TEXTS, return_steps=True, normalize=False)
    for text, got in zip(TEXTS, curve, strict=True):
        ids = torch.tensor(tiny_tokenizer()(text, add_special_tokens=False)["input_ids"])
        states = plain_states("llama", ids, K)
        for k in range(1, K + 1):
            weights = torch.arange(1, k + 1).double() / (k * (k + 1) / 2)
            exact = {
                "mean": states[:k].mean(0),
                "last": states[k - 1],
                "weighted": (weights[:, None] * states[:k]).sum(0),
            }[pooling]
            np.testing.assert_allclose(got[k - 1], exact.detach().numpy(), rtol=2e-5, atol=2e-6)
    for k in range(1, K + 1):
        assert np.array_equal(model.encode(TEXTS, num_steps=k, normalize=False), curve[:, k - 1])
    baseline = model.encode(TEXTS, num_steps=0, normalize=False)
    np.testing.assert_allclose(baseline, curve[:, 0], rtol=1e-5, atol=1e-6)


def test_stopping_early():
    model = model_of(dtype=torch.float32)
    adaptive = model.encode(TEXTS, num_steps="auto", tolerance=1e-9, max_steps=6)
    np.testing.assert_allclose(adaptive, model.encode(TEXTS, num_steps=6), rtol=1e-5, atol=1e-6)
    curve = model.encode(TEXTS, num_steps=6, return_steps=True)
    np.testing.assert_allclose(
        model.encode(TEXTS, num_steps="auto", tolerance=2.0, max_steps=6), curve[:, 2], atol=1e-6
    )


def test_it_differs_from_the_default_and_is_saved(tmp_path):
    model = model_of(dtype=torch.float32)
    model.save_pretrained(tmp_path / "model")
    assert json.loads((tmp_path / "model" / "gircse_config.json").read_text())["include_prompt_state"] is True
    again = GIRCSE.from_pretrained(tmp_path / "model")
    assert again.config == model.config
    assert np.array_equal(again.encode(TEXTS), model.encode(TEXTS))
    model.config = GircseConfig(num_steps=K)
    assert np.abs(again.encode(TEXTS) - model.encode(TEXTS)).max() > 1e-3
    # a folder that was saved before the setting was there
    saved = tmp_path / "model" / "gircse_config.json"
    values = json.loads(saved.read_text())
    del values["include_prompt_state"]
    saved.write_text(json.dumps(values))
    assert GIRCSE.from_pretrained(tmp_path / "model").config.include_prompt_state is False


def test_training(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    rows = [Row("echo", f"{a} {b}", (f"{b} {a}",), ()) for a in ("red", "blue", "fox") for b in ("sea", "hill")]
    config = TrainConfig(
        model=str(tmp_path / "base"),
        output=str(tmp_path / "run"),
        num_steps=3,
        include_prompt_state=True,
        max_steps=2,
        batch_size=3,
        progress=False,
    )
    result = train(config, rows=rows)
    assert len(result.log[0]["losses"]) == 3
    trained = GIRCSE.from_pretrained(result.folder)
    assert trained.config.include_prompt_state
    assert trained.num_steps == 3


def test_bad_value():
    with pytest.raises(ValueError, match="include_prompt_state: got 1, expected true or false"):
        GircseConfig(include_prompt_state=1)
