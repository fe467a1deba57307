"""One training step against the steps K, the prompts' length N and the queries B.

A query has a positive and a negative: 3 B texts. Rollouts, stepwise contrastive loss, ICR objective and backward into
LoRA matrices; the optimizer's own step is left out. Predicted time: the floor of `gircse.roofline`. Predicted memory:
the step counted on the meta device, as `gircse train --plan` counts it. The gradients of the LoRA matrices are there
before the step, in both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bench import train_check
from bench.agreement import worst
from bench.batches import FIXED
from bench.engines import CACHED as OURS
from bench.engines import ENGINES, OFFICIAL_EVAL, REFERENCE
from bench.memory import give_back, peak_extra_bytes
from bench.scaling_curves import Curve, Scale
from bench.shapes import SHAPES, meta_model
from bench.timing import interleaved
from bench.training import TrainJob, step, trainable
from bench.twin import is_half, twin
from gircse.engine.free_memory import free_bytes
from gircse.roofline import Ceilings, ModelFacts
from gircse.train.config import TrainConfig
from gircse.train.plan.extrapolate import TracedModel
from gircse.train.plan.meta_step import Batch
from gircse.train.plan.predict import USABLE, info_nce_bytes

# Gradients are compared with the reference algorithm's after so many steps: it keeps the whole prompt for each of them.
_CHECKED_STEPS, _CHECKED_LENGTH = 3, 16
_NEGATIVES = 1  # of each query


def measure(curve: Curve, scale: Scale, device: torch.device, ceilings: Ceilings) -> dict[str, Any]:
    """-> the curve's one series, agreement, and the sizes that do not fit this machine's memory.

    Raises:
        Disagreement: before any clock has been read.
    """
    jobs = {size: _job(curve.at(size), scale, device) for size in curve.sizes}
    facts = ModelFacts.of(meta_model(SHAPES[scale.shape].config(scale.layers), getattr(torch, scale.dtype)))
    lm = trainable(jobs[min(curve.sizes)])
    traced = TracedModel.of(TrainConfig(dtype=scale.dtype, lora_dropout=0.0), SHAPES[scale.shape].config(scale.layers))
    for base in traced.cut:
        _make_gradients(base)
    predicted = {size: _activations(traced, curve.at(size), device) for size in curve.sizes}
    room = USABLE * free_bytes(device)
    left_out = [
        {"size": size, "why": f"needs about {need / 2**30:.1f} of {room / 2**30:.1f} usable GiB"}
        for size, need in predicted.items()
        if need > room
    ]
    sizes = [size for size, need in predicted.items() if need <= room]

    small = replace(
        jobs[curve.sizes[0]],
        length=min(curve.largest["N"], _CHECKED_LENGTH),
        num_steps=min(curve.largest["K"], _CHECKED_STEPS),
    )
    checks = train_check.check(small, [OURS], lm)
    exact = twin(lm) if is_half(lm) else None
    for size in sizes:
        checks += train_check.timed_states(lm, exact, jobs[size], [OURS])
    del exact
    for difference in checks:
        difference.check(f"{REFERENCE} or {OFFICIAL_EVAL}")

    def run(size: int) -> Callable[[], Tensor]:
        queries, passages = jobs[size].batches(facts.vocab)
        return lambda: step(lm, OURS, queries, passages, jobs[size].num_steps)

    _make_gradients(lm.model)
    runs, peaks = {str(size): run(size) for size in sizes}, {}
    with ENGINES[OURS].attached(lm):
        for size in sizes:
            if device.type == "cuda" or size == sizes[0]:  # a CPU is as warm for one size as for another
                runs[str(size)]()
            peaks[size] = peak_extra_bytes(runs[str(size)], device)
            give_back(device)
        timings = interleaved(runs, device, scale.repeats)
    points = []
    for size in sizes:
        at = curve.at(size)
        points.append(
            {
                "size": size,
                **timings[str(size)]._asdict(),
                "floor_seconds": ceilings.seconds(facts.training(jobs[size].lengths(), at["K"])),
                "peak_extra_bytes": peaks[size],
                "predicted_bytes": predicted[size],
            }
        )
    agreement = {
        "against": f"{REFERENCE}: losses and gradients of a small batch; {OFFICIAL_EVAL}: embeddings of each timed one",
        "worst": worst(checks),
        "checks": len(checks),
    }
    return {"series": [{"pass": "training step", "points": points}], "agreement": agreement, "left_out": left_out}


def _job(at: dict[str, int], scale: Scale, device: torch.device) -> TrainJob:
    return TrainJob(
        shape=scale.shape,
        model=None,
        layers=scale.layers,
        queries=at["B"],
        negatives=_NEGATIVES,
        length=at["N"],
        distribution=FIXED,
        num_steps=at["K"],
        dtype=scale.dtype,
        device=str(device),
        seed=0,
    )


def _make_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)


def _activations(traced: TracedModel, at: dict[str, int], device: torch.device) -> int:
    """Bytes at the peak of forward and backward: queries and passages are rolled out one after the other."""
    batches = [Batch(at["B"], at["N"]), Batch(at["B"] * (1 + _NEGATIVES), at["N"])]
    loss = info_nce_bytes(at["B"], _NEGATIVES, at["K"], traced.facts.hidden)
    return traced.memory(batches, at["K"], cuda=device.type == "cuda", loss_bytes=loss).peak
