"""What `bench/scaling.py` measures: one size varied, the others held, on a CPU and on a GPU.

T rows and V vocabulary entries of `soft_embed`; K steps, N prompt tokens and B rows of encoding and of a training step
(there B queries with a positive and a negative each, so 3 B texts). Sizes at least double from point to point.
"""

from __future__ import annotations

from dataclasses import dataclass

SOFT_EMBED, ENCODE, TRAIN = KINDS = ("soft_embed", "encode", "train")


@dataclass(frozen=True)
class Curve:
    """One size varied.

    Attributes:
        kind: one of `KINDS`.
        axis: the name of the size that varies.
        sizes: its values, rising.
        held: the others by name.
    """

    kind: str
    axis: str
    sizes: tuple[int, ...]
    held: dict[str, int]

    @property
    def name(self) -> str:
        """Unique; also the name of its record's file."""
        return f"{self.kind}.{self.axis}"

    def at(self, size: int) -> dict[str, int]:
        """All sizes of a point."""
        return {**self.held, self.axis: size}

    @property
    def largest(self) -> dict[str, int]:
        return self.at(max(self.sizes))


@dataclass(frozen=True)
class Scale:
    """What fits a machine.

    Attributes:
        shape: a name of `bench.shapes.SHAPES`; encoding and training run it with random weights.
        layers: its depth, None for all.
        dtype: of weights and hidden states (LoRA matrices: float32).
        repeats: timed runs of each point.
        curves: in the order in which they are measured.
    """

    shape: str
    layers: int | None
    dtype: str
    repeats: int
    curves: tuple[Curve, ...]


CPU = Scale(
    "smollm2-135m",
    None,
    "float32",
    3,
    (
        Curve(SOFT_EMBED, "T", (1, 4, 16, 64, 256, 512), {"V": 49_152, "D": 576}),
        Curve(SOFT_EMBED, "V", (4096, 8192, 16_384, 32_768, 65_536, 131_072), {"T": 64, "D": 576}),
        Curve(ENCODE, "K", (1, 2, 5, 10, 20), {"B": 16, "N": 32}),
        Curve(ENCODE, "N", (16, 32, 64, 128, 256), {"B": 16, "K": 5}),
        Curve(ENCODE, "B", (1, 2, 4, 8, 16, 32), {"N": 32, "K": 5}),
        Curve(TRAIN, "K", (1, 2, 4, 8, 16), {"B": 4, "N": 32}),
        Curve(TRAIN, "N", (16, 32, 64, 128, 256), {"B": 2, "K": 5}),
        Curve(TRAIN, "B", (1, 2, 4, 8, 16), {"N": 32, "K": 5}),
    ),
)

CUDA = Scale(
    "qwen2.5-0.5b",
    None,
    "bfloat16",
    7,
    (
        Curve(SOFT_EMBED, "T", (1, 4, 16, 64, 256, 1024, 4096), {"V": 151_936, "D": 896}),
        Curve(SOFT_EMBED, "V", (8192, 16_384, 32_768, 65_536, 131_072, 262_144), {"T": 256, "D": 896}),
        Curve(ENCODE, "K", (1, 2, 5, 10, 20, 40), {"B": 64, "N": 64}),
        Curve(ENCODE, "N", (64, 128, 256, 512, 1024, 2048), {"B": 64, "K": 5}),
        Curve(ENCODE, "B", (1, 4, 16, 64, 256, 1024), {"N": 64, "K": 5}),
        Curve(TRAIN, "K", (1, 2, 5, 10, 20, 40), {"B": 8, "N": 128}),
        Curve(TRAIN, "N", (64, 128, 256, 512, 1024, 2048), {"B": 2, "K": 5}),
        Curve(TRAIN, "B", (4, 8, 16, 32, 64, 128, 256), {"N": 32, "K": 5}),
    ),
)

# The dry run: every code path, no meaning.
QUICK = Scale(
    "smollm2-135m",
    1,
    "float32",
    1,
    (
        Curve(SOFT_EMBED, "T", (1, 4, 16), {"V": 1003, "D": 48}),
        Curve(SOFT_EMBED, "V", (256, 512, 1024), {"T": 4, "D": 48}),
        Curve(ENCODE, "K", (1, 2, 4), {"B": 2, "N": 8}),
        Curve(ENCODE, "N", (4, 8, 16), {"B": 2, "K": 2}),
        Curve(ENCODE, "B", (1, 2, 4), {"N": 8, "K": 2}),
        Curve(TRAIN, "K", (1, 2, 4), {"B": 1, "N": 8}),
        Curve(TRAIN, "N", (4, 8, 16), {"B": 1, "K": 2}),
        Curve(TRAIN, "B", (1, 2, 4), {"N": 8, "K": 2}),
    ),
)
