"""Distillation: the K = 0 student of a GIRCSE teacher, so that the cost of the steps is paid once, in training.

    gircse distill --teacher runs/mine/model --data rows.jsonl --output runs/student

The teacher embeds every text once, with its K steps. The student is the same base with LoRA of its own and no step; its
z_0 is trained towards the teacher's z_K. A run folder holds `distill_config.json`, `distill_log.jsonl` (one line a
step), at the end `distill_result.json` and `model/`, which `GIRCSE.from_pretrained` loads.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from gircse.data.retrieval_task import RetrievalTask
from gircse.data.rows import Row, format_row, load_rows
from gircse.data.sampling import BatchSampler
from gircse.encode.instruction_length import warn_of_rows
from gircse.encode.tokens import pad, prompt_limit, tokenize
from gircse.evaluation.retrieval import evaluate_retrieval
from gircse.files.atomic import new_file
from gircse.files.lock import folder_lock
from gircse.model import GIRCSE
from gircse.ops.pooling import l2_normalize
from gircse.show.tables import text_table
from gircse.train.config import TrainConfig
from gircse.train.distill_config import DistillConfig
from gircse.train.lora import trainable_model
from gircse.train.schedule import learning_rate, set_learning_rate

CONFIG_NAME = "distill_config.json"
LOG_NAME = "distill_log.jsonl"
RESULT_NAME = "distill_result.json"
_AGREEMENT_TEXTS = 256


class DistillLoss(NamedTuple):
    """The objective and its two parts, scalars, float32 (float64 for float64 embeddings)."""

    total: Tensor
    cosine: Tensor
    kl: Tensor


@dataclass(frozen=True)
class DistillResult:
    """A finished run.

    Attributes:
        model: the student.
        log: one dict a step.
        folder: to load the student from.
        agreement: mean cosine of the student's z_0 to the teacher's z_K on training texts, "before" and "after".
        quality: {line of the table: retrieval metrics}; empty without evaluation data.
    """

    model: GIRCSE
    log: list[dict[str, Any]]
    folder: Path
    agreement: dict[str, float]
    quality: dict[str, dict[str, float]]

    def table(self) -> str:
        """The quality of teacher and student, one line each; empty without evaluation data."""
        if not self.quality:
            return ""
        names = list(next(iter(self.quality.values())))
        return text_table(["model", *names], [[k, *(v[name] for name in names)] for k, v in self.quality.items()])


def distillation_loss(
    student_queries: Tensor,
    student_documents: Tensor,
    teacher_queries: Tensor,
    teacher_documents: Tensor,
    *,
    temperature: float,
    kl_weight: float,
) -> DistillLoss:
    """How far the student's embeddings are from the teacher's, and its similarities from the teacher's::

        cosine = mean over queries and documents of 1 - cos(student, teacher)
        kl     = mean over queries of KL(softmax(teacher . documents / tau) || softmax(student . documents / tau))
        total  = cosine + kl_weight * kl

    Args:
        student_queries, student_documents: [B, D] and [M, D], any length and floating-point dtype; differentiable.
        teacher_queries, teacher_documents: the same shapes; no gradient goes there.
        temperature: tau > 0, of both softmaxes.
        kl_weight: >= 0.

    Raises:
        ValueError: shapes that differ, a temperature or weight out of range.
    """
    for name, student, teacher in (
        ("teacher_queries", student_queries, teacher_queries),
        ("teacher_documents", student_documents, teacher_documents),
    ):
        if teacher.shape != student.shape or teacher.ndim != 2:
            raise ValueError(f"{name}: got shape {tuple(teacher.shape)}, expected the student's {tuple(student.shape)}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature: got {temperature!r}, expected a number > 0")
    if not 0 <= kl_weight < math.inf:
        raise ValueError(f"kl_weight: got {kl_weight!r}, expected a number >= 0")
    wide = torch.promote_types(student_queries.dtype, torch.float32)
    queries, documents = (l2_normalize(t.to(wide)) for t in (student_queries, student_documents))
    with torch.no_grad():
        wanted_queries, wanted_documents = (l2_normalize(t.to(wide)) for t in (teacher_queries, teacher_documents))
        wanted = F.log_softmax(wanted_queries @ wanted_documents.T / temperature, dim=1)
    cosines = torch.cat([(queries * wanted_queries).sum(1), (documents * wanted_documents).sum(1)])
    cosine = (1 - cosines).mean()
    found = F.log_softmax(queries @ documents.T / temperature, dim=1)
    kl = F.kl_div(found, wanted, reduction="batchmean", log_target=True)
    return DistillLoss(cosine + kl_weight * kl, cosine, kl)


def distill(
    config: DistillConfig,
    *,
    rows: Sequence[Row] | None = None,
    teacher: GIRCSE | None = None,
    task: RetrievalTask | None = None,
) -> DistillResult:
    """Trains the student.

    Args:
        config: the settings.
        rows: training rows; default: read from `config.data`.
        teacher: default: `config.teacher` is loaded. Its base becomes the student's: do not use the teacher afterwards.
        task: evaluate teacher (K = 0 to its K) and student (before and after) on it.

    Raises:
        DataError: bad rows, each with file, line and reason.
        FileExistsError: the run folder holds a run.
        FloatingPointError: the loss is NaN or infinite.
        FolderInUse: another process distils into the run folder (an OSError).
        ValueError: a teacher without steps, or without the adapter that `init="teacher"` goes on from; settings that
            contradict the data.
    """
    with folder_lock(config.output):
        return _distill(config, rows, teacher, task)


def _distill(
    config: DistillConfig, rows: Sequence[Row] | None, teacher: GIRCSE | None, task: RetrievalTask | None
) -> DistillResult:
    run = Path(config.output)
    if (run / LOG_NAME).exists():
        raise FileExistsError(f"output: {run} holds a run already; name another folder")
    rows = (
        list(rows)
        if rows is not None
        else [row for source in config.data for row in load_rows(source, instruction=config.instruction)]
    )
    if len(rows) < config.batch_size:
        raise ValueError(f"batch_size: got {config.batch_size}, expected at most the number of rows, {len(rows)}")
    if teacher is None:
        teacher = GIRCSE.from_pretrained(config.teacher, dtype=config.dtype, device=config.device)
    lengths: dict[str, Any] = {name: getattr(config, name) for name in ("query_max_length", "passage_max_length")}
    teacher.config = replace(teacher.config, **lengths)  # the student's too, and of both in the evaluation
    num_steps = teacher.num_steps if config.num_steps is None else config.num_steps
    if num_steps == 0:
        raise ValueError("teacher: got a model with K = 0, expected one that takes steps; there is nothing to distil")
    if config.init == "teacher" and not hasattr(teacher.base, "peft_config"):
        raise ValueError("init: got 'teacher', but the teacher has no LoRA adapter to go on from; expected 'fresh'")

    limits = {name: prompt_limit(teacher, length, num_steps) for name, length in lengths.items()}
    warn_of_rows(teacher, [row.instruction for row in rows], **limits)
    sampler = BatchSampler(len(rows), config.batch_size, seed=config.seed)
    total_steps = config.max_steps or len(rows) // config.batch_size
    texts = _Texts.of(rows, sampler, total_steps, teacher, config)
    wanted = texts.embeddings(teacher, num_steps, config)
    quality: dict[str, dict[str, float]] = {}
    if task is not None:
        for steps in ([0], list(range(1, num_steps + 1))):
            found = _evaluate(teacher, task, steps, config)
            quality |= {f"teacher, K = {k}": metrics for k, metrics in found.items()}

    torch.manual_seed(config.seed)
    student = student_of(teacher, config)
    sample = texts.sample(_AGREEMENT_TEXTS)
    agreement = {"before": _agreement(student, texts, sample, wanted, config)}
    if task is not None:
        quality["student, before"] = _evaluate(student, task, [0], config)[0]

    parameters = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    _write(run / CONFIG_NAME, json.dumps(asdict(config), indent=2) + "\n")
    log: list[dict[str, Any]] = []
    student.train()
    bar = tqdm(total=total_steps, desc="distill", unit="step", disable=not config.progress, dynamic_ncols=True)
    with (run / LOG_NAME).open("w", encoding="utf-8") as file, bar:
        for step in range(total_steps):
            started = time.perf_counter()
            queries, documents = texts.batches[step]
            loss = distillation_loss(
                _embed(student, texts, queries, config.query_max_length, num_steps),
                _embed(student, texts, documents, config.passage_max_length, num_steps),
                wanted[queries].to(student.device),
                wanted[documents].to(student.device),
                temperature=config.temperature,
                kl_weight=config.kl_weight,
            )
            if not math.isfinite(loss.total.item()):
                raise FloatingPointError(f"step {step + 1}: the loss is {loss.total.item()}; nothing was saved")
            loss.total.backward()
            grad_norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            rate = learning_rate(config.learning_rate, step, total_steps=total_steps, warmup_ratio=config.warmup_ratio)
            set_learning_rate(optimizer, rate)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            entry = {
                "step": step + 1,
                "loss": loss.total.item(),
                "cosine": loss.cosine.item(),
                "kl": loss.kl.item(),
                "grad_norm": grad_norm.item(),
                "learning_rate": rate,
                "seconds": time.perf_counter() - started,
            }
            log.append(entry)
            file.write(json.dumps(entry) + "\n")
            file.flush()
            bar.set_postfix(loss=f"{entry['loss']:.3f}", cosine=f"{entry['cosine']:.3f}", kl=f"{entry['kl']:.3f}")
            bar.update()

    student.eval()
    agreement["after"] = _agreement(student, texts, sample, wanted, config)
    if task is not None:
        quality["student, after"] = _evaluate(student, task, [0], config)[0]
    student.save_pretrained(run / "model")
    _write(run / RESULT_NAME, json.dumps({"agreement": agreement, "quality": quality}, indent=2) + "\n")
    return DistillResult(student, log, run / "model", agreement, quality)


def student_of(teacher: GIRCSE, config: DistillConfig) -> GIRCSE:
    """The teacher's base with trainable LoRA on it, fresh or the teacher's own, and K = 0. It takes the teacher's base
    over."""
    teacher.unmerge_adapter()
    settings = replace(teacher.config, num_steps=0)
    base: Any = teacher.base
    if config.init == "teacher":
        for name, parameter in base.named_parameters():
            parameter.requires_grad_("lora_" in name)
        student = GIRCSE(base, teacher.tokenizer, settings)
        if config.gradient_checkpointing:
            student.gradient_checkpointing_enable()
        return student
    if hasattr(base, "peft_config"):
        base = base.unload()
        if hasattr(base, "peft_config"):
            del base.peft_config  # left behind: it would make the plain base look like an adapted one
    train_config = TrainConfig(
        model=config.teacher,
        num_steps=0,
        lora_r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        gradient_checkpointing=config.gradient_checkpointing,
    )
    student = trainable_model(train_config, GIRCSE(base, teacher.tokenizer, settings))
    student.config = settings  # with the teacher's prompt template, which a training config does not hold
    return student


@dataclass(frozen=True)
class _Texts:
    """Every prompt of the run once, and which of them each step takes.

    Attributes:
        prompts: (prompt, whether it is a query), as they are written for the model.
        batches: per step the indices of its queries and of its documents, each document once: in the softmax a copy
            would get a share of its own.
    """

    prompts: list[tuple[str, bool]]
    batches: list[tuple[list[int], list[int]]]

    @classmethod
    def of(
        cls, rows: Sequence[Row], sampler: BatchSampler, total_steps: int, model: GIRCSE, config: DistillConfig
    ) -> _Texts:
        index: dict[tuple[str, bool], int] = {}
        batches = []
        for step in range(total_steps):
            queries: list[int] = []
            documents: list[int] = []
            for number in sampler.batch(step):
                row = rows[number]
                choice = sampler.positive(step, number, len(row.positives))
                query, positive, negatives = format_row(row, positive=choice, template=model.config.prompt_template)
                most = len(negatives) if config.max_negatives is None else config.max_negatives
                chosen = [negatives[i] for i in sampler.negatives(step, number, len(negatives), most)]
                queries.append(index.setdefault((query, True), len(index)))
                documents += [index.setdefault((text, False), len(index)) for text in (positive, *chosen)]
            batches.append((queries, list(dict.fromkeys(documents))))
        return cls(list(index), batches)

    def sample(self, count: int) -> list[int]:
        """Indices of at most `count` texts, evenly out of all."""
        return list(range(0, len(self.prompts), max(1, math.ceil(len(self.prompts) / count))))

    def embeddings(self, teacher: GIRCSE, num_steps: int, config: DistillConfig) -> Tensor:
        """z_K of every prompt, [texts, D] float32 on the CPU."""
        wanted = torch.empty(len(self.prompts), teacher.embedding_dimension)
        for is_query, length in ((True, config.query_max_length), (False, config.passage_max_length)):
            chosen = [i for i, (_, kind) in enumerate(self.prompts) if kind is is_query]
            prompts = [self.prompts[i][0] for i in chosen]
            found = teacher.encode(
                prompts, num_steps=num_steps, max_length=length, show_progress_bar=None if config.progress else False
            )
            wanted[chosen] = torch.from_numpy(found)
        return wanted


def _embed(student: GIRCSE, texts: _Texts, indices: list[int], max_length: int, num_steps: int) -> Tensor:
    """z_0 [texts, D], not normalised, with gradient; cut where the teacher, which needs room for K steps, was cut."""
    prompts = [texts.prompts[i][0] for i in indices]
    tokens = tokenize(student, prompts, instruction=None, max_length=max_length, num_steps=num_steps)
    return student.pool(student.rollout(*pad(tokens, pad_id=student.tokenizer.pad_token_id)))[:, 0]


def _agreement(student: GIRCSE, texts: _Texts, sample: list[int], wanted: Tensor, config: DistillConfig) -> float:
    cosines = []
    for is_query, length in ((True, config.query_max_length), (False, config.passage_max_length)):
        chosen = [i for i in sample if texts.prompts[i][1] is is_query]
        if chosen:
            prompts = [texts.prompts[i][0] for i in chosen]
            found = torch.from_numpy(student.encode(prompts, max_length=length, show_progress_bar=False))
            cosines.append(F.cosine_similarity(found, wanted[chosen]))
    return torch.cat(cosines).mean().item()


def _evaluate(
    model: GIRCSE, task: RetrievalTask, steps: list[int], config: DistillConfig
) -> dict[int, dict[str, float]]:
    show = None if config.progress else False
    return evaluate_retrieval(model, task, steps=steps, show_progress_bar=show)


def _write(path: Path, text: str) -> None:
    with new_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
