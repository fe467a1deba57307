"""Scores of a tile of rows against a chunk of the vocabulary, as tensors, from either backend.

For what looks at scores themselves, not at the soft token that they make: `top_tokens`, and the rules that truncate.
"""

from __future__ import annotations

import torch
from gircse_kernels.contract import Inputs, Options
from torch import Tensor

from .backends import kernels
from .scorer import Scorer
from .soft_embed_triton import takes
from .tiles_torch import ChunkReader


class TorchScores:
    """Chunks come in order, and each is read once; at most ``size`` vocabulary rows."""

    def __init__(self, inputs: Inputs, options: Options, size: int) -> None:
        self.scorer = Scorer(inputs, options)
        self.read = None if inputs.head is None else ChunkReader(inputs.head, self.scorer.dtype, size)
        self.vocab: slice | None = None
        self.chunk: Tensor | None = None

    def __call__(self, rows: slice, vocab: slice) -> Tensor:
        """[R, C] in the accumulation dtype; the caller may overwrite it."""
        if self.read is not None and vocab != self.vocab:
            self.vocab, self.chunk = vocab, self.read(vocab)
        return self.scorer(rows, vocab, self.chunk)[0]


class TritonScores:
    """The same by the kernel of the two-pass forward."""

    def __init__(self, inputs: Inputs, options: Options, size: int) -> None:
        self.inputs, self.options = inputs, options

    def __call__(self, rows: slice, vocab: slice) -> Tensor:
        return kernels().chunk_scores(self.inputs.of_rows(rows), self.options, vocab.start, vocab.stop - vocab.start)


def chunk_scores(inputs: Inputs, options: Options, size: int, backend: str) -> TorchScores | TritonScores:
    """A function of rows and vocabulary entries, both slices; with noise, and -inf for what a threshold removes."""
    fused = backend == "triton" and takes(inputs)
    return (TritonScores if fused else TorchScores)(inputs, options, size)


def ordered_bits(scores: Tensor, out: Tensor | None = None) -> Tensor:
    """Integers of the same width that order like the scores: int32 for float32, int64 for float64."""
    # A float's bits order like an integer once the magnitude bits of negative numbers are flipped; adding 0 turns -0.0
    # into 0.0.
    integer = torch.int64 if scores.dtype == torch.float64 else torch.int32
    bits = torch.add(scores, 0.0, out=None if out is None else out.view(scores.dtype)).view(integer)
    return bits.bitwise_xor_((bits >> (torch.iinfo(integer).bits - 1)).bitwise_and_(torch.iinfo(integer).max))
