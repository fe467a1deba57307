"""Gradient caching gives the loss and the gradients of the batch in one piece, dropout included."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import pytest
import torch

from gircse.lm import rollout
from gircse.train import grad_cache
from gircse.train.grad_cache import MicroBatch, backward, micro_batches, positions
from gircse.train.step import contrastive_backward
from tests.training_batches import NUM_STEPS, adapted, batch, config, gradients, weighted_sum


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.usefixtures("no_downcast")
@pytest.mark.parametrize(
    ("budget", "checkpointing", "factor"), [(1, False, 1.0), (45, True, 1.0), (1, True, 0.0), (45, False, 0.0)]
)
def test_equals_the_batch_in_one_piece(budget, checkpointing, factor):
    """Two rollouts (short texts, long ones) with all activations kept, against smaller micro-batches."""
    whole, settings = batch(), config(gradient_checkpointing=checkpointing)
    model, options = adapted(settings), {"num_steps": NUM_STEPS, "soft_token_gradient": factor}
    loss, losses, passes = contrastive_backward(model, whole, settings, **options)
    expected = gradients(model)
    assert passes == 2
    cached = contrastive_backward(model, whole, config(micro_batch_tokens=budget), **options)
    assert cached[2] > 2
    assert cached[2] == whole.texts or budget > 1
    assert relative(cached[0], loss) < 1e-10
    assert relative(cached[1], losses) < 1e-10
    assert relative(gradients(model), expected) < 1e-10


@pytest.mark.usefixtures("no_downcast")
@pytest.mark.parametrize(("checkpointing", "factor"), [(False, 1.0), (True, 1.0), (True, 0.0)])
def test_dropout_falls_on_the_same_places(monkeypatch, checkpointing, factor):
    """The same micro-batches, so the same masks, with all activations kept: one graph, one backward. Tokens that are
    drafted are drafted once."""
    drafts, draft = [], rollout.draft
    monkeypatch.setattr(rollout, "draft", lambda *args, **options: drafts.append(1) or draft(*args, **options))
    whole, settings = batch(), config(lora_dropout=0.3, gradient_checkpointing=checkpointing)
    model = adapted(settings)
    ids, pad_id = [*whole.queries, *whole.passages], model.tokenizer.pad_token_id
    parts = micro_batches(ids, 45, num_steps=NUM_STEPS, pad_id=pad_id)

    def objective(states):
        weight = torch.linspace(-1, 1, states.numel(), dtype=states.dtype).view_as(states)
        return (states * weight).tanh().sum(), states.detach()

    embed = partial(model.rollout, soft_token_gradient=factor)
    results = []
    for cached in (False, True):
        torch.manual_seed(3)
        loss, states = backward(embed, parts, objective, cached=cached)
        results.append((loss, states, gradients(model), torch.rand(3)))
        assert len(drafts) == (0 if factor else len(parts))
        drafts.clear()
    for one_piece, cached in zip(*results, strict=True):
        assert relative(cached, one_piece) < 1e-10
    torch.manual_seed(4)  # dropout is on: other masks give another result
    backward(embed, parts, objective, cached=True)
    assert relative(gradients(model), results[0][2]) > 1e-3


def test_without_the_replay_dropout_would_differ(monkeypatch):
    """The test above can fail."""
    whole, settings = batch(), config(lora_dropout=0.3)
    model = adapted(settings)
    parts = micro_batches(whole.passages, 60, num_steps=NUM_STEPS, pad_id=0)
    flat = []
    for _ in range(2):
        torch.manual_seed(3)
        backward(model.rollout, parts, lambda states: (weighted_sum(states), None), cached=True)
        flat.append(gradients(model))
        monkeypatch.setattr(grad_cache, "replayed", lambda state: nullcontext())
    assert relative(*flat) > 1e-3


def test_micro_batches_hold_every_text_once_within_the_budget():
    ids = [[7] * n for n in (3, 50, 4, 4, 20, 1, 19, 3)]
    parts = micro_batches(ids, 60, num_steps=5, pad_id=0)
    assert sorted(torch.cat([part.rows for part in parts]).tolist()) == list(range(8))
    for part in parts:
        assert [len(ids[row]) for row in part.rows] == part.attention_mask.sum(1).tolist()
        assert positions([part], 5) <= 60 or len(part.rows) == 1
        assert 2 * (part.attention_mask.sum(1).min() + 5) >= part.input_ids.shape[1] + 5
    assert parts[-1].input_ids.shape == (1, 50)  # embedded once: the most positions
    (whole,) = micro_batches([[7] * n for n in (9, 14, 9)], None, num_steps=5, pad_id=0)
    assert whole.rows.tolist() == [0, 1, 2]
    assert sum(part.input_ids.numel() for part in parts) < 1.3 * sum(map(len, ids))  # little padding


def test_an_unused_pass_changes_nothing():
    whole, settings = batch(), config()
    model = adapted(settings)
    parts = micro_batches(whole.passages, 60, num_steps=NUM_STEPS, pad_id=0)
    objective = lambda states: (weighted_sum(states), len(states))  # noqa: E731
    for cached in (False, True):
        _, rows = backward(model.rollout, parts, objective, cached=cached)
        expected = gradients(model)
        assert backward(model.rollout, [*parts, parts[0].unused()], objective, cached=cached)[1] == rows
        assert relative(gradients(model), expected) < 1e-12  # added up in another order


def test_only_one_micro_batch_keeps_its_activations():
    """What autograd saves at once is bounded by the largest micro-batch and not by the batch."""
    settings = config()
    model = adapted(settings, torch.float32)
    own = {p.data_ptr() for p in model.parameters()}
    live, most = 0, 0

    class Kept:
        def __init__(self, tensor):
            nonlocal live, most
            self.tensor, self.size = tensor, 0 if tensor.data_ptr() in own else tensor.nbytes
            live += self.size
            most = max(most, live)

        def __del__(self):
            nonlocal live
            live -= self.size

    def peak(texts: int, cached: bool) -> int:
        nonlocal most
        most = 0
        ids = [[5] * 12] * texts
        parts = micro_batches(ids, 4 * 15, num_steps=3, pad_id=0)
        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
            backward(model.rollout, parts, lambda states: (weighted_sum(states), None), cached=cached)
        return most

    assert peak(32, cached=True) < 1.1 * peak(8, cached=True)
    assert peak(32, cached=False) > 5 * peak(32, cached=True)


def test_a_part_is_padded_to_its_own_longest_text():
    part = MicroBatch.of([2, 0], [[1, 2], [3] * 9, [4, 5, 6]], pad_id=0)
    assert part.input_ids.tolist() == [[4, 5, 6], [1, 2, 0]]
    assert part.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
