"""The probe: what autograd keeps per position, and how many positions that leaves room for."""

from __future__ import annotations

import pytest
import torch

from gircse.train import micro_batch_size as token_budget
from gircse.train.micro_batch_size import activation_bytes, probe_budget
from tests.training_batches import NUM_STEPS, adapted, config


def kept_bytes(model, rows: int, length: int) -> int:
    """What is really kept for backward between forward and backward, counted apart from the probe."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ids = torch.ones(rows, length, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        states = model.rollout(ids, ids)
    del states
    return sum(kept.values())


def test_a_budget_that_fills_the_memory_and_no_more(monkeypatch):
    model = adapted(config(), torch.float32)
    for room in (8 << 20, 32 << 20):
        monkeypatch.setattr(token_budget, "free_bytes", lambda device, room=room: room)
        tokens = probe_budget(model, num_steps=NUM_STEPS, length=40)
        used = kept_bytes(model, tokens // (40 + NUM_STEPS), 40)
        assert 0.5 * room < used < room
    monkeypatch.setattr(token_budget, "free_bytes", lambda device: 1 << 50)
    assert probe_budget(model, num_steps=NUM_STEPS, length=40) == 8192
    monkeypatch.setattr(token_budget, "free_bytes", lambda device: 1)
    assert probe_budget(model, num_steps=NUM_STEPS, length=40) == 256


def test_activation_checkpointing_makes_room():
    # one of the two layers is held in full
    plain, checkpointed = (
        activation_bytes(adapted(config(gradient_checkpointing=on), torch.float32), NUM_STEPS) for on in (False, True)
    )
    assert checkpointed < 0.95 * plain


def test_the_probe_leaves_the_model_as_it_was():
    model = adapted(config(gradient_checkpointing=True), torch.float32)
    probe_budget(model, num_steps=NUM_STEPS, length=40)
    assert model.training
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("steps", [0, 1])
def test_the_baselines_have_a_budget(steps):
    assert probe_budget(adapted(config(num_steps=steps), torch.float32), num_steps=steps, length=40) >= 256
