"""Launches form 3 of the forward (`many_rows`): blocks of rows, chunks of the vocabulary, two products for each."""

from __future__ import annotations

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import launching
from .. import plan as plans
from ..contract import Forward, Inputs, Options
from ..launching import (
    device_of,
    exact_scores,
    logit_offsets,
    row_stride,
    score_flags,
    score_scalars,
    score_strides,
    score_tensors,
)
from ..plan import Config, Problem, TwoProducts, cdiv, lookup, padded, plan_two_products
from . import many_rows

FINISH = Config({"BLOCK_E": 1024}, 4, 1)
ENTRIES = Config({"BLOCK": 32}, 4, 1)
_NO_SUMS = (None,) * 6


def _fits_epilogue(inputs: Inputs, options: Options) -> bool:
    """Whether our own product can be the first: see `plan_two_products`."""
    if inputs.head is None or options.softcap is not None or options.seed is not None:
        return False
    if inputs.seeds is not None or inputs.threshold is not None:
        return False
    # rows of adjacent elements, one behind the other, that begin at multiples of 16 bytes
    return all(
        m.stride(1) == 1 and m.stride(0) >= m.shape[1] and m.stride(0) * m.itemsize % 16 == 0 and m.data_ptr() % 16 == 0
        for m in (inputs.hidden, inputs.head)
    )


class _Scratch:
    """What a chunk of a block of rows needs. S and P are one tensor where both have the input's dtype."""

    def __init__(self, inputs: Inputs, plan: TwoProducts, stats: bool) -> None:
        device, dtype = inputs.hidden.device, inputs.values.dtype
        rows, columns = plan.row_block, padded(min(plan.chunk, inputs.num_vocab))
        tiles = cdiv(plan.chunk, plan.tile)

        def float32(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=device)

        def int64(*shape: int) -> Tensor | None:
            return torch.empty(shape, dtype=torch.int64, device=device) if stats else None

        self.probs = torch.empty((rows, columns), dtype=dtype, device=device)
        self.products = self.probs
        if inputs.head is not None and plan.product is None and not plan.half_scores and dtype != torch.float32:
            self.products = float32(rows, columns)
        # highest score, sum, moment, of each tile and of each row so far; a chunk reads one peak and writes the other
        many = padded(rows)  # so that each of them is aligned, whatever the rows, and needs no other compiled kernel
        self.tiles, self.tile_argmax = float32(3, many, tiles), int64(rows, tiles)
        self.rows = float32(4, many)


def forward_many_rows(
    inputs: Inputs, options: Options, problem: Problem, result: Forward, stats: bool, finish: bool, keep: bool
) -> Forward:
    """Fills the result. With `keep` it also gets `probs`, if they fit and backward can do without the scores."""
    num_rows = inputs.num_rows
    plan = plan_two_products(
        problem,
        device_of(inputs.hidden.device),
        exact_scores=exact_scores(inputs, stats),
        epilogue=_fits_epilogue(inputs, options),
        kept=plans.KEPT_BYTES if keep and inputs.head is not None and options.softcap is None else 0,
    )
    scratch = _Scratch(inputs, plan, stats)
    acc = result.exact
    if acc is None:
        acc = result.out if result.out.dtype == torch.float32 else torch.empty(
            (plan.row_block, result.out.shape[1]), dtype=torch.float32, device=result.out.device
        )  # fmt: skip
    for start in range(0, num_rows, plan.row_block):
        rows = slice(start, min(start + plan.row_block, num_rows))
        part = Forward(*(None if tensor is None else tensor[rows] for tensor in result))  # type: ignore[arg-type]
        part_acc = acc[rows] if acc.shape[0] == num_rows else acc[: rows.stop - start]
        _row_block(inputs.of_rows(rows), options, plan, scratch, part_acc, part, finish)
    if plan.keep:
        return result._replace(probs=scratch.probs[:, : inputs.num_vocab])
    return result


def _row_block(
    inputs: Inputs, options: Options, plan: TwoProducts, scratch: _Scratch, acc: Tensor, result: Forward, finish: bool
) -> None:
    values, count, num_vocab = inputs.values, inputs.num_rows, inputs.num_vocab
    width = values.shape[1]
    old, new, total, moment = scratch.rows
    stats = result.argmax is not None
    for start in range(0, num_vocab, plan.chunk):
        vocab = slice(start, min(start + plan.chunk, num_vocab))
        first, size = start == 0, vocab.stop - start
        _weights(inputs, options, plan, scratch, vocab, old, first, stats)
        tiles = cdiv(size, plan.tile)
        probs = scratch.probs[:count, :size]
        launching.launch(
            many_rows.settle_kernel,
            (count, plan.settle_parts),
            (
                probs, acc, *scratch.tiles, scratch.tile_argmax, old, new, total, moment, result.argmax,
                tiles, size, width, probs.stride(0), plan.settle_parts,
            ),
            Config({"TILE": plan.tile, "BLOCK_E": 1024}, 4, 1),
            FIRST=first,
            STATS=stats,
            TILES=1 << (tiles - 1).bit_length(),
        )  # fmt: skip
        launching.product(probs, values[vocab], acc, add=not first)
        old, new = new, old
    launching.launch(
        many_rows.finish_kernel,
        (count, cdiv(width, FINISH.blocks["BLOCK_E"])),
        (
            acc, old, total, moment, result.out, result.exact,
            result.peak, result.total, result.lse, result.entropy, result.max_prob, width, options.embed_scale,
        ),
        FINISH,
        FINISH=finish,
    )  # fmt: skip


def _weights(
    inputs: Inputs,
    options: Options,
    plan: TwoProducts,
    scratch: _Scratch,
    vocab: slice,
    peak: Tensor,
    first: bool,
    stats: bool,
) -> None:
    """P of a chunk, each tile relative to a reference of its own, and the tiles' sums."""
    hidden, head = inputs.hidden, inputs.head
    count, size = inputs.num_rows, vocab.stop - vocab.start
    sums = (*scratch.tiles, scratch.tile_argmax)
    if plan.product is not None and head is not None:
        blocks = plan.product.blocks
        programs = cdiv(count, blocks["BLOCK_T"]) * cdiv(size, blocks["BLOCK_V"])
        probs = scratch.probs[:count]
        launching.launch(
            many_rows.weights_product_kernel,
            (min(programs, device_of(hidden.device).num_sms * plan.product.per_sm),),
            (
                peak,
                TensorDescriptor.from_tensor(hidden, [blocks["BLOCK_T"], blocks["BLOCK_K"]]),
                TensorDescriptor.from_tensor(head, [blocks["BLOCK_V"], blocks["BLOCK_K"]]),
                TensorDescriptor.from_tensor(probs, [blocks["BLOCK_T"], blocks["BLOCK_V"]]),
                *score_tensors(inputs), *sums, count, inputs.num_vocab, hidden.shape[1], *score_strides(inputs),
                options.vocab_start, vocab.start, size, *score_scalars(inputs, options),
            ),
            plan.product,
            **score_flags(inputs, options),
            FIRST=first,
            STATS=stats,
        )  # fmt: skip
        return
    products, probs = scratch.products[:count, :size], scratch.probs[:count, :size]
    products, inputs, options = _products(inputs, options, vocab, products)
    sums = (peak, *scratch.tiles, scratch.tile_argmax, None)
    _elementwise(inputs, options, vocab.start, products, probs, sums, plan.weights, FIRST=first, STATS=stats)


def chunk_scores(inputs: Inputs, options: Options, chunk_start: int, size: int) -> Tensor:
    """Scores [T, size] of a chunk of the vocabulary, float32, by the same kernel."""
    out = torch.empty((inputs.num_rows, size), dtype=torch.float32, device=inputs.hidden.device)
    if inputs.num_rows:
        products, inputs, options = _products(inputs, options, slice(chunk_start, chunk_start + size), out)
        _elementwise(inputs, options, chunk_start, products, out, _NO_SUMS, _config(inputs), RAW=True)
    return out


def score_sums(
    inputs: Inputs, options: Options, products: Tensor, sums: tuple[Tensor, ...], config: Config, group: int
) -> tuple[Tensor, Inputs, Options]:
    """Of all scores: highest score, sum, moment and argmax of each tile, and the highest score of each group of `group`
    entries, all into `sums`. Returns what they were made from, as `_products` does, `products` being its `out`."""
    products, inputs, options = _products(inputs, options, slice(0, inputs.num_vocab), products)
    _elementwise(inputs, options, 0, products, None, (None, *sums), config, STATS=True, GROUP=group)
    return products, inputs, options


def _products(inputs: Inputs, options: Options, vocab: slice, out: Tensor) -> tuple[Tensor, Inputs, Options]:
    """The products h . w of a chunk, in `out` [T, C], or logits that are given, in their place; and what makes scores
    of them. Where `bias_ids` add to the logits, these are in `out`, and only the rest is left to do."""
    if inputs.head is None:
        return inputs.hidden[..., vocab], inputs, options
    launching.product(inputs.hidden, inputs.head[vocab].T, out)
    if inputs.bias_ids is None or inputs.bias_values is None:
        return out, inputs, options
    plain = Inputs(inputs.hidden, inputs.head, bias=inputs.bias)
    logits = options._replace(temperature=1.0, seed=None)
    _elementwise(plain, logits, vocab.start, out, out, _NO_SUMS, _config(inputs), RAW=True)
    ids, values = inputs.bias_ids.contiguous(), inputs.bias_values.contiguous()
    count, number = ids.shape
    if number:
        launching.launch(
            many_rows.add_entries_kernel,
            (count, cdiv(number, ENTRIES.blocks["BLOCK"])),
            (out, ids, values, number, out.shape[1], out.stride(0), options.vocab_start + vocab.start),
            ENTRIES,
        )
    inputs = inputs._replace(bias=None, bias_ids=None, bias_values=None)
    return out, inputs, options._replace(softcap=None, logit_scale=1.0)


def _config(inputs: Inputs) -> Config:
    return lookup("weights", device_of(inputs.hidden.device).arch, inputs.hidden.itemsize, inputs.num_rows)


def _elementwise(
    inputs: Inputs,
    options: Options,
    chunk_start: int,
    products: Tensor,
    probs: Tensor | None,
    sums: tuple[Tensor | None, ...],
    config: Config,
    *,
    FIRST: bool = True,
    STATS: bool = False,
    RAW: bool = False,
    GROUP: int = 1,
) -> None:
    """What is made of products or logits [.., C] of a chunk. `sums`: peak so far, sums of the tiles, group maxima."""
    count, size = inputs.num_rows, products.shape[-1]
    launching.launch(
        many_rows.weights_kernel,
        (cdiv(count, config.blocks["BLOCK_T"]) * cdiv(size, config.blocks["BLOCK_V"]),),
        (
            products, probs, logit_offsets(inputs), *score_tensors(inputs), *sums,
            count, inputs.num_vocab, cdiv(size, GROUP),
            row_stride(products), products.stride(-1), 0 if probs is None else probs.stride(0), *score_strides(inputs),
            options.vocab_start, chunk_start, size, *score_scalars(inputs, options),
        ),
        config,
        ALIGNED=options.vocab_start % 4 == 0,
        FIRST=FIRST,
        STATS=STATS,
        RAW=RAW,
        GROUP=GROUP,
    )  # fmt: skip
