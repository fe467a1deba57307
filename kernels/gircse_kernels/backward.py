"""Gradients of `soft_embed`, scores recomputed by chunk from the saved peak and sum of each row.

With P = e^(s - peak) / total, delta = sum(g out), dP = embed_scale g E^T, H the entropy::

    constant = delta - g_lse + g_H (H - log total),  slope = g_H                       `constants_kernel`, one row each
    dS = P (dP - constant - slope (s - peak))                                          `score_grad_kernel`, tiles
    d(h w + bias) = dS d score/d(h w + bias)
    dh += dS W                                                                         `matmul.product_kernel`
    dW = dS^T h,  dE = embed_scale P^T g,  tied: the sum of both                       `matmul.vocab_grad_kernel`

Tied: one tile of W is the operand of both products of `score_grad_kernel`. dS and P of a chunk, [T, C] in the input's
dtype, are all that exists of [T, V]; each result has one owner, so two runs are bitwise equal.

FLOPs for frozen matrices 6 T V D (scores, dP, dh); each trainable use adds 2 T V D.
"""

import triton
import triton.language as tl

from .matmul import dot, grouped, row_dot
from .scores import LOG_FLOOR, row_factors, row_seeds, row_thresholds, scores


@triton.jit(do_not_specialize=["num_rows"])
def constants_kernel(
    grad_ptr,  # [T, E] upstream gradient
    out_ptr,  # [T, E]
    grad_lse_ptr,  # [T]
    grad_entropy_ptr,  # [T]
    entropy_ptr,  # [T]
    total_ptr,  # [T]
    constant_ptr,  # [T] float32, out
    num_rows,
    width,
    stride_grad_t,
    stride_grad_e,
    HAS_GRAD: tl.constexpr,
    HAS_LSE: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    constant = 0.0
    if HAS_GRAD:
        products = tl.zeros([BLOCK_E], tl.float32)
        for start in range(0, width, BLOCK_E):
            cols = start + tl.arange(0, BLOCK_E)
            m_cols = cols < width
            grad = tl.load(grad_ptr + row * stride_grad_t + cols.to(tl.int64) * stride_grad_e, mask=m_cols, other=0.0)
            out = tl.load(out_ptr + row * width + cols, mask=m_cols, other=0.0)
            products += grad.to(tl.float32) * out.to(tl.float32)
        constant += tl.sum(products, 0)
    if HAS_LSE:
        constant -= tl.load(grad_lse_ptr + row).to(tl.float32)
    if HAS_ENTROPY:
        log_total = tl.log(tl.load(total_ptr + row))
        constant += tl.load(grad_entropy_ptr + row).to(tl.float32) * (tl.load(entropy_ptr + row) - log_total)
    tl.store(constant_ptr + row, constant)


@triton.jit(do_not_specialize=["seed", "vocab_start", "chunk_start", "num_rows"])
def score_grad_kernel(
    hidden_ptr,  # [T, D]
    weight_ptr,  # [V, D]
    grad_ptr,  # [T, E] upstream gradient
    value_ptr,  # [V, E]
    bias_ptr,  # [V]
    temperature_ptr,  # [T]
    seed_ptr,  # [T]
    threshold_ptr,  # [T]
    peak_ptr,  # [T]
    total_ptr,  # [T]
    constant_ptr,  # [T]
    slope_ptr,  # [T]
    score_grad_ptr,  # [T, C] input dtype, out: gradient of h w + bias
    prob_ptr,  # [T, C] input dtype, out: embed_scale * P
    temperature_part_ptr,  # [tiles, T] float32, out: sum of dS (s - peak)
    bias_part_ptr,  # [row blocks, C] float32, out: column sums
    num_rows,
    num_vocab,
    width,
    value_width,
    stride_hidden_t,
    stride_hidden_d,
    stride_weight_v,
    stride_weight_d,
    stride_grad_t,
    stride_grad_e,
    stride_value_v,
    stride_value_e,
    stride_bias,
    stride_chunk,  # of score_grad, prob and bias_part
    vocab_start,
    chunk_start,
    chunk_size,
    seed,
    scale,
    softcap,
    inverse_temperature,
    embed_scale,
    ALIGNED: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    HAS_SLOPE: tl.constexpr,
    TIED: tl.constexpr,  # value is weight
    NEED_SCORES: tl.constexpr,
    NEED_PROB: tl.constexpr,
    NEED_TEMPERATURE: tl.constexpr,
    NEED_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    i_rows, i_tile = grouped(tl.program_id(0), tl.cdiv(num_rows, BLOCK_T), tl.cdiv(chunk_size, BLOCK_V), GROUP)
    rows = i_rows * BLOCK_T + tl.arange(0, BLOCK_T)
    m_rows = rows < num_rows
    rows64 = rows.to(tl.int64)
    column = i_tile * BLOCK_V + tl.arange(0, BLOCK_V)
    vocab = (chunk_start + column).to(tl.int64)
    m_vocab = column < chunk_size
    if TIED and HAS_GRAD and NEED_SCORES:
        k = tl.arange(0, BLOCK_K)
        p_hidden = hidden_ptr + rows64[:, None] * stride_hidden_t + k[None, :] * stride_hidden_d
        p_grad = grad_ptr + rows64[:, None] * stride_grad_t + k[None, :] * stride_grad_e
        p_weight = weight_ptr + vocab[:, None] * stride_weight_v + k[None, :] * stride_weight_d
        product = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
        grad_prob = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
        for start in range(0, width, BLOCK_K):
            m_k = k < width - start
            m_load = m_rows[:, None] & m_k[None, :]
            hidden = tl.load(p_hidden, mask=m_load, other=0.0)
            grad = tl.load(p_grad, mask=m_load, other=0.0)
            weight = tl.trans(tl.load(p_weight, mask=m_vocab[:, None] & m_k[None, :], other=0.0))
            product = dot(hidden, weight, product, PRECISION)
            grad_prob = dot(grad, weight, grad_prob, PRECISION)
            p_hidden += BLOCK_K * stride_hidden_d
            p_grad += BLOCK_K * stride_grad_e
            p_weight += BLOCK_K * stride_weight_d
    else:
        product = row_dot(
            hidden_ptr, weight_ptr, rows64, vocab, m_rows, m_vocab, width,
            stride_hidden_t, stride_hidden_d, stride_weight_v, stride_weight_d, PRECISION, BLOCK_T, BLOCK_V, BLOCK_K,
        )  # fmt: skip
        grad_prob = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
        if HAS_GRAD and NEED_SCORES:
            grad_prob = row_dot(
                grad_ptr, value_ptr, rows64, vocab, m_rows, m_vocab, value_width,
                stride_grad_t, stride_grad_e, stride_value_v, stride_value_e, PRECISION, BLOCK_T, BLOCK_V, BLOCK_K,
            )  # fmt: skip

    inverse = row_factors(temperature_ptr, rows[:, None], m_rows[:, None], inverse_temperature)
    seeds = row_seeds(seed_ptr, rows[:, None], m_rows[:, None], seed)
    thresholds = row_thresholds(threshold_ptr, rows[:, None], m_rows[:, None])
    score, capped = scores(
        product, vocab[None, :], inverse, seeds, thresholds,
        bias_ptr, threshold_ptr, stride_bias, num_vocab, vocab_start, seed, scale, softcap, ALIGNED,
    )  # fmt: skip
    inside = m_rows[:, None] & m_vocab[None, :]
    relative = score - tl.load(peak_ptr + rows, mask=m_rows, other=0.0)[:, None]
    prob = tl.exp(relative) / tl.load(total_ptr + rows, mask=m_rows, other=1.0)[:, None]
    prob = tl.where(inside, prob, 0.0)
    p_chunk = rows64[:, None] * stride_chunk + column[None, :]
    if NEED_PROB:
        tl.store(prob_ptr + p_chunk, (prob * embed_scale).to(prob_ptr.dtype.element_ty), mask=inside)
    if NEED_SCORES:
        constant = tl.load(constant_ptr + rows, mask=m_rows, other=0.0)
        grad = grad_prob * embed_scale - constant[:, None]
        relative = tl.maximum(relative, LOG_FLOOR)
        if HAS_SLOPE:
            grad -= relative * tl.load(slope_ptr + rows, mask=m_rows, other=0.0).to(tl.float32)[:, None]
        grad *= prob
        if NEED_TEMPERATURE:
            part = tl.sum(tl.where(inside, grad * relative, 0.0), 1)
            tl.store(temperature_part_ptr + i_tile * num_rows + rows, part, mask=m_rows)
        if softcap is not None:
            grad *= (1.0 - capped * capped) * scale * softcap * inverse
        else:
            grad *= scale * inverse
        tl.store(score_grad_ptr + p_chunk, grad.to(score_grad_ptr.dtype.element_ty), mask=inside)
        if NEED_BIAS:
            part = tl.sum(tl.where(inside, grad, 0.0), 0)
            tl.store(bias_part_ptr + i_rows * stride_chunk + column, part, mask=m_vocab)
