"""Training on the GPU: gradient caching replays CUDA's dropout, the probe keeps within the memory, bf16 with LoRA."""

from __future__ import annotations

import pytest
import torch

from gircse import GIRCSE
from gircse.engine.draft import fused_drafter
from gircse.train.capture import CapturedPasses
from gircse.train.grad_cache import backward, micro_batches
from gircse.train.lora import trainable_model
from gircse.train.micro_batch_size import probe_budget
from gircse.train.step import contrastive_backward
from gircse.train.step_monitor import PHASES, StepMonitor
from tests.tiny_models import tiny_model, tiny_tokenizer
from tests.training_batches import NUM_STEPS, batch, config, gradients, weighted_sum


def model_on_gpu(settings, dtype=torch.float32) -> GIRCSE:
    torch.manual_seed(0)
    model = trainable_model(settings, GIRCSE(tiny_model("llama", dtype=dtype).cuda(), tiny_tokenizer()))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model.train()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_falls_on_the_same_places(checkpointing: bool) -> None:
    settings = config(lora_dropout=0.3, gradient_checkpointing=checkpointing)
    model = model_on_gpu(settings)
    parts = micro_batches(batch().passages, 60, num_steps=NUM_STEPS, pad_id=0)
    found = []
    for cached in (False, True):
        torch.manual_seed(3)
        backward(model.rollout, parts, lambda states: (weighted_sum(states), None), cached=cached)
        found.append(gradients(model))
    assert (found[1] - found[0]).norm() <= 1e-4 * found[0].norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_in_micro_batches_is_the_step_in_one_piece(dtype: torch.dtype) -> None:
    model, whole = model_on_gpu(config(), dtype), batch()
    monitor = StepMonitor(torch.device("cuda"))
    monitor.start()
    expected = contrastive_backward(model, whole, config(), num_steps=NUM_STEPS)[0], gradients(model)
    settings = config(micro_batch_tokens=60)
    found = contrastive_backward(model, whole, settings, num_steps=NUM_STEPS, monitor=monitor)[0], gradients(model)
    tolerance = 1e-3 if dtype == torch.float32 else 5e-2
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() <= tolerance * theirs.norm()
    seconds = monitor.seconds()
    assert set(seconds) == set(PHASES)
    assert min(seconds["prompt"], seconds["steps"], seconds["loss"]) > 0
    assert len(monitor.entropies()) == NUM_STEPS
    assert monitor.peak_bytes() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_engine_drafts_the_tokens_of_the_plain_draft(dtype: torch.dtype) -> None:
    model, whole = model_on_gpu(config(), dtype), batch()
    drafter = fused_drafter(model.causal_lm)
    part = micro_batches(whole.passages, None, num_steps=NUM_STEPS, pad_id=0)[-1]
    with torch.no_grad():
        plain, ours = (
            model.rollout(*part[1:], NUM_STEPS, soft_token_gradient=0, drafter=one).float() for one in (None, drafter)
        )
    assert (ours - plain).norm() <= (1e-4 if dtype == torch.float32 else 5e-2) * plain.norm()


def test_the_probe_finds_a_budget_that_fits() -> None:
    model = model_on_gpu(config())
    found = probe_budget(model, num_steps=NUM_STEPS, length=64)
    assert found > 10_000
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("num_steps", "factor", "checkpointing"),
    [(0, 0.0, False), (NUM_STEPS, 0.0, False), (NUM_STEPS, 0.0, True), (NUM_STEPS, 1.0, True)],
)
def test_captured_micro_batches_give_the_gradients_of_single_kernels(
    num_steps: int, factor: float, checkpointing: bool
) -> None:
    """With dropout, over updates of the weights; graphs are made in the second step and replayed in the others."""
    settings = config(lora_dropout=0.2, micro_batch_tokens=120, gradient_checkpointing=checkpointing)
    model, whole, found = model_on_gpu(settings), batch(), []
    weights = [p for p in model.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in weights]
    for captures in (True, False):
        graphs = CapturedPasses(model)
        graphs.refusal = None if captures else "not at all"
        torch._foreach_copy_([p.data for p in weights], start)
        results = []
        for seed in range(4):
            torch.manual_seed(seed)
            options = {"num_steps": num_steps, "soft_token_gradient": factor, "graphs": graphs}
            loss = contrastive_backward(model, whole, settings, **options)[0]
            results.append((loss, gradients(model), torch.rand(3, device="cuda")))
            torch._foreach_mul_([p.data for p in weights], 1.1)
        assert (graphs.refusal is None, bool(graphs.buckets)) == (captures, captures)
        found.append(results)
    for replayed, single in zip(*found, strict=True):
        for ours, theirs in zip(replayed, single, strict=True):
            assert (ours - theirs).norm() <= 1e-3 * theirs.norm()
