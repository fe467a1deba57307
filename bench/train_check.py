"""Whether training engines compute the same losses and gradients: after they have been timed, and nothing of it in what
is timed.

Float32 and float64: a step of every engine against the reference algorithm's, on a small batch and, where the timed
gradients were kept, on the timed one. Half precision: the small batch on a float32 copy of the model; then the error of
losses and gradients against float32, beside the reference's own; and the states of the timed batch, as in encoding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bench.agreement import Difference, compare_each, training_difference, training_rounding, unchecked
from bench.batches import Batch, check_lengths, random_batch
from bench.encode_check import Timed, timed_rows
from bench.engines import ENGINES, REFERENCE
from bench.throughput import Measured, Point, embed
from bench.training import Runner, TrainJob, checkpointed, results, step, trainable
from bench.twin import is_half, twin
from gircse.lm.causal_lm import CausalLM

_LENGTH, _HALF_LENGTH = 24, 64


def check(
    job: TrainJob, engines: Sequence[str], lm: CausalLM | None = None, runners: Sequence[Runner] = ()
) -> list[Difference]:
    """Everything that is compared, whatever it says; a comparison that raises is `UNCHECKED`.

    Args:
        lm: of `trainable`, the job's; made here where it is not given.
        runners: that have been timed on the job, with the results of their first step (not in half precision).
    """
    names = [name for name in dict.fromkeys(engines) if name != REFERENCE]
    if not names:
        return []
    lm = trainable(job) if lm is None else lm
    lm.model.zero_grad(set_to_none=True)
    if not is_half(lm):
        return strict(lm, job, names) + _timed_steps(job, runners)
    try:
        exact = twin(lm)
    except Exception as error:  # too large for this machine's memory
        return [unchecked(name, "a float32 copy of the model", error) for name in names]
    return [*strict(exact, job, names), *_rounding(lm, exact, job, names), *timed_states(lm, exact, job, names)]


def strict(lm: CausalLM, job: TrainJob, names: Sequence[str]) -> list[Difference]:
    """A real step of two queries with a positive and a negative each, half of the rows padded; float32 or float64."""
    lengths = check_lengths(min(job.length, _LENGTH))
    batches = _batches(lm, job, [lengths[0], lengths[2]], lengths)
    what = f"losses and LoRA gradients of 2 + 4 texts up to {lengths[0]} tokens, K = {job.num_steps}"
    return compare_each(
        names,
        what,
        lambda: _gradients(lm, job, REFERENCE, batches, smooth=False),
        lambda name, expected: training_difference(
            name, what, _gradients(lm, job, name, batches, smooth=False), expected, lm.head_weight.dtype
        ),
    )


def _rounding(lm: CausalLM, exact: CausalLM, job: TrainJob, names: Sequence[str]) -> list[Difference]:
    """Four queries and eight passages, of a smooth loss: its gradient is as exact as the states are."""
    lengths = check_lengths(min(job.length, _HALF_LENGTH))
    batches = _batches(lm, job, lengths, 2 * lengths)
    what = f"losses and LoRA gradients of 4 + 8 texts up to {lengths[0]} tokens, K = {job.num_steps}, {job.dtype}"
    return compare_each(
        names,
        what,
        lambda: [_gradients(model, job, REFERENCE, batches, smooth=True) for model in (lm, exact)],
        lambda name, expected: training_rounding(
            name, what, _gradients(lm, job, name, batches, smooth=True), *expected
        ),
    )


def timed_states(lm: CausalLM, exact: CausalLM | None, job: TrainJob, names: Sequence[str]) -> list[Difference]:
    """The forward of the timed batch, some of its rows: its losses and gradients depend on all rows at once.

    Args:
        exact: the float32 copy where `lm` is in half precision.
    """
    found = []
    for title, batch in zip(("queries", "passages"), job.batches(lm.embed_weight.shape[0]), strict=True):
        what, points = f"the timed batch's {title}", []
        for name in names:
            point = Point(name, job.num_steps)
            try:
                with ENGINES[name].attached(lm) as run:
                    points.append(Measured(point, {}, embed(run, lm, batch, job.num_steps).cpu()))
            except Exception as error:
                found.append(unchecked(name, what, error))
        found += timed_rows(lm, exact, Timed(what, batch, points))
    return found


def _timed_steps(job: TrainJob, runners: Sequence[Runner]) -> list[Difference]:
    """Losses and gradients of the timed batch, with the reference among the runners."""
    what = f"losses and LoRA gradients of the timed batch, K = {job.num_steps}"
    by_name = {runner.engine: runner for runner in runners}
    if REFERENCE not in by_name:
        return []
    return compare_each(
        [name for name in by_name if name != REFERENCE],
        what,
        lambda: by_name[REFERENCE].results(),
        lambda name, expected: training_difference(name, what, by_name[name].results(), expected, job.torch_dtype),
    )


def _batches(lm: CausalLM, job: TrainJob, queries: list[int], passages: list[int]) -> tuple[Batch, Batch]:
    vocab = lm.embed_weight.shape[0]
    return (
        random_batch(vocab, queries, seed=job.seed + 2, device=job.device),
        random_batch(vocab, passages, seed=job.seed + 3, device=job.device),
    )


def _gradients(
    lm: CausalLM, job: TrainJob, engine: str, batches: tuple[Batch, Batch], *, smooth: bool
) -> dict[str, Tensor]:
    """The uncached engines keep the prompt of every step: they compute it again, or a large model would not fit."""
    again = engine in job.checkpointing or engine.startswith(REFERENCE)
    with torch.enable_grad(), ENGINES[engine].attached(lm), checkpointed(lm, again):
        return results(lm, step(lm, engine, *batches, job.num_steps, smooth=smooth))
