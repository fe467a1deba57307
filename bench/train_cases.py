"""What a training step is held to on a GPU: runs of `bench/run.py --train`, and the figures that are read off them.

One process each for the reference algorithm (the whole prompt every step, with activation checkpointing, without which
it does not fit) and for ours (once, everything kept), a step each in turn.
"""

from __future__ import annotations

from bench.engine_cases import EngineCase, Figure, Record
from bench.engines import REFERENCE

OURS = "cached"
_LENGTH, _STEPS = 512, 5


def _largest(record: Record) -> Record | None:
    """Our point with the largest K."""
    rows = [row for row in record.get("points", []) if row["engine"] == OURS]
    return max(rows, key=lambda row: row["num_steps"], default=None)


def speedup(record: Record) -> float | None:
    """Over the reference algorithm, at the largest K."""
    row = _largest(record)
    return row["speedup_over_recompute"] if row else None


def overhead(record: Record) -> float | None:
    """Time of a step with the largest K over the time with K = 0, minus one."""
    row = _largest(record)
    found = row.get("time_over_zero") if row else None
    return None if found is None else found - 1


def _case(shape: str, batch: int, seconds: float) -> EngineCase:
    arguments = ["--train", "--shape", shape, "--dtype", "bfloat16", "--batch", str(batch), "--negatives", "1"]
    arguments += ["--length", str(_LENGTH), "--steps", "0", str(_STEPS), "--engines", REFERENCE, OURS]
    arguments += ["--checkpointing", REFERENCE, "--repeats", "5"]
    figures = [
        Figure(f"x {REFERENCE}, a training step, K = {_STEPS}", speedup, True, 6.0),
        Figure(f"training step(K = {_STEPS}) / step(K = 0) - 1", overhead, False, 0.25),
    ]
    return EngineCase(f"training-{shape}-N{_LENGTH}", arguments, figures, seconds)


TRAIN_CASES = [_case("qwen2.5-0.5b", 8, seconds=60), _case("mistral-7b", 4, seconds=120)]

_TINY = ["--train", "--shape", "smollm2-135m", "--layers", "1", "--batch", "2", "--length", "8", "--repeats", "1"]
# The suite's dry run. The bounds are made up: one that is met, one that is not.
SMOKE_TRAIN_CASES = [
    EngineCase(
        "training-smoke",
        [*_TINY, "--steps", "0", "2", "--engines", REFERENCE, OURS, "--checkpointing", REFERENCE],
        [
            Figure(f"x {REFERENCE}, a training step, K = 2", speedup, True, 1e9),
            Figure("training step(K = 2) / step(K = 0) - 1", overhead, False, 1e9),
        ],
        15,
    )
]
