"""Training: one loop that reads from top to bottom.

    python -m gircse train --model BASE --data rows.jsonl --output runs/mine
    torchrun --nproc-per-node 8 -m gircse.train --model BASE --data rows.jsonl --output runs/mine

`run_steps` is the loop of training and of distillation, which differ in their step. In every training step: a batch of
rows -> tokens -> rollout of queries and of candidates -> K contrastive losses -> ICR objective -> LoRA update
(`gircse.train.step`). A batch that is too large for the memory goes through in micro-batches
(`gircse.train.grad_cache`), and several processes share it (`gircse.train.ranks`); neither changes what is computed.
A run folder holds what the run is (`gircse.train.run_folder`), `train_log.jsonl` (one line a step), `checkpoints/`, and
at the end `model/`, which `GIRCSE.from_pretrained` loads.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from gircse.data.retrieval_task import RetrievalTask
from gircse.data.rows import Row
from gircse.data.sources import load_rows
from gircse.evaluation.retrieval import evaluate_retrieval
from gircse.files.atomic import remove_leftovers
from gircse.files.lock import folder_lock
from gircse.lm.lora import unfuse_lora
from gircse.model import GIRCSE
from gircse.train import run_folder
from gircse.train.batches import TrainingData
from gircse.train.capture import refusal_of
from gircse.train.checkpoint import checkpoint_folder, list_checkpoints, load_checkpoint, save_checkpoint, save_failure
from gircse.train.config import TrainConfig
from gircse.train.distill_config import DistillConfig
from gircse.train.fsdp import shard_layers
from gircse.train.learning_rate import learning_rate
from gircse.train.log import open_log, start_log
from gircse.train.lora import trainable_model
from gircse.train.micro_batch_size import probe_budget
from gircse.train.ranks import Ranks, digest_of, digest_of_rows, join_ranks, step_seed
from gircse.train.run_config import RunConfig
from gircse.train.signals import StopRequest, TrainingStopped, stop_on_signals
from gircse.train.step import Step, contrastive_step
from gircse.train.step_monitor import StepMonitor
from gircse.train.update import adamw, clipped_step

Evaluation = Callable[[GIRCSE], dict[str, Any]]
_Config = TypeVar("_Config", bound=RunConfig)


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
    """Trains LoRA adapters with the ICR objective. Every process of a torchrun job calls it alike.

    Args:
        config: the settings.
        rows: training rows; default: read from `config.data`. All of them are checked before anything starts.
        model: a model to train, its base in memory, without an adapter; default: `config.model` is loaded.
        evaluate: called every `config.eval_every` steps and at the end, in every process; what it returns in the first
            process goes into the log. Default: retrieval on `config.eval_data`, where there is one.

    Raises:
        DataError: bad rows, each with file, line and reason.
        FileExistsError: the run folder holds a run and `config.resume` is off.
        FileNotFoundError: there is nothing to resume.
        FolderInUse: another process trains in the run folder (an OSError).
        FloatingPointError: the loss or its gradient is NaN or infinite; the state is saved beside the checkpoints.
        OSError: a checkpoint could not be written; the earlier ones are whole.
        TrainingStopped: SIGTERM or SIGINT came; the run is saved (a SystemExit with code 0).
        RankLost, RanksDisagree: another process died, or does something else.
        ValueError: settings that contradict the data or the run to be resumed.
    """
    with start_run(config) as (ranks, stop):
        if evaluate is None and config.eval_data is not None:
            evaluate = _evaluation(config)
        if config.fsdp and evaluate is not None:
            raise ValueError("fsdp: got an evaluation during the run as well; evaluate the saved model instead")
        data = open_data(config, ranks, rows=rows)
        torch.manual_seed(config.seed)
        model = trainable_model(config, model, ranks=ranks)
        digests = {
            "base": run_folder.digest_of_weights(p for p in model.parameters() if not p.requires_grad),
            "vocabulary": run_folder.digest_of_vocabulary(model),
            "adapter": config.adapter
            and run_folder.digest_of_weights(p for p in model.parameters() if p.requires_grad),
        }
        if ranks.first and config.resume:
            base = config.model or config.adapter
            run_folder.check_model(
                config, digests, {"base": base, "vocabulary": base, "adapter": config.adapter or base}
            )
        if config.fsdp:
            shard_layers(model, ranks)
        config = with_micro_batch_tokens(
            config,
            model,
            ranks,
            num_steps=config.max_num_steps,
            soft_token_gradient=config.max_soft_token_gradient,
            sharded=config.fsdp,
        )
        step = contrastive_step(model, config, ranks, total_steps=config.max_steps or data.steps_per_epoch)
        return run_steps(
            config, data, model, step, ranks, stop, digests, evaluate=evaluate, eval_every=config.eval_every
        )


@contextmanager
def start_run(config: RunConfig) -> Iterator[tuple[Ranks, StopRequest]]:
    """Joins the processes of the job, notes SIGTERM and SIGINT, and locks the run folder, while the block lasts.

    The run folder is checked first, before anything is loaded.
    """
    with (
        join_ranks(config.device, timeout=config.rank_timeout) as ranks,
        stop_on_signals() as stop,
        folder_lock(config.output if ranks.first else None),
    ):
        if ranks.first:
            run_folder.check_settings(config)
        yield ranks, stop


def open_data(config: TrainConfig | DistillConfig, ranks: Ranks, *, rows: Sequence[Row] | None) -> TrainingData:
    """The rows of the run, checked; those of a resumed run must be the ones that it was started with."""
    data = TrainingData.open(config, rows=rows)
    if ranks.first and config.resume:
        run_folder.check_data(config, data, config.max_steps or data.steps_per_epoch)
    ranks.share(config.batch_size)  # raises where there are fewer rows than processes
    return data


def with_micro_batch_tokens(
    config: _Config,
    model: GIRCSE,
    ranks: Ranks,
    *,
    num_steps: int,
    soft_token_gradient: float = 1.0,
    sharded: bool = False,
) -> _Config:
    """`config` with its `micro_batch_tokens`, those of the run that is resumed, or what a probe of the memory allows.

    All processes take the smallest of their values. The model is in training mode afterwards.
    """
    model.train()
    tokens = config.micro_batch_tokens
    if tokens is None and config.resume:
        tokens = run_folder.earlier_config(config).micro_batch_tokens
    if tokens is None:
        length = max(config.query_max_length, config.passage_max_length)
        tokens = probe_budget(
            model,
            num_steps=num_steps,
            soft_token_gradient=soft_token_gradient,
            length=length,
            sharded=sharded,
            graphs=config.cuda_graphs and refusal_of(config) is None,
        )
    return replace(config, micro_batch_tokens=-int(ranks.most(-tokens)))


def run_steps(
    config: RunConfig,
    data: TrainingData,
    model: GIRCSE,
    take_step: Step,
    ranks: Ranks,
    stop: StopRequest,
    digests: run_folder.Digests,
    *,
    evaluate: Evaluation | None = None,
    eval_every: int | None = None,
) -> TrainResult:
    """Runs the steps that are left, saves checkpoints on the way and the model at the end. Raises as `train` does.

    Args:
        model: in training mode; what of it requires a gradient is trained.
        take_step: computes the gradients of a batch.
        digests: of what the run starts from, which a resumed run will be compared with.
    """
    run = Path(config.output)
    total_steps, done = config.max_steps or data.steps_per_epoch, 0
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = adamw(parameters, learning_rate=config.learning_rate, weight_decay=config.weight_decay)
    if config.resume and (checkpoints := list_checkpoints(run)):
        done = load_checkpoint(checkpoints[-1], model, optimizer)
    log: list[dict[str, Any]] = []
    if ranks.first:
        run_folder.write_start(config, data, digests)
        log = start_log(config.path("log.jsonl"), up_to=done)
        for folder in (run, checkpoint_folder(run)):
            remove_leftovers(folder)
    monitor = StepMonitor(ranks.device)
    weights = digest_of(parameters) if ranks.group else 0
    with open_log(config, total=total_steps, done=done, writes=ranks.first) as record:
        for step in range(done, total_steps):
            monitor.start()
            examples = data.batch(step)
            names = [example.id for example in examples]
            position = digest_of_rows([data.fingerprint, *names])
            if ranks.same(step + 1, rows=position, weights=weights, stop=stop.requested):
                record.sync()
                if ranks.first:
                    save_checkpoint(run, step, model, optimizer, keep=config.keep_checkpoints)
                raise _stopped(run, step, ranks)

            torch.manual_seed(step_seed(config.seed, step, ranks.rank))
            result = take_step(examples, step, monitor)
            monitor.enter("update")
            weights = ranks.sum_gradients(parameters)
            rate = learning_rate(config, step, total_steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            host_seconds = monitor.host_seconds()
            loss, grad_norm = clipped_step(optimizer, parameters, result.loss, config.max_grad_norm)
            if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                what = {"step": step + 1, "loss": str(loss), "grad_norm": str(grad_norm), "seed": config.seed}
                what |= {name: str(part.tolist()) for name, part in result.parts.items()} | {"rows": names}
                if ranks.first:
                    save_failure(run, step + 1, model, optimizer, what)
                ranks.wait()
                raise _not_finite(run, what)
            optimizer.zero_grad(set_to_none=True)

            seconds = monitor.seconds()
            whole = sum(seconds.values())
            own = [result.tokens, result.texts, monitor.peak_bytes(), result.passes, *monitor.entropies()]
            tokens, texts, peaks, passes, *entropies = map(list, zip(*ranks.gather(own), strict=True))
            entry: dict[str, Any] = {
                "step": step + 1,
                "loss": loss,
                **{name: part.tolist() for name, part in result.parts.items()},
                "entropy": [sum(map(float.__mul__, each, texts)) / sum(texts) for each in entropies],
                "grad_norm": grad_norm,
                "learning_rate": rate,
                "tokens_per_second": sum(tokens) / whole,
                "seconds": whole,
                "time": {phase: value / whole for phase, value in seconds.items()},
                **({"host": min(host_seconds / whole, 1.0)} if ranks.device.type == "cuda" else {}),
                "peak_bytes": int(max(peaks)),
                "micro_batches": int(max(passes)),
                **({"graph_bytes": monitor.graph_bytes} if monitor.graph_bytes else {}),
                "batch": f"{position:016x}",
            }
            last = step + 1 == total_steps
            if evaluate is not None and (last or (eval_every and (step + 1) % eval_every == 0)):
                entry["evaluation"] = evaluate(model)
                model.train()
            log.append(entry)
            record.write(entry)
            if ranks.first and (last or (step + 1) % config.save_every == 0):
                record.sync()
                save_checkpoint(run, step + 1, model, optimizer, keep=config.keep_checkpoints)

    model.eval()
    unfuse_lora(model.base)
    if ranks.first:
        model.save_pretrained(run / "model")
    ranks.wait()
    return TrainResult(model, log, run / "model")


def _evaluation(config: TrainConfig) -> Evaluation:
    """Retrieval on `config.eval_data`, at the K that the model is saved with."""
    assert config.eval_data is not None
    task = RetrievalTask.from_rows(load_rows(config.eval_data, instruction=config.eval_instruction))
    steps = [config.gircse_config().num_steps]

    def evaluate(model: GIRCSE) -> dict[str, Any]:
        return {str(k): values for k, values in evaluate_retrieval(model, task, steps=steps).items()}

    return evaluate


def _stopped(run: Path, step: int, ranks: Ranks) -> TrainingStopped:
    stopped = TrainingStopped(step, checkpoint_folder(run) / f"step-{step:06d}")
    if ranks.first:
        print(f"{stopped}; go on with the same command and --resume", file=sys.stderr, flush=True)
    return stopped


def _not_finite(run: Path, what: dict[str, Any]) -> FloatingPointError:
    first = ", ".join(what["rows"][:8]) + (", .." if len(what["rows"]) > 8 else "")
    return FloatingPointError(
        f"step {what['step']}: the loss is {what['loss']}, the norm of its gradient {what['grad_norm']}; its batch is "
        f"{first}; seed {what['seed']}. Nothing of this step was kept: the state before it and the names of its rows "
        f"are in {run / 'failed'}, the checkpoints are whole"
    )
