"""The whole model on the GPU gives the embeddings and gradients of the CPU."""

from __future__ import annotations

import pytest
import torch

from gircse.architecture import CausalLM
from gircse.rollout import rollout
from tests.tiny_models import CONFIGS, tiny_model


@pytest.mark.parametrize("name", CONFIGS)
def test_rollout_equals_the_cpu(name: str) -> None:
    results = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = tiny_model(name).float().to(device)
        lm = CausalLM.from_model(model)
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(0, model.config.vocab_size, (3, 9), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, :4] = 0
        hidden = rollout(lm, ids.to(device), mask.to(device), num_steps=3).steps
        parameter = model.get_input_embeddings().weight
        (grad,) = torch.autograd.grad(hidden.square().sum(), parameter)
        results.append((hidden.detach().cpu(), grad.cpu()))
    for cpu, cuda in zip(*results, strict=True):
        assert (cpu - cuda).norm() <= 1e-3 * cpu.norm()
