"""Which kernels run, with which tiles, over which shares: everything the launcher decides, in plain numbers.

A plan depends on the problem (T, V, D, E, tied, dtype) and the device (architecture, multiprocessors) alone. It is
made once per problem and cached; the traffic model and the compile report read the same plans as the launcher.

Tiles come from a committed table, `configs.json`, written offline by `bench/tune.py`: for each kernel and architecture
a list of entries, each for inputs of `itemsize` bytes, up to `rows` rows and (where a kernel holds whole rows) up to
`width` columns. The look-up takes the smallest entry that fits, the tallest if none does, and `SAFE` where the table
has nothing. Nothing is ever tuned in a user's process.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

# Limit of what a pass holds beyond O(T D): one chunk of probabilities (two in a backward that needs both), and the
# partial sums of all splits.
CHUNK_BYTES = 32 << 20
PARTIAL_BYTES = 32 << 20
# A chunk of a tied matrix that should still be in L2 for its second product (50 MB on an H100, 40 MB on an A100).
L2_BYTES = 24 << 20
# Fewer rows than this are bound by memory: 2 FLOPs for each of T rows and 2 bytes, 790 TFLOP/s against 3 TB/s.
MEMORY_BOUND_ROWS = 256
ROW_BLOCK = 4096  # rows that a two-pass forward or a backward takes at once
# Up to this width and so many rows, a program holds whole rows of a tied matrix, which is then read once.
WHOLE_WIDTH = 2048
FEW_ROWS = 32
TABLE = Path(__file__).with_name("configs.json")


class Config(NamedTuple):
    """Tiles of one kernel: the values of its block constants, and how it is compiled."""

    blocks: dict[str, int]
    num_warps: int
    num_stages: int
    per_sm: int = 1  # programs that a multiprocessor should have; decides into how many shares work is split

    def __hash__(self) -> int:
        return hash((*self.blocks.items(), *self[1:]))


SAFE = {
    "score": Config({"BLOCK_T": 16, "BLOCK_V": 64, "BLOCK_K": 32, "GROUP": 8}, 4, 2),
    "weigh": Config({"BLOCK_T": 16, "BLOCK_E": 64, "BLOCK_V": 32, "GROUP": 8}, 4, 2),
    "score_grad": Config({"BLOCK_T": 16, "BLOCK_V": 64, "BLOCK_K": 32, "GROUP": 8}, 4, 2),
    "product": Config({"BLOCK_T": 16, "BLOCK_E": 64, "BLOCK_V": 32, "GROUP": 8}, 4, 2),
    "vocab_grad": Config({"BLOCK_V": 64, "BLOCK_E": 64, "BLOCK_T": 16, "GROUP": 8}, 4, 2),
}


class Device(NamedTuple):
    """What a plan depends on: compute capability (80, 90, ..) and multiprocessors."""

    arch: int
    num_sms: int


class Problem(NamedTuple):
    """T, V, D, E, whether the value matrix is the head, bytes per element."""

    rows: int
    vocab: int
    width: int
    value_width: int
    tied: bool
    itemsize: int


class OneRow(NamedTuple):
    """`one_row_kernel`, then `merge_kernel`."""

    config: Config
    pieces: int  # of PIECE columns, in which a row of D is held
    splits: int  # programs among which the vocabulary is divided
    tiles_per_split: int

    def scratch(self, problem: Problem) -> int:
        """Bytes of the partial sums."""
        return 4 * partial_floats(self.splits, problem.rows, problem.value_width)


class FewRows(NamedTuple):
    """`few_rows_kernel`, then `merge_kernel`."""

    config: Config
    pieces: int  # of PIECE columns, in which a row of D is held
    row_blocks: int  # of BLOCK_T rows; each reads the whole matrix, from L2 where another one has just read it
    splits: int  # shares of the vocabulary; there are splits * row_blocks programs
    tiles_per_split: int

    def scratch(self, problem: Problem) -> int:
        """Bytes of the partial sums."""
        return 4 * partial_floats(self.splits, problem.rows, problem.value_width)


class TwoPass(NamedTuple):
    """For each block of rows and each chunk `score_kernel` and `weigh_kernel`; at the block's end `merge_kernel`."""

    score: Config
    weigh: Config
    row_block: int
    chunk: int  # vocabulary rows
    splits: int
    tiles_per_split: int


class Backward(NamedTuple):
    """`constants_kernel`, then for each chunk and block of rows `score_grad_kernel` and the products asked for."""

    score_grad: Config
    product: Config
    vocab_grad: Config
    row_block: int
    chunk: int
    splits: int  # of the product dS W over a chunk
    per_split: int


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


@functools.lru_cache(maxsize=1)
def table() -> dict[str, dict[str, list[dict[str, Any]]]]:
    """kernel -> "sm_XX" -> entries."""
    return json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else {}


def find(kernel: str, arch: int, itemsize: int, rows: int, width: int = 0) -> Config | None:
    """The entry for this case; None where the table has none."""
    by_arch = table().get(kernel, {})
    known = [int(name[3:]) for name in by_arch if int(name[3:]) <= arch]
    if not known:
        return None
    fitting = [e for e in by_arch[f"sm_{max(known)}"] if e["itemsize"] == itemsize and e.get("width", width) >= width]
    if not fitting:
        return None
    # fewest blocks of rows, then the narrowest, then the shortest tile that does it
    entry = min(fitting, key=lambda e: (cdiv(rows, e["rows"]), e.get("width", 0), e["rows"]))
    return Config(entry["blocks"], entry["num_warps"], entry["num_stages"], entry.get("per_sm", 1))


def lookup(kernel: str, arch: int, itemsize: int, rows: int) -> Config:
    return find(kernel, arch, itemsize, rows) or SAFE[kernel]


def partial_floats(splits: int, rows: int, width: int) -> int:
    """Elements of the partial sums, laid out as `merge` says."""
    return splits * rows * (width + 4)


@functools.lru_cache(maxsize=4096)
def plan_forward(problem: Problem, device: Device) -> OneRow | FewRows | TwoPass:
    return _whole_rows(problem, device) or _two_pass(problem, device)


def _whole_rows(problem: Problem, device: Device) -> OneRow | FewRows | None:
    # float32: a 3xTF32 product of whole rows spills, and its gradients need scores bitwise as backward recomputes them
    if not problem.tied or problem.itemsize != 2 or problem.width > WHOLE_WIDTH or problem.rows > FEW_ROWS:
        return None
    kernel = "one_row" if problem.rows == 1 else "few_rows"
    config = find(kernel, device.arch, problem.itemsize, problem.rows, problem.width)
    if config is None:
        return None
    pieces = cdiv(problem.width, config.blocks["PIECE"])
    row_blocks = cdiv(problem.rows, config.blocks.get("BLOCK_T", 1))
    tiles = cdiv(problem.vocab, config.blocks["BLOCK_V"])
    most = max(1, PARTIAL_BYTES // (4 * partial_floats(1, problem.rows, problem.width)))
    splits = max(1, min(tiles, most, device.num_sms * config.per_sm // row_blocks))
    per_split = cdiv(tiles, splits)
    splits = cdiv(tiles, per_split)
    if kernel == "one_row":
        return OneRow(config, pieces, splits, per_split)
    return FewRows(config, pieces, row_blocks, splits, per_split)


def _two_pass(problem: Problem, device: Device) -> TwoPass:
    row_block = even_blocks(problem.rows, ROW_BLOCK)
    score = lookup("score", device.arch, problem.itemsize, row_block)
    weigh = lookup("weigh", device.arch, problem.itemsize, row_block)
    tile = score.blocks["BLOCK_V"]
    # a product of the second kernel may not reach beyond one tile of the first
    block = math.gcd(tile, weigh.blocks["BLOCK_V"])
    weigh = weigh._replace(blocks={**weigh.blocks, "BLOCK_V": block})
    most = CHUNK_BYTES // (row_block * problem.itemsize)
    if problem.tied and row_block < MEMORY_BOUND_ROWS:
        most = min(most, L2_BYTES // (problem.width * problem.itemsize))
    chunk = chunk_size(problem.vocab, most, tile)
    tiles = cdiv(chunk, tile)
    programs = cdiv(row_block, weigh.blocks["BLOCK_T"]) * cdiv(problem.value_width, weigh.blocks["BLOCK_E"])
    splits = _splits(programs, tiles, row_block * problem.value_width, weigh, device)
    per_split = cdiv(tiles, splits)
    return TwoPass(score, weigh, row_block, chunk, cdiv(tiles, per_split), per_split)


@functools.lru_cache(maxsize=4096)
def plan_backward(problem: Problem, device: Device, need_values: bool, need_head: bool) -> Backward:
    row_block = even_blocks(problem.rows, ROW_BLOCK)
    score_grad, product, vocab_grad = (
        lookup(kernel, device.arch, problem.itemsize, row_block) for kernel in ("score_grad", "product", "vocab_grad")
    )
    most = CHUNK_BYTES // (row_block * problem.itemsize * (2 if need_values else 1))
    sums = problem.width * need_head + problem.value_width * (need_values and not problem.tied)
    if row_block < problem.rows and sums:  # float32 sums over the blocks of rows, too
        most = min(most, PARTIAL_BYTES // (4 * sums))
    if problem.tied and row_block < MEMORY_BOUND_ROWS:
        most = min(most, L2_BYTES // (problem.width * problem.itemsize))
    chunk = chunk_size(problem.vocab, most, score_grad.blocks["BLOCK_V"])
    block = product.blocks["BLOCK_V"]
    steps = cdiv(chunk, block)
    programs = cdiv(row_block, product.blocks["BLOCK_T"]) * cdiv(problem.width, product.blocks["BLOCK_E"])
    splits = _splits(programs, steps, problem.rows * problem.width, product, device)
    per_split = cdiv(steps, splits)
    return Backward(score_grad, product, vocab_grad, row_block, chunk, cdiv(steps, per_split), per_split * block)


def even_blocks(total: int, limit: int) -> int:
    """Size of the fewest equal blocks of at most `limit` that cover `total`."""
    return max(1, cdiv(total, max(1, cdiv(total, limit))))


def chunk_size(vocab: int, most: int, tile: int) -> int:
    """The fewest even chunks of at most `most` vocabulary rows, whole tiles each."""
    tiles = cdiv(vocab, tile)
    return tile * even_blocks(tiles, max(1, most // tile))


def _splits(programs: int, steps: int, elements: int, config: Config, device: Device) -> int:
    """Shares of a long sum that fill the device, as far as their partial results fit."""
    wanted = cdiv(device.num_sms * config.per_sm, programs)
    return max(1, min(wanted, steps, PARTIAL_BYTES // (4 * elements)))
