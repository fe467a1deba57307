"""LoRA layers that compute together on the GPU: PEFT's results, float32 gradients, captured once and replayed."""

from __future__ import annotations

import torch

from gircse.lm.lora import fuse_lora, refresh_lora
from tests.lm.test_lora import ATTENTION, MLP, adapted, assert_equal, errors_in_half_precision


def test_float64_is_pefts() -> None:
    model, run = adapted("qwen2", {"target_modules": ATTENTION + MLP}, checkpointing=True, device="cuda")
    expected = run()
    fuse_lora(model)
    assert_equal(run(), expected)


def test_half_precision_has_float32_gradients() -> None:
    ours, theirs = errors_in_half_precision("cuda")
    assert ours[0] <= 2 * theirs[0]
    assert ours[1:].norm() <= 1.2 * theirs[1:].norm()


def test_a_captured_pass_follows_the_weights() -> None:
    config = {"target_modules": ATTENTION + MLP}
    model, _ = adapted("llama", config, dtype=torch.bfloat16, device="cuda")
    fuse_lora(model)
    ids = torch.tensor([[5, 6, 7, 8]], device="cuda")
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    layers = model.base_model.model.model

    def run() -> tuple[torch.Tensor, ...]:
        states = layers(ids, use_cache=False).last_hidden_state
        return states.detach(), *torch.autograd.grad(states.float().square().sum(), weights)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        torch._foreach_mul_(weights, 1.5)
    refresh_lora(model)
    graph.replay()
    assert_equal(captured, run())
