"""Matrices as users have them in memory: transposed, parts of wider ones, with gaps. Right, and at full speed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gircse.ops import info_nce_torch, soft_embed, soft_embed_torch, stepwise_info_nce, tiles_torch, top_tokens
from tests.ops.accuracy import random_inputs, run

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "by columns": lambda m: m.T.contiguous().T,
    "left half": lambda m: torch.cat([m, m], 1)[:, : m.shape[1]],
    "right part, odd offset": lambda m: torch.cat([m[:, :3], m], 1)[:, 3:],
    "every second row": lambda m: m.repeat_interleave(2, 0)[::2],
    "every second column": lambda m: m.repeat_interleave(2, 1)[:, ::2],
    "part of columns of columns": lambda m: torch.cat([m, m]).T.contiguous().T[: m.shape[0]],
    "weight of a transposed layer": lambda m: transposed_layer(m).weight.T,
}


def transposed_layer(matrix: Tensor) -> nn.Linear:
    layer = nn.Linear(*matrix.shape, bias=False, dtype=matrix.dtype)
    layer.weight.data.copy_(matrix.T)
    return layer


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles_torch, "VOCAB_CHUNK", 16)
    monkeypatch.setattr(tiles_torch, "ROW_TILE", 4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_products_get_dense_operands(layout: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """For operands with gaps oneDNN has only its reference kernel, several hundred times slower."""
    matmul, products = tiles_torch.matmul_nt, []

    def checked(a: Tensor, b: Tensor) -> Tensor:
        products.append(tiles_torch.is_dense(a) and tiles_torch.is_dense(b))
        return matmul(a, b)

    for module in (soft_embed_torch, info_nce_torch):
        monkeypatch.setattr(module, "matmul_nt", checked)
    tensors = random_inputs((4, 3), embed=6, bias=True, dtype=dtype)
    expected = run(soft_embed, tensors, dtype, True, {"softcap": 3.0})
    products.clear()
    strided = {name: t if t.dim() == 1 else LAYOUTS[layout](t.flatten(0, -2)) for name, t in tensors.items()}
    strided["hidden"] = strided["hidden"].unflatten(0, (4, 3))
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in strided.items()}
    out, stats = soft_embed(**leaves, softcap=3.0, return_stats=True)  # type: ignore[misc, arg-type]
    upstream = torch.ones(4, 3, 12).to(out)[..., ::2]
    torch.autograd.grad([out, stats.lse, stats.entropy], list(leaves.values()), [upstream, stats.lse, stats.lse])
    top_tokens(leaves["hidden"], leaves["head_weight"], 5)
    tolerance: dict[str, Any] = {"rtol": 8 * torch.finfo(dtype).eps, "atol": 8 * torch.finfo(dtype).eps}
    torch.testing.assert_close(out, expected["out"], **tolerance)
    steps = LAYOUTS[layout](torch.randn(15, 6).to(dtype))
    stepwise_info_nce(steps[:3, None].requires_grad_(), steps[3:, None]).sum().backward()
    assert len(products) > 20
    assert all(products)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_product_with_gaps_does_not_reach_onednn(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, matrix = torch.randn(5, 7), torch.randn(11, 7)
    strided = LAYOUTS[layout](matrix).detach()
    expected = rows @ matrix.T
    if not tiles_torch.is_dense(strided):
        monkeypatch.setattr(tiles_torch, "onednn_linear", None if tiles_torch.onednn_linear is None else pytest.fail)
    torch.testing.assert_close(tiles_torch.matmul_nt(rows, strided), expected)
