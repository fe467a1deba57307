"""Launches forward and backward of rows that keep few entries (`kept_rows`)."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ... import launching
from ...contract import Forward, Grads, Inputs, Needs, Options, Saved
from ...launching import adjacent, device_of, logit_offsets, row_stride, score_scalars, score_strides, score_tensors
from ...plan import Config, cdiv, lookup
from ..launch_backward import constants, side_by_side
from . import kept_rows, kept_rows_backward


def forward_kept_rows(inputs: Inputs, options: Options, result: Forward, finish: bool) -> Forward:
    """Fills the result from the lists `ids`, `scores`, `count`."""
    config = _config("kept_forward", inputs)
    out, exact, lse, entropy, max_prob, argmax, peak, total, _ = result
    launching.launch(
        kept_rows.kept_forward_kernel,
        (inputs.num_rows, cdiv(out.shape[1], config.blocks["BLOCK_E"])),
        (
            *_sources(inputs), *score_tensors(inputs), out, exact, peak, total, lse, entropy, max_prob, argmax,
            *_sizes(inputs), *score_strides(inputs),
            options.vocab_start, *score_scalars(inputs, options), options.embed_scale,
        ),
        config,
        FINISH=finish,
        COUNT=_capacity(inputs),
    )  # fmt: skip
    return result


def backward_kept_rows(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    grad_entropy: Tensor | None,
    inputs: Inputs,
    saved: Saved,
    options: Options,
    needs: Needs,
) -> Grads:
    """As `launch_backward.backward`."""
    hidden, head, embed, device = inputs.hidden, inputs.head, inputs.embed, inputs.hidden.device
    num_vocab, num_rows, capacity = inputs.num_vocab, inputs.num_rows, _capacity(inputs)
    grad_lse, grad_entropy, saved = side_by_side(grad_lse, grad_entropy, saved)
    zeros = functools.partial(torch.zeros, dtype=torch.float32, device=device)
    empty = functools.partial(torch.empty, dtype=torch.float32, device=device)
    grads = Grads(
        None if not needs.hidden
        else zeros((num_rows, num_vocab), dtype=hidden.dtype) if head is None else empty((num_rows, head.shape[1])),
        zeros(head.shape, dtype=head.dtype) if needs.head and head is not None else None,
        zeros(embed.shape, dtype=embed.dtype) if needs.embed and embed is not None else None,
        zeros(num_vocab) if needs.bias and inputs.bias is not None else None,
        empty(num_rows) if needs.temperature and inputs.temperature is not None else None,
        empty(num_rows) if needs.noise_scale and inputs.noise_scale is not None else None,
        zeros(inputs.bias_values.shape) if needs.bias_values and inputs.bias_values is not None else None,
    )  # fmt: skip
    values_grad = None if grad_out is None else grads.head if embed is None else grads.embed
    weights = grads.head is not None or grads.bias is not None
    score_grad = empty((num_rows, capacity)) if weights else None
    probs = empty((num_rows, capacity)) if values_grad is not None else None
    if num_rows == 0:
        return grads
    config = _config("kept_backward", inputs)
    upstream = (
        grad_out, saved.peak, saved.total, constants(grad_out, grad_lse, grad_entropy, saved), grad_entropy,
        saved.token,
    )  # fmt: skip
    sources = (*_sources(inputs), *score_tensors(inputs), *upstream)
    grad_strides = (0, 0) if grad_out is None else grad_out.stride()
    rest = (
        *_sizes(inputs), *grad_strides, *score_strides(inputs),
        options.vocab_start, *score_scalars(inputs, options), options.embed_scale,
    )  # fmt: skip
    launching.launch(
        kept_rows_backward.kept_backward_kernel,
        (num_rows,),
        (
            *sources, score_grad, probs,
            grads.hidden, grads.temperature, grads.noise_scale, grads.bias_values, *rest,
        ),
        config,
        COUNT=capacity,
    )  # fmt: skip
    if grads.temperature is not None:
        grads.temperature.neg_()
    if score_grad is None and probs is None:
        return grads
    _matrices(grad_out, inputs, grads, score_grad, probs)
    config = _config("kept_overflow", inputs)
    launching.launch(
        kept_rows_backward.overflow_matrix_kernel,
        (cdiv(num_vocab, config.blocks["BLOCK_C"]),),
        (*sources, grads.head, values_grad, grads.bias, num_rows, *rest),
        config,
        COUNT=capacity,
    )  # fmt: skip
    return grads


def _matrices(
    grad_out: Tensor | None, inputs: Inputs, grads: Grads, score_grad: Tensor | None, probs: Tensor | None
) -> None:
    """Gradients of head, embedding matrix and bias: rows of hidden and grad_out, added up where their ids say."""
    assert inputs.ids is not None
    assert inputs.scores is not None
    assert inputs.num_kept is not None
    capacity, num_vocab = _capacity(inputs), inputs.num_vocab
    lost = (inputs.scores == -torch.inf) | (inputs.num_kept >= capacity)[:, None]
    ids, order = inputs.ids.masked_fill(lost, num_vocab).flatten().sort(stable=True)
    of_hidden, of_grad = (score_grad, inputs.hidden), (probs, grad_out)
    nothing: tuple[Any, Any] = (None, None)
    sums: list[tuple[Any, ...]] = []
    if inputs.embed is None and probs is not None:
        sums.append((of_hidden, of_grad, grads.head, grads.bias))
    else:
        if score_grad is not None:
            sums.append((of_hidden, nothing, grads.head, grads.bias))
        if probs is not None:
            sums.append((of_grad, nothing, grads.embed, None))
    config = _config("kept_matrix", inputs)
    for (weight, rows), (weight2, rows2), grad, grad_bias in sums:
        width = 1 if grad is None else grad.shape[1]
        strides = (*_matrix_strides(rows), *_matrix_strides(rows2))
        launching.launch(
            kept_rows_backward.kept_matrix_kernel,
            (ids.shape[0], cdiv(width, config.blocks["BLOCK_E"])),
            (ids, order, weight, rows, weight2, rows2, grad, grad_bias, ids.shape[0], num_vocab, width, *strides),
            config,
            COUNT=capacity,
        )


def _config(kernel: str, inputs: Inputs) -> Config:
    return lookup(kernel, device_of(inputs.hidden.device).arch, inputs.values.itemsize, inputs.num_rows)


def _capacity(inputs: Inputs) -> int:
    assert inputs.ids is not None
    return inputs.ids.shape[1]


def _matrix_strides(matrix: Tensor | None) -> tuple[int, int]:
    return (0, 0) if matrix is None else (row_stride(matrix), matrix.stride(-1))


def _sources(inputs: Inputs) -> tuple[Any, ...]:
    """Lists and matrices, and what scores are made of where a row overflows."""
    ids, values = inputs.bias_ids, inputs.bias_values
    lists = tuple(None if tensor is None else tensor.contiguous() for tensor in (inputs.ids, inputs.scores))
    return (
        *lists, adjacent(inputs.num_kept), inputs.values, inputs.hidden, logit_offsets(inputs), inputs.head,
        None if ids is None else ids.contiguous(), None if values is None else values.contiguous(),
    )  # fmt: skip


def _sizes(inputs: Inputs) -> tuple[int, ...]:
    values, hidden, head = inputs.values, inputs.hidden, inputs.head
    entries = 0 if inputs.bias_ids is None else inputs.bias_ids.shape[1]
    return (
        inputs.num_vocab, values.shape[1], 0 if head is None else head.shape[1], entries,
        *values.stride(), *_matrix_strides(hidden), *_matrix_strides(head),
    )  # fmt: skip
