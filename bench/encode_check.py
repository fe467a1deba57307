"""Whether engines embed the same: after they have been timed, and nothing of it in what is timed.

Float32 and float64: every engine against the reference algorithm on a small batch, and its timed embeddings against
official-style evaluation of the same rows. Half precision: the first on a float32 copy of the model; then the engines
in half precision, on short rows and on the timed rows, may be 1.5 times as far from float32 as the stock
engines are in half precision.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from bench.agreement import (
    Difference,
    compare_each,
    embedding_difference,
    embedding_rounding,
    typical_error,
    unchecked,
)
from bench.batches import Batch, check_lengths, random_batch, spaced
from bench.engines import OFFICIAL_EVAL, REFERENCE, Engine, forget, fresh
from bench.throughput import Measured, embed
from bench.twin import is_half, twin
from gircse.lm.causal_lm import CausalLM
from gircse.ops import l2_normalize, pool_steps

# Of a timed batch so many rows are compared, evenly spaced, the first and the last among them: fewer where they are
# long, so that float32 takes a 7B model about two seconds.
_MOST_ROWS, _LEAST_ROWS, _MOST_TOKENS = 16, 4, 4096
# Half precision is judged on so many times four rows of so many tokens.
_REPEATED, _SHORT = 8, 24


@dataclass(frozen=True)
class Timed:
    """Points that were timed on one batch.

    Attributes:
        name: of the batch, for messages.
    """

    name: str
    batch: Batch
    points: Sequence[Measured]


def check(
    lm: CausalLM,
    names: Sequence[str],
    num_steps: int,
    length: int,
    *,
    seed: int,
    shared_prefix: int = 0,
    timed: Sequence[Timed] = (),
) -> list[Difference]:
    """Everything that is compared, whatever it says; a comparison that raises is `UNCHECKED`.

    Buffers and graphs that engines keep for `lm` are given back first: the copy of a large model needs the room.

    Args:
        names: of engines.
        num_steps: the largest K; K = 0 is compared, too.
        length: tokens of the longest row of the small batch, beyond the `shared_prefix` that all rows start with.
        timed: the embeddings that were timed, of every batch of this model.
    """
    compared = [name for name in dict.fromkeys(names) if name != REFERENCE]
    if not compared and not timed:
        return []
    if timed or is_half(lm):  # what timed rows and half precision are held against
        compared = list(dict.fromkeys([*compared, OFFICIAL_EVAL]))
    forget(compared)
    vocab, lengths = lm.embed_weight.shape[0], [shared_prefix + own for own in check_lengths(length)]
    small = random_batch(vocab, lengths, seed=seed + 1, device=lm.device, shared_prefix=shared_prefix)
    if not is_half(lm):
        return strict(lm, compared, small, num_steps) + [found for one in timed for found in timed_rows(lm, None, one)]
    try:
        exact = twin(lm)
    except Exception as error:  # too large for this machine's memory
        return [unchecked(name, "a float32 copy of the model", error) for name in compared]
    found = strict(exact, compared, small, num_steps)
    short = random_batch(vocab, check_lengths(_SHORT) * _REPEATED, seed=seed + 2, device=lm.device)
    rounding, own = short_rows(lm, exact, compared, short, num_steps)
    return found + rounding + [one for each in timed for one in timed_rows(lm, exact, each, own)]


def strict(lm: CausalLM, names: Sequence[str], batch: Batch, num_steps: int) -> list[Difference]:
    """Every engine against the reference in float32 or float64: on the batch, and on its first row alone."""
    engines, found = {name: fresh(name) for name in (*names, REFERENCE)}, []
    for rows in (batch, Batch(*(tensor[:1] for tensor in batch))):
        for steps, able in _each_steps(engines, names, num_steps):
            what = _what(lm, rows, steps)

            def one(name: str, expected: Tensor, rows: Batch = rows, steps: int = steps, what=what) -> Difference:
                ours = _embed(engines[name], lm, rows, steps)
                return embedding_difference(name, what, ours, expected, lm.head_weight.dtype)

            found += compare_each(able, what, partial(_embed, engines[REFERENCE], lm, rows, steps), one)
    return found


def short_rows(
    lm: CausalLM, exact: CausalLM, names: Sequence[str], batch: Batch, num_steps: int
) -> tuple[list[Difference], dict[int, float]]:
    """Every engine's error in half precision beside that of official-style evaluation, which takes a fraction of the
    reference algorithm's time and has been compared with it. -> differences, official-style evaluation's error by K."""
    engines, found = {name: fresh(name) for name in (*names, OFFICIAL_EVAL)}, []
    own: dict[int, float] = {}
    for steps, able in _each_steps(engines, names, num_steps):

        def stock(steps: int = steps) -> tuple[Tensor, Tensor]:
            theirs, truth = (_embed(engines[OFFICIAL_EVAL], model, batch, steps) for model in (lm, exact))
            own[steps] = typical_error(theirs, truth, steps)
            return theirs, truth

        def one(name: str, stock: tuple[Tensor, Tensor], steps: int = steps) -> Difference:
            ours = _embed(engines[name], lm, batch, steps)
            return embedding_rounding(name, _what(lm, batch, steps), ours, *stock, steps=steps)

        found += compare_each([n for n in able if n != OFFICIAL_EVAL], _what(lm, batch, steps), stock, one)
    return found, own


def timed_rows(
    lm: CausalLM, exact: CausalLM | None, timed: Timed, own: Mapping[int, float] | None = None
) -> list[Difference]:
    """The embeddings that were timed against official-style evaluation of a few of the rows.

    Args:
        exact: the float32 copy where `lm` is in half precision.
        own: the reference's error on other rows, by K: of a few texts it may be small by chance.

    A single text is compared in half precision at K = 0 alone: after that its error may be anything.
    """
    count, longest = timed.batch.input_ids.shape
    chosen = spaced(count, min(_MOST_ROWS, max(_LEAST_ROWS, _MOST_TOKENS // longest)))
    rows = Batch(*(tensor[chosen] for tensor in timed.batch))
    by_steps: dict[int, dict[str, Tensor]] = {}
    for measured in timed.points:
        judged = exact is None or len(chosen) > 1 or measured.point.num_steps == 0
        if judged and measured.embeddings is not None:
            by_steps.setdefault(measured.point.num_steps, {})[measured.point.engine] = measured.embeddings[chosen]

    @cache
    def stock() -> list[dict[int, Tensor]]:
        return [_embed_all(model, rows, sorted(by_steps)) for model in (lm, exact) if model is not None]

    found = []
    for k, ours in by_steps.items():
        what = f"{timed.name}, {len(chosen)} of {count} rows, K = {k}"
        least = max((error for at, error in (own or {}).items() if at <= k), default=0.0)

        def one(name: str, stock: list[Tensor], k=k, ours=ours, what=what, least=least) -> Difference:
            if exact is None:
                return embedding_difference(name, what, ours[name], stock[0], lm.head_weight.dtype)
            return embedding_rounding(name, what, ours[name], *stock, steps=k, at_least=least)

        found += compare_each(ours, what, lambda k=k: [table[k] for table in stock()], one)
    return found


@torch.no_grad()
def _embed_all(lm: CausalLM, rows: Batch, steps: Sequence[int]) -> dict[int, Tensor]:
    """Embeddings [B, D] of official-style evaluation after each number of steps: fewer steps are the first of more."""
    found = {}
    with fresh(OFFICIAL_EVAL).attached(lm) as run:
        if 0 in steps:
            found[0] = embed(run, lm, rows, 0).cpu()
        if steps[-1]:
            pooled = l2_normalize(pool_steps(run(lm, *rows, steps[-1])))
            found |= {k: pooled[:, k - 1].cpu() for k in steps if k}
    return found


def _each_steps(engines: Mapping[str, Engine], names: Sequence[str], num_steps: int) -> Iterator[tuple[int, list[str]]]:
    """K = 0 and the largest, each with the engines that have it."""
    for steps in sorted({0, num_steps}):
        yield steps, [name for name in names if engines[name].steps or not steps]


def _embed(engine: Engine, lm: CausalLM, batch: Batch, num_steps: int) -> Tensor:
    with engine.attached(lm) as run:
        return embed(run, lm, batch, num_steps)


def _what(lm: CausalLM, batch: Batch, steps: int) -> str:
    lengths = batch.lengths
    few = "/".join(map(str, lengths)) if len(lengths) <= 4 else f"{min(lengths)} to {max(lengths)}"
    rows = f"{len(lengths)} {'rows' if len(lengths) > 1 else 'row'} of {few} tokens"
    return f"{rows}, K = {steps}, {str(lm.head_weight.dtype).removeprefix('torch.')}"
