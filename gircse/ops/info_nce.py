"""``stepwise_info_nce``: one contrastive loss for every number of steps, from one pass (SPEC 1.3-1.4)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import info_nce_torch as torch_backend
from .backends import check_backend
from .pooling import check_pooling, l2_normalize, pool_steps
from .soft_embed import check_floating, check_number


def stepwise_info_nce(
    query_steps: Tensor,
    doc_steps: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float = 0.02,
    pooling: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Losses of the embeddings after 1..K steps (GIRCSE, arXiv 2509.24291; SPEC 1.3-1.4)::

        z_k = l2_normalize(pool_steps(g_1..g_k))
        L_k = mean_i cross_entropy(z_k(query_i) . z_k(doc_1..M) / temperature, target_i)

    Exact: similarities are float32 (float64 for float64 steps) under autocast too; on CUDA the process-wide TF32
    setting of PyTorch, off by default, applies. No [B, M] tensor is made: tiles of it pass through a fixed budget
    below 64 MiB, and backward recomputes them. State is O((B + M) * K * D).

    Args:
        query_steps: [B, K, D], hidden states at the generated positions of the queries, any floating-point dtype.
        doc_steps: [M, K, D], of the candidates, in the reference order ``[pos_0, neg_0, ..., pos_1, neg_1, ...]``;
            same dtype.
        target: [B], int64, each row's positive in 0..M-1; default ``i * (M // B)``, which needs M to be a multiple of
            B. The values of a CUDA tensor are not checked, which would stall the device.
        temperature: > 0, a number.
        pooling: "mean", "last" or "weighted", see `pool_steps`.
        backend: None (choose) or "torch".

    A zero vector has no direction: its embedding is zero, so all its similarities are 0, and its gradient is zero.

    Returns:
        [K], in nats, float32 (float64 for float64 steps). Differentiable once, with respect to both step tensors.

    Raises:
        TypeError: an argument is of the wrong type or dtype. ValueError: of the wrong rank, shape, device or value.
        RuntimeError: the backend is not available.
    """
    temperature = _check(query_steps, doc_steps, temperature, pooling)
    target = _check_target(target, query_steps, doc_steps)
    check_backend(backend)
    if backend == "triton":
        raise RuntimeError("backend: 'triton' is not available for this op yet; use None or 'torch'")
    queries, docs = (
        l2_normalize(pool_steps(steps, pooling)).transpose(0, 1).contiguous() for steps in (query_steps, doc_steps)
    )
    losses, _, _ = _StepwiseInfoNCE.apply(queries, docs, target, temperature)
    return losses


class _StepwiseInfoNCE(torch.autograd.Function):
    """Connects a backend's ``forward`` and ``backward`` to autograd."""

    @staticmethod
    def forward(queries, docs, target, temperature):
        with torch.autocast(queries.device.type, enabled=False):
            return tuple(torch_backend.forward(queries, docs, target, temperature))

    @staticmethod
    def setup_context(ctx, inputs, output):
        queries, docs, target, ctx.temperature = inputs
        _, peak, total = output
        ctx.mark_non_differentiable(peak, total)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(queries, docs, target, peak, total)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_losses, _peak, _total):
        if grad_losses is None:
            return None, None, None, None
        saved = torch_backend.Saved(*ctx.saved_tensors)
        need_queries, need_docs = ctx.needs_input_grad[:2]
        with torch.autocast(grad_losses.device.type, enabled=False):
            grads = torch_backend.backward(grad_losses, saved, ctx.temperature, need_queries, need_docs)
        return (*grads, None, None)


def _check(query_steps: Tensor, doc_steps: Tensor, temperature: float, pooling: str) -> float:
    for name, steps, rows in (("query_steps", query_steps, "B"), ("doc_steps", doc_steps, "M")):
        check_floating(name, steps)
        if steps.dim() != 3 or 0 in steps.shape:
            raise ValueError(f"{name}: got shape {tuple(steps.shape)}, expected [{rows}, K, D], none of them 0")
    if doc_steps.shape[1:] != query_steps.shape[1:]:
        raise ValueError(
            f"doc_steps: got shape {tuple(doc_steps.shape)}, "
            f"expected the K and D of query_steps {tuple(query_steps.shape)}"
        )
    if doc_steps.dtype != query_steps.dtype:
        raise TypeError(
            f"doc_steps: got dtype {doc_steps.dtype}, expected {query_steps.dtype}, the dtype of query_steps"
        )
    if doc_steps.device != query_steps.device:
        raise ValueError(
            f"doc_steps: got device {doc_steps.device}, expected {query_steps.device}, the device of query_steps"
        )
    check_pooling(pooling)
    return check_number("temperature", temperature, positive=True)


def _check_target(target: Tensor | None, query_steps: Tensor, doc_steps: Tensor) -> Tensor:
    rows, candidates, device = query_steps.shape[0], doc_steps.shape[0], query_steps.device
    if target is None:
        if candidates % rows:
            raise ValueError(
                f"doc_steps: got {candidates} candidates for {rows} rows, expected a multiple of the rows; "
                "pass target if they are arranged otherwise"
            )
        return torch.arange(rows, device=device) * (candidates // rows)
    if not isinstance(target, Tensor) or target.dtype != torch.int64:
        raise TypeError(f"target: got {getattr(target, 'dtype', type(target).__name__)}, expected an int64 tensor")
    if target.shape != (rows,):
        raise ValueError(
            f"target: got shape {tuple(target.shape)}, expected ({rows},), one for each row of query_steps"
        )
    if target.device != device:
        raise ValueError(f"target: got device {target.device}, expected {device}, the device of query_steps")
    if device.type == "cpu" and bool(((target < 0) | (target >= candidates)).any()):
        raise ValueError(f"target: got {target.min().item()} to {target.max().item()}, expected 0 to {candidates - 1}")
    return target
