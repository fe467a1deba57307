"""One training step: rows to tokens, and from tokens to the gradients of the trained weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from gircse import ops
from gircse.encode.tokens import PromptTokenizer, prompt_limit, warn_cut, warn_of_rows
from gircse.engine.draft import fused_drafter
from gircse.lm.rollout import Drafter
from gircse.lm.soft_token_gradient import SoftTokenGradient
from gircse.model import GIRCSE
from gircse.train.batches import Example, mask_of
from gircse.train.capture import CapturedPasses
from gircse.train.config import TrainConfig
from gircse.train.grad_cache import backward, micro_batches, positions
from gircse.train.ranks import Ranks
from gircse.train.run_config import RunConfig
from gircse.train.step_monitor import StepMonitor

Extra = TypeVar("Extra")


class StepResult(NamedTuple):
    """What a step reports; it has left the gradients of this process's share in `.grad`.

    Attributes:
        loss: the scalar of the whole batch, of all processes.
        parts: what the loss consists of, without gradient, scalars or [K], for the log.
        texts, tokens: of this process's share, without padding.
        passes: the number of micro-batches that went through the model.
    """

    loss: Tensor
    parts: dict[str, Tensor]
    texts: int
    tokens: int
    passes: int


# A batch of rows, the number of the step (from 0) and the monitor of the run -> the step's result.
Step = Callable[[Sequence[Example], int, StepMonitor], StepResult]


class TokenizedRows(NamedTuple):
    """This process's share of a step's rows, as tokens.

    Attributes:
        queries: token ids of its B queries.
        passages: token ids of its candidates, [pos_0, negatives of 0.., pos_1, ..].
        target: [B] int64, each row's positive among `passages`; rows may have different numbers of negatives.
        mask: [B, candidates of all processes] bool, True where a candidate does not count for a row; None where all
            count. Where queries are candidates too, they follow the passages.
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


class RowTokenizer:
    """Prompts of queries and of passages -> token ids, each kind cut to its own limit.

    A limit is that of the settings, or less where the model's positions must also hold `num_steps` soft tokens.
    """

    def __init__(self, model: GIRCSE, config: RunConfig, num_steps: int) -> None:
        self._model = model
        self._limits = {
            name: prompt_limit(model, getattr(config, name), num_steps)
            for name in ("query_max_length", "passage_max_length")
        }
        queries, passages = (PromptTokenizer(model, None, limit) for limit in self._limits.values())
        self.queries, self.passages = partial(_token_ids, queries), partial(_token_ids, passages)

    def warn(self, examples: Sequence[Example]) -> None:
        """Warns where an instruction leaves no room for the text after it."""
        warn_of_rows(self._model, [example.instruction for example in examples], **self._limits)


def _token_ids(tokenizer: PromptTokenizer, prompts: Sequence[str]) -> list[list[int]]:
    rows, cut = tokenizer(prompts)
    warn_cut(cut, len(rows), tokenizer)
    return rows


def contrastive_step(model: GIRCSE, config: TrainConfig, ranks: Ranks, *, total_steps: int) -> Step:
    """The training step of a run of `total_steps`."""
    tokenizer = RowTokenizer(model, config, config.max_num_steps)
    drafter = drafter_of(model, config)
    graphs = CapturedPasses.of(model, config)

    def step(examples: Sequence[Example], number: int, monitor: StepMonitor) -> StepResult:
        rows = tokenize_rows(tokenizer, examples, config, share=ranks.share(len(examples)))
        factor = config.soft_token_gradient_at(number, total_steps)
        loss, losses, passes = contrastive_backward(
            model, rows, config,
            num_steps=config.steps_at(number), soft_token_gradient=factor, ranks=ranks, monitor=monitor,
            graphs=graphs, drafter=drafter,
        )  # fmt: skip
        parts = {"losses": losses, "soft_token_gradient": torch.tensor(factor, dtype=torch.float64)}
        return StepResult(loss, parts, rows.texts, rows.tokens, passes)

    return step


def drafter_of(model: GIRCSE, config: TrainConfig) -> Drafter | None:
    """What drafts the soft tokens of a run: the engine's decoder on CUDA; None, for `gircse.lm.rollout.draft`, where
    the run has no steps by the block or FSDP gathers the layers that it would read."""
    factors = SoftTokenGradient.of(config.soft_token_gradient)
    if model.device.type != "cuda" or config.fsdp or min(factors.first, factors.last) > 0:
        return None
    return fused_drafter(model.causal_lm)


def tokenize_rows(
    tokenizer: RowTokenizer, examples: Sequence[Example], config: TrainConfig, *, share: slice = slice(None)
) -> TokenizedRows:
    """The rows `share` (default: all) of a step's `examples`. The mask is that of the whole batch."""
    own = examples[share]
    tokenizer.warn(own)
    passages = [[example.positive, *example.negatives] for example in own]
    counts = torch.tensor([len(texts) for texts in passages])
    mask = mask_of(examples, include_queries=config.include_queries) if config.filter_false_negatives else None
    return TokenizedRows(
        tokenizer.queries([example.query for example in own]),
        tokenizer.passages([text for texts in passages for text in texts]),
        counts.cumsum(0) - counts,
        None if mask is None else mask[share],
    )


def contrastive_backward(
    model: GIRCSE,
    rows: TokenizedRows,
    config: TrainConfig,
    *,
    num_steps: int,
    soft_token_gradient: float = 1.0,
    ranks: Ranks | None = None,
    monitor: StepMonitor | None = None,
    graphs: CapturedPasses | None = None,
    drafter: Drafter | None = None,
) -> tuple[Tensor, Tensor, int]:
    """Rollouts, contrastive losses, objective, backward: gradients of this process's share are left in `.grad`.

    Returns:
        The loss and its parts L_1..L_K, of the batch of all processes; the number of micro-batches.
    """
    ranks = ranks or Ranks(model.device)
    split = len(rows.queries)

    def objective(states: Tensor) -> tuple[Tensor, Tensor]:
        losses = ops.stepwise_info_nce(
            states[:split],
            states[split:],
            rows.target.to(states.device),
            temperature=config.contrastive_temperature,
            pooling=config.pooling,
            mask=None if rows.mask is None else rows.mask.to(states.device),
            include_queries=config.include_queries,
            symmetric=config.symmetric,
            group=ranks.group,
        )
        counted = losses if config.stepwise else losses[-1:]
        loss = ops.icr_objective(
            counted, reg_weight=config.reg_weight, reduction=config.reduction, detach_previous=config.detach_previous
        )
        return loss, losses.detach()

    ids = [*rows.queries, *rows.passages]
    return backward_of(
        model, ids, objective, config.micro_batch_tokens,
        num_steps=num_steps, soft_token_gradient=soft_token_gradient, monitor=monitor,
        same_passes=ranks if config.fsdp else None, graphs=graphs, drafter=drafter,
    )  # fmt: skip


def backward_of(
    model: GIRCSE,
    ids: Sequence[Sequence[int]],
    objective: Callable[[Tensor], tuple[Tensor, Extra]],
    budget: int | None,
    *,
    num_steps: int,
    soft_token_gradient: float = 1.0,
    monitor: StepMonitor | None = None,
    same_passes: Ranks | None = None,
    graphs: CapturedPasses | None = None,
    drafter: Drafter | None = None,
) -> tuple[Tensor, Extra, int]:
    """Rollout of texts, objective and backward, at once or by gradient caching (`gircse.train.grad_cache`).

    Args:
        ids: token ids of each text. Queries and passages go through the model together.
        objective: states [T, K, D] -> (scalar loss, anything).
        budget: the most positions (padding, that of buckets, too, and K included) that go through the model at once;
            None: no limit.
        same_passes: processes that must make the same number of passes, because each of them gathers FSDP's layers.
        graphs: runs micro-batches as CUDA graphs; only one can await its backward pass.
        drafter: makes the soft tokens of rollouts by the block; default: `gircse.lm.rollout.draft`.

    Returns:
        (loss, anything) of `objective`; the number of micro-batches.
    """
    parts = micro_batches(
        ids, budget, num_steps=num_steps, pad_id=model.tokenizer.pad_token_id,
        padded=None if graphs is None else partial(graphs.padded, num_steps=num_steps),
    )  # fmt: skip
    cached = budget is not None and positions(parts, num_steps) > budget
    if same_passes is not None:
        cached = bool(same_passes.most(cached))
    cached = cached or (graphs is not None and len(parts) > 1)
    if same_passes is not None:
        parts += [parts[-1].unused()] * (int(same_passes.most(len(parts))) - len(parts))

    def timed(states: Tensor) -> tuple[Tensor, Extra]:
        if monitor is not None:
            monitor.enter("loss")
        return objective(states)

    embed = partial(
        model.rollout if graphs is None else partial(graphs.embed, own_drafter=drafter),
        num_steps=num_steps,
        soft_token_gradient=soft_token_gradient,
        observer=monitor,
    )
    loss, extra = backward(embed, parts, timed, cached=cached, drafter=drafter)
    if monitor is not None and graphs is not None:
        monitor.graph_bytes = graphs.graph_bytes
    return loss, extra, len(parts)
