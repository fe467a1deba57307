"""Scores of a tile of rows against a chunk of the vocabulary, and their way back, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from gircse_kernels.contract import Inputs, Options
from torch import Tensor

from .noise import gumbel
from .tiles_torch import accumulation_dtype, matmul_nt, slices


class Scorer:
    """Scores of a row tile against a vocabulary chunk, as `Options` defines them.

    All that is constant along a row is folded into one scaled copy of hidden (``inner``) and one factor after the
    soft-cap (``outer``), so that the plain case costs no pass over the scores.
    """

    def __init__(self, inputs: Inputs, options: Options) -> None:
        hidden = inputs.hidden
        self.inputs, self.dtype = inputs, accumulation_dtype(hidden.dtype)
        self.capped, self.vocab_start = options.softcap is not None, options.vocab_start
        inner: float | Tensor = options.logit_scale
        outer: float | Tensor = 1.0 / options.temperature
        if inputs.temperature is not None:
            outer = outer / inputs.temperature.to(self.dtype)[:, None]
        self.inverse_temperature = outer
        noise_scale = inputs.noise_scale
        self.noise_scale = options.noise_scale if noise_scale is None else noise_scale.to(self.dtype)[:, None]
        self.seeds = inputs.seeds
        if options.seed is not None:  # the same noise in every row
            self.seeds = torch.full((1,), options.seed, dtype=torch.int64, device=hidden.device)
        if options.softcap is not None:
            inner, outer = inner / options.softcap, outer * options.softcap
        else:
            inner, outer = outer * inner, 1.0
        self.inner, self.outer = inner, outer  # numbers, or [T, 1]
        self.scaled = not isinstance(inner, float) or inner != 1.0
        self.rows = hidden[:0]
        if inputs.head is not None:
            rows = hidden.to(self.dtype)
            self.rows = (rows * inner if self.scaled else rows).contiguous()  # [T, D]

    def _products(self, rows: slice, vocab: slice, chunk: Tensor | None) -> Tensor:
        """Logits times `inner`, without bias, [R, C]: of a chunk of the head, or as they are given."""
        if chunk is not None:
            return matmul_nt(self.rows[rows], chunk)
        logits = self.inputs.logits(rows, vocab).to(self.dtype, copy=True)
        return logits.mul_(row_factor(self.inner, rows)) if self.scaled else logits

    def __call__(self, rows: slice, vocab: slice, chunk: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Scores [R, C], which the caller may overwrite, and tanh of the capped logits (None without soft-cap).

        ``chunk`` is that of the head, [C, D]; None: logits are given.
        """
        scores = self._products(rows, vocab, chunk)
        if self.inputs.bias is not None:
            bias = self.inputs.bias[vocab].to(self.dtype)
            if isinstance(self.inner, Tensor):
                scores.addr_(self.inner[rows, 0], bias)
            else:
                scores.add_(bias, alpha=self.inner)
        tanh = None
        if self.capped:
            tanh = scores.tanh_()
            scores = tanh * row_factor(self.outer, rows)
        if self.inputs.bias_ids is not None:
            add_entries(scores, *self._entries(rows, vocab))
        if self.inputs.bitmask is not None:
            scores.masked_fill_(~unpack_bits(self.inputs.bitmask[rows], *self._whole(vocab)), -torch.inf)
        threshold = self.inputs.threshold
        removed = None  # 0 or 1, whatever the noise
        if threshold is not None:
            removed = torch.lt(scores, threshold[rows, None], out=torch.empty_like(scores))
        if self.seeds is not None:
            factor = row_factor(self.noise_scale, rows)
            for part, noise in self.noise(rows, vocab):
                scores[:, part] += noise * factor
        if removed is not None:
            # -inf where 1. `masked_fill` branches at every entry, and takes ten times as long where it cannot guess.
            most = torch.finfo(scores.dtype).max
            scores = scores.sub_(removed, alpha=most).sub_(removed, alpha=most)
        return scores, tanh

    def noise(self, rows: slice, vocab: slice) -> Iterator[tuple[slice, Tensor]]:
        """Standard Gumbel noise, a few columns at a time, because the generator has a dozen temporaries."""
        assert self.seeds is not None
        seeds = self.seeds if self.seeds.shape[0] == 1 else self.seeds[rows]
        start = self._whole(vocab)[0]
        for part in slices(vocab.stop - vocab.start, max(4, (1 << 16) // max(1, seeds.shape[0]))):
            yield part, gumbel(seeds, start + part.start, start + part.stop).to(self.dtype)

    def _whole(self, vocab: slice) -> tuple[int, int]:
        """First and last + 1 in the whole vocabulary."""
        return self.vocab_start + vocab.start, self.vocab_start + vocab.stop

    def _entries(self, rows: slice, vocab: slice) -> tuple[Tensor, Tensor]:
        """Columns and values [R, m] of what `bias_ids` add to the scores of a chunk."""
        assert self.inputs.bias_values is not None
        columns, inside = self._columns(rows, vocab)
        values = self.inputs.bias_values[rows].to(self.dtype) * row_factor(self.inverse_temperature, rows)
        return columns, values.masked_fill(~inside, 0.0)

    def _columns(self, rows: slice, vocab: slice) -> tuple[Tensor, Tensor]:
        """Columns [R, m] of `bias_ids` in a chunk, and which of them are in it."""
        assert self.inputs.bias_ids is not None
        start, stop = self._whole(vocab)
        columns = self.inputs.bias_ids[rows] - start
        inside = (columns >= 0) & (columns < stop - start)
        return columns.masked_fill(~inside, 0), inside

    def backpropagate(self, grad: Tensor, tanh: Tensor | None, rows: slice) -> Tensor:
        """Gradient of the products times `inner` from the gradient of the scores, in place."""
        if tanh is None:
            return grad
        # d(outer * tanh(x)) = outer * (1 - tanh^2) dx
        grad.addcmul_(grad * tanh, tanh, value=-1.0)
        return grad.mul_(row_factor(self.outer, rows))

    def entry_gradient(self, grad: Tensor, rows: slice, vocab: slice) -> Tensor:
        """A chunk's part of the gradient of `bias_values` [R, m], from the gradient of its scores."""
        columns, inside = self._columns(rows, vocab)
        return grad.gather(1, columns).masked_fill_(~inside, 0.0) * row_factor(self.inverse_temperature, rows)

    def noise_gradient(self, grad: Tensor, rows: slice, vocab: slice) -> Tensor:
        """A chunk's sum of dS gumbel [R, 1], from the gradient of its scores."""
        return sum((grad[:, part] * noise).sum(1, keepdim=True) for part, noise in self.noise(rows, vocab))  # type: ignore[return-value]


def add_entries(scores: Tensor, columns: Tensor, values: Tensor) -> None:
    """``scores[r, columns[r, j]] += values[r, j]``, in place, in a fixed order where columns occur twice."""
    if scores.device.type == "cpu":
        scores.scatter_add_(1, columns, values)
    else:  # sorts, where a scatter on CUDA would add atomically
        row = torch.arange(scores.shape[0], device=scores.device)[:, None]
        scores.index_put_((row.expand_as(columns), columns), values, accumulate=True)


def unpack_bits(bitmask: Tensor, start: int, stop: int) -> Tensor:
    """Bits start to stop - 1 of packed rows [R, W] int32, as bool [R, stop - start]; see `Inputs.bitmask`."""
    words = bitmask[:, start // 32 : -(-stop // 32)]
    bits = words[:, :, None] >> torch.arange(32, dtype=torch.int32, device=bitmask.device)
    return (bits & 1).bool().flatten(1)[:, start % 32 :][:, : stop - start]


def row_factor(factor: float | Tensor, rows: slice) -> float | Tensor:
    """The part of a per-row factor that belongs to a tile; a number as it is."""
    return factor[rows] if isinstance(factor, Tensor) else factor
