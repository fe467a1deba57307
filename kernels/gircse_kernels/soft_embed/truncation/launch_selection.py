"""Launches the selection of what truncation keeps: scores in memory, their sums, and one program for each row."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import launching
from ...contract import Candidates, Inputs, Options, Selection, Truncation
from ...launching import adjacent, device_of, row_stride
from ...plan import Select, padded, plan_select
from ..launch_many_rows import score_sums
from .narrowing import BINS, narrow_kernel
from .selection import select_kernel


def select(inputs: Inputs, options: Options, rules: Truncation, capacity: int) -> Selection:
    """What the rules keep of each row, from its scores without noise, and the statistics of the whole distribution.

    Args:
        capacity: C, a power of two above the largest top_k, or above the largest top_n where there is no top_k; 0: no
            lists, thresholds alone.
    """
    ruled = any(rule is not None for rule in rules)
    found = _select(inputs, options, rules if ruled else None, capacity, finish=True)
    threshold = found.threshold if ruled else torch.full_like(found.sums[0], -torch.inf)
    return Selection(threshold, *found.sums, found.argmax, found.ids, found.scores, found.num_kept)


def candidates(inputs: Inputs, options: Options, capacity: int) -> Candidates:
    """The C highest scores of each row of a shard, and the sums over all of them, to be merged with other shards'."""
    found = _select(inputs, options, None, capacity, finish=False)
    return Candidates(found.ids, found.scores, *found.sums, found.argmax)


class _Found(NamedTuple):
    """The outputs of `select_kernel`."""

    threshold: Any
    sums: tuple[Tensor, Tensor, Tensor]
    argmax: Tensor
    ids: Any
    scores: Any
    num_kept: Any


def _select(inputs: Inputs, options: Options, rules: Truncation | None, capacity: int, *, finish: bool) -> _Found:
    inputs, options = inputs._replace(seeds=None, threshold=None, embed=None), options._replace(seed=None)
    num_rows, num_vocab, device = inputs.num_rows, inputs.num_vocab, inputs.hidden.device
    plan = plan_select(num_rows, num_vocab, inputs.hidden.itemsize, device_of(device), capacity)
    blocks = plan.select.blocks
    float32 = functools.partial(torch.empty, dtype=torch.float32, device=device)
    int64 = functools.partial(torch.empty, dtype=torch.int64, device=device)
    found = _Found(
        None if rules is None else float32(num_rows),
        (float32(num_rows), float32(num_rows), float32(num_rows)),
        int64(num_rows),
        int64((num_rows, capacity)) if capacity else None,
        float32((num_rows, capacity)) if capacity else None,
        int64(num_rows) if capacity and rules is not None else None,
    )
    products = float32((plan.row_block, padded(num_vocab) if inputs.head is not None else 0))
    tiles, tile_argmax = float32((3, padded(plan.row_block), plan.tiles)), int64((plan.row_block, plan.tiles))
    groups = float32((plan.row_block, plan.groups))
    lists = float32((plan.row_block, blocks["ROOM"]))
    indices = torch.empty((plan.row_block, 2 * blocks["ROOM"]), dtype=torch.int32, device=device) if capacity else None
    sums = (*tiles, tile_argmax, groups)
    narrow = None
    if rules is not None and capacity == 0 and plan.parts and _top_p_alone(rules):
        narrow = _Narrow(plan, device)
    for start in range(0, num_rows, plan.row_block):
        rows = slice(start, min(start + plan.row_block, num_rows))
        part, count = inputs if plan.row_block >= num_rows else inputs.of_rows(rows), rows.stop - start
        scores, scoring = score_sums(part, options, products, sums, plan.weights, blocks["GROUP"])
        first, second, third = (_rows(tensor, rows) for tensor in found.sums)
        bias, temperature, *_, bitmask = scoring.tensors
        of_rows = [adjacent(_rows(rule, rows)) for rule in rules or Truncation()]
        strides = (row_stride(scores), scores.stride(-1), *scoring.strides)
        rest = (*strides, options.vocab_start, *scoring.scalars[1:4])
        padded_tiles = 1 << (plan.tiles - 1).bit_length()
        if narrow is not None:
            head = (scores, scoring.offsets, *sums[:2], bias, temperature, bitmask, of_rows[1])
            narrow.run(count, head, (num_vocab, plan.tiles, plan.parts, *rest), padded_tiles)
        launching.launch(
            select_kernel,
            (count,),
            (
                scores, scoring.offsets, groups, *sums[:-1], bias, temperature, bitmask,
                *of_rows, lists, indices, *([None] * 5 if narrow is None else narrow.found),
                _rows(found.threshold, rows), first, second, third, _rows(found.argmax, rows),
                _rows(found.ids, rows), _rows(found.scores, rows), _rows(found.num_kept, rows),
                num_vocab, plan.tiles, plan.groups, plan.parts, *rest,
            ),
            plan.select,
            FINISH=finish,
            COUNT=capacity,
            LIST=plan.listed,
            GROUPS=1 << (plan.groups - 1).bit_length(),
            TILES=padded_tiles,
            PARTS=1 << max(0, plan.parts - 1).bit_length(),
            PART_ROOM=plan.narrow.blocks["ROOM"],
        )  # fmt: skip
    return found


def _top_p_alone(rules: Truncation) -> bool:
    return rules.top_p is not None and all(rule is None for rule in rules._replace(top_p=None))


class _Narrow:
    """The passes of `narrow_kernel` over a block of rows, and what they leave."""

    def __init__(self, plan: Select, device: torch.device) -> None:
        self.plan = plan
        rows, parts, bins = plan.row_block, plan.parts, BINS.value
        self.keys = torch.empty((2, rows, bins), dtype=torch.int32, device=device).unbind()
        self.masses = torch.empty((2, rows, parts, bins), dtype=torch.float32, device=device).unbind()
        self.lists = torch.empty((rows, parts, plan.narrow.blocks["ROOM"]), dtype=torch.float32, device=device)
        self.numbers = torch.empty((rows, parts), dtype=torch.int32, device=device)
        self.edges = torch.empty((rows, parts, 2), dtype=torch.float32, device=device)

    def run(self, count: int, head: tuple[Any, ...], rest: tuple[Any, ...], tiles: int) -> None:
        (keys, last_keys), (masses, last_masses) = self.keys, self.masses
        none = (None, None)
        for before, after, lists in (
            (none, (keys, masses), (None, None, None)),
            ((keys, masses), (last_keys, last_masses), (None, None, None)),
            ((last_keys, last_masses), none, (self.lists, self.numbers, self.edges)),
        ):
            launching.launch(
                narrow_kernel,
                (count * self.plan.parts,),
                (*head, *before, *after, *lists, *rest),
                self.plan.narrow,
                TILES=tiles,
                PARTS=1 << (self.plan.parts - 1).bit_length(),
            )

    @property
    def found(self) -> tuple[Any, ...]:
        """As `select_kernel` takes it."""
        return self.keys[1], self.masses[1], self.lists, self.numbers, self.edges


def _rows(tensor: Tensor | None, rows: slice) -> Tensor | None:
    whole = tensor is None or (rows.start == 0 and rows.stop == tensor.shape[0])
    return tensor if whole else tensor[rows]  # type: ignore[index]
