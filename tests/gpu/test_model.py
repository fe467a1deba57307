"""The whole model on the GPU gives the embeddings and gradients of the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gircse.lm.causal_lm import CausalLM
from gircse.lm.rollout import rollout
from tests.tiny_models import CONFIGS, tiny_model
from tests.training_batches import weighted_sum


@pytest.mark.usefixtures("no_downcast")
@pytest.mark.parametrize("name", CONFIGS)
def test_rollout_equals_the_cpu(name: str) -> None:
    """Float32 on the GPU is as far from float64 as float32 on the CPU, which needs 2e-7 to 4e-6 of the norm.

    Four times as far is allowed, and some units of rounding: both are sums in an order of their own.
    """
    exact, cpu, cuda = (results(name, *how) for how in (("cpu", torch.float64), ("cpu",), ("cuda",)))
    for truth, theirs, ours in zip(exact, cpu, cuda, strict=True):
        allowed = 4 * (theirs - truth).norm() + 16 * torch.finfo(torch.float32).eps * truth.norm()
        assert (ours - truth).norm() <= allowed


def results(name: str, device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """States and the gradient at the embedding table, in float64 on the CPU."""
    model = tiny_model(name).to(dtype).to(device)
    lm = CausalLM.from_model(model)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, model.config.vocab_size, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    hidden = rollout(lm, ids.to(device), mask.to(device), num_steps=3).steps
    (grad,) = torch.autograd.grad(weighted_sum(hidden), model.get_input_embeddings().weight)
    return hidden.detach().cpu().double(), grad.cpu().double()
