"""``stepwise_info_nce``: one contrastive loss for every number of steps, from one pass (docs/method.md §4-5)."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import torch
import torch.distributed as dist
from torch import Tensor

from .arguments import check_flag, check_floating, check_number, has_no_values
from .backends import check_backend
from .info_nce_op import OP, Options
from .pooling import check_pooling


class InfoNCEStats(NamedTuple):
    """Of each number of steps, [K], float32 (float64 for float64 steps), over all rows (of all ranks); no gradient."""

    accuracy: Tensor  # share of rows whose positive is no less similar than every other candidate
    positive: Tensor  # mean cosine of the positives
    hardest_negative: Tensor  # mean cosine of the most similar other document that counts; -1 for a row without one


@overload
def stepwise_info_nce(
    query_steps: Tensor,
    doc_steps: Tensor,
    target: Tensor | None = ...,
    *,
    temperature: float = ...,
    pooling: str = ...,
    mask: Tensor | None = ...,
    include_queries: bool = ...,
    symmetric: bool = ...,
    group: Any = ...,
    return_stats: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...


@overload
def stepwise_info_nce(
    query_steps: Tensor,
    doc_steps: Tensor,
    target: Tensor | None = ...,
    *,
    temperature: float = ...,
    pooling: str = ...,
    mask: Tensor | None = ...,
    include_queries: bool = ...,
    symmetric: bool = ...,
    group: Any = ...,
    return_stats: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, InfoNCEStats]: ...


def stepwise_info_nce(
    query_steps: Tensor,
    doc_steps: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float = 0.02,
    pooling: str = "mean",
    mask: Tensor | None = None,
    include_queries: bool = False,
    symmetric: bool = False,
    group: Any = None,
    return_stats: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, InfoNCEStats]:
    """Losses of the embeddings after 1..K steps (GIRCSE, arXiv 2509.24291; docs/method.md §4-5)::

        z_k = l2_normalize(pool_steps(g_1..g_k))
        L_k = mean_i cross_entropy(z_k(query_i) . z_k(doc_1..M) / temperature, target_i)

    Similarities are float32 (float64 for float64 steps) under autocast too. The kernels multiply bfloat16 parts of the
    unit vectors on the tensor cores: three for float32 steps, which is float32's accuracy, and two for half-precision
    ones, where a logit's error stays below 1e-4 at temperature 0.02. The torch backend on CUDA follows PyTorch's
    process-wide TF32 setting, off by default. No [B, M] tensor is made: candidates are met a piece at a time, and
    backward recomputes the piece. Beyond inputs and gradients there are the unit vectors of one step of this rank's
    queries and their gradient, the same of a piece of the candidates with its similarities, 32 MiB to 512 MiB together
    (in the torch backend, which has only tiles of similarities, 16 MiB and less than 64 MiB of tiles), and, for
    half-precision steps, one step's gradients in float32; not more with more ranks.

    Args:
        query_steps: [B, K, D], hidden states at the generated positions of the queries, any floating-point dtype.
        doc_steps: [M, K, D], of the candidates, in the reference order ``[pos_0, neg_0, ..., pos_1, neg_1, ...]``;
            same dtype.
        target: [B], int64, each row's positive in 0..M-1; default ``i * (M // B)``, which needs M to be a multiple of
            B. The values of a CUDA tensor are not checked, which would stall the device.
        temperature: > 0, a number.
        pooling: "mean", "last" or "weighted", see `pool_steps`.
        mask: [B, M], bool; True: the candidate does not count for that row (a duplicate of the positive, a false
            negative from the same document). With ``include_queries`` also [B, M + B], whose last columns are the
            queries. With a group M and B of the columns are those of all ranks, in the order of the ranks. Not the
            target itself (unchecked on CUDA).
        include_queries: the other queries (of all ranks) are negatives too.
        symmetric: the mean of this loss and that of each row's positive among all queries, with its own as target; a
            query whose row masks the document does not count there either.
        group: a `torch.distributed` process group. Candidates of all ranks count, targets stay indices of this rank's
            documents, batches may differ in size. Every rank gets the mean over all rows of all ranks, and backward
            leaves each with the gradient that one process with the whole batch would have for its rows: where
            gradients of parameters are *averaged* over ranks afterwards (DDP), multiply the loss by the world size.
        return_stats: also return an `InfoNCEStats`, from the same pass.
        backend: None (choose: triton on CUDA from compute capability 8.0 on, else torch), "torch" or "triton".

    A zero vector has no direction: its embedding is zero, so all its similarities are 0, and its gradient is zero.
    So are those of a vector whose squares leave the range of float32: norms have to lie between 1e-18 and 1e18, as they
    do after a decoder's last norm.

    Returns:
        [K], in nats, float32 (float64 for float64 steps), differentiable with respect to both step tensors, to
        any order as `soft_embed` is; with a group only once. With ``return_stats`` a pair of it and the statistics.

    Raises:
        TypeError: an argument is of the wrong type or dtype. ValueError: of the wrong rank, shape, device or value.
        RuntimeError: the backend is not available, or torch.distributed is not initialised.
    """
    temperature = _check(query_steps, doc_steps, temperature, pooling)
    target = _check_target(target, query_steps, doc_steps)
    for name, flag in (("include_queries", include_queries), ("symmetric", symmetric), ("return_stats", return_stats)):
        check_flag(name, flag)
    check_backend(backend)
    group_name = None if group is None else _group_name(group)
    if mask is not None:
        _check_mask(mask, query_steps, doc_steps, target, group is not None)
    options = Options(temperature, pooling, include_queries, symmetric, group_name, backend)
    losses, accuracy, positive, hardest = OP.call((query_steps, doc_steps, target, mask), options)[:4]
    return (losses, InfoNCEStats(accuracy, positive, hardest)) if return_stats else losses


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
    if device.type == "cpu" and not has_no_values(target) and bool(((target < 0) | (target >= candidates)).any()):
        raise ValueError(f"target: got {target.min().item()} to {target.max().item()}, expected 0 to {candidates - 1}")
    return target


def _check_mask(mask: object, query_steps: Tensor, doc_steps: Tensor, target: Tensor, grouped: bool) -> None:
    """The exact number of columns is known once the ranks have told their sizes: `info_nce_op.check_columns`."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask: got {getattr(mask, 'dtype', type(mask).__name__)}, expected a bool tensor")
    rows, candidates = query_steps.shape[0], doc_steps.shape[0]
    if mask.dim() != 2 or mask.shape[0] != rows or mask.shape[1] < candidates:
        wanted = "all ranks' candidates" if grouped else candidates
        raise ValueError(f"mask: got shape {tuple(mask.shape)}, expected ({rows}, {wanted})")
    if mask.device != query_steps.device:
        raise ValueError(f"mask: got device {mask.device}, expected {query_steps.device}, the device of query_steps")
    if mask.device.type == "cpu" and not grouped and not has_no_values(mask) and not has_no_values(target):
        hidden = mask.gather(1, target[:, None])[:, 0].nonzero()
        if hidden.numel():
            row = int(hidden[0])
            raise ValueError(f"mask: got True at the target of row {row}, {int(target[row])}, expected it to count")


def _group_name(group: object) -> str:
    """The name under which a custom op finds the group again."""
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("group: torch.distributed is not initialised, expected a process group")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group: got {type(group).__name__}, expected a torch.distributed process group")
    return group.group_name
