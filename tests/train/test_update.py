"""The update of a step, and what is said about its time."""

from __future__ import annotations

import copy

import pytest
import torch

from gircse.train.config import TrainConfig
from gircse.train.step_time import _gpu, expected, taken
from gircse.train.update import adamw, clipped_step


def test_the_update_is_adamws_with_the_clipped_gradient() -> None:
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(5, 3)), torch.nn.Parameter(torch.randn(7))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    optimizer = adamw(ours, learning_rate=1e-2, weight_decay=0.1)
    plain = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1, foreach=False)
    for _ in range(3):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = 3 * torch.randn_like(one)
            other.grad = one.grad.clone()
        loss, norm = clipped_step(optimizer, ours, torch.tensor(1.5), 1.0)
        assert loss == 1.5
        assert norm == torch.nn.utils.clip_grad_norm_(theirs, 1.0).item() > 1
        plain.step()
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_nothing_moves_where_a_number_is_not_finite(what: str) -> None:
    weight = torch.nn.Parameter(torch.randn(5))
    optimizer = adamw([weight], learning_rate=1e-2, weight_decay=0.1)
    for finite in (True, False):
        weight.grad = torch.ones(5)
        before, state = weight.detach().clone(), copy.deepcopy(optimizer.state_dict()["state"])
        if not finite and what == "gradient":
            weight.grad[2] = torch.nan
        clipped_step(optimizer, [weight], torch.tensor(1.0 if finite or what == "gradient" else torch.inf), 1.0)
        assert torch.equal(before, weight) != finite
    assert all(torch.equal(value, state[0][name]) for name, value in optimizer.state_dict()["state"][0].items())


def test_what_a_step_took() -> None:
    log = [{"seconds": s, "time": {"prompt": 0.75, "update": 0.25}, "host": h} for s, h in ((1, 0.5), (2, 0.9), (9, 1))]
    assert taken(log) == "a step took 2,000 ms (median of 3): prompt 75%, update 25%; the host was busy for 90% of it"


def test_the_plan_is_that_of_the_device() -> None:
    assert _gpu("NVIDIA H200") == "h200"
    assert _gpu("NVIDIA A100-SXM4-40GB") == "a100-40gb"
    assert _gpu("NVIDIA A100-SXM4-80GB") == "a100-80gb"
    assert _gpu("NVIDIA GeForce RTX 4090") == "rtx4090"
    assert _gpu("Tesla T4") is None
    assert expected(TrainConfig(model="m", device="cpu")) is None
