"""One training step, engine against engine: loss and gradients first, then time and peak memory.

Every engine runs in a fresh process of its own, because the peak of a process can be read but not divided. The
processes live side by side and take turns, a step each, so that drifts of the machine hit all of them alike.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from bench.agreement import Difference, training_difference
from bench.batches import Batch, check_lengths, draw_lengths, random_batch
from bench.engines import ENGINES, REFERENCE
from bench.shapes import SHAPES, pretrained_model, random_model
from bench.timing import Timing
from gircse import ops
from gircse.architecture import CausalLM
from gircse.floors import Ceilings, ModelFacts
from gircse.ops.reference import icr_objective_reference, info_nce_reference
from gircse.quiet import quiet_peft
from gircse.train_config import TrainConfig
from gircse.trainable import lora_targets


@dataclass(frozen=True)
class TrainJob:
    """A training step, as it is sent to a worker.

    Attributes:
        shape, model: a name of `SHAPES`, or a folder or hub name; one of them.
        layers: depth, None for all.
        queries, negatives: B rows of one query, one positive and `negatives` hard negatives.
        length: prompt tokens of every text, or of the longest.
        distribution: of the lengths, one of `bench.batches.DISTRIBUTIONS`.
        num_steps: the largest K.
        dtype: of the frozen base; the LoRA matrices are float32 beside half precision.
        checkpointing: engines that recompute the prompt pass in backward.
    """

    shape: str | None
    model: str | None
    layers: int | None
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


def trainable(job: TrainJob, engine: str | None = None) -> CausalLM:
    """The model, for an engine, with LoRA on it as in training, but no dropout (it differs between engines by
    construction) and a small random B as after some training (with B = 0, as it starts, A has no gradient to compare).
    """
    from peft import LoraConfig, get_peft_model

    if job.model is not None:
        base = pretrained_model(job.model, dtype=job.torch_dtype, device=job.device, layers=job.layers)
    else:
        assert job.shape is not None
        base = random_model(
            SHAPES[job.shape].config(job.layers), dtype=job.torch_dtype, device=job.device, seed=job.seed
        )
    defaults = TrainConfig()
    torch.manual_seed(job.seed)
    lora = LoraConfig(
        r=defaults.lora_r,
        lora_alpha=defaults.lora_alpha,
        lora_dropout=0.0,
        target_modules=lora_targets(base),
        task_type="CAUSAL_LM",
    )
    with quiet_peft():
        adapted: Any = get_peft_model(base, lora)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    lm = CausalLM.from_model(adapted.get_base_model())
    if engine in job.checkpointing:
        lm.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    lm.model.train()
    return lm


def step(lm: CausalLM, engine: str, queries: Batch, passages: Batch, num_steps: int) -> Tensor:
    """Rollouts, stepwise contrastive losses, ICR objective, backward. -> L_1..L_K; gradients are left in `.grad`.

    The uncached engines take the objective in plain PyTorch, so that the check covers the objective too.
    """
    run = ENGINES[engine].run
    states = run(lm, *queries, num_steps), run(lm, *passages, num_steps)
    if engine.startswith(REFERENCE):
        losses = info_nce_reference(*(s.to(torch.promote_types(s.dtype, torch.float32)) for s in states))
        loss = icr_objective_reference(losses)
    else:
        losses = ops.stepwise_info_nce(*states)
        loss = ops.icr_objective(losses)
    loss.backward()
    return losses.detach()


def results(lm: CausalLM, losses: Tensor) -> dict[str, Tensor]:
    """Losses and LoRA gradients on the CPU; clears the gradients."""
    found = {"losses": losses.cpu()}
    for name, parameter in lm.model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            found[name] = parameter.grad.cpu()
            parameter.grad = None
    return found


def check_agreement(job: TrainJob, engines: list[str], lm: CausalLM | None = None) -> list[Difference]:
    """Two queries with a positive and a negative each, half of the rows padded, in this process.

    Raises:
        Disagreement: with the measured difference.
    """
    lm = trainable(job) if lm is None else lm
    vocab = lm.embed_weight.shape[0]
    lengths = check_lengths(min(job.length, 24))
    queries = random_batch(vocab, [lengths[0], lengths[2]], seed=job.seed + 2, device=job.device)
    passages = random_batch(vocab, lengths, seed=job.seed + 3, device=job.device)
    found = {}
    for name in dict.fromkeys([REFERENCE, *engines]):
        with ENGINES[name].attached(lm):
            found[name] = results(lm, step(lm, name, queries, passages, job.num_steps))
    what = f"losses and LoRA gradients of 2 + 4 texts up to {lengths[0]} tokens, K = {job.num_steps}"
    return [
        training_difference(name, what, found[name], found[REFERENCE], job.torch_dtype).check(REFERENCE)
        for name in engines
        if name != REFERENCE
    ]


class WorkerError(RuntimeError):
    """A worker's process ended before it answered."""


class Worker:
    """A process that holds one engine and makes a step whenever it is told to."""

    def __init__(self, job: TrainJob, engine: str, results_file: Path) -> None:
        self.engine, self.results_file = engine, results_file
        command = [sys.executable, str(Path(__file__).with_name("train_worker.py"))]
        setup = json.dumps({"job": asdict(job), "engine": engine, "results": str(results_file)})
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.loaded = self._tell(setup)

    def step(self, num_steps: int) -> dict[str, Any]:
        """-> {"seconds", "peak_bytes"}."""
        return self._tell(str(num_steps))

    def results(self) -> dict[str, Tensor]:
        """Losses and gradients of its first step, the job's largest K."""
        return torch.load(self.results_file, weights_only=True)

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _tell(self, line: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        answer = ""
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            pass
        if not answer:
            code = self._process.wait()
            why = "killed, probably out of memory" if code == -9 else f"exit code {code}"
            raise WorkerError(f"the process of engine {self.engine} ended early ({why})")
        return json.loads(answer)


@contextmanager
def workers(job: TrainJob, engines: list[str]) -> Iterator[list[Worker]]:
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        found = []
        for name in engines:
            found.append(Worker(job, name, Path(folder) / f"{name}.pt"))
            stack.callback(found[-1].close)
        yield found


def measure(
    job: TrainJob, facts: ModelFacts, ceilings: Ceilings, engines: list[str], steps: list[int], repeats: int
) -> tuple[list[Difference], list[dict[str, Any]]]:
    """-> differences on the timed batch (with the reference among the engines), one JSON object per engine and K."""
    total = len(engines) * (1 + len(steps) * repeats)
    with (
        workers(job, engines) as found,
        tqdm(total=total, desc="bench", unit="step", disable=None, leave=False) as progress,
    ):
        for worker in found:
            worker.step(job.num_steps)  # warm-up, and the results
            progress.update()
        differences = []
        if REFERENCE in engines:
            expected = found[engines.index(REFERENCE)].results()
            what = f"losses and LoRA gradients of the timed batch, K = {job.num_steps}"
            for worker in found:
                if worker.engine != REFERENCE:
                    theirs = worker.results()
                    differences.append(training_difference(worker.engine, what, theirs, expected, job.torch_dtype))
                    differences[-1].check(REFERENCE)
        answers: dict[int, dict[str, list[dict[str, Any]]]] = {k: {name: [] for name in engines} for k in steps}
        for _ in range(repeats):
            for k in steps:
                for worker in found:
                    answers[k][worker.engine].append(worker.step(k))
                    progress.update()
        loaded = {worker.engine: worker.loaded for worker in found}
    rows = [row for k in steps for row in _rows(replace(job, num_steps=k), facts, ceilings, answers[k], loaded)]
    for row in rows if steps[0] == 0 else ():
        zero = next(other for other in rows if other["engine"] == row["engine"])
        row["time_over_zero"] = row["seconds"] / zero["seconds"]
        row["floor_over_zero"] = row["floor_seconds"] / zero["floor_seconds"]
    return differences, rows


def _rows(
    job: TrainJob,
    facts: ModelFacts,
    ceilings: Ceilings,
    answers: dict[str, list[dict[str, Any]]],
    loaded: dict[str, dict[str, Any]],
) -> list[dict[str, Any]]:
    timings = {name: Timing.of([answer["seconds"] for answer in found]) for name, found in answers.items()}
    peaks = {name: max(answer["peak_bytes"] for answer in found) for name, found in answers.items()}
    lengths = job.lengths()
    work = facts.training(lengths, job.num_steps)
    floor = ceilings.seconds(work)
    tokens = sum(lengths) + job.num_steps * len(lengths)
    rows = []
    for name, timing in timings.items():
        base = loaded[name]["loaded_bytes"]
        rows.append(
            {
                "engine": name,
                "num_steps": job.num_steps,
                "seconds": timing.seconds,
                "spread": timing.spread,
                "runs": timing.runs,
                "texts_per_second": len(lengths) / timing.seconds,
                "tokens_per_second": tokens / timing.seconds,
                "speedup_over_recompute": timings[REFERENCE].seconds / timing.seconds if REFERENCE in timings else None,
                "peak_bytes": peaks[name],
                "loaded_bytes": base,
                "peak_extra_bytes": peaks[name] - base,
                "peak_ratio_to_recompute": peaks[name] / peaks[REFERENCE] if REFERENCE in peaks else None,
                "flops": sum(phase.flops for phase in work),
                "bytes": sum(phase.bytes for phase in work),
                "floor_seconds": floor,
                "time_over_floor": timing.seconds / floor,
            }
        )
    return rows
