"""The draft of training on the engine's decoder gives the tokens of the plain one, adapters included."""

from __future__ import annotations

import pytest
import torch

from gircse.engine import draft as engine_draft
from gircse.engine import pool
from gircse.engine.draft import fused_drafter
from gircse.lm.attention import RolloutKV
from gircse.lm.causal_lm import CausalLM
from gircse.lm.rollout import draft, rollout
from tests.capture_guard import two_steps
from tests.tiny_models import tiny_model
from tests.training_batches import adapted, config, gradients


class Entropies:
    def __init__(self):
        self.values = []

    def enter(self, phase):
        pass

    def soft_token(self, step, entropy):
        self.values.append(entropy)


def texts(*lengths):
    """Right-padded random ids [B, N] and their mask."""
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return torch.randint(3, 100, mask.shape), mask


@pytest.mark.usefixtures("no_downcast")
def test_states_entropies_and_gradients_are_those_of_the_plain_draft():
    """Dropout is on in training; no draft has it, and none draws random numbers."""
    model = adapted(config(lora_dropout=0.3))
    drafter, batch = fused_drafter(model.causal_lm), texts(9, 3, 1)
    assert model.causal_lm.body.training
    results = []
    for chosen in (None, drafter):
        torch.manual_seed(3)
        seen = Entropies()
        steps = rollout(
            model.causal_lm, *batch, 4, soft_token_gradient=0, temperature=0.7, drafter=chosen, observer=seen
        ).steps
        (steps * torch.linspace(-1, 1, steps.numel()).view_as(steps)).sum().backward()
        results.append((steps.detach(), torch.stack(seen.values), gradients(model)))
    for ours, theirs in zip(*results, strict=True):
        assert ((ours - theirs).norm() / theirs.norm()).item() < 1e-10


def test_weights_of_the_next_step_count():
    """The decoder reads the adapters' copies, which the prompt pass writes again."""
    model = adapted(config())
    drafter, batch, found = fused_drafter(model.causal_lm), texts(5, 4), []
    for _ in range(2):
        found += [
            model.rollout(*batch, 3, soft_token_gradient=0, drafter=chosen).detach() for chosen in (None, drafter)
        ]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * parameter.requires_grad)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5)
    torch.testing.assert_close(found[2], found[3], rtol=0, atol=1e-5)
    assert (found[0] - found[2]).abs().max() > 1e-2


def test_merged_adapters_are_drafted_plainly(monkeypatch):
    model, calls = adapted(config()), []
    drafter = fused_drafter(model.causal_lm)
    monkeypatch.setattr(engine_draft, "draft", lambda *args, **options: calls.append(1) or draft(*args, **options))
    for merged in (False, True):
        if merged:
            model.base.merge_adapter()
        model.rollout(*texts(5, 4), 3, soft_token_gradient=0, drafter=drafter)
        assert len(calls) == merged


def test_a_decoder_that_is_not_ours_is_drafted_by_its_own_layers():
    lm = CausalLM.from_model(tiny_model("gpt2"))
    with pytest.warns(UserWarning, match="drafted by the model's own layers, which is slower: model_type 'gpt2'"):
        assert fused_drafter(lm) is None


def test_a_draft_can_be_captured(monkeypatch):
    monkeypatch.setattr(pool, "_zeros", lambda count, like: like.new_zeros(count))  # as on a GPU
    model = adapted(config(), torch.float32)
    lm, (ids, mask) = model.causal_lm, texts(9, 3, 1)
    drafter = fused_drafter(lm)
    with torch.no_grad():
        kv = RolloutKV(mask.sum(1))
        prompt = lm.run_prompt(kv, ids)[:, 0]
    drafter(lm, kv, prompt, 3)  # makes the rotary tables
    first, second = two_steps(lambda: drafter(lm, kv, prompt, 3))
    assert len(first) > 100
    assert first == second
