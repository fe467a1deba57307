"""Hard rows and the two temperatures of Gumbel noise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gircse.ops import soft_embed
from gircse.ops.noise import gumbel
from gircse.ops.soft_embed_reference import soft_embed_reference
from tests.ops.accuracy import random_inputs, run
from tests.ops.test_soft_embed_op import BACKENDS

HARD = torch.tensor([True, False] * 5 + [True])


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("embed", [None, 6])
def test_a_hard_row_is_the_embedding_of_its_token(backend: str, dtype: torch.dtype, embed: int | None) -> None:
    """Exactly; and all gradients but that of the embedding matrix are bitwise those of the soft row."""
    tensors = random_inputs(embed=embed, bias=True, dtype=dtype)
    options: dict[str, Any] = {"embed_scale": 3.0, "temperature": 0.7, "backend": backend}
    soft = run(soft_embed, tensors, dtype, True, options)
    mixed = run(soft_embed, tensors, dtype, True, {**options, "hard": HARD})
    every = run(soft_embed, tensors, dtype, True, {**options, "hard": True})
    values = tensors["head_weight" if embed is None else "embed_weight"]
    tokens = (3.0 * values[soft["argmax"]].float()).to(dtype)
    assert torch.equal(every["out"], tokens)
    assert torch.equal(mixed["out"], torch.where(HARD[:, None], tokens, soft["out"]))
    for name in soft:
        if name not in ("out", "grad head_weight" if embed is None else "grad embed_weight"):
            assert torch.equal(mixed[name], soft[name]), name
            assert torch.equal(every[name], soft[name]), name


@BACKENDS
@pytest.mark.parametrize("embed", [None, 6])
@pytest.mark.parametrize("hard", [True, HARD], ids=["all", "some"])
def test_gradients_are_those_of_gumbel_softmax(
    monkeypatch: pytest.MonkeyPatch, backend: str, embed: int | None, hard: Any
) -> None:
    """Of PyTorch's own function, with our noise as its draw: the embedding matrix gets that of the tokens alone."""
    tensors = random_inputs(embed=embed, dtype=torch.float32)
    noise = gumbel(torch.tensor([5]), 0, 53)
    monkeypatch.setattr(Tensor, "exponential_", lambda empty: empty.copy_(noise.neg().exp()))

    def official(hidden: Tensor, head_weight: Tensor, embed_weight: Tensor | None = None) -> Tensor:
        logits = hidden @ head_weight.T
        rows = [torch.nn.functional.gumbel_softmax(logits, 0.6, hard=hard) for hard in (True, False)]
        return torch.where(torch.as_tensor(hard)[..., None], *rows) @ (head_weight if embed is None else embed_weight)

    def ours(**leaves: Tensor) -> Any:
        return soft_embed(**leaves, temperature=0.6, gumbel_seed=5, hard=hard, backend=backend)  # type: ignore[arg-type]

    upstream = torch.randn(11, embed or 9)
    results = []
    for function, dtype in ((ours, torch.float32), (official, torch.float32), (official, torch.float64)):
        leaves = {name: tensor.to(dtype).requires_grad_() for name, tensor in tensors.items()}
        grads = torch.autograd.grad(function(**leaves), list(leaves.values()), upstream.to(dtype))
        results.append([grad.double() for grad in grads])
    for got, plain, exact in zip(*results, strict=True):
        assert (got - exact).abs().max() <= 2 * (plain - exact).abs().max() + 1e-6 * exact.abs().max()
    if embed is not None and hard is True:
        assert (results[0][2].abs().sum(1) > 0).sum() <= 11


def test_values_and_gradients() -> None:
    tensors = random_inputs((3, 11), embed=6, bias=True)
    options = {"hard": HARD, "top_k": 9, "gumbel_seed": 2, "gumbel_temperature": 0.3, "temperature": 0.8}
    ours = run(soft_embed, tensors, torch.float64, True, options)
    truth = run(soft_embed_reference, tensors, torch.float64, True, options)
    for name, exact in truth.items():
        torch.testing.assert_close(ours[name], exact, rtol=1e-11, atol=1e-11, msg=lambda text, n=name: f"{n}: {text}")


@BACKENDS
def test_compiled_and_transformed(backend: str) -> None:
    torch._dynamo.reset()
    tensors = random_inputs(dtype=torch.float32)
    hidden, head = tensors["hidden"].requires_grad_(), tensors["head_weight"]

    def function(hidden: Tensor) -> Any:
        return soft_embed(hidden, head, hard=HARD, gumbel_seed=1, gumbel_temperature=0.5, backend=backend)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(hidden), function(hidden))
    exact, got = (torch.autograd.grad(f(hidden).square().sum(), hidden)[0] for f in (function, compiled))
    functional = torch.func.grad(lambda h: function(h).square().sum())(hidden.detach())
    for other in (got, functional):  # the eager call may keep its probabilities, these two compute them again
        torch.testing.assert_close(other, exact, rtol=0.0, atol=1e-6 * exact.abs().max().item())


def test_a_bad_row_stays_bad_and_alone() -> None:
    tensors = random_inputs(dtype=torch.float32)
    tensors["hidden"][3, 2] = torch.nan
    out = soft_embed(**tensors, hard=True)  # type: ignore[arg-type]
    assert isinstance(out, Tensor)
    assert out.isnan().any(1).tolist() == [row == 3 for row in range(11)]


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("tau", [0.3, "rows"])
@BACKENDS
def test_gumbel_temperature(softcap: float | None, tau: Any, backend: str) -> None:
    """(scores / temperature + noise) / gumbel_temperature, differentiable in a tensor of it."""
    dtype = torch.float64 if backend == "torch" else torch.float32
    tensors = random_inputs(embed=6, bias=True, dtype=dtype)
    if tau == "rows":
        tau = (torch.rand(11, dtype=torch.float64) + 0.2).to(dtype)
    options = {"temperature": 0.6, "softcap": softcap, "logit_scale": 1.2, "gumbel_seed": 7, "top_p": 0.9}
    results = []
    for function, extra in ((soft_embed, {"backend": backend}), (soft_embed_reference, {})):
        wide = torch.float64 if function is soft_embed_reference else dtype
        leaves = {name: tensor.to(wide).requires_grad_() for name, tensor in tensors.items()}
        if isinstance(tau, Tensor):
            leaves["gumbel_temperature"] = tau.to(wide).requires_grad_()
        else:
            extra["gumbel_temperature"] = tau
        results.append(run(function, leaves, wide, True, {**options, **extra}))
    ours, truth = results
    tolerance = 1e-11 if dtype == torch.float64 else 5e-5
    for name, exact in truth.items():
        assert (ours[name].double() - exact).abs().max() <= tolerance * (exact.abs().max() + 1), name


def test_temperature_alone_is_that_of_gumbel_softmax() -> None:
    """F.gumbel_softmax's formula, with the same noise."""
    logits = torch.randn(5, 40, dtype=torch.float64)
    identity = torch.eye(40, dtype=torch.float64)
    seeds = torch.arange(5)
    noise = gumbel(seeds, 0, 40).double()
    ours = soft_embed(logits, identity, temperature=0.4, gumbel_seed=seeds)
    torch.testing.assert_close(ours, ((logits + noise) / 0.4).softmax(-1))
    sampled = soft_embed(logits, identity, temperature=0.4, gumbel_seed=seeds, hard=True)
    assert torch.equal(sampled, torch.nn.functional.one_hot((logits + noise).argmax(-1), 40).double())
