"""What PyTorch's autograd offers around the ops: hooks on saved tensors, batches of gradients, in-place changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from gircse.ops import soft_embed, stepwise_info_nce
from tests.ops.accuracy import random_inputs


def soft(**options: Any) -> tuple[Callable[..., Tensor], list[Tensor]]:
    tensors = random_inputs((5,), 37, 8, 6, bias=True, row_temperature=True)

    def function(*values: Tensor) -> Tensor:
        out, stats = soft_embed(**dict(zip(tensors, values, strict=True)), return_stats=True, **options)  # type: ignore[arg-type, misc]
        return torch.cat([out, stats.lse[:, None], stats.entropy[:, None]], 1)

    return function, list(tensors.values())


def contrastive(**options: Any) -> tuple[Callable[..., Tensor], list[Tensor]]:
    values = [torch.randn(4, 2, 8, dtype=torch.float64), torch.randn(8, 2, 8, dtype=torch.float64)]
    return lambda *steps: stepwise_info_nce(*steps, temperature=0.1, **options), values


OPS = pytest.mark.parametrize(
    "op",
    [
        soft(),
        soft(gumbel_seed=3, top_k=9, hard=torch.arange(5) % 2 == 0),
        contrastive(),
        contrastive(symmetric=True, include_queries=True),
    ],
    ids=["soft_embed", "soft_embed, all", "stepwise_info_nce", "stepwise_info_nce, all"],
)
Op = tuple[Callable[..., Tensor], list[Tensor]]


def gradients(function: Callable[..., Tensor], values: list[Tensor]) -> list[Tensor]:
    leaves = [value.detach().clone().requires_grad_() for value in values]
    out = function(*leaves)
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(out.shape, dtype=out.dtype, generator=generator)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def same(ours: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@OPS
def test_checkpointing(op: Op) -> None:
    function, values = op
    checkpointed = gradients(lambda *leaves: checkpoint(function, *leaves, use_reentrant=False), values)
    same(checkpointed, gradients(function, values))


@OPS
def test_hooks_on_saved_tensors(op: Op) -> None:
    """Each is packed once and unpacked once, and the pack may move it."""
    function, values = op
    counts: dict[int, int] = {}

    def pack(tensor: Tensor) -> tuple[int, Tensor]:
        counts[len(counts)] = 0
        return len(counts) - 1, tensor.clone()

    def unpack(packed: tuple[int, Tensor]) -> Tensor:
        counts[packed[0]] += 1
        return packed[1]

    def hooked(*leaves: Tensor) -> Tensor:
        with saved_tensors_hooks(pack, unpack):
            return function(*leaves)

    def offloaded(*leaves: Tensor) -> Tensor:
        with save_on_cpu():
            return function(*leaves)

    expected = gradients(function, values)
    same(gradients(hooked, values), expected)
    assert counts
    assert max(counts.values()) == 1
    same(gradients(offloaded, values), expected)


@OPS
def test_batches_of_gradients(op: Op) -> None:
    """is_grads_batched, vectorized Jacobians and vmap over a backward, each against one gradient after the other."""
    function, values = op
    leaves = [value.clone().requires_grad_() for value in values]
    out = function(*leaves)
    upstream = torch.randn(3, *out.shape, dtype=out.dtype)
    single = [torch.autograd.grad(out, leaves, each, retain_graph=True) for each in upstream]
    expected = [torch.stack(column) for column in zip(*single, strict=True)]
    batched = torch.autograd.grad(out, leaves, upstream, is_grads_batched=True, retain_graph=True)
    mapped = torch.vmap(lambda each: torch.autograd.grad(out, leaves, each, retain_graph=True))(upstream)
    for found in (batched, mapped):
        torch.testing.assert_close(list(found), expected, rtol=1e-12, atol=1e-12)
    jacobians = [torch.autograd.functional.jacobian(function, tuple(values), vectorize=v) for v in (True, False)]
    torch.testing.assert_close(*jacobians, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hard", [False, True])
def test_results_may_be_changed_in_place(dtype: torch.dtype, hard: bool) -> None:
    """Every result, the statistics too: the gradients are those of the same changes out of place."""
    tensors = random_inputs((5,), 37, 8, 6, dtype=dtype)
    found = []
    for in_place in (True, False):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
        out, stats = soft_embed(**leaves, return_stats=True, hard=hard)  # type: ignore[misc, arg-type]
        results = [out, *stats[:4]]
        results = [r.mul_(3) if in_place else r * 3 for r in results]
        total = results[0].float().square().sum() + results[1].square().sum() + results[2].square().sum()
        found.append(torch.autograd.grad(total, list(leaves.values())))
    same(*(list(grads) for grads in found))


def test_losses_may_be_changed_in_place() -> None:
    function, values = contrastive()
    same(
        gradients(lambda *leaves: function(*leaves).mul_(3), values),
        gradients(lambda *leaves: function(*leaves) * 3, values),
    )


def test_dropout_in_place_on_the_result() -> None:
    hidden, head = torch.randn(5, 8, requires_grad=True), torch.randn(37, 8)
    out = soft_embed(hidden, head)
    torch.manual_seed(3)
    torch.nn.functional.dropout(out, 0.5, inplace=True).sum().backward()  # type: ignore[arg-type]
    torch.manual_seed(3)
    expected = torch.nn.functional.dropout(soft_embed(hidden, head), 0.5).sum()  # type: ignore[arg-type]
    assert torch.equal(hidden.grad, torch.autograd.grad(expected, hidden)[0])  # type: ignore[arg-type]


@pytest.mark.parametrize("tied", [True, False])
def test_autocast_keeps_no_copy_of_a_matrix(tied: bool) -> None:
    """Eight calls keep the float32 matrices themselves, which are there anyway, and the rows: nothing of size V."""
    head, embed = (torch.randn(3000, 64, requires_grad=True) for _ in range(2))
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autocast("cpu", torch.bfloat16), saved_tensors_hooks(pack, lambda tensor: tensor):
        outs = [soft_embed(torch.randn(4, 64, requires_grad=True), head, None if tied else embed) for _ in range(8)]
    own = {head.untyped_storage().data_ptr(), embed.untyped_storage().data_ptr()}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    assert own & storages.keys()
    extra = sum(size for pointer, size in storages.items() if pointer not in own)
    assert extra <= 8 * 4 * (2 * 64 * 4 + 4 * 4) + 1024
    assert all(out.dtype == torch.bfloat16 for out in outs)  # type: ignore[union-attr]
