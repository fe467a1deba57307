"""Launches form 3 of the forward (`many_rows`): blocks of rows, chunks of the vocabulary, two products for each."""

from __future__ import annotations

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import launching
from .. import plan as plans
from ..contract import Forward, Inputs, Options
from ..launching import Scoring, chunks, corner, device_of, exact_scores, row_stride, score_flags
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
        part, part_inputs, part_acc = result, inputs, acc
        if plan.row_block < num_rows:
            rows = slice(start, min(start + plan.row_block, num_rows))
            part = Forward(*(None if tensor is None else tensor[rows] for tensor in result))  # type: ignore[arg-type]
            part_inputs = inputs.of_rows(rows)
            part_acc = acc[rows] if acc.shape[0] == num_rows else acc[: rows.stop - start]
        _row_block(part_inputs, options, plan, scratch, part_acc, part, finish)
    if plan.keep:
        return result._replace(probs=scratch.probs[:, : inputs.num_vocab])
    return result


def _row_block(
    inputs: Inputs, options: Options, plan: TwoProducts, scratch: _Scratch, acc: Tensor, result: Forward, finish: bool
) -> None:
    count, stats = inputs.num_rows, result.argmax is not None
    tables = chunks(inputs.values, plan.chunk)
    width, start = acc.shape[1], 0
    old, new, total, moment = scratch.rows
    sums = *scratch.tiles, scratch.tile_argmax
    source = _Source(inputs, options, plan.chunk)
    for i, table in enumerate(tables):
        size = table.shape[0]
        tiles = cdiv(size, plan.tile)
        probs = corner(scratch.probs, count, size)
        if plan.product is None:
            made = source.products(i, start, scratch.products)
            flags = {"FIRST": i == 0, "STATS": stats}
            _elementwise(source, start, made, probs, (old, *sums, None), plan.weights, **flags)
        else:
            _product_and_weights(source, plan.product, start, size, scratch, (old, *sums), i == 0, stats)
        launching.launch(
            many_rows.settle_kernel,
            (count, plan.settle_parts),
            (
                probs, acc, *sums, old, new, total, moment, result.argmax,
                tiles, size, width, probs.stride(0), plan.settle_parts,
            ),
            Config({"TILE": plan.tile, "BLOCK_E": 1024}, 4, 1),
            FIRST=i == 0,
            STATS=stats,
            TILES=1 << (tiles - 1).bit_length(),
        )  # fmt: skip
        launching.product(probs, table, acc, add=i > 0)
        old, new = new, old
        start += size
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


class _Source:
    """Where the scores of a block of rows come from, and what the kernels need to make them, once for all chunks."""

    def __init__(self, inputs: Inputs, options: Options, chunk: int, only: slice | None = None) -> None:
        self.inputs, self.options, self.count = inputs, options, inputs.num_rows
        self.num_vocab = inputs.num_vocab
        self.given = inputs.head is None
        # logits that are given, or what hidden states are multiplied with
        right = inputs.hidden if inputs.head is None else inputs.head.T
        self.parts = chunks(right, chunk, right.dim() - 1) if only is None else (right[..., only],)
        self.added = not self.given and inputs.bias_ids is not None and inputs.bias_values is not None
        if self.added:  # behind bias and soft-cap, which are then done
            inputs, options = inputs._replace(bias=None), options._replace(softcap=None, logit_scale=1.0)
        self.scoring = Scoring.of(inputs, options)

    def products(self, i: int, start: int, out: Tensor) -> Tensor:
        """The products h . w of chunk i, which begins at `start`, in the corner of `out` [T, C], or logits that are
        given, in their place. Where `bias_ids` add to the logits, these are in `out`, and only the rest is left to do.
        """
        part = self.parts[i]
        if self.given:
            return part
        out = corner(out, self.count, part.shape[1])
        launching.product(self.inputs.hidden, part, out)
        if self.added:
            self._add(start, out)
        return out

    def _add(self, start: int, out: Tensor) -> None:
        inputs, options = self.inputs, self.options._replace(temperature=1.0, seed=None)
        assert inputs.bias_ids is not None
        assert inputs.bias_values is not None
        plain = _Source(Inputs(inputs.hidden, inputs.head, bias=inputs.bias), options, self.num_vocab)
        _elementwise(plain, start, out, out, _NO_SUMS, _config(inputs), RAW=True)
        ids, values = inputs.bias_ids.contiguous(), inputs.bias_values.contiguous()
        count, number = ids.shape
        if number:
            launching.launch(
                many_rows.add_entries_kernel,
                (count, cdiv(number, ENTRIES.blocks["BLOCK"])),
                (out, ids, values, number, out.shape[1], out.stride(0), options.vocab_start + start),
                ENTRIES,
            )


def _product_and_weights(
    source: _Source,
    config: Config,
    start: int,
    size: int,
    scratch: _Scratch,
    sums: tuple[Tensor | None, ...],
    first: bool,
    stats: bool,
) -> None:
    """P of a chunk, each tile relative to a reference of its own, and the tiles' sums, by one kernel."""
    inputs, options, blocks, count = source.inputs, source.options, config.blocks, source.count
    hidden, head, scoring = inputs.hidden, inputs.head, source.scoring
    assert head is not None
    peak, *tiles = sums
    programs = cdiv(count, blocks["BLOCK_T"]) * cdiv(size, blocks["BLOCK_V"])
    launching.launch(
        many_rows.weights_product_kernel,
        (min(programs, device_of(hidden.device).num_sms * config.per_sm),),
        (
            peak,
            TensorDescriptor.from_tensor(hidden, [blocks["BLOCK_T"], blocks["BLOCK_K"]]),
            TensorDescriptor.from_tensor(head, [blocks["BLOCK_V"], blocks["BLOCK_K"]]),
            TensorDescriptor.from_tensor(scratch.probs[:count], [blocks["BLOCK_T"], blocks["BLOCK_V"]]),
            *scoring.tensors, *tiles, count, source.num_vocab, hidden.shape[1], *scoring.strides,
            options.vocab_start, start, size, *scoring.scalars,
        ),
        config,
        **score_flags(inputs, options),
        FIRST=first,
        STATS=stats,
    )  # fmt: skip


def chunk_scores(inputs: Inputs, options: Options, chunk_start: int, size: int) -> Tensor:
    """Scores [T, size] of a chunk of the vocabulary, float32, by the same kernel."""
    out = torch.empty((inputs.num_rows, size), dtype=torch.float32, device=inputs.hidden.device)
    if inputs.num_rows:
        source = _Source(inputs, options, size, slice(chunk_start, chunk_start + size))
        products = source.products(0, chunk_start, out)
        _elementwise(source, chunk_start, products, out, _NO_SUMS, _config(inputs), RAW=True)
    return out


def score_sums(
    inputs: Inputs, options: Options, products: Tensor, sums: tuple[Tensor, ...], config: Config, group: int
) -> tuple[Tensor, Scoring]:
    """Of all scores: highest score, sum, moment and argmax of each tile, and the highest score of each group of `group`
    entries, all into `sums`. Returns what they were made from: the products, in `products` unless logits are given."""
    source = _Source(inputs, options, inputs.num_vocab)
    products = source.products(0, 0, products)
    _elementwise(source, 0, products, None, (None, *sums), config, STATS=True, GROUP=group)
    return products, source.scoring


def _config(inputs: Inputs) -> Config:
    return lookup("weights", device_of(inputs.hidden.device).arch, inputs.hidden.itemsize, inputs.num_rows)


def _elementwise(
    source: _Source,
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
    (offsets, tensors, strides, scalars), count, start = source.scoring, source.count, source.options.vocab_start
    size = products.shape[-1]
    launching.launch(
        many_rows.weights_kernel,
        (cdiv(count, config.blocks["BLOCK_T"]) * cdiv(size, config.blocks["BLOCK_V"]),),
        (
            products, probs, offsets, *tensors, *sums, count, source.num_vocab, cdiv(size, GROUP),
            row_stride(products), products.stride(-1), 0 if probs is None else probs.stride(0), *strides,
            start, chunk_start, size, *scalars,
        ),
        config,
        ALIGNED=start % 4 == 0,
        FIRST=FIRST,
        STATS=STATS,
        RAW=RAW,
        GROUP=GROUP,
    )  # fmt: skip
