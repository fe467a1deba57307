"""Gradients of `soft_embed`, scores recomputed by chunk from the saved peak and sum of each row.

With P = e^(s - peak) / total, delta = sum(g out), dP = embed_scale g E^T, H the entropy::

    constant = delta - g_lse + g_H (H - log total),  slope = g_H                     `constants_kernel`, one row each
    S = h W_c^T,  dP = g E_c^T                      cuBLAS; one product where E is W and both are float32 (dP always is)
    dS = P (dP - constant - slope (s - peak));  P = embed_scale P                    `score_grad_kernel`, elementwise
    d(h w + bias) = dS d score/d(h w + bias)
    dh += dS W_c                                                                     cuBLAS
    dW_c = dS^T h,  dE_c = P^T g;  tied: [dS; P]^T [h; g]                            cuBLAS
    dbias_c = dS^T 1                                                                 cuBLAS

Where the forward kept its P, S is not needed. dS and P of a chunk, [T, C] in the input's dtype, take the memory of S
and dP where those have the same dtype. dP is float32: dP - constant would keep what is rounded off it, also in a row of
one probability, whose gradient is zero. Each result has one owner and there are no atomics, so two runs are bitwise
equal.

Logits that are given take the place of S, dS is written into their gradient, and there are no products with W: 4 T V E
with a trainable E. A hard row's P is one-hot where it multiplies g: only its token's row of E gets a gradient.

FLOPs for frozen matrices 6 T V D (scores, dP, dh), 4 T V D with P kept; each trainable use adds 2 T V D.
"""

import triton
import triton.language as tl

from ..scores import LOG_FLOOR, reference, row_options, scores
from .many_rows import row_starts


@triton.jit
def constants_kernel(
    total_ptr,  # [T]
    grad_ptr,  # [T, E] upstream gradient; None: zero, as for the next two
    grad_lse_ptr,  # [T]
    grad_entropy_ptr,  # [T]
    out_ptr,  # [T, E]
    entropy_ptr,  # [T]
    constant_ptr,  # [T] float32, out
    width,
    stride_grad_t,
    stride_grad_e,
    BLOCK_E: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    constant = 0.0
    if grad_ptr is not None:
        products = tl.zeros([BLOCK_E], tl.float32)
        for start in range(0, width, BLOCK_E):
            cols = start + tl.arange(0, BLOCK_E)
            m_cols = cols < width
            grad = tl.load(grad_ptr + row * stride_grad_t + cols.to(tl.int64) * stride_grad_e, mask=m_cols, other=0.0)
            out = tl.load(out_ptr + row * width + cols, mask=m_cols, other=0.0)
            products += grad.to(tl.float32) * out.to(tl.float32)
        constant += tl.sum(products, 0)
    if grad_lse_ptr is not None:
        constant -= tl.load(grad_lse_ptr + row).to(tl.float32)
    if grad_entropy_ptr is not None:
        log_total = tl.log(tl.load(total_ptr + row))
        constant += tl.load(grad_entropy_ptr + row).to(tl.float32) * (tl.load(entropy_ptr + row) - log_total)
    tl.store(constant_ptr + row, constant)


@triton.jit(do_not_specialize=["seed", "vocab_start", "chunk_start", "num_rows"])
def score_grad_kernel(
    product_ptr,  # [T, C] h . w, float32 or the input's dtype, or given logits; with KEPT: the forward's P
    grad_prob_ptr,  # [T, C] g . e, float32; None: zero
    score_grad_ptr,  # [T, C] input dtype, out: gradient of h w + bias; None: not wanted
    prob_ptr,  # [T, C] input dtype, out: embed_scale * P, of a hard row one-hot; None: not wanted
    temperature_part_ptr,  # [T, tiles] float32, out: sum of dS (s without noise - peak); None: not wanted
    noise_part_ptr,  # [T, tiles] float32, out: sum of dS noise; None: not wanted
    offset_ptr,  # as for `weights_kernel`
    token_ptr,  # [T] int64, index of a hard row's one token in the whole vocabulary, -1: a soft row; None: all are
    bias_ptr,  # [V]
    temperature_ptr,  # [T]
    noise_scale_ptr,  # [T]
    seed_ptr,  # [T]
    threshold_ptr,  # [T]
    bitmask_ptr,  # [T, W] int32
    peak_ptr,  # [T]
    total_ptr,  # [T]
    constant_ptr,  # [T]
    slope_ptr,  # [T]; None: zero
    num_rows,
    num_vocab,
    stride_product_t,
    stride_product_v,
    stride_grad_prob,
    stride_score_grad,
    stride_prob,
    stride_bias,
    stride_bitmask,
    vocab_start,
    chunk_start,
    chunk_size,
    seed,
    scale,
    softcap,
    inverse_temperature,
    noise_scale,
    embed_scale,
    ALIGNED: tl.constexpr,
    KEPT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    num_tiles = tl.cdiv(chunk_size, BLOCK_V)
    i_tile = tl.program_id(0) % num_tiles
    rows = tl.program_id(0) // num_tiles * BLOCK_T + tl.arange(0, BLOCK_T)
    m_rows = rows < num_rows
    column = i_tile * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = m_rows[:, None] & (column < chunk_size)[None, :]
    rows64 = rows.to(tl.int64)[:, None]
    p_product = product_ptr + row_starts(offset_ptr, rows, m_rows, stride_product_t)[:, None]
    p_product += column.to(tl.int64)[None, :] * stride_product_v
    product = tl.load(p_product, mask=inside, other=0.0).to(tl.float32)
    if grad_prob_ptr is not None:
        grad = tl.load(grad_prob_ptr + rows64 * stride_grad_prob + column[None, :], mask=inside, other=0.0)
        grad = grad.to(tl.float32) * embed_scale
    else:
        grad = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
    row = row_options(
        temperature_ptr, noise_scale_ptr, seed_ptr, threshold_ptr, bitmask_ptr, stride_bitmask,
        rows[:, None], m_rows[:, None], seed, inverse_temperature, noise_scale,
    )  # fmt: skip
    call = (bias_ptr, threshold_ptr, bitmask_ptr, stride_bias, num_vocab, vocab_start, seed, scale, softcap)
    inverse, noise_scales = row[0], row[1]
    peak = tl.load(peak_ptr + rows, mask=m_rows, other=0.0)
    total = tl.load(total_ptr + rows, mask=m_rows, other=1.0)
    if KEPT:
        prob = product * (tl.exp(reference(peak) - peak) / total)[:, None]
    else:
        score, capped, noise = scores(product, (chunk_start + column)[None, :], row, call, ALIGNED)
        relative = score - peak[:, None]
        prob = tl.exp(relative) / total[:, None]
        without_noise = tl.maximum(relative - noise * noise_scales, LOG_FLOOR)
        relative = tl.maximum(relative, LOG_FLOOR)
    if prob_ptr is not None:
        chosen = prob
        if token_ptr is not None:
            token = tl.load(token_ptr + rows, mask=m_rows, other=-1)[:, None]
            index = (vocab_start + chunk_start + column)[None, :]
            chosen = tl.where(token < 0, prob, tl.where(token == index, 1.0, 0.0))
        tl.debug_barrier()  # P may take the memory of g . e, which other threads may still be reading
        p_prob = prob_ptr + rows64 * stride_prob + column[None, :]
        tl.store(p_prob, (chosen * embed_scale).to(prob_ptr.dtype.element_ty), mask=inside)
    if score_grad_ptr is not None:
        grad -= tl.load(constant_ptr + rows, mask=m_rows, other=0.0)[:, None]
        if slope_ptr is not None:
            grad -= relative * tl.load(slope_ptr + rows, mask=m_rows, other=0.0).to(tl.float32)[:, None]
        grad *= prob
        p_part = rows.to(tl.int64) * num_tiles + i_tile
        if temperature_part_ptr is not None:
            part = tl.sum(tl.where(inside, grad * without_noise, 0.0), 1)
            tl.store(temperature_part_ptr + p_part, part, mask=m_rows)
        if noise_part_ptr is not None:
            part = tl.sum(tl.where(inside, grad * noise, 0.0), 1)
            tl.store(noise_part_ptr + p_part, part, mask=m_rows)
        if softcap is not None:
            grad *= (1.0 - capped * capped) * (scale * softcap * inverse)
        else:
            grad *= scale * inverse
        p_score_grad = score_grad_ptr + rows64 * stride_score_grad + column[None, :]
        tl.store(p_score_grad, grad.to(score_grad_ptr.dtype.element_ty), mask=inside)
