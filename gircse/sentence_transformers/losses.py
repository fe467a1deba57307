"""Losses for `SentenceTransformerTrainer`: the ICR objective (docs/method.md §5-6), plain and cached.

Columns follow sentence-transformers' convention: anchor, positive, any number of negatives. All positives and negatives
of the batch are candidates of every anchor, except those that are right answers themselves
(`gircse.data.false_negatives`).

Both losses use `step_embeddings` [B, K, D], the embeddings z_1..z_K that `GIRCSEModule` adds to its output, and of them
as many dimensions as `sentence_embedding` has. `MatryoshkaLoss` shortens only the latter, so within it the loss is
right for each dimension.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses import CachedLossMixin, RandContext
from sentence_transformers.base.modules import Normalize
from torch import Tensor, nn

from gircse import ops
from gircse.data.false_negatives import false_negatives
from gircse.integers import check_integer
from gircse.lm.adapter import check_trainable
from gircse.lm.rollout import Drafter, KeptDraft
from gircse.ops.objective import REDUCTIONS
from gircse.sentence_transformers import modeling_gircse
from gircse.sentence_transformers.module import GIRCSEModule

_CITATION = """
@inproceedings{tsai2026gircse,
    title = {Let LLMs Speak Embedding Languages: Generative Text Embeddings via Iterative Contrastive Refinement},
    author = {Tsai and others},
    booktitle = {International Conference on Learning Representations},
    year = {2026},
    eprint = {2509.24291},
    archivePrefix = {arXiv}
}
"""


class GIRCSELoss(nn.Module):
    """The objective of GIRCSE: `icr_objective` of `stepwise_info_nce`, one contrastive loss for each number of steps.

    Args:
        model: a `SentenceTransformer` whose first module is a `GIRCSEModule`; K is that module's `num_steps`.
        temperature: tau of the contrastive losses.
        reg_weight: weight of the penalty on steps that do not improve.
        reduction: "mean" (the reference code) or "sum" (the paper's formula) over the steps.
        soft_token_gradient: in [0, 1], multiplies the gradient of every soft token (docs/training.md). It may be set
            anew between steps, as `SoftTokenGradientCallback` does.
        filter_false_negatives: a candidate does not count for a row if its text is the row's anchor, or the positive of
            another row with the same anchor, unless it is the row's own positive. Texts with the same tokens are the
            same.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        *,
        temperature: float = 0.02,
        reg_weight: float = 1.0,
        reduction: str = "mean",
        soft_token_gradient: float = 1.0,
        filter_false_negatives: bool = True,
    ) -> None:
        super().__init__()
        _check_modules(model)
        if not temperature > 0:
            raise ValueError(f"temperature: got {temperature!r}, expected a number > 0")
        if not reg_weight >= 0:
            raise ValueError(f"reg_weight: got {reg_weight!r}, expected a number >= 0")
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction: got {reduction!r}, expected one of {', '.join(map(repr, REDUCTIONS))}")
        self.model = model
        self.temperature = temperature
        self.reg_weight = reg_weight
        self.reduction = reduction
        self._damps = isinstance(model[0], GIRCSEModule)
        self.soft_token_gradient = soft_token_gradient
        self.filter_false_negatives = filter_false_negatives

    @property
    def soft_token_gradient(self) -> float:
        return self._soft_token_gradient

    @soft_token_gradient.setter
    def soft_token_gradient(self, value: float) -> None:
        if not 0 <= value <= 1:
            raise ValueError(f"soft_token_gradient: got {value!r}, expected a number from 0 to 1")
        if value != 1 and not self._damps:
            raise ValueError(
                f"soft_token_gradient: got {value!r} with the plain modeling_gircse.py, expected 1, or a model of "
                "gircse.load"
            )
        self._soft_token_gradient = value

    def embed(self, features: dict[str, Tensor], drafter: Drafter | None = None) -> Tensor:
        """`embed_steps` with this loss' factor."""
        if self.soft_token_gradient == 1:
            return embed_steps(self.model, features)
        # A feature, because the library's wrappers of `forward` pass nothing else on.
        options = {"soft_token_gradient": self.soft_token_gradient, "drafter": drafter}
        return embed_steps(self.model, {**features, modeling_gircse.ROLLOUT: options})

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        """One dict of features for each column -> the loss, a scalar.

        Raises:
            ValueError: there are fewer than two columns, there are labels, or all weights of the model are frozen.
        """
        columns = self.check(sentence_features, labels)
        return self.objective(list(map(self.embed, columns)), self.mask_of(columns))

    def check(
        self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None
    ) -> list[dict[str, Tensor]]:
        """The columns; raises the errors of `forward`."""
        columns = list(sentence_features)
        if len(columns) < 2:
            raise ValueError(
                f"sentence_features: got {len(columns)} columns, expected anchor, positive and any negatives"
            )
        if labels is not None:
            raise ValueError(
                f"labels: got {len(labels)} of them, expected none: {type(self).__name__} takes every row for a right "
                "pair. Keep the rows that are, and remove the column (label, labels, score or scores) from the data set"
            )
        if torch.is_grad_enabled():
            check_trainable(self.model)
        return columns

    def mask_of(self, columns: list[dict[str, Tensor]]) -> Tensor | None:
        """[B, candidates] bool, True where a candidate does not count; None where all do."""
        if not self.filter_false_negatives:
            return None
        anchors, *others = [_texts(features) for features in columns]
        candidates = [text for column in others for text in column]
        mask = false_negatives(anchors, candidates, range(len(anchors)))  # the positives come first
        return None if mask is None else mask.to(columns[0]["input_ids"].device)

    def objective(self, columns: list[Tensor], mask: Tensor | None = None) -> Tensor:
        """[B, K, D] embeddings after 1..K steps of each column, and the mask of `mask_of` -> the loss, a scalar."""
        anchors, candidates = columns[0], torch.cat(columns[1:])
        target = torch.arange(len(anchors), device=anchors.device)
        losses = ops.stepwise_info_nce(
            anchors, candidates, target, temperature=self.temperature, pooling="last", mask=mask
        )  # "last", because the steps are pooled already
        return ops.icr_objective(losses, reg_weight=self.reg_weight, reduction=self.reduction)

    def get_config_dict(self) -> dict[str, Any]:
        names = ("temperature", "reg_weight", "reduction", "soft_token_gradient", "filter_false_negatives")
        return {name: getattr(self, name) for name in names}

    @property
    def citation(self) -> str:
        return _CITATION


class CachedGIRCSELoss(CachedLossMixin, GIRCSELoss):
    """`GIRCSELoss` with gradient caching (GradCache, arXiv 2101.06983): the same loss and gradient for a batch of any
    size, in the memory of `mini_batch_size` texts, at the cost of one more forward pass.

    A first pass embeds the batch without gradients. The loss over the whole batch gives the gradient of each embedding.
    Then every mini-batch is embedded again, with the random numbers (dropout) and the drafted soft tokens of the first
    pass, and its part of the gradient goes backward.

    Args:
        mini_batch_size: texts embedded at once.
        show_progress_bar: over the mini-batches.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        *,
        mini_batch_size: int = 32,
        temperature: float = 0.02,
        reg_weight: float = 1.0,
        reduction: str = "mean",
        soft_token_gradient: float = 1.0,
        filter_false_negatives: bool = True,
        show_progress_bar: bool = False,
    ) -> None:
        super().__init__(
            model,
            temperature=temperature,
            reg_weight=reg_weight,
            reduction=reduction,
            soft_token_gradient=soft_token_gradient,
            filter_false_negatives=filter_false_negatives,
        )
        self.mini_batch_size = check_integer("mini_batch_size", mini_batch_size, least=1)
        self.show_progress_bar = show_progress_bar

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        columns = self.check(sentence_features, labels)
        return CachedLossMixin.forward_cached(self, columns, self.mask_of(columns))

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """[b, K, D] step embeddings of each column's mini-batches -> the loss, with backward if asked for.

        The library passes the mask of false negatives as `labels`.
        """
        loss = self.objective([torch.cat(column) for column in reps], labels)
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss

    def embed_minibatch(
        self,
        sentence_feature: dict[str, Tensor],
        begin: int,
        end: int,
        with_grad: bool,
        copy_random_state: bool,
        random_state: RandContext | None = None,
    ) -> tuple[Tensor, RandContext | None]:
        """The library's method, with the embeddings after every number of steps instead of the last one."""
        features = minibatch(sentence_feature, begin, end)
        with random_state or nullcontext(), nullcontext() if with_grad else torch.no_grad():
            state = _FirstPass(*features.values()) if copy_random_state else None
            first = random_state or state
            return self.embed(features, first.drafter if isinstance(first, _FirstPass) else None), state

    def get_config_dict(self) -> dict[str, Any]:
        return {**super().get_config_dict(), "mini_batch_size": self.mini_batch_size}


class _FirstPass(RandContext):
    """What the second pass of gradient caching takes over from the first: random state and drafted soft tokens."""

    def __init__(self, *tensors: Tensor) -> None:
        super().__init__(*tensors)
        self.drafter = KeptDraft()


def embed_steps(model: nn.Module, features: dict[str, Any]) -> Tensor:
    """[B, K, D'] embeddings after 1..K steps, with as many dimensions as the output's `sentence_embedding` has."""
    output = model(features)
    return output["step_embeddings"][..., : output["sentence_embedding"].shape[-1]]


def _texts(features: dict[str, Tensor]) -> list[tuple[int, ...]]:
    """The token ids of each row, without the padding."""
    rows, real = features["input_ids"].tolist(), features["attention_mask"].tolist()
    return [tuple(token for token, kept in zip(*row, strict=True) if kept) for row in zip(rows, real, strict=True)]


def _check_modules(model: SentenceTransformer) -> None:
    """Checks that no module after the first changes the embedding, because the losses use the first one's steps."""
    if not isinstance(model[0], modeling_gircse.GIRCSEModule):
        raise TypeError(f"model: its first module is {type(model[0]).__name__}, expected GIRCSEModule")
    other = [type(module).__name__ for module in list(model)[1:] if not isinstance(module, Normalize)]
    if other:
        raise ValueError(
            f"model: {', '.join(other)} after the GIRCSEModule would not be trained by a loss over its steps"
        )


def minibatch(features: dict[str, Tensor], begin: int, end: int) -> dict[str, Tensor]:
    """Rows begin..end of each tensor, without the columns that are padding in all of them."""
    real = features["attention_mask"][begin:end].any(dim=0).nonzero()
    columns = slice(int(real[0]), int(real[-1]) + 1)
    return {name: features[name][begin:end, columns] for name in ("input_ids", "attention_mask")}
