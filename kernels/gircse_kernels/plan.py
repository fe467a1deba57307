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
from pathlib import Path
from typing import Any, NamedTuple

SCRATCH_BYTES = 64 << 20  # the most that a call holds beyond O(T D), whatever T and V
# The most that one call keeps of its probabilities for backward, which then makes two products of three; 0: nothing.
KEPT_BYTES = 64 << 20
PARTIAL_BYTES = 32 << 20  # of that, the partial sums of forms 1 and 2
# What a chunk of given logits may take whatever their size: smaller ones cost more launches than they save memory.
GIVEN_BYTES = 8 << 20
SETTLED_TILES = 4  # tiles of a row that one program of `settle_kernel` brings to the row's reference
LISTED_PARTS = 64  # of a row in `narrow_kernel`, whose lists one program holds in registers
ROW_BLOCK = 4096  # rows that form 3 or a backward takes at once
# Up to this width and so many rows, a program holds whole rows of a tied matrix, which is then read once.
WHOLE_WIDTH = 2048
FEW_ROWS = 32
# A second block of rows reads the matrix again from L2: beyond these columns form 3 is then faster.
NARROW_WIDTH = 1024
FEW_WIDE_ROWS = 16
# Consumer and inference GPUs (compute capability 8.6, 8.9, 12.0, 12.1) give a program 99 KiB of shared memory, the
# others 163 or 227. All of them are planned as 8.6: with Ampere's tiles, and form 2 up to the width that fits.
SMALL_SHARED = (86, 89, 120, 121)
SMALL_SHARED_WIDTH = 576
# On sm_90 and newer a kernel of the decoder may start before the one in front of it has ended, see
# `decoder/dependent.py`: a captured step of 0.5B with 64 rows took 1.08 ms instead of 1.20 on an H200.
DEPENDENT_LAUNCH = True
TABLE = Path(__file__).with_name("configs.json")


class Config(NamedTuple):
    """Tiles of one kernel: the values of its block constants, and how it is compiled."""

    blocks: dict[str, int]
    num_warps: int
    num_stages: int
    per_sm: int = 1  # programs that a multiprocessor should have; decides into how many shares work is split
    dependent: bool = False  # it may start before the kernel in front of it has ended

    def __hash__(self) -> int:
        return hash((*self.blocks.items(), *self[1:]))

    @property
    def options(self) -> dict[str, Any]:
        """What Triton compiles with, beside the kernel's own constants."""
        found: dict[str, Any] = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return {**found, "launch_pdl": True} if self.dependent else found


SAFE = {
    "matmul": Config({"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 32, "GROUP": 8}, 4, 2),
    "weights": Config({"BLOCK_T": 1, "BLOCK_V": 2048}, 4, 1),
    "weights_product": Config({"BLOCK_T": 64, "BLOCK_V": 64, "BLOCK_K": 32}, 4, 2),
    "score_grad": Config({"BLOCK_T": 2, "BLOCK_V": 1024}, 4, 1),
    "kept_forward": Config({"BLOCK_C": 32, "BLOCK_E": 128}, 4, 1),
    "kept_backward": Config({"BLOCK_C": 32, "BLOCK_E": 128}, 4, 1),
    "kept_overflow": Config({"BLOCK_C": 32, "BLOCK_E": 128}, 8, 1),
    "kept_matrix": Config({"BLOCK_C": 16, "BLOCK_E": 256}, 4, 1),
    "narrow": Config({"BLOCK": 4096, "ROOM": 128}, 8, 1),
    "select": Config({"GROUP": 64, "WALK": 64, "BLOCK": 4096, "ROOM": 4096}, 8, 1),
}


class Device(NamedTuple):
    """What a plan depends on: compute capability (80, 90, ..; 86 for all of `SMALL_SHARED`) and multiprocessors."""

    arch: int
    num_sms: int


class Problem(NamedTuple):
    """T, V, D, E, whether the value matrix is the head, bytes per element (of the matrices)."""

    rows: int
    vocab: int
    width: int  # 0: logits are given
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


class Choice(NamedTuple):
    """What form 3 and the backward may choose between, by rows and width: the table's entries under `many_rows`."""

    epilogue: bool  # the first product is our own, with the exponential in its epilogue, where that can be
    half_scores: bool  # otherwise cuBLAS rounds it to the input's dtype, as eager PyTorch does
    chunk_mib: int  # of a chunk's scratch, at most; columns that fill the GPU's multiprocessors with whole tiles
    backward_mib: int  # the same in backward, where an entry takes more

    def rounds(self, problem: Problem, exact_scores: bool) -> bool:
        """Whether scores are rounded: by forward and backward alike, or the backward's P would not sum to 1."""
        return self.half_scores and not self.epilogue and problem.itemsize == 2 and not exact_scores


class TwoProducts(NamedTuple):
    """Form 3. For each block of rows and each chunk: `weights_product_kernel`, or a product and `weights_kernel`; then
    `settle_kernel` and a product. At the end of the block of rows `finish_kernel`."""

    product: Config | None  # of `weights_product_kernel`; None: cuBLAS, or nothing, and `weights_kernel`
    weights: Config  # of `weights_kernel`
    row_block: int
    chunk: int  # vocabulary rows
    settle_parts: int  # programs of `settle_kernel` for each row
    half_scores: bool  # scores come from cuBLAS in the input's dtype, not in float32
    keep: bool  # P [T, V], one chunk, is kept for backward

    @property
    def tile(self) -> int:
        """Vocabulary rows of a tile of P."""
        return (self.product or self.weights).blocks["BLOCK_V"]

    def scratch(self, problem: Problem) -> int:
        """Bytes that a call allocates beyond its inputs and results; P is a result where it is kept."""
        elements = self.row_block * padded(min(self.chunk, problem.vocab))
        apart = problem.width > 0 and self.product is None and not self.half_scores and problem.itemsize == 2
        probs = 0 if self.keep else elements * problem.itemsize
        sums = 4 * padded(self.row_block) * (4 + 3 * cdiv(self.chunk, self.tile))
        accumulator = 4 * self.row_block * problem.value_width if problem.itemsize == 2 else 0
        return probs + 4 * elements * apart + sums + accumulator


class Backward(NamedTuple):
    """`constants_kernel`, then for each chunk and block of rows the products that are wanted and, between them,
    `score_grad_kernel`."""

    score_grad: Config
    row_block: int
    chunk: int
    half_scores: bool

    def scratch(self, problem: Problem) -> int:
        """Bytes that a call for the gradient of hidden states allocates beyond its inputs and results."""
        elements = self.row_block * padded(min(self.chunk, problem.vocab))
        stacked = 2 * self.row_block * problem.width * problem.itemsize if problem.tied and not self.half_scores else 0
        each = _backward_bytes(problem, self.half_scores, False, False)
        return elements * each + stacked + 4 * problem.rows


class Select(NamedTuple):
    """For each block of rows the scores of all entries by a product, then `weights_kernel` and `select_kernel`; between
    them, for top-p alone, `narrow_kernel` three times."""

    weights: Config
    select: Config
    narrow: Config
    row_block: int
    tiles: int  # of a row, with sums of their own
    groups: int  # of a row, with a highest score of their own
    listed: int  # entries among which the highest ones are chosen
    parts: int  # of a row, with a program each in `narrow_kernel`; 0: too many, it does not run

    def scratch(self, vocab: int) -> int:
        """Bytes that a call allocates beyond its inputs and results."""
        lists = 12 * self.select.blocks["ROOM"] + 4 * self.parts * (self.narrow.blocks["ROOM"] + 35) + 128
        return self.row_block * (4 * padded(vocab) + 20 * self.tiles + 4 * self.groups + lists)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


@functools.lru_cache(maxsize=1)
def table() -> dict[str, dict[str, list[dict[str, Any]]]]:
    """kernel -> "sm_XX" -> entries."""
    return json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else {}


def _entry(kernel: str, arch: int, itemsize: int, rows: int, width: int) -> dict[str, Any] | None:
    """The entry for this case; None where the table has none."""
    by_arch = table().get(kernel, {})
    known = [int(name[3:]) for name in by_arch if int(name[3:]) <= arch]
    if not known:
        return None
    fitting = [e for e in by_arch[f"sm_{max(known)}"] if e["itemsize"] == itemsize and e.get("width", width) >= width]
    # fewest blocks of rows, then the narrowest, then the shortest tile that does it
    return min(fitting, key=lambda e: (cdiv(rows, e["rows"]), e.get("width", 0), e["rows"]), default=None)


def find(kernel: str, arch: int, itemsize: int, rows: int, width: int = 0) -> Config | None:
    """The kernel's config for this case; None where the table has none."""
    entry = _entry(kernel, arch, itemsize, rows, width)
    if entry is None:
        return None
    return Config(entry["blocks"], entry["num_warps"], entry["num_stages"], entry.get("per_sm", 1))


def lookup(kernel: str, arch: int, itemsize: int, rows: int) -> Config:
    return find(kernel, arch, itemsize, rows) or SAFE[kernel]


def partial_floats(splits: int, rows: int, width: int) -> int:
    """Elements of the partial sums, laid out as `merge` says."""
    return splits * rows * (width + 4)


@functools.lru_cache(maxsize=4096)
def plan_forward(problem: Problem, device: Device) -> OneRow | FewRows | TwoProducts:
    """The form of a forward; of form 3 as it is where nothing but the result is wanted."""
    return _whole_rows(problem, device) or plan_two_products(problem, device)


def _whole_rows(problem: Problem, device: Device) -> OneRow | FewRows | None:
    # float32: a 3xTF32 product of whole rows spills, and its gradients need scores bitwise as backward recomputes them
    most_rows = FEW_ROWS if problem.width <= NARROW_WIDTH else min(FEW_ROWS, FEW_WIDE_ROWS)
    if not problem.tied or problem.itemsize != 2 or problem.width > WHOLE_WIDTH or problem.rows > most_rows:
        return None
    kernel = "one_row" if problem.rows == 1 else "few_rows"
    if kernel == "few_rows" and device.arch == SMALL_SHARED[0] and problem.width > SMALL_SHARED_WIDTH:
        return None
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


def choose(problem: Problem, device: Device) -> Choice:
    """The committed choice for this problem."""
    entry = _entry("many_rows", device.arch, problem.itemsize, problem.rows, problem.width)
    most = SCRATCH_BYTES >> 20
    return Choice(False, False, most, most) if entry is None else Choice(*(entry[n] for n in Choice._fields))


@functools.lru_cache(maxsize=4096)
def plan_two_products(
    problem: Problem,
    device: Device,
    *,
    exact_scores: bool = False,
    epilogue: bool = False,
    kept: int = 0,
    scratch: int | None = None,
) -> TwoProducts:
    """Form 3 for any problem.

    Args:
        exact_scores: scores may not be rounded to the input's dtype, because they themselves are read: for statistics,
            or to be compared with a threshold.
        epilogue: our own product may be the first: tensor descriptors can read the matrices, and its epilogue has no
            soft-cap, noise or threshold, whose registers would not fit beside the accumulator.
        kept: bytes of probabilities that may be kept for backward.
        scratch: bytes that a chunk may take; None: `scratch_bytes`.
    """
    scratch = scratch_bytes(problem) if scratch is None else scratch
    rows, vocab, width, _, _, itemsize = problem
    choice = choose(problem, device)
    product = None
    if choice.epilogue and epilogue:
        product = find("weights_product", device.arch, itemsize, rows, width)
    weights = lookup("weights", device.arch, itemsize, rows)
    tile = (product or weights).blocks["BLOCK_V"]
    half = choice.rounds(problem, exact_scores)
    # P takes the memory of the scores where the dtypes are the same
    score_bytes = 0 if product or half or itemsize == 4 or width == 0 else 4
    row_block = even_blocks(rows, min(ROW_BLOCK, scratch // (tile * (itemsize + score_bytes))))
    elements = rows * padded(vocab)
    keep = row_block == rows and elements * itemsize <= kept and elements * score_bytes <= scratch
    most = min(choice.chunk_mib << 20, scratch) // (row_block * (itemsize + score_bytes))
    chunk = chunk_size(vocab, vocab + tile if keep else most, tile)
    parts = cdiv(cdiv(chunk, tile), SETTLED_TILES)
    return TwoProducts(product, weights, row_block, chunk, parts, half, keep)


@functools.lru_cache(maxsize=4096)
def plan_backward(
    problem: Problem,
    device: Device,
    need_values: bool,
    need_head: bool,
    *,
    exact_scores: bool = False,
    scratch: int | None = None,
) -> Backward:
    """The chunks of a backward.

    Args:
        need_values: P is wanted, for the gradient of the embedding matrix.
        need_head: the gradient of the head is wanted; where logits are given, dS without being their gradient.
        exact_scores, scratch: as for `plan_two_products`.
    """
    scratch = scratch_bytes(problem) if scratch is None else scratch
    choice = choose(problem, device)
    half = choice.rounds(problem, exact_scores) and isinstance(plan_forward(problem, device), TwoProducts)
    config = lookup("score_grad", device.arch, problem.itemsize, problem.rows)
    tile = config.blocks["BLOCK_V"]
    each = _backward_bytes(problem, half, need_values, need_head)
    # float32 sums over the blocks of rows
    sums = 4 * (problem.width * need_head + problem.value_width * (need_values and not problem.tied))
    sums = sums if problem.itemsize == 2 else 0
    column = scratch // tile
    row_block = even_blocks(problem.rows, min(ROW_BLOCK, max(column - sums, column // 2) // each))
    per_column = row_block * each + (sums if row_block < problem.rows else 0)
    most = min(choice.backward_mib << 20, scratch) // per_column
    return Backward(config, row_block, chunk_size(problem.vocab, most, tile), half)


@functools.lru_cache(maxsize=4096)
def plan_select(rows: int, vocab: int, itemsize: int, device: Device, capacity: int) -> Select:
    """The blocks of rows whose scores are in memory at once; `capacity` as in `launch_selection.select`."""
    weights, config = lookup("weights", device.arch, itemsize, rows), lookup("select", device.arch, itemsize, rows)
    row_block = even_blocks(rows, min(ROW_BLOCK, SCRATCH_BYTES // (4 * padded(vocab))))
    groups, tiles = cdiv(vocab, config.blocks["GROUP"]), cdiv(vocab, weights.blocks["BLOCK_V"])
    listed = max(2 * capacity, min(4 * capacity, 512))
    blocks = {**config.blocks, "WALK": min(config.blocks["WALK"], max(1, 2 * capacity))}
    blocks["ROOM"] = max(blocks["ROOM"], listed)
    narrow = lookup("narrow", device.arch, itemsize, rows)
    parts = cdiv(vocab, narrow.blocks["BLOCK"])
    parts = parts if parts <= LISTED_PARTS else 0
    return Select(weights, config._replace(blocks=blocks), narrow, row_block, tiles, groups, listed, parts)


def _backward_bytes(problem: Problem, half_scores: bool, need_values: bool, need_head: bool) -> int:
    """Of an entry of a chunk: dS and P, dP in float32, and scores, which are dS's memory where they are rounded. For
    float32 inputs scores and dP are the memory of dS and P. Where logits are given there are no scores, and dS is their
    gradient."""
    itemsize = problem.itemsize
    if problem.width == 0:
        return 4 * (1 + need_head) if itemsize == 4 else 4 + itemsize * (need_values + need_head)
    return 8 if itemsize == 4 else itemsize * (1 + need_values) + (4 if half_scores else 8)


def scratch_bytes(problem: Problem) -> int:
    """What a chunk may take: where logits are given, no more than a part of what they take, so that memory is saved."""
    if problem.width > 0:
        return SCRATCH_BYTES
    return min(SCRATCH_BYTES, max(GIVEN_BYTES, problem.rows * problem.vocab * problem.itemsize * 3 // 5))


def padded(columns: int) -> int:
    """Columns that a scratch row has room for, so that every row begins at a multiple of 16 bytes."""
    return 8 * cdiv(columns, 8)


def even_blocks(total: int, limit: int) -> int:
    """Size of the fewest equal blocks of at most `limit`, or of 1, that cover `total`."""
    return max(1, cdiv(total, max(1, cdiv(total, max(1, limit)))))


def chunk_size(vocab: int, most: int, tile: int) -> int:
    """The fewest even chunks of at most `most` vocabulary rows, whole tiles each."""
    tiles = cdiv(vocab, tile)
    return tile * even_blocks(tiles, max(1, most // tile))
