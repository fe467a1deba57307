"""A training step as `gircse train` makes it, with CUDA graphs where it makes them, beside the reference algorithm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench import training
from bench.batches import FIXED
from bench.cases import Target
from bench.engines import REFERENCE
from bench.plan_check import TOLERANCE
from bench.shapes import SHAPES, random_model
from bench.suite.model_cases import ModelCase
from bench.suite.session import Record, Session
from bench.timing import Timing, for_about
from bench.verdict import WrongResultError, verdict_of
from gircse.engine.draft import fused_drafter
from gircse.model import GIRCSE
from gircse.roofline import ModelFacts
from gircse.train.capture import CapturedPasses
from gircse.train.config import TrainConfig
from gircse.train.lora import trainable_model
from gircse.train.plan.predict import GRAPHS, plan
from gircse.train.step import TokenizedRows, contrastive_backward
from tests.tiny_models import tiny_tokenizer

EXACT = "exact gradient"  # through the soft tokens, as in the paper; otherwise K steps are one block
_ROUNDING = 0.15  # of the gradient's norm, between captured passes and single kernels, in half precision


def measure(session: Session, case: ModelCase) -> Record:
    """Every K of the case, and the largest K that the reference is timed at with the exact gradient."""
    base = random_model(SHAPES[case.shape].config(case.layers), dtype=case.torch_dtype, device=session.device)
    facts = ModelFacts.of(base)
    config = TrainConfig(lora_dropout=0.0)
    model = trainable_model(config, GIRCSE(base, tiny_tokenizer())).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, and then half of the gradients are
            torch.nn.init.normal_(parameter, std=0.01)
    ours, lengths = _Ours(model, config, case), [case.length] * (3 * case.rows)
    ceilings, lines, points = session.ceilings(case.dtype), [], []
    job = training.TrainJob(
        queries=case.rows, negatives=1, length=case.length, distribution=FIXED, num_steps=max(case.targets),
        dtype=case.dtype, device=str(session.device), seed=0, checkpointing=(REFERENCE,),
    )  # fmt: skip
    reference, zero = training.Runner(model.causal_lm, job, REFERENCE), None
    ways = [(k, 0.0, target) for k, target in case.targets.items()]
    ways += [(case.compared[-1], 1.0, case.exact)] if case.exact is not None else []
    theirs: dict[int, float] = {}
    last: tuple[int, float, int] | None = None  # the largest replay
    for k, factor, target in ways:
        timing, peak = ours.time(k, factor, session.device)
        zero = timing.seconds if k == 0 else zero
        if k in case.compared and k not in theirs:
            reference.step(k)
            theirs[k] = reference.step(k)
        if session.device.type == "cuda" and ours.graphs.refusal is None:
            last = max(last or (k, factor, peak), (k, factor, peak), key=lambda one: one[2])
        floor = ceilings.seconds(facts.training(lengths, k))
        what = f"K = {k}" + (f", {EXACT}" if factor else "")
        points.append(
            {"num_steps": k, "soft_token_gradient": factor, "seconds": timing.seconds, "spread": timing.spread,
             "floor_seconds": floor, "reference_seconds": theirs.get(k), "peak_bytes": peak}
        )  # fmt: skip
        lines.append(_line(case, what, target, timing.seconds, floor, theirs.get(k), zero))
    return {
        "benchmark": "train-step",
        "case": case.name,
        "shape": case.shape,
        "batch": {"queries": case.rows, "texts": 3 * case.rows, "length": case.length},
        "dtype": case.dtype,
        "ceilings": vars(ceilings),
        "points": points,
        "graphs": str(ours.graphs),
        "not_captured": ours.graphs.refusal,
        "memory": None if last is None else memory_of(session, case, *last),
        "agreement": verdict_of(lambda: _agreement(ours, max(case.compared))),
        "lines": lines,
    }


def memory_of(session: Session, case: ModelCase, k: int, factor: float, measured: int) -> dict[str, Any]:
    """The bytes of a replayed step beside those that the plan predicts; a problem where they are too far apart.

    A replay holds no activations outside of its graphs, and this step has no optimizer.
    """
    settings = TrainConfig(
        lora_dropout=0.0, num_steps=k, soft_token_gradient=factor, batch_size=case.rows, dtype=case.dtype,
        query_max_length=case.length, passage_max_length=case.length,
    )  # fmt: skip
    memory = plan(settings, gpu="h100", negatives=1, model_config=SHAPES[case.shape].config(case.layers)).memory
    parts = ("frozen weights", "LoRA weights", "LoRA copies", "LoRA gradients", GRAPHS)
    predicted = sum(memory[part] for part in parts)
    error = predicted / measured - 1
    if abs(error) > TOLERANCE:
        session.problem(f"{case.name}: predicted memory is off by {error:+.1%}, expected within {TOLERANCE:.0%}")
    return {"num_steps": k, "predicted_bytes": predicted, "measured_bytes": measured, "error": error}


class _Ours:
    """Gradients of a step, with graphs and without."""

    def __init__(self, model: GIRCSE, config: TrainConfig, case: ModelCase) -> None:
        self._model, self._config = model, config
        captures = model.device.type == "cuda"
        self.graphs = CapturedPasses(model) if captures else CapturedPasses(model, record=_uncaptured)
        self._drafter = fused_drafter(model.causal_lm) if captures else None
        generator, vocab = torch.Generator().manual_seed(0), model.causal_lm.vocabulary

        def draw(count: int) -> list[list[int]]:
            return torch.randint(3, vocab, (count, case.length), generator=generator).tolist()

        self._rows = TokenizedRows(draw(case.rows), draw(2 * case.rows), torch.arange(case.rows) * 2, None)
        self._weights = [p for p in model.parameters() if p.requires_grad]

    def step(self, k: int, factor: float, *, graphs: bool = True) -> None:
        for parameter in self._weights:
            parameter.grad = None
        contrastive_backward(
            self._model, self._rows, self._config, num_steps=k, soft_token_gradient=factor,
            graphs=self.graphs if graphs else None, drafter=None if factor else self._drafter,
        )  # fmt: skip

    def time(self, k: int, factor: float, device: torch.device) -> tuple[Timing, int]:
        """-> the time, and the bytes at the peak, those of the graphs included."""
        run: Callable[[], None] = lambda: self.step(k, factor)  # noqa: E731
        for _ in range(3):  # compile, capture, replay
            run()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        found = for_about({"ours": run}, device, 0.5, fewest=3)["ours"]
        peak = torch.cuda.max_memory_allocated(device) + self.graphs.graph_bytes if device.type == "cuda" else 0
        return found, peak

    def gradients(self, k: int, *, graphs: bool) -> Tensor:
        self.step(k, 0.0, graphs=graphs)
        return torch.cat([p.grad.flatten() for p in self._weights if p.grad is not None]).double()


def _uncaptured(captured: Any) -> tuple[Callable[[], None], Callable[[], None]]:
    """Without a GPU the functions themselves stand for their graphs."""
    captured.warm_up()
    return captured.forward, captured.backward


def _agreement(ours: _Ours, k: int) -> dict[str, Any]:
    """Of the gradients of captured passes with those of single kernels."""
    single, captured = (ours.gradients(k, graphs=graphs) for graphs in (False, True))
    error = ((single - captured).norm() / single.norm()).item()
    if not error <= _ROUNDING:
        raise WrongResultError(f"gradients of captured passes differ from single kernels' by {error:.1e} of their norm")
    return {"worst_error": error}


def _line(
    case: ModelCase, what: str, target: Target, ours: float, floor: float, theirs: float | None, zero: float | None
) -> dict[str, Any]:
    line = {"case": f"{case.name}, {what}", "floor": floor * 1e3, "ours": ours * 1e3}
    line |= {"baseline": None if theirs is None else theirs * 1e3, "speedup": None if theirs is None else theirs / ours}
    line |= {"over_floor": ours / floor, "over_zero": None if zero is None else ours / zero, "milliseconds": ours * 1e3}
    return target.judge(line)
