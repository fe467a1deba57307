"""Distillation: the K = 0 student of a GIRCSE teacher, so that the cost of the steps is paid once, in training.

    gircse distill --teacher runs/mine/model --data rows.jsonl --output runs/student

The teacher embeds every text of the run once, with its K steps. The student is the same base with LoRA of its own and
no step; its z_0 is trained towards the teacher's z_K, in the loop of `gircse.train.loop`. The run folder is that of a
training run with "distill" for "train" in its file names; `distill_result.json` comes at the end.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gircse.data.retrieval_task import RetrievalTask
from gircse.data.rows import Row
from gircse.data.sources import load_rows
from gircse.evaluation.retrieval import evaluate_retrieval
from gircse.files.atomic import new_file
from gircse.lm.lora import fuse_lora
from gircse.model import GIRCSE
from gircse.show.tables import metrics_table
from gircse.train import run_folder
from gircse.train.batches import Example, TrainingData
from gircse.train.capture import CapturedPasses
from gircse.train.checkpointing import enable_checkpointing
from gircse.train.distill_config import DistillConfig
from gircse.train.distill_loss import DistillLoss, distillation_loss
from gircse.train.loop import TrainResult, open_data, run_steps, start_run, with_micro_batch_tokens
from gircse.train.lora import add_lora
from gircse.train.ranks import Ranks
from gircse.train.step import RowTokenizer, Step, StepResult, backward_of
from gircse.train.step_monitor import StepMonitor

_AGREEMENT_TEXTS = 256


@dataclass(frozen=True)
class DistillResult(TrainResult):
    """A finished run; its `model` is the student.

    Attributes:
        agreement: mean cosine of the student's z_0 to the teacher's z_K on training texts, "before" and "after".
        quality: {line of the table: retrieval metrics}; empty without evaluation data.
    """

    agreement: dict[str, float]
    quality: dict[str, dict[str, float]]

    def table(self) -> str:
        """The quality of teacher and student, one line each; empty without evaluation data."""
        return metrics_table(self.quality, title="model") if self.quality else ""


def distill(
    config: DistillConfig,
    *,
    rows: Sequence[Row] | None = None,
    teacher: GIRCSE | None = None,
    task: RetrievalTask | None = None,
) -> DistillResult:
    """Trains the student. Every process of a torchrun job calls it alike.

    Args:
        config: the settings.
        rows: training rows; default: read from `config.data`.
        teacher: default: `config.teacher` is loaded. Its base becomes the student's: do not use the teacher afterwards.
        task: teacher (K = 0 to its K) and student (before and after) are evaluated on it. Default: the rows of
            `config.eval_data`, where there are any.

    Raises:
        ValueError: the teacher takes no steps, or has no adapter that `init="teacher"` could go on from.
        DataError, OSError, ..: as `gircse.train.train`.
    """
    with start_run(config) as (ranks, stop):
        if task is None and config.eval_data is not None:
            task = RetrievalTask.from_rows(load_rows(config.eval_data, instruction=config.instruction))
        data = open_data(config, ranks, rows=rows)
        if teacher is None and not config.teacher:  # transformers would read the current folder
            raise ValueError("teacher: got none, expected a folder, a hub name or a model in memory")
        if teacher is None:
            teacher = GIRCSE.from_pretrained(config.teacher, dtype=config.dtype, device=ranks.device)
        # the limits hold for the teacher's embeddings, the evaluation, and what the saved student encodes
        teacher.config = replace(
            teacher.config, query_max_length=config.query_max_length, passage_max_length=config.passage_max_length
        )
        data.template = teacher.config.prompt_template
        num_steps = teacher.num_steps if config.num_steps is None else config.num_steps
        if num_steps == 0:
            raise ValueError(
                "teacher: got a model with K = 0, expected one that takes steps; there is nothing to distil"
            )
        if config.init == "teacher" and not hasattr(teacher.base, "peft_config"):
            raise ValueError("init: got 'teacher', but the teacher has no LoRA adapter to go on from; expected 'fresh'")
        digests = {
            "teacher": run_folder.digest_of_weights(teacher.parameters()),
            "vocabulary": run_folder.digest_of_vocabulary(teacher),
        }
        if ranks.first and config.resume:
            run_folder.check_model(config, digests, dict.fromkeys(digests, config.teacher))

        targets = Targets.of(teacher, data, num_steps, config, ranks)
        quality: dict[str, dict[str, float]] = {}
        if task is not None:
            for steps in ([0], list(range(1, num_steps + 1))):
                quality |= {
                    f"teacher, K = {k}": scores for k, scores in _evaluate(teacher, task, steps, config).items()
                }
        torch.manual_seed(config.seed)
        student = student_of(teacher, config)
        agreement = {"before": targets.agreement(student, config)}
        if task is not None:
            quality["student, before"] = _evaluate(student, task, [0], config)[0]

        config = with_micro_batch_tokens(config, student, ranks, num_steps=0)
        step = distillation_step(student, targets, num_steps, config, ranks)
        run = run_steps(config, data, student, step, ranks, stop, digests)

        agreement["after"] = targets.agreement(student, config)
        if task is not None:
            quality["student, after"] = _evaluate(student, task, [0], config)[0]
        if ranks.first:
            with new_file(config.path("result.json")) as partial:
                result = json.dumps({"agreement": agreement, "quality": quality}, indent=2)
                partial.write_text(result + "\n", encoding="utf-8")
    return DistillResult(run.model, run.log, run.folder, agreement, quality)


def student_of(teacher: GIRCSE, config: DistillConfig) -> GIRCSE:
    """The teacher's base, which the teacher loses, with trainable LoRA on it, fresh or the teacher's own, and K = 0."""
    teacher.unmerge_adapter()
    base: Any = teacher.base
    if config.init == "teacher":
        for name, parameter in base.named_parameters():
            parameter.requires_grad_("lora_" in name)
    else:
        if hasattr(base, "peft_config"):
            base = base.unload()
            if hasattr(base, "peft_config"):
                del base.peft_config  # PEFT leaves it behind, and the plain base would look like an adapted one
        base = add_lora(base, config)
    student = GIRCSE(base, teacher.tokenizer, replace(teacher.config, num_steps=0))
    enable_checkpointing(student, config)
    fuse_lora(student.base)
    return student


class Prompt(NamedTuple):
    """A text as it is written for the model, and whether it is a query, which decides where it is cut."""

    text: str
    is_query: bool


def _prompts(examples: Sequence[Example]) -> tuple[list[Prompt], list[Prompt]]:
    """The queries of a batch and its documents, each once, because a copy would get a share of the softmax."""
    queries = [Prompt(example.query, True) for example in examples]
    documents = [Prompt(text, False) for example in examples for text in (example.positive, *example.negatives)]
    return queries, list(dict.fromkeys(documents))


@dataclass(frozen=True)
class Targets:
    """The teacher's embedding of every prompt of the run.

    Attributes:
        index: the row of each prompt.
        embeddings: z_K, [prompts, D] float32 on the CPU.
    """

    index: dict[Prompt, int]
    embeddings: Tensor

    @classmethod
    def of(cls, teacher: GIRCSE, data: TrainingData, num_steps: int, config: DistillConfig, ranks: Ranks) -> Targets:
        """Each process embeds its share of the prompts."""
        index: dict[Prompt, int] = {}
        for step in range(config.max_steps or data.steps_per_epoch):
            queries, documents = _prompts(data.batch(step))
            for prompt in (*queries, *documents):
                index.setdefault(prompt, len(index))
        share = ranks.share(len(index))
        own = _encode(teacher, list(index)[share], num_steps, config)
        return cls(index, ranks.join(own.to(ranks.device), share, len(index)).cpu())

    def rows(self, prompts: Sequence[Prompt]) -> Tensor:
        return self.embeddings[[self.index[prompt] for prompt in prompts]]

    def agreement(self, student: GIRCSE, config: DistillConfig) -> float:
        """Mean cosine of the student's embeddings to the teacher's, on at most 256 prompts, evenly out of all."""
        sample = list(self.index)[:: math.ceil(len(self.index) / _AGREEMENT_TEXTS)]
        return F.cosine_similarity(_encode(student, sample, 0, config), self.rows(sample)).mean().item()


def distillation_step(student: GIRCSE, targets: Targets, num_steps: int, config: DistillConfig, ranks: Ranks) -> Step:
    """The step of a distillation. Texts are cut where the teacher, which needs room for K steps, cuts them."""
    tokenizer = RowTokenizer(student, config, num_steps)
    graphs = CapturedPasses.of(student, config)

    def step(examples: Sequence[Example], number: int, monitor: StepMonitor) -> StepResult:
        tokenizer.warn(examples)
        queries, documents = _prompts(examples)
        split, prompts = len(queries), [*queries, *documents]
        wanted = targets.rows(prompts).to(student.device)
        share = ranks.share(len(prompts))
        own = prompts[share]
        own_queries = [prompt.text for prompt in own if prompt.is_query]
        ids = tokenizer.queries(own_queries) + tokenizer.passages([p.text for p in own if not p.is_query])

        def objective(states: Tensor) -> tuple[Tensor, DistillLoss]:
            embeddings = ranks.join(student.pool(states)[:, 0], share, len(prompts))
            loss = distillation_loss(
                embeddings[:split],
                embeddings[split:],
                wanted[:split],
                wanted[split:],
                temperature=config.temperature,
                kl_weight=config.kl_weight,
            )
            return loss.total, loss

        loss, of_loss, passes = backward_of(
            student, ids, objective, config.micro_batch_tokens, num_steps=0, monitor=monitor, graphs=graphs
        )
        parts = {"cosine": of_loss.cosine.detach(), "kl": of_loss.kl.detach()}
        return StepResult(loss, parts, len(own), sum(map(len, ids)), passes)

    return step


def _encode(model: GIRCSE, prompts: Sequence[Prompt], num_steps: int, config: DistillConfig) -> Tensor:
    """The embeddings of prompts after `num_steps` steps, [n, D] float32 on the CPU."""
    rows = torch.empty(len(prompts), model.embedding_dimension)
    for is_query, length in ((True, config.query_max_length), (False, config.passage_max_length)):
        chosen = [i for i, prompt in enumerate(prompts) if prompt.is_query is is_query]
        texts = [prompts[i].text for i in chosen]
        bar = None if config.progress else False
        rows[chosen] = torch.from_numpy(
            model.encode(texts, num_steps=num_steps, max_length=length, show_progress_bar=bar)
        )
    return rows


def _evaluate(
    model: GIRCSE, task: RetrievalTask, steps: list[int], config: DistillConfig
) -> dict[int, dict[str, float]]:
    return evaluate_retrieval(model, task, steps=steps, show_progress_bar=None if config.progress else False)
