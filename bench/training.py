"""One training step, engine against engine: time and peak memory. `bench.train_check` compares losses and gradients.

On a CPU every engine runs in a fresh process of its own, because the peak of a process can be read but not divided. The
processes live side by side and take turns, a step each, so that drifts of the machine hit all of them alike. On a GPU
the allocator's peak can be divided, and engines may take turns on one model (`here`).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from bench.agreement import HALF, reason
from bench.batches import Batch, draw_lengths, random_batch
from bench.engines import ENGINES, REFERENCE
from bench.memory import peak, reset_peak
from bench.shapes import SHAPES, pretrained_model, random_model
from bench.timing import Timing, seconds
from gircse import ops
from gircse.lm.causal_lm import CausalLM
from gircse.lm.quiet import quiet_peft
from gircse.ops.info_nce_reference import icr_objective_reference, info_nce_reference
from gircse.roofline import Ceilings, ModelFacts
from gircse.train.config import TrainConfig
from gircse.train.lora import lora_targets

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TEMPERATURE = TrainConfig().contrastive_temperature


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


def trainable(job: TrainJob, base: PreTrainedModel | None = None) -> CausalLM:
    """The model with LoRA on it as in training, but no dropout (it differs between engines by construction) and a small
    random B as after some training (with B = 0, as it starts, A has no gradient to compare).

    Args:
        base: the job's model where the caller has it already; the adapters are put into it.
    """
    from peft import LoraConfig, get_peft_model

    if base is None and job.model is not None:
        base = pretrained_model(job.model, dtype=job.torch_dtype, device=job.device, layers=job.layers)
    elif base is None:
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
    lm.model.train()
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

    The uncached engines take the objective in plain PyTorch, so that the check covers the objective too.

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
    found = {"losses": losses.cpu()}
    for name, parameter in lm.model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            found[name] = parameter.grad.cpu()
            parameter.grad = None
    return found


class WorkerError(RuntimeError):
    """A worker's process ended before it answered."""


class Runner(Protocol):
    """One engine, which makes a step whenever it is told to.

    Attributes:
        loaded: bytes in use before the first step, as `loaded_bytes`.
    """

    engine: str
    loaded: dict[str, Any]

    def step(self, num_steps: int) -> dict[str, Any]:
        """-> {"seconds", "peak_bytes"}."""

    def results(self) -> dict[str, Tensor]:
        """Losses and gradients of its first step."""


class Here:
    """A runner in this process, on a model that others may use as well.

    Peaks are CUDA's allocator's, which can be reset; on a CPU those of the whole process.

    Args:
        kept: where losses and gradients of the first step go; None: they are not kept.
    """

    def __init__(self, lm: CausalLM, job: TrainJob, engine: str, kept: dict[str, Tensor] | None = None) -> None:
        self.engine = engine
        self._lm, self._kept, self._checkpointing = lm, kept, engine in job.checkpointing
        self._batches = job.batches(lm.embed_weight.shape[0])
        self.loaded = {"loaded_bytes": reset_peak(lm.device)}

    def step(self, num_steps: int) -> dict[str, Any]:
        lm, losses = self._lm, []
        with ENGINES[self.engine].attached(lm), checkpointed(lm, self._checkpointing):
            reset_peak(lm.device)
            took = seconds(lambda: losses.append(step(lm, self.engine, *self._batches, num_steps)), lm.device)
            answer = {"seconds": took, "peak_bytes": peak(lm.device)}
        if self._kept is not None and not self._kept:
            self._kept |= results(lm, losses[0])
        lm.model.zero_grad(set_to_none=True)
        return answer

    def results(self) -> dict[str, Tensor]:
        assert self._kept, "no step has been made, or its results were not to be kept"
        return self._kept


def here(lm: CausalLM, job: TrainJob, engines: list[str]) -> list[Runner]:
    """Runners of all engines on one model in this process, as `measure` takes them."""
    return [Here(lm, job, name, None if job.torch_dtype in HALF else {}) for name in engines]


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
    """Times every runner at every K of the (ascending) `steps`, after one step that is not counted. -> the JSON object
    of each point; compares nothing (`bench.train_check`).

    Args:
        runners: of `here` or `workers`; the first step of each is one with the job's K.
        interleave, most_seconds: see `bench.throughput.measure`.

    A point whose step raised gives `engine`, `num_steps` and `failed`, the reason, and its runner makes no more steps.
    """
    failed: dict[str, str] = {}
    zero: dict[str, dict[str, Any]] = {}
    total = len(runners) * (1 + len(steps) * (repeats + (not interleave)))
    with tqdm(total=total, desc="bench", unit="step", disable=None, leave=False) as progress:

        def one(runner: Runner, num_steps: int) -> dict[str, Any] | None:
            progress.update()
            if runner.engine in failed:
                return None
            try:
                return runner.step(num_steps)
            except Exception as error:  # one that fails must not cost the others their figures
                failed[runner.engine] = reason(error)
                return None

        for runner in runners:
            one(runner, job.num_steps)  # warm-up, and the results
        for group in [steps] if interleave else [[k] for k in steps]:
            answers: dict[int, dict[str, list[dict[str, Any]]]] = {k: {r.engine: [] for r in runners} for k in group}
            for runner in () if interleave else runners:
                one(runner, group[0])
            for _ in range(repeats):
                for k in group:
                    for runner in runners:
                        found = answers[k][runner.engine]
                        enough = most_seconds is not None and sum(a["seconds"] for a in found) > most_seconds
                        if not enough and (answer := one(runner, k)) is not None:
                            found.append(answer)
            loaded = {runner.engine: runner.loaded for runner in runners}
            for k in group:
                whole = {name: found for name, found in answers[k].items() if name not in failed}
                for row in _rows(replace(job, num_steps=k), facts, ceilings, whole, loaded):
                    if steps[0] == 0:
                        first = zero.setdefault(row["engine"], row)
                        row["time_over_zero"] = row["seconds"] / first["seconds"]
                        row["floor_over_zero"] = row["floor_seconds"] / first["floor_seconds"]
                    yield row
                yield from ({"engine": n, "num_steps": k, "failed": failed[n]} for n in answers[k] if n in failed)


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
