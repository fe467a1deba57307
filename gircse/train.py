"""Training: one loop that reads from top to bottom.

    python -m gircse train --model BASE --data rows.jsonl --output runs/mine

Every step: a batch of rows -> tokens -> rollout of queries and of candidates -> K contrastive losses -> ICR objective
-> LoRA update. A run folder holds `train_config.json`, `train_data.json` (what the data were), `train_log.jsonl` (one
line a step), `checkpoints/`, and at the end `model/`, which `GIRCSE.from_pretrained` loads.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from gircse import ops
from gircse.atomic import new_file
from gircse.batches import Example, TrainingData, false_negatives
from gircse.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from gircse.data import Row
from gircse.encode import pad, tokenize
from gircse.loading import load_pretrained
from gircse.model import GIRCSE
from gircse.train_config import LORA_TARGETS, TrainConfig

CONFIG_NAME = "train_config.json"
DATA_NAME = "train_data.json"
LOG_NAME = "train_log.jsonl"
Evaluation = Callable[[GIRCSE], dict[str, Any]]


@dataclass(frozen=True)
class TrainResult:
    """A finished run: the trained model, its log (one dict a step) and the folder to load it from."""

    model: GIRCSE
    log: list[dict[str, Any]]
    folder: Path


def train(
    config: TrainConfig,
    *,
    rows: Sequence[Row] | None = None,
    model: GIRCSE | None = None,
    evaluate: Evaluation | None = None,
) -> TrainResult:
    """Trains LoRA adapters with the ICR objective.

    Args:
        config: the settings.
        rows: training rows; default: read from `config.data`. All of it is checked before anything starts.
        model: a model to train, its base in memory, without an adapter; default: `config.model` is loaded.
        evaluate: called every `config.eval_every` steps and at the end; what it returns goes into the log.

    Raises:
        DataError: bad rows, each with file, line and reason.
        FileExistsError: the run folder holds a run and `config.resume` is off.
        FileNotFoundError: there is nothing to resume.
        FloatingPointError: the loss is NaN or infinite; the last checkpoint stays.
        ValueError: settings that contradict the data or the run to be resumed.
    """
    run = Path(config.output)
    _check_run_folder(run, config)
    data = TrainingData.open(config, rows=rows)
    if config.resume and (run / DATA_NAME).exists():
        data.check_continues(run / DATA_NAME)
    total_steps = config.max_steps or data.steps_per_epoch

    torch.manual_seed(config.seed)
    model = trainable_model(config, model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    scheduler = linear_schedule(optimizer, total_steps, config.warmup_ratio)

    done, log = 0, []
    if config.resume:
        done = load_checkpoint(list_checkpoints(run)[-1], model, optimizer, scheduler)
        log = _read_log(run, up_to=done)
    run.mkdir(parents=True, exist_ok=True)
    _write(run / CONFIG_NAME, config.to_json())
    _write(run / DATA_NAME, data.to_json())
    _write(run / LOG_NAME, "".join(json.dumps(entry) + "\n" for entry in log))

    model.train()
    with _outputs(run, total_steps, done, config.progress) as (write, progress):
        for step in range(done, total_steps):
            started = time.perf_counter()
            examples = data.batch(step)
            queries, passages, target = collate(model, examples, config)
            mask = false_negatives(examples) if config.filter_false_negatives else None
            num_steps = config.steps_at(step)
            losses = ops.stepwise_info_nce(
                model.rollout(*queries, num_steps),
                model.rollout(*passages, num_steps),
                target.to(model.device),
                temperature=config.contrastive_temperature,
                pooling=config.pooling,
                mask=None if mask is None else mask.to(model.device),
                include_queries=config.include_queries,
                symmetric=config.symmetric,
            )
            counted = losses if config.stepwise else losses[-1:]
            loss = ops.icr_objective(
                counted,
                reg_weight=config.reg_weight,
                reduction=config.reduction,
                detach_previous=config.detach_previous,
            )
            if not math.isfinite(loss.item()):
                raise FloatingPointError(
                    f"step {step + 1}: the loss is {loss.item()}; its batch is {', '.join(e.id for e in examples[:8])} "
                    f"..; seed {config.seed}. Nothing of this step was kept; the last checkpoint is whole"
                )
            loss.backward()
            grad_norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            learning_rate = scheduler.get_last_lr()[0]
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)

            seconds = time.perf_counter() - started
            tokens = int(queries[1].sum() + passages[1].sum())
            entry: dict[str, Any] = {
                "step": step + 1,
                "loss": loss.item(),
                "losses": losses.tolist(),
                "grad_norm": grad_norm.item(),
                "learning_rate": learning_rate,
                "tokens_per_second": tokens / seconds,
                "seconds": seconds,
            }
            last = step + 1 == total_steps
            if evaluate is not None and (last or (config.eval_every and (step + 1) % config.eval_every == 0)):
                entry["evaluation"] = evaluate(model)
                model.train()
            log.append(entry)
            write(entry)
            progress.set_postfix(loss=f"{entry['loss']:.3f}", L1=f"{losses[0]:.3f}", LK=f"{losses[-1]:.3f}")
            progress.update()
            if last or (step + 1) % config.save_every == 0:
                save_checkpoint(run, step + 1, model, optimizer, scheduler, keep=config.keep_checkpoints)

    model.eval()
    model.save_pretrained(run / "model")
    return TrainResult(model, log, run / "model")


def trainable_model(config: TrainConfig, model: GIRCSE | None = None) -> GIRCSE:
    """The base of `config.model` (or of `model`), frozen, with fresh LoRA adapters in float32 on it."""
    from peft import LoraConfig, get_peft_model

    if model is None:
        base, tokenizer, _ = load_pretrained(
            config.model,
            adapter=None,
            dtype=config.dtype,
            device=config.device,
            attn_implementation=None,
            trust_remote_code=False,
        )
    else:
        base, tokenizer = model.base, model.tokenizer
    if hasattr(base, "peft_config"):
        raise ValueError(
            f"model: got {config.model or type(base).__name__} with an adapter on it, expected a plain base model"
        )
    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=lora_targets(base, config.lora_targets),
        task_type="CAUSAL_LM",
    )
    adapted = GIRCSE(get_peft_model(base, lora), tokenizer, config.gircse_config())
    if config.gradient_checkpointing:
        adapted.gradient_checkpointing_enable()
    return adapted


def lora_targets(base: torch.nn.Module, wanted: Sequence[str] = LORA_TARGETS) -> list[str] | str:
    """The layer names of `wanted` that `base` has; "all-linear" where it has none of the default ones.

    Raises:
        ValueError: names were asked for that the model does not have.
    """
    names = {name.rsplit(".", 1)[-1] for name, _ in base.named_modules()}
    targets = [name for name in wanted if name in names]
    if not targets and tuple(wanted) != LORA_TARGETS:
        raise ValueError(f"lora_targets: the model has no layer named {', '.join(wanted)}")
    return targets or "all-linear"


def collate(
    model: GIRCSE, examples: Sequence[Example], config: TrainConfig
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor]:
    """A batch in tokens: (query ids, mask), (passage ids, mask), target.

    The passages are [pos_0, negatives of 0.., pos_1, ..]; target [B] points at each row's positive, so rows may have
    different numbers of negatives.
    """
    passages = [[example.positive, *example.negatives] for example in examples]
    counts = torch.tensor([len(texts) for texts in passages])
    return (
        _tokens(model, [example.query for example in examples], config.query_max_length, config),
        _tokens(model, [text for texts in passages for text in texts], config.passage_max_length, config),
        counts.cumsum(0) - counts,
    )


def linear_schedule(
    optimizer: torch.optim.Optimizer, total_steps: int, warmup_ratio: float
) -> torch.optim.lr_scheduler.LRScheduler:
    """Linear warm-up over `warmup_ratio` of the steps, then linear decay to zero."""
    from transformers import get_linear_schedule_with_warmup

    return get_linear_schedule_with_warmup(optimizer, math.ceil(warmup_ratio * total_steps), total_steps)


def _tokens(model: GIRCSE, prompts: list[str], max_length: int, config: TrainConfig) -> tuple[Tensor, Tensor]:
    ids = tokenize(model, prompts, instruction=None, max_length=max_length, num_steps=config.max_num_steps)
    return pad(ids, pad_id=model.tokenizer.pad_token_id)


def _check_run_folder(run: Path, config: TrainConfig) -> None:
    if config.resume:
        if not (run / CONFIG_NAME).is_file() or not list_checkpoints(run):
            raise FileNotFoundError(f"resume: {run} holds no checkpoint to go on from")
        config.check_continues(TrainConfig.from_json(run / CONFIG_NAME))
    elif (run / LOG_NAME).exists():
        raise FileExistsError(f"output: {run} holds a run already; resume it, or name another folder")


def _read_log(run: Path, up_to: int) -> list[dict[str, Any]]:
    """The entries of the steps a checkpoint includes; what an interrupted run logged after it is dropped."""
    entries = []
    for line in (run / LOG_NAME).read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:  # the line a kill cut short
            break
        if entry["step"] <= up_to:
            entries.append(entry)
    return entries


def _write(path: Path, text: str) -> None:
    with new_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def _outputs(run: Path, total: int, done: int, show: bool) -> Iterator[tuple[Callable[[dict[str, Any]], None], tqdm]]:
    """The log file, TensorBoard where it is installed, and the progress bar."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        board = None
    else:
        board = SummaryWriter(run / "tensorboard", purge_step=done + 1)
    bar = tqdm(total=total, initial=done, desc="train", unit="step", disable=not show, dynamic_ncols=True)
    with (run / LOG_NAME).open("a", encoding="utf-8") as file, bar:

        def write(entry: dict[str, Any]) -> None:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            if board is not None:
                for name in ("loss", "grad_norm", "learning_rate", "tokens_per_second"):
                    board.add_scalar(name, entry[name], entry["step"])
                for k, value in enumerate(entry["losses"], start=1):
                    board.add_scalar(f"loss_by_step/{k}", value, entry["step"])

        try:
            yield write, bar
        finally:
            if board is not None:
                board.close()
