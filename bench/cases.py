"""The cases of the op benchmarks: one list for `pytest bench/`, the GPU suite and the tables of the docs.

A case is `soft_embed` on the vocabulary matrices of one model: T rows, one pass, one dtype, and what is expected of it
on an H100. Its floor is the least time that the arithmetic and the traffic allow (V, D = vocabulary, width)::

    forward   max(bytes / bandwidth, 4 T V D / peak)        bytes: both matrices once, a tied one once
    backward  max(bytes / bandwidth, 6 T V D / peak)        scores again, dP, dh; frozen matrices

at ceilings measured in the same run (`bench.floors.measure_ceilings`); forward and backward follow one another, so in
all 10 T V D. Hidden states and results are not counted: T D elements are little beside V D, or hide behind arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from bench.shapes import SHAPES
from gircse.floors import Ceilings, Work

FORWARD, BOTH = "forward", "forward+backward"
PASSES = (FORWARD, BOTH)
H100 = Ceilings(flops_per_s=790e12, bytes_per_s=3.0e12)  # for tables where nothing was measured


class Matrices(NamedTuple):
    """The vocabulary matrices of a model: head and embedding table, each [vocab, width]."""

    vocab: int
    width: int
    tied: bool

    def __str__(self) -> str:
        return f"{self.vocab} x {self.width}, {'tied' if self.tied else 'untied'}"


MODELS: dict[str, Matrices] = {
    **{
        name: Matrices(*(shape.settings[key] for key in ("vocab_size", "hidden_size", "tie_word_embeddings")))
        for name, shape in SHAPES.items()
    },
    "qwen3-0.6b": Matrices(151936, 1024, True),
    "qwen3-4b": Matrices(151936, 2560, True),
    # no models: small enough for a CPU, with ragged tiles
    "small-untied": Matrices(16001, 512, False),
    "tiny-tied": Matrices(1003, 48, True),
    "tiny-untied": Matrices(517, 40, False),
}


class Target(NamedTuple):
    """What a case is held to; None: to nothing.

    Attributes:
        over_floor: at most so many times the floor.
        over_eager: at least so many times as fast as eager PyTorch.
        over_best: at least so many times as fast as the best of eager and `torch.compile`.
        memory_ratio: extra peak memory, at most this part of eager's.
        extra_bytes: extra peak memory, at most.
    """

    over_floor: float | None = None
    over_eager: float | None = None
    over_best: float | None = None
    memory_ratio: float | None = None
    extra_bytes: float | None = None

    def parts(self) -> Iterator[tuple[str, str, bool, float]]:
        """(key of a record, words, whether it is a lower bound, bound) of everything that is asked."""
        if self.over_floor is not None:
            yield "over_floor", f"<= {self.over_floor:g}x floor", False, self.over_floor
        if self.over_eager is not None:
            yield "speedup_over_eager", f">= {self.over_eager:g}x eager", True, self.over_eager
        if self.over_best is not None:
            yield "speedup_over_best", f">= {self.over_best:g}x best", True, self.over_best
        if self.memory_ratio is not None:
            yield "memory_ratio", f"<= {self.memory_ratio:g} of eager's memory", False, self.memory_ratio
        if self.extra_bytes is not None:
            yield "extra_bytes", f"< {self.extra_bytes / 1e9:g} GB extra", False, self.extra_bytes

    def __str__(self) -> str:
        return ", ".join(words for _, words, _, _ in self.parts())

    def misses(self, record: dict[str, Any]) -> list[str]:
        """The parts that a record does not reach. A comparison with what could not run at all (None) is won."""
        missed = []
        for key, words, at_least, bound in self.parts():
            got = record[key]
            if got is not None and not (got >= bound if at_least else got <= bound):
                missed.append(f"{words}: {got:.3g}")
        return missed


_NOTHING = Target()


@dataclass(frozen=True)
class Case:
    """One op benchmark.

    Attributes:
        model: a name of `MODELS`.
        rows: T.
        what: one of `PASSES`; the matrices are frozen, so backward gives the gradient of the hidden states.
        dtype: of everything, a name of torch's.
        target: on an H100.
    """

    model: str
    rows: int
    what: str = FORWARD
    dtype: str = "bfloat16"
    target: Target = _NOTHING

    @property
    def name(self) -> str:
        """Unique; also the name of its record's file."""
        return f"{self.model}-T{self.rows}-{self.what.replace('+', '-')}-{self.dtype}"

    @property
    def matrices(self) -> Matrices:
        return MODELS[self.model]

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def decodes(self) -> bool:
        """A decoding step: so short that launches matter, hence timed under CUDA-graph replay too."""
        return self.what == FORWARD and self.rows <= 64

    def work(self) -> list[Work]:
        """FLOPs and bytes of forward, and of backward where there is one."""
        vocab, width, tied = self.matrices
        traffic = vocab * width * (1 if tied else 2) * self.torch_dtype.itemsize
        products = 2 * self.rows * vocab * width
        forward = Work(2 * products, traffic)
        return [forward] if self.what == FORWARD else [forward, Work(3 * products, traffic)]

    def floor(self, ceilings: Ceilings) -> float:
        """Seconds."""
        return ceilings.seconds(self.work())


_TIED = ("qwen2.5-0.5b", "qwen3-0.6b", "llama-3.2-1b")
_UNTIED = ("mistral-7b", "qwen2.5-7b")


def _backward_target(model: str) -> Target:
    vocab, width, _ = MODELS[model]
    # we compute 10 T V D where eager, which keeps its probabilities, computes 8: a wider matrix cannot win that back
    return Target(over_eager=1.0 if width <= 2048 else 0.8, memory_ratio=1 / 20 if vocab > 150_000 else None)


# What runs on a GPU, in the order of its worth: whatever time is left, the head of this list is measured.
CASES: list[Case] = [
    *(Case(m, t, target=Target(over_floor=1.25, over_best=1.7)) for m in _TIED for t in (1, 16, 64)),
    *(Case(m, 256, target=Target(over_eager=2.0)) for m in _TIED),
    *(Case(m, t, target=Target(over_floor=1.2, over_eager=1.1)) for m in _UNTIED for t in (1, 16, 64)),
    *(
        Case(m, t, target=Target(over_floor=1.35, over_eager=1.0))
        for m in ("qwen2.5-0.5b", "llama-3.2-1b", *_UNTIED)
        for t in (1024, 4096)
    ),
    *(Case(m, 1024, BOTH, target=_backward_target(m)) for m in (*_TIED, *_UNTIED)),
    *(Case("qwen2.5-0.5b", 65536, what, target=Target(extra_bytes=1e9)) for what in (BOTH, FORWARD)),
    *(Case(m, t) for m in ("smollm2-135m", "qwen3-4b") for t in (1, 64, 256, 1024)),
]

# `pytest bench/` without a GPU: real code paths on sizes that two cores manage.
CPU_CASES: list[Case] = [
    Case("smollm2-135m", 1, dtype="float32"),
    Case("smollm2-135m", 16, dtype="float32"),
    Case("smollm2-135m", 64, BOTH, dtype="float32"),
    Case("small-untied", 48, dtype="float32"),
    Case("small-untied", 48, BOTH, dtype="float32"),
]

# The suite's dry run. The bounds are made up so that tables show every kind of target, met and missed.
SMOKE_CASES: list[Case] = [
    Case("tiny-tied", 1, dtype="float32", target=Target(over_floor=1e9)),
    Case("tiny-tied", 5, BOTH, dtype="float32", target=Target(over_eager=1e9, memory_ratio=1e9)),
    Case("tiny-untied", 7, dtype="float32", target=Target(extra_bytes=1e9)),
]
