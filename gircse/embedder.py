"""`Embedder`, the base class of `GIRCSE`: weights and modes, rollout, pooling, engine and adapter merging."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gircse.engine import Engine, EngineConfig
from gircse.lm.adapter import check_trainable, train_in_float32
from gircse.lm.causal_lm import CausalLM
from gircse.lm.config import GircseConfig
from gircse.lm.device import without_autocast
from gircse.lm.forking import compute_on_one_thread_in_child, is_lost, rewriting_weights, tell_after_fork
from gircse.lm.merged_adapter import MergedAdapter
from gircse.lm.rollout import Drafter, RolloutObserver, rollout
from gircse.lm.token_ids import check_prompt
from gircse.ops.head_facts import below_peft
from gircse.ops.pooling import pool_steps

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def pooled_states(
    lm: CausalLM, config: GircseConfig, input_ids: Tensor, attention_mask: Tensor, num_steps: int, **options: Any
) -> Tensor:
    """`Embedder.rollout` on the model's device, of arguments that were checked; the host waits for nothing.

    Args:
        options: of `gircse.lm.rollout.rollout`.
    """
    with_prompt = config.include_prompt_state or not num_steps
    steps = max(num_steps - 1, 0) if with_prompt else num_steps
    states = rollout(lm, input_ids, attention_mask, steps, temperature=config.temperature, **options)
    return states.with_prompt if with_prompt else states.steps


class Embedder(nn.Module):
    """A causal LM with a differentiable rollout, pooling, the generation engine and the merging of its adapter.

    Arguments and errors are those of `gircse.GIRCSE`, which adds the methods for texts and folders.
    """

    def __init__(
        self,
        base: PreTrainedModel | nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        config: GircseConfig | None = None,
    ) -> None:
        super().__init__()
        self.base = base
        self.tokenizer = tokenizer
        self.config = config or GircseConfig()
        self.causal_lm = CausalLM.from_model(self._unwrapped())
        self.engine_config = EngineConfig()
        self._engine: Engine | None = None
        self._merged: MergedAdapter | None = None
        self._begin()

    def _begin(self) -> None:
        """Sets up the parts that a copy does not share."""
        self._lock = threading.RLock()
        self._mode_outside: bool | None = None
        tell_after_fork(self)

    def __getstate__(self) -> dict[str, Any]:
        """A copy or pickle leaves out the engine's buffers and graphs, which are made again when they are needed."""
        return {**self.__dict__, "_engine": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._begin()

    def after_fork(self) -> None:
        """If another thread was encoding at the fork, replaces its lock and ends its eval mode."""
        if is_lost(self._lock):
            self._lock = threading.RLock()
            if self._mode_outside is not None:
                self._set_mode(self._mode_outside)
                self._mode_outside = None

    @property
    def device(self) -> torch.device:
        return self.causal_lm.device

    @property
    def num_steps(self) -> int:
        return self.config.num_steps

    @property
    def embedding_dimension(self) -> int:
        return self.causal_lm.hidden_size

    def forward(self, input_ids: Tensor, attention_mask: Tensor, num_steps: int | None = None) -> Tensor:
        """The same as `rollout`."""
        return self.rollout(input_ids, attention_mask, num_steps)

    def rollout(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        num_steps: int | None = None,
        *,
        soft_token_gradient: float = 1.0,
        drafter: Drafter | None = None,
        observer: RolloutObserver | None = None,
    ) -> Tensor:
        """The hidden states that are pooled, g_1..g_K, differentiable.

        Args:
            input_ids: [B, N] integer token ids, padded on either side.
            attention_mask: [B, N], nonzero at real tokens; every row has at least one.
            num_steps: K; default: the config's.
            soft_token_gradient: in [0, 1], multiplies the gradient of every soft token; with 0 the steps go by the
                block (`gircse.lm.rollout`).
            drafter, observer: see `gircse.lm.rollout.rollout`.

        Returns:
            [B, K, D] in the model's dtype: with the config's `include_prompt_state` h_0, g_1..g_{K-1}. With K = 0, the
            encoder-only baseline: [B, 1, D], the prompt's last state, so that pooling, loss and training take the same
            path.

        Raises:
            TypeError, ValueError: wrong ranks, shapes or dtypes, or a row without a token; in training mode also a
                model whose weights are all frozen.
        """
        if self.training and torch.is_grad_enabled():
            check_trainable(self)
        steps = self.config.num_steps if num_steps is None else num_steps
        steps = GircseConfig(num_steps=steps).num_steps  # checks it
        lm = self.causal_lm
        check_prompt(input_ids, attention_mask, steps, positions=lm.max_positions, vocabulary=lm.vocabulary)
        return pooled_states(
            lm,
            self.config,
            input_ids.to(self.device),
            attention_mask.to(self.device),
            steps,
            soft_token_gradient=soft_token_gradient,
            drafter=drafter,
            observer=observer,
        )

    def pool(self, steps: Tensor) -> Tensor:
        """[B, K, D] states of `rollout` -> [B, K, D] embeddings after 1..K steps, not normalised, float32 (or 64)."""
        return pool_steps(steps, self.config.pooling)

    @contextmanager
    def inference(self) -> Iterator[Engine]:
        """The generation engine. During the block the model is in eval mode, and other threads wait.

        `engine_config` sets how it runs.
        """
        with self._lock, without_autocast(self.device):
            compute_on_one_thread_in_child()
            with rewriting_weights():
                if self._merged is not None:
                    self._merged.refresh()
            outermost, was_training = self._mode_outside is None, self.training
            if outermost:
                self._mode_outside = was_training
            if _is_training(self):
                self._set_mode(False)
            try:
                if self._engine is None or not self._engine.fits(self.causal_lm, self.engine_config):
                    self._engine = None  # frees its buffers before new ones are made
                    self._engine = Engine(self.causal_lm, self.engine_config)
                yield self._engine
            finally:
                if was_training:
                    self._set_mode(True)
                if outermost:
                    self._mode_outside = None

    def merge_adapter(self) -> None:
        """Merges the LoRA adapter into the base weights: encoding is faster, and `save_pretrained` still saves the
        adapter.

        `unmerge_adapter` and `train` restore the exact original weights; until then a copy of them stays in the host's
        memory. Without an adapter, or when it is merged already, nothing happens. `load_state_dict` and `state_dict`
        work on the separate weights. When adapters are switched or changed, they are merged again before the next text
        is encoded.
        """
        with self._lock, rewriting_weights():
            if self._merged is None and hasattr(self.base, "peft_config"):
                self._merged = MergedAdapter(self.base)

    def unmerge_adapter(self) -> None:
        """Restores the base weights from before the merge, bitwise.

        Raises:
            RuntimeError: a merged weight was overwritten since, so that its value without the adapter is unknown.
        """
        with self._lock, rewriting_weights():
            if self._merged is not None:
                self._merged.close()
                self._merged = None

    def quantize_weights(self, kind: str = "int8") -> None:
        """Stores the decoder's matrices in 8 bits (weight only), for inference: less memory, fewer bytes per step.

        The embedding table and the head, of which soft tokens are made, keep their dtype. The loss of quality depends
        on the model: compare embeddings before and after (docs/engine.md).

        Args:
            kind: "int8" or "fp8" (torchao's weight-only layouts).

        Raises:
            ModuleNotFoundError: torchao is not installed.
            ValueError: another kind, or an adapter that is apart from the base.
        """
        from gircse.lm.quantize import quantize_weights

        with self._lock, rewriting_weights():
            quantize_weights(self.causal_lm, kind, adapted=hasattr(self.base, "peft_config"))
            self._engine = None

    def train(self, mode: bool = True) -> Embedder:
        """Sets the mode. For training, a merged adapter is unmerged, and the trainable weights of adapters in half
        precision become float32."""
        with self._lock:
            if mode:
                self.unmerge_adapter()
                if train_in_float32(self):
                    self._engine = None
            return self._set_mode(mode)

    def _set_mode(self, training: bool) -> Embedder:
        return super().train(training)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Recomputes the prompt pass in backward instead of keeping its activations, in training mode.

        Checkpointing is non-reentrant, so that the gradient through keys and values is exact. Steps by the block are
        recomputed, too, and steps one after the other are not.

        Args:
            gradient_checkpointing_kwargs, options: as for the transformers method of that name.

        Raises:
            ValueError: `use_reentrant=True`.
        """
        kwargs = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        if kwargs["use_reentrant"]:
            raise ValueError(
                "gradient_checkpointing_kwargs: got use_reentrant=True, which would cut the gradient through the "
                "rollout's keys and values; expected False"
            )
        base = self._unwrapped()
        # Where transformers has both names, the older one warns.
        enable = getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)
        enable(kwargs, **options)

    def _unwrapped(self) -> PreTrainedModel:
        """The transformers model below a PEFT wrapper."""
        base: Any = self.base
        if not hasattr(base, "peft_config"):
            return base
        kinds = sorted({str(c.peft_type).rsplit(".", 1)[-1] for c in base.peft_config.values() if c.is_prompt_learning})
        if kinds:
            raise ValueError(
                f"base: got a PEFT model of type {', '.join(kinds)}, expected LoRA-like layers in the decoder"
            )
        return below_peft(base)


def _is_training(module: nn.Module) -> bool:
    """Whether a module or one inside of it is in training mode. `train(False)` takes a millisecond where nothing has to
    change, ten times as long as asking."""
    waiting: list[nn.Module | None] = [module]
    while waiting:
        current = waiting.pop()
        if current is not None:
            if current.training:
                return True
            waiting += current._modules.values()
    return False
