"""The cases of the op benchmarks: one list for the GPU suite and the tables of the docs.

A case is `soft_embed` on the vocabulary matrices of one model: T rows, one pass, one dtype, and what is expected of it
on an H100. Its floor is the least time that the arithmetic and the traffic allow (V, D = vocabulary, width)::

    forward   max(bytes / bandwidth, 4 T V D / peak)        bytes: both matrices once, a tied one once
    backward  max(bytes / bandwidth, 6 T V D / peak)        scores again, dP, dh; frozen matrices

    variants  top_k: the scores alone, 2 T V D and the head once; top_p: as without;
              logits: 2 T V D for each pass, the embedding matrix and the logits once, in backward their gradient, too

at ceilings measured in the same run (`bench.floors.measure_ceilings`); forward and backward follow one another, so in
all 10 T V D. Hidden states and results are not counted: T D elements are little beside V D, or hide behind arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from bench.shapes import SHAPES
from gircse.roofline import Ceilings, Work

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


# The options of each variant. The first truncation keeps few entries, the second any number.
OPTIONS: dict[str, dict[str, Any]] = {
    "top_k": {"top_k": 30, "top_p": 0.95},
    "top_p": {"top_p": 0.95},
    "logits": {"temperature": 0.7},
}


class Target(NamedTuple):
    """What a measured line is held to; None: to nothing.

    Attributes:
        speedup: at least so many times as fast as the line's baseline: eager PyTorch, official-style encoding, or the
            reference algorithm of training.
        over_floor: at most so many times the floor.
        plain_speedup: as `speedup`, for single calls outside of CUDA graphs.
        milliseconds: at most, on an H200.
        over_zero: at most so many times the time of the same job with K = 0.
        memory_ratio: extra peak memory, at most this part of the baseline's.
        extra_bytes: extra peak memory, at most.
        over_product: at most so many times the time of `hidden @ head.T` alone.
    """

    speedup: float | None = None
    over_floor: float | None = None
    plain_speedup: float | None = None
    milliseconds: float | None = None
    over_zero: float | None = None
    memory_ratio: float | None = None
    extra_bytes: float | None = None
    over_product: float | None = None

    def parts(self) -> Iterator[tuple[str, str, bool, float]]:
        """(key of a line, words, whether it is a lower bound, bound) of everything that is asked."""
        for key, bound in self._asdict().items():
            if bound is not None:
                words = _WORDS[key].format(bound / 1e9 if key == "extra_bytes" else bound)
                yield key, words, key in ("speedup", "plain_speedup"), bound

    def __str__(self) -> str:
        return ", ".join(words for _, words, _, _ in self.parts())

    def misses(self, line: dict[str, Any]) -> list[str]:
        """The parts that a line does not reach. A comparison with a baseline that could not run at all (None) is
        won."""
        missed = []
        for key, words, at_least, bound in self.parts():
            got = line.get(key)
            if got is not None and not (got >= bound if at_least else got <= bound):
                missed.append(f"{words}: {got:.3g}")
        return missed

    def judge(self, line: dict[str, Any]) -> dict[str, Any]:
        """The line with its target, what it misses, and whether the target is met (None: there is none)."""
        misses = self.misses(line)
        asked = any(bound is not None for bound in self)
        return {**line, "target": str(self), "misses": misses, "met": not misses if asked else None}


_WORDS = {
    "speedup": ">= {:g}x",
    "over_floor": "<= {:g} floor",
    "plain_speedup": ">= {:g}x plain",
    "milliseconds": "<= {:g} ms",
    "over_zero": "<= {:g} K=0",
    "memory_ratio": "<= {:.2g} mem",
    "extra_bytes": "< {:g} GB",
    "over_product": "<= {:g} h@W",
}
_NOTHING = Target()


@dataclass(frozen=True)
class Case:
    """One op benchmark.

    Attributes:
        model: a name of `MODELS`.
        rows: T.
        what: one of `PASSES`; the matrices are frozen, so backward gives the gradient of the hidden states.
        dtype: of everything, a name of torch's.
        target: on an H100 or H200.
        variant: a name of `OPTIONS`: the soft tokens are truncated, or of given logits (`soft_embed_logits`), whose
            gradient backward then gives; "": neither.
    """

    model: str
    rows: int
    what: str = FORWARD
    dtype: str = "bfloat16"
    target: Target = _NOTHING
    variant: str = ""

    @property
    def name(self) -> str:
        """Unique; also the name of its record's file."""
        passes = self.what.replace("+", "-")
        if self.variant:  # a line of the summary has room for no more
            passes = f"{self.variant}-{passes.removeprefix('forward-')}"
        return f"{self.model}-T{self.rows}-{passes}-{self.dtype}"

    @property
    def matrices(self) -> Matrices:
        return MODELS[self.model]

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def work(self) -> list[Work]:
        """FLOPs and bytes of forward, and of backward where there is one."""
        vocab, width, tied = self.matrices
        traffic = vocab * width * (1 if tied else 2) * self.torch_dtype.itemsize
        products = 2 * self.rows * vocab * width
        if self.variant == "top_k":  # few rows of the embedding matrix
            return [Work(products, vocab * width * self.torch_dtype.itemsize)]
        if self.variant == "logits":
            matrix, logits = (n * vocab * self.torch_dtype.itemsize for n in (width, self.rows))
            passes = [Work(products, matrix + logits), Work(products, matrix + 2 * logits)]
            return passes[: 1 if self.what == FORWARD else 2]
        forward = Work(2 * products, traffic)
        return [forward] if self.what == FORWARD else [forward, Work(3 * products, traffic)]

    def floor(self, ceilings: Ceilings) -> float:
        """Seconds."""
        return ceilings.seconds(self.work())


_NARROW = ("qwen2.5-0.5b", "qwen3-0.6b")  # tied, D <= 1024


def _backward_target(model: str) -> Target:
    """Scores are computed again where eager keeps its probabilities: 10 T V D against 8."""
    vocab, width, _ = MODELS[model]
    return Target(speedup=0.85 if width <= 1024 else 0.78, memory_ratio=1 / 12 if vocab > 150_000 else None)


# What runs on a GPU, in the order of its worth: whatever time is left, the head of this list is measured.
CASES: list[Case] = [
    *(
        Case(m, t, target=Target(2.0, over_floor=1.4, plain_speedup=1.0 if t == 1 else None))
        for m in _NARROW
        for t in (1, 16)
    ),
    *(Case("llama-3.2-1b", t, target=Target(1.3)) for t in (1, 16)),
    *(
        Case(m, t, target=Target(speedup))
        for t, speedup in ((32, 1.4), (64, 1.1), (256, 1.0))
        for m in ("qwen2.5-0.5b", "llama-3.2-1b")
    ),
    *(Case("mistral-7b", t, target=Target(1.0)) for t in (1, 64)),
    *(Case(m, 1024, target=Target(1.0)) for m in ("qwen2.5-0.5b", "llama-3.2-1b", "mistral-7b", "qwen2.5-7b")),
    *(Case(m, 4096, target=Target(1.0)) for m in ("qwen2.5-0.5b", "mistral-7b")),
    *(Case(m, 64, BOTH, target=Target(1.15)) for m in ("qwen2.5-0.5b", "mistral-7b")),
    *(Case(m, 1024, BOTH, target=_backward_target(m)) for m in ("qwen2.5-0.5b", "llama-3.2-1b", "mistral-7b")),
    *(Case("qwen2.5-0.5b", t, target=Target(2.0, over_product=1.3), variant="top_k") for t in (1, 16, 64)),
    *(Case("qwen2.5-0.5b", t, target=Target(3.0), variant="top_p") for t in (16, 64)),
    Case("qwen2.5-0.5b", 64, BOTH, target=Target(1.0), variant="top_k"),
    # Memory: a third of eager's logits / T and P; with a backward, of two tensors of that size beyond the gradient.
    *(
        Case("qwen2.5-0.5b", t, what, target=Target(1.2, memory_ratio=ratio), variant="logits")
        for t in (64, 1024)
        for what, ratio in ((FORWARD, 1 / 3), (BOTH, 5 / 9))
    ),
    Case("qwen2.5-0.5b", 65536, BOTH, target=Target(extra_bytes=1e9)),
]

# The cases that `torch.compile` of the plain formula is timed for too; compiling it takes longer than timing it.
_TO_COMPILE = {("qwen2.5-0.5b", 1, FORWARD), ("qwen2.5-0.5b", 64, FORWARD), ("mistral-7b", 64, FORWARD)}
_TO_COMPILE |= {("qwen2.5-0.5b", 1024, BOTH)}
COMPILED = {case.name for case in CASES if not case.variant and (case.model, case.rows, case.what) in _TO_COMPILE}

# The suite's dry run. The bounds are made up so that tables show every kind of target, met and missed.
SMOKE_CASES: list[Case] = [
    Case("tiny-tied", 1, dtype="float32", target=Target(over_floor=1e9)),
    Case("tiny-tied", 5, BOTH, dtype="float32", target=Target(1e9, memory_ratio=1e9)),
    Case("tiny-untied", 7, dtype="float32", target=Target(extra_bytes=1e9)),
    Case("tiny-tied", 3, dtype="float32", target=Target(1e-9, over_product=1e9), variant="top_k"),
    Case("tiny-untied", 3, BOTH, dtype="float32", target=Target(1e-9), variant="logits"),
]
SMOKE_COMPILED = {SMOKE_CASES[0].name}
