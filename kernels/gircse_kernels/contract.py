"""What goes into an op and comes out of it, whichever backend runs it. No Triton here: the torch backend uses it, too.

T rows, V vocabulary entries, D hidden size, E embedding size; B rows, K steps in the contrastive loss. The accumulation
dtype is float32, or float64 for float64 inputs, which only the torch backend takes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Options(NamedTuple):
    """The scalar parameters of `soft_embed`. They define the operation and are never tensors.

    With `logits = softcap(logit_scale * (hidden @ head.T + bias))` and the values of `Inputs.bias_ids` added to them,
    the scores of which the softmax is taken are `logits / temperature + noise_scale * gumbel`: a public temperature
    that divides the noise, too, is in both numbers.
    """

    temperature: float = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0
    embed_scale: float = 1.0
    seed: int | None = None  # of the Gumbel noise, one for all rows
    vocab_start: int = 0  # first vocabulary index of this shard; noise, bits and ids count from the whole's first
    noise_scale: float = 1.0  # factor of the noise


class Inputs(NamedTuple):
    """The tensors of the forward of `soft_embed`: first those that have gradients, in the order of `Needs`."""

    hidden: Tensor  # [T, D]; where there is no head, the logits [.., V], T rows of any strides, never written to
    head: Tensor | None  # [V, D]; None: the logits are given, and there is `embed`
    embed: Tensor | None = None  # [V, E]; None: tied, the head serves as embedding matrix
    bias: Tensor | None = None  # [V]
    temperature: Tensor | None = None  # [T], instead of the number
    noise_scale: Tensor | None = None  # [T], instead of the number
    bias_values: Tensor | None = None  # [T, m], added to the logits of the entries `bias_ids`
    bias_ids: Tensor | None = None  # [T, m] int64, in the whole vocabulary; those of other shards count for nothing
    seeds: Tensor | None = None  # [T] int64, instead of the number
    threshold: Tensor | None = None  # [T] accumulation dtype, the lowest score without noise that a row keeps
    bitmask: Tensor | None = None  # [T, W] int32, entry v of the whole is bit v % 32 of word v // 32; 0 removes it
    ids: Tensor | None = None  # [T, C] int64, of this head: with the next two, all that the rows keep (`Selection`)
    scores: Tensor | None = None  # [T, C] accumulation dtype, without noise; -inf: not kept, or of another shard
    num_kept: Tensor | None = None  # [T] int64; a row where it reaches C has to be seen whole, with its threshold
    hard: Tensor | None = None  # [T] bool: rows that become the embedding of their one highest score
    places: Tensor | None = None  # [T] int64: which rows of logits [.., V] these are; None: all of them, in order

    @property
    def num_rows(self) -> int:
        """T. Not `Size.numel`, which a compiler takes for a constant."""
        return math.prod(self.hidden.shape[:-1]) if self.places is None else self.places.shape[0]

    @property
    def num_vocab(self) -> int:
        """V."""
        return self.hidden.shape[-1] if self.head is None else self.head.shape[0]

    @property
    def values(self) -> Tensor:
        """The embedding matrix [V, E]."""
        found = self.head if self.embed is None else self.embed
        assert found is not None
        return found

    @property
    def out_dtype(self) -> torch.dtype:
        """That of the result: hidden's, and where logits are given the embedding matrix's."""
        return self.values.dtype if self.head is None else self.hidden.dtype

    def of_rows(self, rows: slice) -> Inputs:
        """The same call for some of the rows."""
        parts = self
        if self.hidden.dim() > 2 and self.places is None:
            parts = self._replace(places=torch.arange(self.num_rows, device=self.hidden.device))
        hidden = self.hidden[rows] if self.hidden.dim() == 2 else self.hidden
        return Inputs(hidden, *self[1:4], *(None if tensor is None else tensor[rows] for tensor in parts[4:]))

    def logits(self, rows: slice, vocab: slice) -> Tensor:
        """A part [R, C] of logits that are given: a view, or a copy of that part if rows have more than one stride."""
        part = self.hidden[..., vocab]
        if part.dim() == 2:
            return part[rows]
        places = torch.arange(self.num_rows, device=part.device) if self.places is None else self.places
        return part[self.index_of(places[rows])]

    def index_of(self, places: Tensor) -> tuple[Tensor, ...]:
        """Indices into the leading dimensions of `hidden` from numbers of rows. `torch.unravel_index` copies the shape
        to the device and waits for that, which no capture allows."""
        index = []
        for size in reversed(self.hidden.shape[:-1]):
            index.append(places % size)
            places = places // size
        return tuple(reversed(index))


class Truncation(NamedTuple):
    """The rules of a truncation, one value for each row, [T]; None: no such rule."""

    top_k: Tensor | None = None  # int64, >= 1
    top_p: Tensor | None = None  # accumulation dtype, in (0, 1]
    min_p: Tensor | None = None  # accumulation dtype, in [0, 1]
    top_n: Tensor | None = None  # int64, >= 1


class Candidates(NamedTuple):
    """The highest scores of each row, without noise, and the softmax sums of the whole row (see `OnlineState`)."""

    ids: Tensor  # [T, C] int64, the lower one first among equal scores
    scores: Tensor  # [T, C] accumulation dtype, descending; -inf behind those that there are
    peak: Tensor  # [T] largest score
    total: Tensor  # [T] sum of e^(score - peak)
    moment: Tensor  # [T] sum of e^(score - peak) (score - peak)
    argmax: Tensor  # [T] int64


class Selection(NamedTuple):
    """What a truncation keeps of each row, by its scores without noise.

    Where candidates were asked for, `ids` and `scores` are the kept ones among C of them: the entries of -inf are not
    kept. `num_kept` is how many entries top_k (or else top_n) leaves with their ties. Where it reaches C, a tie may go
    on behind the candidates: of such a row only the threshold is right.
    """

    threshold: Tensor  # [T] accumulation dtype, below the lowest score that is kept, above the others
    lse: Tensor  # [T] accumulation dtype: with the next three, the statistics of the whole distribution
    entropy: Tensor
    max_prob: Tensor
    argmax: Tensor  # [T] int64, in the whole vocabulary
    ids: Tensor | None = None  # [T, C] int64, in the whole vocabulary
    scores: Tensor | None = None  # [T, C] accumulation dtype, descending, the lower id first among equals
    num_kept: Tensor | None = None  # [T] int64


class Forward(NamedTuple):
    """What the forward returns, in the accumulation dtype except `out`. A tensor that was not asked for is None.

    For a vocabulary shard, whose sums are still to be merged with those of the other shards, `out` is the weighted sum
    before the division, in the accumulation dtype, and `entropy` is the moment, sum of e^(score - peak) (score - peak).
    """

    out: Tensor  # [T, E], `Inputs.out_dtype`
    exact: Tensor | None  # [T, E]: `out` before it is rounded, in memory of its own
    lse: Tensor | None  # [T]; with the next three, the statistics
    entropy: Tensor | None  # [T]
    max_prob: Tensor | None  # [T]
    argmax: Tensor | None  # [T] int64, index in this head
    peak: Tensor | None  # [T] largest score; with the next one, for backward and for other shards
    total: Tensor | None  # [T] sum of e^(score - peak)
    probs: Tensor | None = None  # [T, V] input dtype: what the backend keeps of the probabilities for its backward


class Saved(NamedTuple):
    """What backward needs of the forward. No backend changes it.

    The log-sum-exp is saved as `peak` and `total`: rounded to one number, it would give every recomputed probability of
    a row one common relative error of half a unit of lse (1e-6 at 30, 1e-3 at 30,000), which eager PyTorch does not
    make.
    """

    out: Tensor  # [T, E], as exact as there is
    peak: Tensor  # [T]
    total: Tensor  # [T]
    entropy: Tensor | None  # [T], where it has a gradient
    probs: Tensor | None = None  # [T, V], `Forward.probs`; None: scores are recomputed
    token: Tensor | None = None  # [T] int64, index of a hard row's one token in the whole vocabulary; -1: a soft row


class Needs(NamedTuple):
    """Which gradients are wanted."""

    hidden: bool
    head: bool
    embed: bool
    bias: bool
    temperature: bool
    noise_scale: bool = False
    bias_values: bool = False


class Grads(NamedTuple):
    """What the backward returns. A gradient that was not asked for is None.

    Over a vocabulary shard, those of what has rows, but for given logits, are this shard's share of a sum, in the
    accumulation dtype. The caller, who knows the whole sum, finishes the temperature's:
    `(sum over shards - peak grad_lse) / temperature`.
    """

    hidden: Tensor | None  # [T, D] accumulation dtype; of given logits [T, V], their dtype
    head: Tensor | None  # [V, D] the head's dtype; of a tied matrix the sum of both uses
    embed: Tensor | None  # [V, E] its dtype
    bias: Tensor | None  # [V] accumulation dtype
    temperature: Tensor | None  # [T] accumulation dtype, -sum of dS (score without noise - peak)
    noise_scale: Tensor | None = None  # [T] accumulation dtype, sum of dS gumbel
    bias_values: Tensor | None = None  # [T, m] accumulation dtype


class Pooled(NamedTuple):
    """Unit vectors of every number of steps."""

    vectors: Tensor  # [K, B, D] accumulation dtype; of the kernels [K, B, P, D], bfloat16 parts whose sum they are
    norms: Tensor  # [K, B] accumulation dtype, of the sums of the steps, before they were divided


class Sums(NamedTuple):
    """Softmax sums of each row over some candidates, [K, B]."""

    peak: Tensor  # largest logit that counts, never below the smallest finite number
    total: Tensor  # sum of e^(logit - peak)
    positive: Tensor  # logit of the target; -inf where it is not among them
    hardest: Tensor  # largest logit that counts and is not the target's; -inf where there is none
