"""Derivatives of derivatives of both public ops, by every entrance of PyTorch, against plain PyTorch in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from gircse.ops import soft_embed, soft_embed_op, soft_embed_plain, stepwise_info_nce
from gircse.ops.info_nce_reference import info_nce_reference
from gircse.ops.soft_embed_reference import soft_embed_reference
from tests.ops.accuracy import noise_of, random_inputs
from tests.ops.test_soft_embed_op import BACKENDS

OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tied": ({}, {}),
    "all": (
        {"embed": 6, "bias": True, "row_temperature": True},
        {"softcap": 3.0, "logit_scale": 1.3, "embed_scale": 2.0},
    ),
    "truncated": ({"embed": 6, "bias": True}, {"temperature": 0.7, "top_k": 9, "top_p": 0.95, "min_p": 0.001}),
    "noise": ({"bias": True}, {"temperature": 0.8, "gumbel_seed": 5, "gumbel_temperature": 0.6, "softcap": 4.0}),
    "hard": ({"embed": 6}, {"hard": True, "gumbel_seed": 3, "temperature": 0.9}),
    "banned": ({"bias": True, "row_temperature": True}, {"top_k": 20}),
}


def case(name: str) -> tuple[dict[str, Tensor], Callable[..., Tensor], Callable[..., Tensor]]:
    """Leaves, and a random function of all differentiable results, by the op and by plain PyTorch."""
    shape, options = OPTIONS[name]
    tensors = random_inputs((4,), 23, 5, **shape)
    if name == "banned":
        tensors["bias"][3:6] = -torch.inf
    names = list(tensors)
    leaves = {key: tensor.requires_grad_() for key, tensor in tensors.items()}
    weights = torch.randn(4, shape.get("embed", 5), dtype=torch.float64), *torch.randn(2, 4, dtype=torch.float64)
    plain_options = dict(options)
    if "gumbel_seed" in options:
        plain_options["noise"] = noise_of(plain_options.pop("gumbel_seed"), leaves).double()

    kept = torch.ones(23, dtype=torch.bool)
    if name == "banned":  # plain PyTorch makes 0 * inf of them: for it they are not there
        kept[3:6] = False

    def shorter(**arguments: Tensor) -> Any:
        matrices = {key: arguments[key][kept] for key in ("head_weight", "embed_weight", "bias") if key in arguments}
        return soft_embed_reference(**{**arguments, **matrices})

    def energy(function: Any, options: dict[str, Any], *values: Tensor) -> Tensor:
        out, stats = function(**dict(zip(names, values, strict=True)), **options)
        parts = [(part * weight).sum() for part, weight in zip((out, stats.lse, stats.entropy), weights, strict=True)]
        return sum(parts) + out.square().sum()  # type: ignore[return-value]

    return (
        leaves,
        lambda *values: energy(soft_embed, {**options, "return_stats": True}, *values),
        lambda *values: energy(shorter, plain_options, *values),
    )


CONTRASTIVE: dict[str, dict[str, Any]] = {
    "contrastive": {},
    "contrastive, all": {
        "pooling": "weighted",
        "include_queries": True,
        "symmetric": True,
        "temperature": 0.3,
        "mask": torch.arange(18).reshape(3, 6) % 7 == 3,
    },
    "contrastive, queries masked": {"include_queries": True, "mask": torch.arange(27).reshape(3, 9) % 7 == 5},
}


def contrastive_case(name: str) -> tuple[dict[str, Tensor], Callable[..., Tensor], Callable[..., Tensor]]:
    leaves = {"query_steps": torch.randn(3, 2, 4, dtype=torch.float64), "doc_steps": torch.randn(6, 2, 4).double()}
    weights, options = torch.randn(2, dtype=torch.float64), {"temperature": 0.1, **CONTRASTIVE[name]}

    def energy(function: Any, *values: Tensor) -> Tensor:
        losses = function(*values, **options)
        return (losses * weights).sum() + losses.square().sum()

    return (
        {key: leaf.requires_grad_() for key, leaf in leaves.items()},
        lambda *values: energy(stepwise_info_nce, *values),
        lambda *values: energy(info_nce_reference, *values),
    )


def penalty(function: Callable[..., Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """The gradient of a random quadratic form of the gradient: what a gradient penalty is."""
    generator = torch.Generator().manual_seed(4)
    grads = torch.autograd.grad(function(*leaves), leaves, create_graph=True)
    total = sum((g * torch.randn(g.shape, dtype=g.dtype, generator=generator)).sum() + g.square().sum() for g in grads)
    return list(torch.autograd.grad(total, leaves, materialize_grads=True))  # type: ignore[arg-type]


def close(ours: Any, truth: Any) -> None:
    torch.testing.assert_close(ours, truth, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", [*OPTIONS, *CONTRASTIVE])
def test_gradient_penalty(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soft_embed_plain, "PLAIN_BYTES", 3 * 23 * 8)  # several blocks of rows
    leaves, ours, plain = (contrastive_case if name in CONTRASTIVE else case)(name)
    close(penalty(ours, list(leaves.values())), penalty(plain, list(leaves.values())))


ENTRANCES: dict[str, Callable[[Callable[..., Tensor], list[Tensor]], Any]] = {
    "grad of grad": lambda f, xs: torch.func.grad(lambda x: torch.func.grad(f)(x, *xs[1:]).square().sum())(xs[0]),
    "jacrev of grad": lambda f, xs: torch.func.jacrev(torch.func.grad(f, (0, 1)), (0, 1))(*xs),
    "vmap of grad of grad": lambda f, xs: torch.vmap(
        lambda x: torch.func.grad(lambda y: torch.func.grad(f)(y, *xs[1:]).square().sum())(x)
    )(torch.stack([xs[0], xs[0] * 0.5])),
    "hessian": lambda f, xs: torch.autograd.functional.hessian(f, tuple(xs)),
    "hessian, vectorized": lambda f, xs: torch.autograd.functional.hessian(f, tuple(xs), vectorize=True),
    "hvp": lambda f, xs: torch.autograd.functional.hvp(f, tuple(xs), tuple(x.cos() for x in xs))[1],
    "vhp": lambda f, xs: torch.autograd.functional.vhp(f, tuple(xs), tuple(x.cos() for x in xs))[1],
    "jvp": lambda f, xs: torch.autograd.functional.jvp(f, tuple(xs), tuple(x.cos() for x in xs))[1],
    "forward mode": lambda f, xs: torch.func.jvp(f, tuple(xs), tuple(x.cos() for x in xs)),
    "jacfwd of jacrev": lambda f, xs: torch.func.hessian(f, (0, 1))(*xs),
    "jacrev of jacfwd": lambda f, xs: torch.func.jacrev(torch.func.jacfwd(f, (0, 1)), (0, 1))(*xs),
    "dual numbers": lambda f, xs: dual(f, xs),
    "third": lambda f, xs: torch.func.grad(
        lambda x: torch.func.grad(lambda y: torch.func.grad(f)(y, *xs[1:]).square().sum())(x).square().sum()
    )(xs[0]),
    "third by create_graph": lambda f, xs: third(f, xs),
    "inner step": lambda f, xs: torch.func.grad(lambda x: f(x - 0.1 * torch.func.grad(f)(x, *xs[1:]), *xs[1:]))(xs[0]),
}


def dual(function: Callable[..., Tensor], values: list[Tensor]) -> Tensor | None:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(*(forward_ad.make_dual(v, v.cos()) for v in values))).tangent


def third(function: Callable[..., Tensor], values: list[Tensor]) -> tuple[Tensor, ...]:
    leaves = [value.detach().requires_grad_() for value in values]
    total = function(*leaves)
    for _ in range(2):
        total = sum(g.square().sum() for g in torch.autograd.grad(total, leaves, create_graph=True))  # type: ignore[assignment]
    return torch.autograd.grad(total, leaves)


@pytest.mark.parametrize("entrance", ENTRANCES)
@pytest.mark.parametrize("name", ["tied", "all", "contrastive, all"])
def test_every_entrance(entrance: str, name: str) -> None:
    leaves, ours, plain = (contrastive_case if name in CONTRASTIVE else case)(name)
    values = [leaf.detach() for leaf in leaves.values()]
    close(ENTRANCES[entrance](ours, values), ENTRANCES[entrance](plain, values))


def test_what_pytorch_would_drop_is_refused() -> None:
    """Tangents of tangents, and tangents in compiled calls, which custom ops lose without a word."""
    leaves, ours, _ = case("tied")
    hidden, head = (leaf.detach() for leaf in leaves.values())
    with pytest.raises(RuntimeError, match="soft_embed: got forward-mode differentiation of forward-mode"):
        torch.func.jacfwd(torch.func.jacfwd(ours))(hidden, head)
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager")
    with pytest.raises(RuntimeError, match="soft_embed: got forward-mode differentiation in a compiled or traced call"):
        dual(compiled, [hidden, head])
    with pytest.raises(RuntimeError, match="soft_embed: got forward-mode differentiation in a compiled or traced call"):
        torch.func.linearize(lambda x: soft_embed(x, head), hidden.detach())
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager")
    hidden.requires_grad_()
    (grad,) = torch.autograd.grad(compiled(hidden, head), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        grad.sum().backward()


def test_a_first_derivative_takes_no_plain_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """create_graph=True and torch.func.grad alone make no [T, V] tensor; only a second derivative does."""
    monkeypatch.setattr(soft_embed_op, "plain", lambda *_: pytest.fail("the plain formula ran"))
    leaves, ours, _ = case("all")
    values = list(leaves.values())
    torch.autograd.grad(ours(*values), values, create_graph=True)
    torch.func.grad(ours)(*(value.detach() for value in values))


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lower_precision(dtype: torch.dtype, backend: str) -> None:
    """Error against float64 at most twice that of plain PyTorch in float32, plus the rounding of what is returned."""
    tensors = random_inputs((4,), 23, 5, 6, bias=True, dtype=dtype)

    def second(function: Any, dtype: torch.dtype) -> list[Tensor]:
        leaves = {name: tensor.to(dtype).requires_grad_() for name, tensor in tensors.items()}
        found = function(**leaves, **({"backend": backend} if function is soft_embed else {}))
        out = found[0] if isinstance(found, tuple) else found
        (grad,) = torch.autograd.grad(out.sum(dim=1).sum(), leaves["hidden"], create_graph=True)
        return list(torch.autograd.grad(grad.sum(), list(leaves.values())))

    truth = second(soft_embed_reference, torch.float64)
    for ours, eager, exact in zip(
        second(soft_embed, dtype), second(soft_embed_reference, torch.float32), truth, strict=True
    ):
        assert ours.dtype == dtype
        allowed = 2 * (eager - exact).abs().max() + 4 * torch.finfo(dtype).eps * exact.abs().max()
        assert (ours - exact).abs().max() <= allowed
