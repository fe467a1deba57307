"""Norms and gates as single kernels give the states and gradients of the stock layers, for every known decoder."""

from __future__ import annotations

import pytest
import torch

from gircse import GIRCSE
from gircse.embedder import pooled_states
from gircse.lm.lora import fused_lora
from gircse.ops.backends import kernels
from gircse.train.capture import layers
from gircse.train.capture.checkpoints import checkpoints_without_generator
from gircse.train.capture.layers import FusedLayers
from gircse.train.lora import trainable_model
from tests.tiny_models import tiny_model, tiny_tokenizer
from tests.training_batches import config

NORMS = {"qwen3": 9, "gemma2": 9, "phi3": 5}


@pytest.mark.parametrize("name", NORMS)
def test_states_and_gradients_are_those_of_the_stock_layers(name, monkeypatch):
    """Also in the second pass of a checkpoint."""
    pytest.importorskip("triton")
    if not kernels().INTERPRETED:
        pytest.skip("the kernels are compiled here: tests/gpu checks them")
    monkeypatch.setattr(layers, "resolve_backend", lambda backend, tensor: "triton")
    torch.manual_seed(0)
    settings = config(gradient_checkpointing=name == "qwen3")
    model = trainable_model(settings, GIRCSE(tiny_model(name), tiny_tokenizer())).train()
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.05)
    fused = FusedLayers.of(model.causal_lm)
    gates = 0 if name == "phi3" else 2
    assert len(fused.forwards) == NORMS[name] + gates
    assert fused.rotary is not None
    ids = torch.randint(3, 100, (2, 5))
    weights = [p for p in model.parameters() if p.requires_grad]
    found = []
    before, rotated, calls = fused.rotary.apply_rotary_pos_emb, layers._rotated, []
    monkeypatch.setattr(layers, "_rotated", lambda *args: calls.append(1) or rotated(*args))
    for layer_set in (fused, FusedLayers([])):
        lora = fused_lora(model.base)
        with layer_set.at_work(), checkpoints_without_generator(model.causal_lm.body, lora, layer_set.at_work):
            states = pooled_states(model.causal_lm, model.config, ids, torch.ones_like(ids), 1)
        weight = torch.linspace(-1, 1, states.numel()).view_as(states)
        found.append([states.detach(), *torch.autograd.grad((states * weight).sum(), weights)])
    for ours, stock in zip(*found, strict=True):
        assert (ours - stock).norm() <= 1e-5 * stock.norm()
    # two layers, the prompt pass and a step, and the prompt pass again
    assert len(calls) == (6 if settings.gradient_checkpointing else 4)
    assert fused.rotary.apply_rotary_pos_emb is before
    assert not any("forward" in vars(module) for module, _ in fused.forwards)


def test_layers_that_keep_their_kernels(monkeypatch):
    """On a CPU all; elsewhere norms that are trained, and all of a decoder that nobody has read."""
    lm = GIRCSE(tiny_model("llama"), tiny_tokenizer()).causal_lm
    assert FusedLayers.of(lm).forwards == []
    monkeypatch.setattr(layers, "resolve_backend", lambda backend, tensor: "triton")
    assert len(FusedLayers.of(lm).forwards) == 2  # the gates; all weights are trained
    assert FusedLayers.of(GIRCSE(tiny_model("gpt2"), tiny_tokenizer()).causal_lm).forwards == []
