"""Training: one loop that reads from top to bottom.

    python -m gircse train --model BASE --data rows.jsonl --output runs/mine
    torchrun --nproc-per-node 8 -m gircse.train --model BASE --data rows.jsonl --output runs/mine

Every step: a batch of rows -> tokens -> rollout of queries and of candidates -> K contrastive losses -> ICR objective
-> LoRA update. A batch that is too large for the memory goes through in micro-batches (`gircse.grad_cache`), of several
processes each has a share of it (`gircse.distributed`); neither changes what is computed. A run folder holds what the
run is (`gircse.run_folder`), `train_log.jsonl` (one line a step), `checkpoints/`, and at the end `model/`, which
`GIRCSE.from_pretrained` loads.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gircse import ops
from gircse.atomic import remove_leftovers
from gircse.batches import Example, TrainingData, mask_of
from gircse.checkpoint import checkpoint_folder, list_checkpoints, load_checkpoint, save_checkpoint, save_failure
from gircse.data import Row, load_rows
from gircse.distributed import Ranks, digest_of, digest_of_rows, join_ranks, step_seed
from gircse.encode import prompt_limit, tokenize
from gircse.evaluate import RetrievalTask, evaluate_retrieval
from gircse.folder_lock import folder_lock
from gircse.grad_cache import MicroBatch, backward, micro_batches, positions
from gircse.instruction_length import warn_of_rows
from gircse.model import GIRCSE
from gircse.run_folder import CONFIG_NAME, check_data, check_model, check_settings, start_of, write_start
from gircse.run_log import open_log, start_log
from gircse.schedule import learning_rate, set_learning_rate
from gircse.signals import TrainingStopped, stop_on_signals
from gircse.step_monitor import StepMonitor
from gircse.token_budget import probe_budget
from gircse.train_config import TrainConfig
from gircse.trainable import trainable_model

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


class Batch(NamedTuple):
    """This process's share of a step's rows, as tokens.

    Attributes:
        queries: token ids of its B queries.
        passages: of its candidates, [pos_0, negatives of 0.., pos_1, ..].
        target: [B] int64, each row's positive among `passages`; rows may have different numbers of negatives.
        mask: [B, candidates of all processes] bool or None, where queries are candidates too with all of those after
            them; True: does not count for that row.
    """

    queries: list[list[int]]
    passages: list[list[int]]
    target: Tensor
    mask: Tensor | None

    @property
    def texts(self) -> int:
        return len(self.queries) + len(self.passages)

    @property
    def tokens(self) -> int:
        return sum(map(len, [*self.queries, *self.passages]))


def collate(model: GIRCSE, examples: Sequence[Example], config: TrainConfig, *, share: slice | None = None) -> Batch:
    """The rows `share` (default: all) of a step's `examples`."""
    own = examples[share] if share is not None else examples
    passages = [[example.positive, *example.negatives] for example in own]
    counts = torch.tensor([len(texts) for texts in passages])
    mask = mask_of(examples, include_queries=config.include_queries) if config.filter_false_negatives else None
    limits = {
        name: prompt_limit(model, getattr(config, name), config.max_num_steps)
        for name in ("query_max_length", "passage_max_length")
    }
    warn_of_rows(model, [example.instruction for example in own], **limits)
    tokens = partial(tokenize, model, instruction=None, num_steps=config.max_num_steps)
    return Batch(
        tokens([example.query for example in own], max_length=config.query_max_length),
        tokens([text for texts in passages for text in texts], max_length=config.passage_max_length),
        counts.cumsum(0) - counts,
        mask if mask is None or share is None else mask[share],
    )


def contrastive_backward(
    model: GIRCSE,
    batch: Batch,
    config: TrainConfig,
    *,
    num_steps: int,
    ranks: Ranks | None = None,
    monitor: StepMonitor | None = None,
) -> tuple[Tensor, Tensor, int]:
    """Rollouts, contrastive losses, objective, backward: gradients of this process's share are left in `.grad`.

    At once where the share fits `config.micro_batch_tokens` (None: always), else by gradient caching.

    Returns:
        The loss and its parts L_1..L_K, of the batch of all processes; the number of passes it took.
    """
    ranks = ranks or Ranks(model.device)
    ids, pad_id = [*batch.queries, *batch.passages], model.tokenizer.pad_token_id
    split = len(batch.queries)
    parts = [MicroBatch.of(rows, ids, pad_id=pad_id) for rows in (range(split), range(split, len(ids)))]
    budget = config.micro_batch_tokens
    cached = budget is not None and positions(parts, num_steps) > budget
    if config.fsdp:  # whose layers are gathered by all processes together: they must make the same passes
        cached = bool(ranks.most(cached))
    if cached and budget is not None:
        parts = micro_batches(ids, budget, num_steps=num_steps, pad_id=pad_id)
    if config.fsdp:
        parts += [parts[-1].unused()] * (int(ranks.most(len(parts))) - len(parts))

    def objective(states: Tensor) -> tuple[Tensor, Tensor]:
        if monitor is not None:
            monitor.enter("loss")
        losses = ops.stepwise_info_nce(
            states[:split],
            states[split:],
            batch.target.to(states.device),
            temperature=config.contrastive_temperature,
            pooling=config.pooling,
            mask=None if batch.mask is None else batch.mask.to(states.device),
            include_queries=config.include_queries,
            symmetric=config.symmetric,
            group=ranks.group,
        )
        counted = losses if config.stepwise else losses[-1:]
        loss = ops.icr_objective(
            counted, reg_weight=config.reg_weight, reduction=config.reduction, detach_previous=config.detach_previous
        )
        return loss, losses.detach()

    embed = partial(model.rollout, num_steps=num_steps, observer=monitor)
    loss, losses = backward(embed, parts, objective, cached=cached)
    return loss, losses, len(parts)


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


if __name__ == "__main__":  # torchrun -m gircse.train
    from gircse.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
