"""Jacobi decoding: all K soft tokens together, again and again, until the embedding settles.

One step after the other, token k + 1 is made of state k, and state k of the tokens 1 to k. A *pass* makes all states at
once, from tokens that were made of the states of the pass before; the first pass has d_1 in every place. Pass i makes
state i exact, because its token and the ones before are, so pass i + 1 begins at token i + 1: the states, keys and
values before it stay as they are. K passes are therefore the sequential method. The states of a trained model hardly
differ from one soft token to the next, and then 3 or 4 passes are enough: a row stops when its embedding z_K changes by
less than a tolerance, 1 - cosine, from one pass to the next. Rows decide for themselves.

This is the fixed-point iteration with which Santilli et al. (arXiv 2305.10427) decode discrete tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gircse.engine import varlen
from gircse.engine.body.decoder import Decoder
from gircse.engine.pool import KVPool, PoolPass
from gircse.engine.state import DecodeState
from gircse.lm.attention import causal_attention
from gircse.lm.causal_lm import CausalLM
from gircse.lm.config import GircseConfig
from gircse.ops.head_facts import HeadFacts
from gircse.ops.pooling import pool_steps

# With `Limits.row_buckets` a pass takes a multiple of so many tokens of a row, so that there are few graphs.
TOKENS_BUCKET = 8

# After every pass: the indices of the rows in it, their states [n, K, D], and by how much z_K of each has moved, 1 -
# cosine; None after the first pass.
Watch = Callable[[Sequence[int], Tensor, Sequence[float] | None], None]


@dataclass(frozen=True)
class Jacobi:
    """How a batch is decoded by Jacobi passes.

    Attributes:
        pooling: how z_K is made of the states.
        tolerance: a row stops when z_K has changed by less, 1 - cosine; with 0 every row takes K passes.
        auto: only batches that it makes faster, by `is_faster`; others are decoded one step after the other.
        watch: is told about every pass.
    """

    pooling: str
    tolerance: float
    auto: bool = False
    watch: Watch | None = None

    @classmethod
    def of(cls, config: GircseConfig) -> Jacobi | None:
        """What the config says; None: one step after the other."""
        if config.decoding == "sequential":
            return None
        return cls(config.pooling, config.jacobi_tolerance, config.decoding == "auto")


class JacobiPass(PoolPass):
    """The tokens `first` to `stop` - 1 of every row, from 0. Call `begin` before each use.

    Args:
        pool, rows, slots: the buffers, viewed as `rows` rows of `slots` slots.
        position: [rows] int64 on the device, the position of each row's token 0; it is only read.
    """

    def __init__(self, pool: KVPool, rows: int, slots: int, position: Tensor, first: int, stop: int) -> None:
        super().__init__(pool, rows, slots)
        device = position.device
        self.start, self.first, self.stop = position, first, stop
        self.row = torch.arange(rows, device=device).repeat_interleave(stop - first)
        self.positions = torch.empty_like(self.row)
        self._used = torch.empty(rows, dtype=torch.int32, device=device)
        self._steps = torch.arange(first, stop, device=device)
        self._slot = torch.arange(slots, device=device)
        self._starts = torch.arange(rows + 1, dtype=torch.int32, device=device) * (stop - first)
        self._row_starts = torch.arange(rows + 1, dtype=torch.int32, device=device) * slots
        self._key_starts: dict[int, Tensor] = {}
        self._masks: dict[int | None, Tensor] = {}

    def begin(self) -> None:
        """Reads the positions."""
        torch.add(self.start[:, None], self._steps, out=self.positions.view(self.rows, -1))
        self._used.copy_(self.start + self.stop)
        self._masks.clear()

    def attention(self, layer, query, key, value, *, scaling, window, softcap):
        keys, values = self.pool.layer(layer, self.rows, self.slots)
        if window is not None and window >= self.slots:
            window = None
        if varlen.usable(query, keys, values, softcap):
            return varlen.varlen_attention(
                query,
                keys,
                values,
                starts=self._starts,
                key_starts=self._key_starts_of(keys.shape[1]),
                used=self._used,
                longest=self.stop - self.first,
                longest_key=self.slots,
                scaling=scaling,
                window=window,
            )
        mask = self._masks.get(window)
        if mask is None:
            distance = self.positions.view(self.rows, 1, -1, 1) - self._slot
            mask = distance >= 0 if window is None else (distance >= 0) & (distance < window)
            self._masks[window] = mask
        query = query.unflatten(0, (self.rows, -1)).transpose(1, 2)
        out = causal_attention(query, keys, values, mask=mask, scaling=scaling, softcap=softcap)
        return out.transpose(1, 2).flatten(0, 1)

    def _key_starts_of(self, heads: int) -> Tensor:
        """The `key_starts` of `varlen_attention`; made once, outside of a graph, because a capture is run before."""
        if heads not in self._key_starts:
            self._key_starts[heads] = self._row_starts * heads
        return self._key_starts[heads]


def jacobi_pass(
    lm: CausalLM,
    decoder: Decoder,
    kv: JacobiPass,
    state: DecodeState,
    temperature: float,
    pooling: str,
    before: int,
    facts: HeadFacts | None = None,
) -> None:
    """One pass of every row, in place: `states`, and `moved`, by how much z_K has changed since the pass before. It can
    be captured: shapes are static and the host never waits.

    Args:
        before: number of states that stand before that of token 0: 1 where the prompt's own state is pooled, else 0.
    """
    first, stop = before + kv.first, before + kv.stop
    kv.begin()
    if kv.first:
        tokens = lm.soft_embed(state.states[:, first - 1 : stop - 1], temperature=temperature, facts=facts)
    else:
        tokens = lm.soft_embed(state.hidden, temperature=temperature, facts=facts)[:, None]
        tokens = tokens.expand(-1, kv.stop, -1).contiguous()  # the decoder may write on them
    state.states[:, first:stop] = decoder.block(kv, tokens.flatten(0, 1)).view(len(state.hidden), stop - first, -1)
    embedding = pool_steps(state.states[:, :stop], pooling)[:, -1]
    torch.sub(1, F.cosine_similarity(embedding, state.embedding, dim=-1), out=state.moved).clamp_(min=0)
    state.embedding.copy_(embedding)


def first_token(done: int, num_tokens: int, multiple: int) -> int:
    """The token that the next pass begins with, after `done` passes: `done`, or one before it, but token 0 in the first
    pass alone."""
    if not done:
        return 0
    return max(1, num_tokens - -(-(num_tokens - done) // multiple) * multiple)


class _Faster(NamedTuple):
    """Up to so many `rows` Jacobi passes of at least so many `tokens` are faster than single steps, on a device of this
    type, where the decoder has up to so many `parameters` and texts take at most the share `passes` of K passes."""

    device: str
    parameters: float
    tokens: int
    rows: int
    passes: float


# CPU: SmolLM2-135M on two cores (bench/results/jacobi-speed-cpu.json): with one and two texts Jacobi is as fast as
# single steps when it takes .65 of K passes, with four .45, with eight .2, about what trained models take. CUDA:
# estimated. A pass costs as much as a step while its tokens are fewer than the 200 or so at which a GPU is as long at
# the arithmetic as at one read of the weights, and more in proportion beyond.
FASTER = (
    _Faster("cpu", math.inf, 4, 2, 0.6),
    _Faster("cpu", math.inf, 8, 4, 0.45),
    _Faster("cuda", math.inf, 4, 4, 0.5),
    _Faster("cuda", math.inf, 8, 16, 0.5),
    _Faster("cuda", math.inf, 16, 32, 0.5),
)


def is_faster(device: str, parameters: int, rows: int, tokens: int, passes: float) -> bool:
    """Whether Jacobi passes are faster than single steps, by `FASTER`.

    Args:
        device: its type.
        parameters: of the decoder.
        rows: texts of the batch.
        tokens: soft tokens of each.
        passes: the mean number of passes of the texts so far with this K and tolerance; 0: none is known.
    """
    return any(
        line.device == device
        and parameters <= line.parameters
        and tokens >= line.tokens
        and rows <= line.rows
        and passes <= line.passes * tokens
        for line in FASTER
    )
