"""Attention of one query token per row on a static buffer of keys and values, split over the slots.

Row b stands at p = position[b], read on the device, and sees the slots max(0, p - window + 1) <= j <= p. For each of
its query heads, with the running maximum m, sum l and accumulator acc of an online softmax in base 2::

    x_j = q . k_j                               c = scale log2(e)
    x_j = tanh(q . k_j scale / softcap)         c = softcap log2(e), with soft-cap
    m = max_j x_j;  l = sum_j 2^(c (x_j - m));  acc = sum_j 2^(c (x_j - m)) v_j;  out = acc / l

The difference comes before the factor: where a weight counts it is small, and so is what the factor's rounding does.

Grid: (B, H_kv, splits). The G = H / H_kv query heads of a key head are the rows of one tile, so a key and a value are
read once for all of them (more than 16 heads are several tiles, which share the reads through L2). A program walks the
blocks of its slice of slots that hold something visible; one whose slice holds nothing ends at once. Where a row sees
one slice, its program writes the result. Otherwise each program writes its (m, l, acc) in float32 and counts itself in
`arrivals`; the one that finds all others of the row's slices counted adds up the parts, slice by slice, and sets the
count back to 0. So the attention is one launch whatever S. Nothing is read on the host and no shape depends on a value,
so a CUDA graph that captured the call is replayed while `position` moves on.

A slice is `SLICE` slots, whatever the batch: the number of splits follows from S alone. So a row's result is bitwise
the same in every batch, and, up to S = SLICE * MOST_SPLITS, in every buffer that is long enough for it. A count made to
fit the multiprocessors would change the order of a row's sum with the rows beside it. The price is a small batch on a
short buffer, which occupies few multiprocessors; then the step is bound by the weights.

The count is the only atomic operation, and no sum depends on who arrives last: two runs are bitwise equal. Products
accumulate in float32; those of float32 inputs are exact float32 products, on no tensor core.

Traffic, s bytes per element, n_b the slots that row b sees, t_b the slices that these lie in (0 where it is one)::

    s H_kv (d + d_v) sum_b n_b              keys and values, once
    s B H (d + d_v)                         queries, results
    8 H (d_v + 2) sum_b t_b                 partials, written and read

Stale slots are not read, so they may hold anything.

`TABLE` holds the tiles: for each padded width, max(d, d_v) rounded up to a power of two, and element size the slots of
a block, warps and pipeline stages. They are chosen so that neither sm_80 nor sm_90 spills registers or runs out of
shared memory (`bench/static/compile_report.py`); at 16 query rows the tensor cores wait for memory either way. That
holds for sizes that are multiples of 16, as those of language models are; others run, but load element by element.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launching
from ..launching import dependent
from ..matmul import dot
from ..plan import Config, cdiv
from ..scores import tanh
from .dependent import wait_for_kernel_before

SLICE = 512  # slots of a split: its partials are then a few percent of its keys and values
MOST_SPLITS = 64
BLOCK_G = 16  # query heads of a tile, the least that a matrix product takes
WIDEST = 256
START = tl.constexpr(-1e30)  # of a running maximum: below every product, and finite after the factor, too
# (padded width, bytes per element) -> slots of a block, warps, stages
TABLE = {
    (16, 2): (64, 4, 3),
    (32, 2): (128, 4, 3),
    (64, 2): (128, 4, 3),
    (128, 2): (64, 4, 3),
    (256, 2): (32, 4, 3),
    (16, 4): (32, 4, 2),
    (32, 4): (64, 4, 2),
    (64, 4): (32, 4, 2),
    (128, 4): (16, 8, 2),
    (256, 4): (16, 8, 2),
}


@triton.jit
def visible_slots(position_ptr, row, stride_position, num_slots, window, HAS_WINDOW: tl.constexpr):
    """First slot that the row sees, and the one behind the last; int32."""
    position = tl.load(position_ptr + row * stride_position)
    stop = tl.maximum(tl.minimum(position + 1, num_slots), 0).to(tl.int32)
    if HAS_WINDOW:
        first = tl.minimum(tl.maximum(position + 1 - window, 0), num_slots).to(tl.int32)
    else:
        first = stop * 0
    return first, stop


@triton.jit(do_not_specialize=["num_slots", "slice_size", "window"])
def decode_attention_kernel(
    query_ptr,  # [B, H, d]
    key_ptr,  # [B, H_kv, S, d]
    value_ptr,  # [B, H_kv, S, d_v]
    position_ptr,  # [B] int64
    out_ptr,  # [B, H, d_v], out
    acc_ptr,  # [B, H, splits, d_v] float32, out, with SPLIT
    peak_ptr,  # [B, H, splits] float32, out, with SPLIT; the same for total
    total_ptr,
    arrival_ptr,  # [B, tiles of heads] int32, with SPLIT: 0 before and after
    num_heads,
    num_slots,
    slice_size,  # slots of a split, a multiple of BLOCK_S
    window,
    stride_qb,
    stride_qh,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_position,
    inner,  # scale / softcap, with CAPPED
    factor,  # c above
    HEADS: tl.constexpr,  # query heads of one key head
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    DEPENDENT: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tiles: tl.constexpr = (HEADS + BLOCK_G - 1) // BLOCK_G
    kv_head = (tl.program_id(1) // tiles).to(tl.int64)
    i_split = tl.program_id(2)
    wait_for_kernel_before(DEPENDENT)
    first, stop = visible_slots(position_ptr, row, stride_position, num_slots, window, HAS_WINDOW)
    begin = tl.maximum(i_split * slice_size, first // BLOCK_S * BLOCK_S)
    end = tl.minimum((i_split + 1) * slice_size, stop)
    # A row that sees nothing, before the buffer or behind it, has one split, too.
    first_split = tl.minimum(first // slice_size, tl.num_programs(2) - 1)
    last_split = tl.maximum(tl.cdiv(stop, slice_size), first_split + 1)
    if SPLIT and (i_split < first_split or i_split >= last_split):
        return

    in_group = tl.program_id(1) % tiles * BLOCK_G + tl.arange(0, BLOCK_G)
    m_heads = in_group < HEADS
    heads = kv_head * HEADS + in_group
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    m_d = d < WIDTH
    m_e = e < VALUE_WIDTH
    query = tl.load(
        query_ptr + row * stride_qb + heads[:, None] * stride_qh + d.to(tl.int64)[None, :] * stride_qd,
        mask=m_heads[:, None] & m_d[None, :],
        other=0.0,
    )
    p_key = key_ptr + row * stride_kb + kv_head * stride_kh + d[None, :]
    p_value = value_ptr + row * stride_vb + kv_head * stride_vh + e[None, :]

    peak = tl.full([BLOCK_G], START, tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_E], tl.float32)
    for start in range(begin, end, BLOCK_S):
        slot = start + tl.arange(0, BLOCK_S)
        visible = slot < end
        if HAS_WINDOW:
            visible = visible & (slot >= first)
        slot64 = slot.to(tl.int64)
        key = tl.load(p_key + slot64[:, None] * stride_ks, mask=visible[:, None] & m_d[None, :], other=0.0)
        product = dot(query, tl.trans(key), tl.zeros([BLOCK_G, BLOCK_S], tl.float32), PRECISION)
        if CAPPED:
            product = tanh(product * inner)
        score = tl.where(visible[None, :], product, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(score, 1))
        prob = tl.exp2((score - new_peak[:, None]) * factor)
        decay = tl.exp2((peak - new_peak) * factor)
        total = total * decay + tl.sum(prob, 1)
        peak = new_peak
        value = tl.load(p_value + slot64[:, None] * stride_vs, mask=visible[:, None] & m_e[None, :], other=0.0)
        acc = dot(prob.to(value.dtype), value, acc * decay[:, None], PRECISION)

    index = row * num_heads + heads
    finished = True
    if SPLIT:
        splits = last_split - first_split
        if splits > 1:
            num_splits = tl.num_programs(2)
            p_part = index * num_splits
            p_acc = acc_ptr + p_part[:, None] * VALUE_WIDTH + e[None, :]
            m_acc = m_heads[:, None] & m_e[None, :]
            tl.store(peak_ptr + p_part + i_split, peak, mask=m_heads)
            tl.store(total_ptr + p_part + i_split, total, mask=m_heads)
            tl.store(p_acc + i_split * VALUE_WIDTH, acc, mask=m_acc)
            tl.debug_barrier()  # the whole program has written before it counts itself
            arrival = arrival_ptr + row * tl.num_programs(1) + tl.program_id(1)
            finished = tl.atomic_add(arrival, 1, sem="acq_rel", scope="gpu") == splits - 1
            if finished:
                tl.store(arrival, 0)
                peak = tl.full([BLOCK_G], START, tl.float32)
                total = tl.zeros([BLOCK_G], tl.float32)
                acc = tl.zeros([BLOCK_G, BLOCK_E], tl.float32)
                for split in tl.range(first_split, last_split, loop_unroll_factor=4):
                    # from L2: this multiprocessor's own cache may hold what was there before
                    part_peak = tl.load(peak_ptr + p_part + split, mask=m_heads, other=START, cache_modifier=".cg")
                    part_total = tl.load(total_ptr + p_part + split, mask=m_heads, other=0.0, cache_modifier=".cg")
                    part = tl.load(p_acc + split * VALUE_WIDTH, mask=m_acc, other=0.0, cache_modifier=".cg")
                    new_peak = tl.maximum(peak, part_peak)
                    weight = tl.exp2((part_peak - new_peak) * factor)
                    decay = tl.exp2((peak - new_peak) * factor)
                    total = total * decay + part_total * weight
                    acc = acc * decay[:, None] + part * weight[:, None]
                    peak = new_peak
    out = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(
        out_ptr + index[:, None] * VALUE_WIDTH + e[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=m_heads[:, None] & m_e[None, :] & finished,
    )


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    splits: int | None = None,
    arrivals: Tensor | None = None,
) -> Tensor:
    """softmax(softcap(scale q K^T)) V of one token per row over the slots that it sees.

    Args:
        query: [B, H, d] float16, bfloat16 or float32, any strides; d at most 256.
        key: [B, H_kv, S, d] in the query's dtype, a view of a static buffer: any strides but the last, which is 1. H is
            a multiple of H_kv: query heads h G to h G + G - 1 belong to key head h, G = H / H_kv.
        value: [B, H_kv, S, d_v], likewise; d_v at most 256.
        position: [B] int64 on the same device: row b sees slots 0 to position[b]. Below 0 it sees none and gets zeros.
            Its values are never read on the host.
        scale: factor of the scores, above 0.
        window: a row sees the last `window` of its slots; None: all.
        softcap: scores are softcap * tanh(score / softcap); None: as they are.
        splits: into how many slices the slots are cut, at most; None: as many as slices of 512, at most 64.
        arrivals: int32 zeros, contiguous, at least B * H of them, which are zeros again when the call is done. Calls
            that may run at the same time need one each. None: made here, in one more launch where there are slices.

    Returns:
        [B, H, d_v], contiguous, in the query's dtype.

    Raises:
        TypeError: an argument has a dtype that it cannot have.
        ValueError: shapes, strides, devices or numbers that do not fit.
    """
    _check(query, key, value, position, scale, window, softcap, splits, arrivals)
    batch, num_heads, width = query.shape
    kv_heads, num_slots, value_width = value.shape[1:]
    out = torch.empty((batch, num_heads, value_width), dtype=query.dtype, device=query.device)
    if not out.numel():
        return out
    heads = num_heads // kv_heads
    config = tiles(width, value_width, query.dtype.itemsize)
    size = slice_size(num_slots, splits, config.blocks["BLOCK_S"])
    count = cdiv(num_slots, size)
    config = config._replace(dependent=dependent(query.device))
    acc = peak = total = None
    if count > 1:
        acc = torch.empty((batch, num_heads, count, value_width), dtype=torch.float32, device=query.device)
        peak, total = torch.empty((2, batch, num_heads, count), dtype=torch.float32, device=query.device)
        if arrivals is None:
            arrivals = torch.zeros(batch * num_heads, dtype=torch.int32, device=query.device)
    launching.launch(
        decode_attention_kernel,
        (batch, kv_heads * cdiv(heads, BLOCK_G), count),
        (
            query, key, value, position, out, acc, peak, total, arrivals if count > 1 else None,
            num_heads, num_slots, size, window or 0,
            *query.stride(), *key.stride()[:3], *value.stride()[:3], position.stride(0),
            0.0 if softcap is None else scale / softcap, (scale if softcap is None else softcap) * math.log2(math.e),
        ),
        config,
        HEADS=heads,
        WIDTH=width,
        VALUE_WIDTH=value_width,
        HAS_WINDOW=window is not None,
        CAPPED=softcap is not None,
        SPLIT=count > 1,
        PRECISION="widen" if launching.INTERPRETED and query.dtype == torch.bfloat16 else "ieee",
        DEPENDENT=config.dependent,
    )  # fmt: skip
    return out


def tiles(width: int, value_width: int, itemsize: int) -> Config:
    """The entry of `TABLE` for heads of this size."""
    block_d, block_e = (max(16, 1 << (n - 1).bit_length()) for n in (width, value_width))
    slots, num_warps, num_stages = TABLE[max(block_d, block_e), itemsize]
    return Config({"BLOCK_G": BLOCK_G, "BLOCK_S": slots, "BLOCK_D": block_d, "BLOCK_E": block_e}, num_warps, num_stages)


def slice_size(num_slots: int, splits: int | None, block: int) -> int:
    """Slots of a split, whole blocks."""
    size = max(SLICE, cdiv(num_slots, MOST_SPLITS)) if splits is None else cdiv(num_slots, splits)
    return cdiv(size, block) * block


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    splits: int | None,
    arrivals: Tensor | None,
) -> None:
    if query.dtype not in launching.DTYPES:
        raise TypeError(f"query: got {query.dtype}, expected float16, bfloat16 or float32")
    if query.dim() != 3:
        raise ValueError(f"query: got shape {list(query.shape)}, expected [B, H, d]")
    batch, num_heads, width = query.shape
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name}: got {tensor.dtype}, expected {query.dtype} as the query")
        if tensor.dim() != 4:
            raise ValueError(f"{name}: got shape {list(tensor.shape)}, expected [B, H_kv, S, d]")
        if tensor.shape[3] > 1 and tensor.stride(3) != 1:
            raise ValueError(f"{name}: got strides {tensor.stride()}, expected 1 as the last one")
    kv_heads, num_slots = key.shape[1:3]
    if key.shape[0] != batch or key.shape[3] != width or not num_slots:
        raise ValueError(f"key: got shape {list(key.shape)}, expected [{batch}, H_kv, S, {width}] with S >= 1")
    if not kv_heads or num_heads % kv_heads:
        raise ValueError(f"key: got {kv_heads} heads, expected a divisor of the query's {num_heads}")
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(f"value: got shape {list(value.shape)}, expected {[*key.shape[:3]]} before the last dimension")
    for name, size in (("query", width), ("value", value.shape[3])):
        if not 1 <= size <= WIDEST:
            raise ValueError(f"{name}: got heads of size {size}, expected 1 to {WIDEST}")
    if position.dtype != torch.int64:
        raise TypeError(f"position: got {position.dtype}, expected int64")
    if position.shape != (batch,):
        raise ValueError(f"position: got shape {list(position.shape)}, expected [{batch}]")
    if arrivals is not None:
        if arrivals.dtype != torch.int32:
            raise TypeError(f"arrivals: got {arrivals.dtype}, expected int32")
        if arrivals.dim() != 1 or len(arrivals) < batch * num_heads or not arrivals.is_contiguous():
            raise ValueError(
                f"arrivals: got shape {list(arrivals.shape)}, expected at least [{batch * num_heads}], contiguous"
            )
    tensors = {"key": key, "value": value, "position": position, **({} if arrivals is None else {"arrivals": arrivals})}
    for name, tensor in tensors.items():
        if tensor.device != query.device:
            raise ValueError(f"{name}: got a tensor on {tensor.device}, expected {query.device} as the query")
    for name, number in (("scale", scale), ("softcap", softcap if softcap is not None else 1.0)):
        if not 0 < number < math.inf:
            raise ValueError(f"{name}: got {number}, expected a finite number > 0")
    for name, count in (("window", window), ("splits", splits)):
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            raise ValueError(f"{name}: got {count!r}, expected an integer >= 1 or None")
