"""One training step: rows to tokens, and from tokens to the gradients of the trained weights."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from gircse import ops
from gircse.encode.instruction_length import warn_of_rows
from gircse.encode.tokens import prompt_limit, tokenize
from gircse.model import GIRCSE
from gircse.train.batches import Example, mask_of
from gircse.train.config import TrainConfig
from gircse.train.grad_cache import MicroBatch, backward, micro_batches, positions
from gircse.train.ranks import Ranks
from gircse.train.step_monitor import StepMonitor


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
