"""One training step, engine against engine: time and peak memory. `bench.train_check` compares losses and gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bench.agreement import HALF
from bench.batches import Batch, draw_lengths, random_batch
from bench.engines import ENGINES, REFERENCE
from bench.memory import peak_extra_bytes
from bench.points import Point, Trial, point_row, take_turns
from bench.timing import Timing, seconds
from gircse import ops
from gircse.lm.adapter import quiet_peft
from gircse.lm.causal_lm import CausalLM
from gircse.lm.lora import fuse_lora
from gircse.ops.info_nce_reference import icr_objective_reference, info_nce_reference
from gircse.roofline import Ceilings, ModelFacts
from gircse.train.config import TrainConfig
from gircse.train.lora import lora_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TEMPERATURE = TrainConfig().contrastive_temperature


@dataclass(frozen=True)
class TrainJob:
    """The texts of a training step, and how it is made.

    Attributes:
        queries, negatives: B rows of one query, one positive and `negatives` hard negatives.
        length: prompt tokens of every text, or of the longest.
        distribution: of the lengths, one of `bench.batches.DISTRIBUTIONS`.
        num_steps: the largest K.
        dtype: of the frozen base; the LoRA matrices are float32 beside half precision.
        checkpointing: engines that recompute the prompt pass in backward.
    """

    queries: int
    negatives: int
    length: int
    distribution: str
    num_steps: int
    dtype: str
    device: str
    seed: int
    checkpointing: tuple[str, ...] = ()

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def lengths(self) -> list[int]:
        """Of the queries, then of the passages."""
        rows = self.queries * (2 + self.negatives)
        return draw_lengths(rows, self.length, distribution=self.distribution, seed=self.seed)

    def batches(self, vocab: int) -> tuple[Batch, Batch]:
        """Queries [B, N] and passages [B (1 + H), N], each padded to its own longest row."""
        lengths = self.lengths()
        return (
            random_batch(vocab, lengths[: self.queries], seed=self.seed, device=self.device),
            random_batch(vocab, lengths[self.queries :], seed=self.seed + 1, device=self.device),
        )


def with_lora(base: PreTrainedModel, config: TrainConfig) -> CausalLM:
    """The model in training mode with LoRA matrices as training makes them; they are put into `base`."""
    from peft import get_peft_model

    with quiet_peft():
        adapted: Any = get_peft_model(base, lora_config(base, config))
    lm = CausalLM.from_model(adapted.get_base_model())
    lm.model.train()
    fuse_lora(lm.model)
    return lm


def trainable(job: TrainJob, base: PreTrainedModel) -> CausalLM:
    """The model with LoRA, but without dropout (which differs between engines by construction) and with a small random
    B as after some training (with B = 0, as it starts, A has no gradient to compare)."""
    torch.manual_seed(job.seed)
    lm = with_lora(base, TrainConfig(lora_dropout=0.0))
    for name, parameter in lm.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    return lm


@contextmanager
def checkpointed(lm: CausalLM, on: bool) -> Iterator[None]:
    """The prompt pass is computed again in backward, if `on`."""
    model: Any = lm.model
    if not on:
        yield
        return
    name = "activation_checkpointing" if hasattr(model, "activation_checkpointing_enable") else "gradient_checkpointing"
    getattr(model, f"{name}_enable")({"use_reentrant": False})
    try:
        yield
    finally:
        getattr(model, f"{name}_disable")()


def step(lm: CausalLM, engine: str, queries: Batch, passages: Batch, num_steps: int, *, smooth: bool = False) -> Tensor:
    """Rollouts, stepwise contrastive losses, ICR objective, backward. -> L_1..L_K; gradients are left in `.grad`.

    The engines without a cache take the objective in plain PyTorch, so that the check covers the objective as well.

    Args:
        smooth: the mean loss at temperature 1 instead. At the temperature of training, with a penalty that is on or
            off, the gradient of a few rows is a matter of chance when their similarities are rounded.
    """
    run = ENGINES[engine].run
    states = run(lm, *queries, num_steps), run(lm, *passages, num_steps)
    temperature = 1.0 if smooth else _TEMPERATURE
    if engine.startswith(REFERENCE):
        wide = [s.to(torch.promote_types(s.dtype, torch.float32)) for s in states]
        losses, objective = info_nce_reference(*wide, temperature=temperature), icr_objective_reference
    else:
        losses, objective = ops.stepwise_info_nce(*states, temperature=temperature), ops.icr_objective
    (losses.mean() if smooth else objective(losses)).backward()
    return losses.detach()


def results(lm: CausalLM, losses: Tensor) -> dict[str, Tensor]:
    """Losses and LoRA gradients on the CPU; clears the gradients."""
    tensors = {"losses": losses.cpu()}
    for name, parameter in lm.model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            tensors[name] = parameter.grad.cpu()
            parameter.grad = None
    return tensors


class Runner:
    """One engine that makes a step whenever it is told to, on a model that others may use as well.

    Attributes:
        loaded_bytes: of the model's parameters and buffers.
    """

    def __init__(self, lm: CausalLM, job: TrainJob, engine: str) -> None:
        self.engine = engine
        self._lm, self._job = lm, job
        self._batches = job.batches(lm.embed_weight.shape[0])
        self._results: dict[str, Tensor] | None = None
        self.loaded_bytes = sum(t.numel() * t.itemsize for t in (*lm.model.parameters(), *lm.model.buffers()))

    def step(self, num_steps: int) -> float:
        """-> its seconds."""
        return self._run(num_steps, seconds)

    def peak(self, num_steps: int) -> int:
        """The bytes that a step allocates at its peak; the first one of the largest K leaves its `results`."""
        return self._run(num_steps, peak_extra_bytes)

    def results(self) -> dict[str, Tensor]:
        """Losses and gradients of a step with the job's K; they are not kept in half precision."""
        assert self._results is not None, "no step has been made, or its results were not to be kept"
        return self._results

    def _run(self, num_steps: int, measured: Any) -> Any:
        lm, losses = self._lm, list[Tensor]()
        with ENGINES[self.engine].attached(lm), checkpointed(lm, self.engine in self._job.checkpointing):
            outcome = measured(lambda: losses.append(step(lm, self.engine, *self._batches, num_steps)), lm.device)
        if self._results is None and num_steps == self._job.num_steps and self._job.torch_dtype not in HALF:
            self._results = results(lm, losses[0])
        lm.model.zero_grad(set_to_none=True)
        return outcome


def here(lm: CausalLM, job: TrainJob, engines: Sequence[str]) -> list[Runner]:
    """Runners of all engines on one model."""
    return [Runner(lm, job, name) for name in engines]


def measure(
    runners: Sequence[Runner],
    job: TrainJob,
    facts: ModelFacts,
    ceilings: Ceilings,
    steps: list[int],
    repeats: int,
    *,
    interleave: bool = True,
    most_seconds: float | None = None,
) -> Iterator[dict[str, Any]]:
    """Times every runner at every K of the (ascending) `steps`, the largest of which is the job's.

    Yields:
        the JSON object of each point; where a step raised, `engine`, `num_steps` and the reason as `failed`.

    Args:
        interleave, most_seconds: see `bench.points.take_turns`.
    """
    by_name = {runner.engine: runner for runner in runners}
    loaded = runners[0].loaded_bytes
    device, lengths = torch.device(job.device), job.lengths()
    at_zero = facts.training(lengths, 0) if 0 in steps else None
    timings: dict[Point, Timing] = {}

    def warm_up(trial: Trial) -> None:
        trial.peak = by_name[trial.point.engine].peak(trial.point.num_steps)

    def timed(trial: Trial) -> float:
        return by_name[trial.point.engine].step(trial.point.num_steps)

    points = [Point(name, k) for k in steps for name in by_name]
    for trials in take_turns(points, warm_up, timed, repeats, device, interleave=interleave, most_seconds=most_seconds):
        timings |= {trial.point: Timing.of(trial.seconds) for trial in trials if trial.seconds}
        peaks = {trial.point: loaded + trial.peak for trial in trials if trial.peak is not None}
        for trial in trials:
            point = trial.point
            if trial.failed is not None:
                yield trial.failure
                continue
            row = point_row(point, timings, lengths, facts.training(lengths, point.num_steps), at_zero, ceilings)
            reference = peaks.get(Point(REFERENCE, point.num_steps))
            yield row | {
                "peak_bytes": peaks[point],
                "loaded_bytes": loaded,
                "peak_extra_bytes": trial.peak,
                "peak_ratio_to_recompute": peaks[point] / reference if reference is not None else None,
            }
