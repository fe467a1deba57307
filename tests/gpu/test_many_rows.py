"""Form 3 on a device in the ways that the table may choose, with real tiles, and float32 where TF32 is allowed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from gircse_kernels import plan

from gircse.ops import soft_embed
from gircse.ops.soft_embed_reference import soft_embed_reference
from tests.ops.accuracy import random_inputs, rms


@pytest.fixture
def fresh_plans() -> Iterator[None]:
    def forget() -> None:
        for function in (plan.plan_forward, plan.plan_two_products, plan.plan_backward):
            function.cache_clear()

    forget()
    yield
    forget()


def check(dtype: torch.dtype, rows: int, embed: int | None) -> None:
    """Values and gradients; several chunks come of several blocks of rows and a small budget."""
    tensors = {name: t.cuda() for name, t in random_inputs((rows,), 5003, 256, embed, scale=0.3).items()}
    upstream = torch.randn(rows, embed or 256, device="cuda")

    def results(function, wide):
        leaves = [tensor.to(dtype).to(wide).requires_grad_() for tensor in tensors.values()]
        out = function(*leaves)
        return [r.double() for r in (out, *torch.autograd.grad(out, leaves, upstream.to(dtype).to(wide)))]

    ours = results(soft_embed, dtype)
    eager, truth = (results(lambda *a: soft_embed_reference(*a)[0], wide) for wide in (dtype, torch.float64))
    for got, plain, exact in zip(ours, eager, truth, strict=True):
        assert rms([got - exact]) <= 2 * rms([plain - exact]) + torch.finfo(dtype).eps * rms([exact])


@pytest.mark.usefixtures("fresh_plans")
@pytest.mark.parametrize("kept", [0, 64 << 20])
@pytest.mark.parametrize("embed", [None, 320], ids=["tied", "untied"])
@pytest.mark.parametrize("rows", [40, 300])
@pytest.mark.parametrize(
    "choice",
    [plan.Choice(True, True, 64, 64), plan.Choice(False, True, 64, 64), plan.Choice(False, False, 64, 64)],
    ids=["our product", "half scores", "float32 scores"],
)
def test_every_choice(
    choice: plan.Choice, rows: int, embed: int | None, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "choose", lambda *_: choice)
    monkeypatch.setattr(plan, "KEPT_BYTES", kept)
    monkeypatch.setattr(plan, "SCRATCH_BYTES", 2 << 20)
    for dtype in (torch.bfloat16, torch.float16):
        check(dtype, rows, embed)


@pytest.mark.usefixtures("fresh_plans")
def test_float32_is_exact_where_tf32_is_allowed() -> None:
    tensors = [t.float().cuda() for t in random_inputs((300,), 5003, 256, scale=0.3).values()]
    exact = soft_embed(*tensors)
    try:
        torch.backends.cuda.matmul.allow_tf32 = True
        allowed = soft_embed(*tensors)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    torch.testing.assert_close(allowed, exact, rtol=2e-5, atol=2e-6)
