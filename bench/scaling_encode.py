"""Encoding by the generation engine against the steps K, the prompt's length N and the rows B.

Predicted time: the floor of `gircse.roofline`. Predicted memory: the engine's own plan of its buffers (keys and values
of whole buckets of slots, states), the results, and what is widest: the activations of a prefill, or a soft token's
tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench import scaling_soft_embed
from bench.agreement import Difference, worst
from bench.batches import Batch, random_batch
from bench.cases import FORWARD
from bench.encode_check import Timed, strict, timed_rows
from bench.engines import GRAPH, OFFICIAL_EVAL, REFERENCE, real_tokens
from bench.memory import give_back, peak_extra_bytes
from bench.scaling_curves import Curve, Scale
from bench.scaling_soft_embed import Sizes
from bench.shapes import SHAPES, random_model
from bench.throughput import Measured, Point
from bench.timing import interleaved
from bench.twin import is_half, twin
from gircse.engine import Engine, EngineConfig
from gircse.engine.config import STEPS_BUCKET, Limits
from gircse.engine.schedule import next_batch
from gircse.lm.causal_lm import CausalLM
from gircse.ops import l2_normalize, pool_steps
from gircse.roofline import Ceilings, ModelFacts

# Embeddings after so many steps are compared: every step feeds its rounding to the next, and half precision is a
# different path after twenty of them.
CHECKED_STEPS = 20


def measure(curve: Curve, scale: Scale, device: torch.device, ceilings: Ceilings) -> dict[str, Any]:
    """-> the curve's one series, and how well the engine agrees at every point.

    Raises:
        Disagreement: before any clock has been read.
    """
    dtype = getattr(torch, scale.dtype)
    model = random_model(SHAPES[scale.shape].config(scale.layers), dtype=dtype, device=device)
    facts, lm = ModelFacts.of(model), CausalLM.from_model(model)
    batches = {size: _batch(curve.at(size), facts.vocab, device) for size in curve.sizes}
    peaks, limits = {}, None
    for size, batch in batches.items():  # each with an engine of its own, whose buffers count
        peaks[size], limits = _cold_peak(lm, batch, curve.at(size)["K"])
        give_back(device)
    assert limits is not None

    engine = Engine(lm, EngineConfig())

    def run(size: int) -> Callable[[], Tensor]:
        rows, steps = real_tokens(*batches[size]), curve.at(size)["K"]
        return lambda: _embed(engine.states(rows, steps), steps)

    checks = _check(lm, engine, curve, batches)  # and so each is warmed up
    timings = interleaved({str(size): run(size) for size in curve.sizes}, device, scale.repeats)
    points = []
    for size in curve.sizes:
        at = curve.at(size)
        points.append(
            {
                "size": size,
                **timings[str(size)]._asdict(),
                "floor_seconds": ceilings.seconds(facts.inference([at["N"]] * at["B"], at["K"])),
                "peak_extra_bytes": peaks[size],
                "predicted_bytes": held_bytes(lm, facts, limits, at),
            }
        )
    agreement = {
        "against": f"{OFFICIAL_EVAL} on every timed batch, {REFERENCE} on four rows of the smallest",
        "worst": worst(checks),
        "checks": len(checks),
    }
    return {
        "series": [{"pass": "encode", "points": points}],
        "agreement": agreement,
        "left_out": [],
        "not_captured": engine.report().not_captured,
    }


def _batch(at: dict[str, int], vocab: int, device: torch.device) -> Batch:
    return random_batch(vocab, [at["N"]] * at["B"], seed=0, device=device)


def _embed(states: Tensor, steps: int) -> Tensor:
    """[B, K, D] -> z_steps [B, D], length 1."""
    return l2_normalize(pool_steps(states)[:, steps - 1])


def _cold_peak(lm: CausalLM, batch: Batch, steps: int) -> tuple[int, Limits]:
    """Peak bytes of an engine's first call, its construction included, and its limits."""
    rows = real_tokens(*batch)
    engines: list[Engine] = []

    def first() -> Tensor:
        engines.append(Engine(lm, EngineConfig()))
        return engines[0].states(rows, steps)

    peak = peak_extra_bytes(first, lm.device)
    report = engines[0].report()
    # on a CPU the buffers of keys and values come from NumPy, which PyTorch's profiler does not see
    return peak + (report.kv_bytes if lm.device.type == "cpu" else 0), report.limits


@torch.no_grad()
def _check(lm: CausalLM, engine: Engine, curve: Curve, batches: dict[int, Batch]) -> list[Difference]:
    exact = twin(lm) if is_half(lm) else None
    differences = []
    for size in reversed(curve.sizes):  # the largest first: its buffers serve all others
        at, batch = curve.at(size), batches[size]
        steps = min(at["K"], CHECKED_STEPS)
        ours = _embed(engine.states(real_tokens(*batch), at["K"]), steps)
        what = f"the timed batch, B = {at['B']}, N = {at['N']}"
        points = [Measured(Point(GRAPH, steps), {}, ours.cpu())]
        differences += [d.check(OFFICIAL_EVAL) for d in timed_rows(lm, exact, Timed(what, batch, points))]
        if size == min(curve.sizes):
            small = Batch(*(tensor[:4] for tensor in batch))
            differences += [d.check(REFERENCE) for d in strict(exact or lm, [GRAPH, OFFICIAL_EVAL], small, steps)]
    return differences


def held_bytes(lm: CausalLM, facts: ModelFacts, limits: Limits, at: dict[str, int]) -> int:
    """Of the largest decode batch: keys and values, states, results, and the activations of a prefill or of a step.

    The widest moment of a prefill is the gated MLP: the residual and its norm [T, D]; gate, up and product [T, I]. That
    of a step is its soft token.
    """
    lengths = [at["N"]] * at["B"]
    batch = next_batch(range(at["B"]), lengths, limits, at["K"])
    tokens = batch.buffer_rows * batch.slots
    pool = max(tokens, min(1 << (tokens - 1).bit_length(), limits.kv_tokens))
    cached = pool * 2 * facts.layers * facts.kv_heads * facts.head_dim
    states = batch.buffer_rows * (1 + max(at["K"], STEPS_BUCKET)) * facts.hidden
    results = at["B"] * at["K"] * facts.hidden
    start, stop = batch.prefills[0]
    prefill = (stop - start) * at["N"] * (2 * facts.hidden + 3 * lm.config.intermediate_size)
    token = Sizes(batch.buffer_rows, facts.vocab, facts.hidden, facts.embed, facts.tied, facts.itemsize)
    step = scaling_soft_embed.held_bytes(token, FORWARD, lm.head_weight.dtype, lm.device)
    return facts.itemsize * (cached + states + results) + max(facts.itemsize * prefill, step)
