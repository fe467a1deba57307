"""Training: one loop that reads from top to bottom.

    python -m gircse train --model BASE --data rows.jsonl --output runs/mine
    torchrun --nproc-per-node 8 -m gircse.train --model BASE --data rows.jsonl --output runs/mine

Every step: a batch of rows -> tokens -> rollout of queries and of candidates -> K contrastive losses -> ICR objective
-> LoRA update. A batch that is too large for the memory goes through in micro-batches (`gircse.train.grad_cache`), of
several processes each has a share of it (`gircse.train.ranks`); neither changes what is computed. A run folder holds
what the run is (`gircse.train.run_folder`), `train_log.jsonl` (one line a step), `checkpoints/`, and at the end
`model/`, which `GIRCSE.from_pretrained` loads.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gircse.data.retrieval_task import RetrievalTask
from gircse.data.rows import Row, load_rows
from gircse.evaluation.retrieval import evaluate_retrieval
from gircse.files.atomic import remove_leftovers
from gircse.files.lock import folder_lock
from gircse.model import GIRCSE
from gircse.train.batches import TrainingData
from gircse.train.checkpoint import checkpoint_folder, list_checkpoints, load_checkpoint, save_checkpoint, save_failure
from gircse.train.config import TrainConfig
from gircse.train.log import open_log, start_log
from gircse.train.lora import trainable_model
from gircse.train.micro_batch_size import probe_budget
from gircse.train.ranks import Ranks, digest_of, digest_of_rows, join_ranks, step_seed
from gircse.train.run_folder import CONFIG_NAME, check_data, check_model, check_settings, start_of, write_start
from gircse.train.schedule import learning_rate, set_learning_rate
from gircse.train.signals import TrainingStopped, stop_on_signals
from gircse.train.step import collate, contrastive_backward
from gircse.train.step_monitor import StepMonitor

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
    """Trains LoRA adapters with the ICR objective; in every process of a torchrun job alike.

    Args:
        config: the settings.
        rows: training rows; default: read from `config.data`. All of it is checked before anything starts.
        model: a model to train, its base in memory, without an adapter; default: `config.model` is loaded.
        evaluate: called every `config.eval_every` steps and at the end, in every process; what it returns in the first
            goes into the log. Default: retrieval on `config.eval_data`, where there is one.

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
    run = Path(config.output)
    with (
        join_ranks(config.device, timeout=config.rank_timeout) as ranks,
        stop_on_signals() as stop,
        folder_lock(run if ranks.first else None),
    ):
        if ranks.first:
            check_settings(run, config)
        if evaluate is None and config.eval_data is not None:
            evaluate = _evaluation(config)
        if config.fsdp and evaluate is not None:
            raise ValueError("fsdp: got an evaluation during the run as well; evaluate the saved model instead")
        data = TrainingData.open(config, rows=rows)
        total_steps = config.max_steps or data.steps_per_epoch
        if ranks.first and config.resume:
            check_data(run, data, total_steps)
        ranks.share(config.batch_size)  # enough rows for every process?

        torch.manual_seed(config.seed)
        model = trainable_model(config, model, ranks=ranks)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
        start, done = start_of(model, config), 0
        if ranks.first and config.resume:
            check_model(run, config, start)
        if config.resume and (found := list_checkpoints(run)):
            done = load_checkpoint(found[-1], model, optimizer)
        model.train()
        config = replace(config, micro_batch_tokens=_budget(run, config, model, ranks))

        log: list[dict[str, Any]] = []
        if ranks.first:
            write_start(run, config, data, start)
            log = start_log(run, up_to=done)
            for folder in (run, checkpoint_folder(run)):
                remove_leftovers(folder)
        monitor = StepMonitor(ranks.device)
        weights = digest_of(parameters) if ranks.group else 0
        with open_log(run if ranks.first else None, asdict(config), total=total_steps, done=done) as record:
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
                num_steps = config.steps_at(step)
                batch = collate(model, examples, config, share=ranks.share(len(examples)))

                torch.manual_seed(step_seed(config.seed, step, ranks.rank))
                loss, losses, parts = contrastive_backward(
                    model, batch, config, num_steps=num_steps, ranks=ranks, monitor=monitor
                )
                monitor.enter("update")
                weights = ranks.sum_gradients(parameters)
                grad_norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
                if not (math.isfinite(loss.item()) and math.isfinite(grad_norm.item())):
                    what = {"step": step + 1, "loss": str(loss.item()), "losses": list(map(str, losses.tolist()))}
                    what |= {"grad_norm": str(grad_norm.item()), "seed": config.seed, "rows": names}
                    if ranks.first:
                        save_failure(run, step + 1, model, optimizer, what)
                    ranks.wait()
                    raise _not_finite(run, what)
                rate = learning_rate(
                    config.learning_rate, step, total_steps=total_steps, warmup_ratio=config.warmup_ratio
                )
                set_learning_rate(optimizer, rate)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

                seconds = monitor.seconds()
                whole = sum(seconds.values())
                measured = ranks.gather([batch.tokens, batch.texts, monitor.peak_bytes(), parts, *monitor.entropies()])
                tokens, texts, peaks, counts, *entropies = map(list, zip(*measured, strict=True))
                entry: dict[str, Any] = {
                    "step": step + 1,
                    "loss": loss.item(),
                    "losses": losses.tolist(),
                    "entropy": [sum(map(float.__mul__, each, texts)) / sum(texts) for each in entropies],
                    "grad_norm": grad_norm.item(),
                    "learning_rate": rate,
                    "tokens_per_second": sum(tokens) / whole,
                    "seconds": whole,
                    "time": {phase: value / whole for phase, value in seconds.items()},
                    "peak_bytes": int(max(peaks)),
                    "micro_batches": int(max(counts)),
                    "batch": f"{position:016x}",
                }
                last = step + 1 == total_steps
                if evaluate is not None and (last or (config.eval_every and (step + 1) % config.eval_every == 0)):
                    entry["evaluation"] = evaluate(model)
                    model.train()
                log.append(entry)
                record.write(entry)
                if ranks.first and (last or (step + 1) % config.save_every == 0):
                    record.sync()
                    save_checkpoint(run, step + 1, model, optimizer, keep=config.keep_checkpoints)

        model.eval()
        if ranks.first:
            model.save_pretrained(run / "model")
        ranks.wait()
    return TrainResult(model, log, run / "model")


def _evaluation(config: TrainConfig) -> Evaluation:
    """Retrieval on `config.eval_data`, at the K that the model is saved with."""
    task = RetrievalTask.from_rows(load_rows(config.eval_data, instruction=config.eval_instruction))
    steps = [config.gircse_config().num_steps]

    def evaluate(model: GIRCSE) -> dict[str, Any]:
        return {str(k): values for k, values in evaluate_retrieval(model, task, steps=steps).items()}

    return evaluate


def _budget(run: Path, config: TrainConfig, model: GIRCSE, ranks: Ranks) -> int:
    """`micro_batch_tokens` of the config, of the run that is resumed, or what a probe finds; the least of all
    processes."""
    found = config.micro_batch_tokens
    if found is None and config.resume:
        found = TrainConfig.from_json(run / CONFIG_NAME).micro_batch_tokens
    if found is None:
        length = max(config.query_max_length, config.passage_max_length)
        found = probe_budget(model, num_steps=config.max_num_steps, length=length, sharded=config.fsdp)
    return -int(ranks.most(-found))


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
