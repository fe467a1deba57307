"""`GIRCSE`: a causal LM that embeds texts by speaking soft tokens."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from gircse.architecture import CausalLM
from gircse.config import GircseConfig
from gircse.device import without_autocast
from gircse.engine import Engine, EngineConfig
from gircse.forking import compute_on_one_thread_in_child, is_lost, rewriting_weights, tell_after_fork
from gircse.merging import MergedAdapter
from gircse.ops.head_facts import below_peft
from gircse.ops.pooling import pool_steps
from gircse.rollout import RolloutObserver, rollout
from gircse.token_ids import check_prompt
from gircse.trained_weights import check_trainable, train_in_float32

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from gircse.inspection import TextInspection


class GIRCSE(nn.Module):
    """Generative text embeddings from a causal LM (GIRCSE, arXiv 2509.24291).

    Args:
        base: a `PreTrainedModel` with a language-model head, or a `peft.PeftModel` (LoRA) around one. It is switched to
            the rollout's attention function; its ordinary calls keep working.
        tokenizer: its tokenizer.
        config: K, pooling, temperature and prompt template; the defaults are the paper's.

    Raises:
        gircse.UnsupportedModelError: the architecture fails a probe (see `gircse.architecture`).
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
        """What no copy shares."""
        self._lock = threading.RLock()
        self._mode_outside: bool | None = None
        tell_after_fork(self)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave the engine's buffers and graphs behind; they are made anew."""
        return {**self.__dict__, "_engine": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._begin()

    def after_fork(self) -> None:
        """Another thread was encoding when this process was forked: its lock is replaced, its eval mode ended."""
        if is_lost(self._lock):
            self._lock = threading.RLock()
            if self._mode_outside is not None:
                self._set_mode(self._mode_outside)
                self._mode_outside = None

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        adapter: str | Path | None = None,
        num_steps: int | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        merge_adapter: bool = False,
        is_trainable: bool = False,
    ) -> GIRCSE:
        """Loads a causal LM, a saved GIRCSE folder, or a PEFT LoRA folder (its base is read from adapter_config.json).

        Args:
            name_or_path: a folder or a hub name.
            adapter: a PEFT LoRA folder or hub name to put on the base `name_or_path`.
            num_steps: K; default: the folder's `gircse_config.json`, else 5.
            dtype: a torch dtype or its name; "auto" takes the checkpoint's.
            device: default: CUDA if there is one, else the CPU.
            attn_implementation: None or "gircse", the rollout's own attention (SDPA underneath); nothing else can carry
                its keys and values.
            trust_remote_code: allow the checkpoint to run its own modelling code.
            merge_adapter: see the method of that name: for encoding only, fastest.
            is_trainable: the adapter goes on training; otherwise it is frozen, and in training mode `rollout` refuses
                a model of which nothing trains. Without an adapter all weights train.

        Raises:
            FileNotFoundError: a folder or a base named by an adapter does not exist.
            ValueError: bad arguments, or an adapter that does not fit the base.
            gircse.UnsupportedModelError: the architecture fails a probe.
        """
        from gircse.loading import load_pretrained

        base, tokenizer, config = load_pretrained(
            name_or_path,
            adapter=adapter,
            dtype=dtype,
            device=device,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            is_trainable=is_trainable,
        )
        model = cls(base, tokenizer, config.with_steps(num_steps)).eval()
        if merge_adapter:
            model.merge_adapter()
        return model

    def save_pretrained(self, path: str | Path) -> None:
        """Saves the active LoRA adapter (or, without one, the whole model), the tokenizer and `gircse_config.json`.

        Every file is written aside first and then moved into place; other files in `path` stay. Loaded again, the
        adapter is called "default", whatever its name is here; its base is known again by some of its numbers
        (`gircse.base_fingerprint`).

        Raises:
            ValueError: several adapters are active, or none of those there are; nothing is written.
        """
        from gircse.saving import save_pretrained

        save_pretrained(self, path)

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
        observer: RolloutObserver | None = None,
    ) -> Tensor:
        """The hidden states that are pooled, g_1..g_K, differentiable; the prompt is encoded once.

        Args:
            input_ids: [B, N] integer token ids, padded on either side.
            attention_mask: [B, N], nonzero at real tokens; every row has at least one.
            num_steps: K; default: the config's.
            observer: see `gircse.rollout.rollout`.

        Returns:
            [B, K, D] in the model's dtype: with the config's `include_prompt_state` h_0, g_1..g_{K-1}. With K = 0, the
            encoder-only baseline: [B, 1, D], the prompt's last state, so that pooling, loss and training take the same
            path.

        Raises:
            TypeError, ValueError: wrong ranks, shapes or dtypes, or a row without a token; in training mode a model of
                which every weight is frozen.
        """
        if self.training and torch.is_grad_enabled():
            check_trainable(self)
        steps = self.config.num_steps if num_steps is None else num_steps
        steps = GircseConfig(num_steps=steps).num_steps  # the same check and message as everywhere
        lm = self.causal_lm
        check_prompt(input_ids, attention_mask, steps, positions=lm.max_positions, vocabulary=lm.vocabulary)
        with_prompt = self.config.include_prompt_state or not steps
        states = rollout(
            lm,
            input_ids.to(self.device),
            attention_mask.to(self.device),
            max(steps - 1, 0) if with_prompt else steps,
            temperature=self.config.temperature,
            observer=observer,
        )
        return states.with_prompt if with_prompt else states.steps

    def pool(self, steps: Tensor) -> Tensor:
        """[B, K, D] states of `rollout` -> [B, K, D] embeddings after 1..K steps, not normalised, float32 (or 64)."""
        return pool_steps(steps, self.config.pooling)

    def encode(
        self,
        texts: str | Sequence[str],
        *,
        instruction: str | None = None,
        num_steps: int | str | None = None,
        tolerance: float = 1e-3,
        max_steps: int = 20,
        batch_size: int | None = None,
        max_length: int | None = None,
        normalize: bool = True,
        truncate_dim: int | None = None,
        return_steps: bool = False,
        show_progress_bar: bool | None = None,
        devices: Sequence[str | torch.device] | None = None,
    ) -> np.ndarray:
        """Embeds texts.

        Args:
            texts: a list of strings; a single string gives its embedding without the leading axis.
            instruction: what the embedding is for; None embeds the bare text (passages of retrieval tasks).
            num_steps: K; default: the config's. 0 gives the encoder-only baseline; "auto" lets texts stop early.
            tolerance: with "auto", a text stops once `1 - cos(z_k, z_{k-1})` was below this twice in a row.
            max_steps: with "auto", the most steps of a text.
            batch_size: rows per batch; default: as many as fit the memory for keys and values.
            max_length: tokens of a prompt, instruction included; longer ones are cut at the end (at the beginning where
                the tokenizer's `truncation_side` is "left"), with one warning that counts them. Default: the config's
                `query_max_length` where there is an instruction, its `passage_max_length` where there is none.
            normalize: scale every embedding to length 1.
            truncate_dim: keep the first dimensions only (before normalisation).
            return_steps: the embeddings after 1, 2, .., K steps, for the price of the last. Entry k - 1 is exactly
                `encode(texts, num_steps=k)` (up to K = 32; beyond, to rounding). A text that stopped early keeps its
                last embedding.
            show_progress_bar: default: when there is more than a handful of texts and a terminal.
            devices: spread the texts over these devices, each with a copy of the model for the time of the call.

        Returns:
            float32 [n, D], or [n, K, D] with `return_steps` ([n, max_steps, D] with "auto"); in the order of `texts`.
            An empty text is embedded as its end-of-sequence token. The same text gives the same embedding, to
            rounding, whatever it is encoded with.

        Raises:
            TypeError: a text that is not a string (its index is named).
            ValueError: a text that is no Unicode (half of a surrogate pair), an argument out of range.
        """
        from gircse.encode import EncodeOptions, encode
        from gircse.replicas import encode_on

        options = EncodeOptions.of(
            self,
            instruction=instruction,
            num_steps=num_steps,
            tolerance=tolerance,
            max_steps=max_steps,
            batch_size=batch_size,
            max_length=max_length,
            normalize=normalize,
            truncate_dim=truncate_dim,
            return_steps=return_steps,
        )
        if devices is not None:
            return encode_on(devices, self, texts, options, show_progress_bar=show_progress_bar)
        return encode(self, texts, options, show_progress_bar=show_progress_bar)

    def encode_stream(
        self,
        texts: Iterable[str],
        *,
        instruction: str | None = None,
        num_steps: int | str | None = None,
        tolerance: float = 1e-3,
        max_steps: int = 20,
        batch_size: int | None = None,
        max_length: int | None = None,
        normalize: bool = True,
        truncate_dim: int | None = None,
        return_steps: bool = False,
        window: int = 2048,
    ) -> Iterator[np.ndarray]:
        """Embeds an iterable of unknown length in bounded memory: yields one embedding per text, in order.

        Args:
            texts: strings; read in the caller's thread, at most two windows ahead of what was yielded. Where it raises,
                the embeddings of all texts before come first, then its exception.
            window: texts that are sorted by length and batched together, and held at once.

        The other arguments are those of `encode`. The consumer may stop at any time (`close()`, `break`).

        Yields:
            float32 [D], or [K, D] with `return_steps`.
        """
        from gircse.encode import EncodeOptions, encode_stream

        options = EncodeOptions.of(
            self,
            instruction=instruction,
            num_steps=num_steps,
            tolerance=tolerance,
            max_steps=max_steps,
            batch_size=batch_size,
            max_length=max_length,
            normalize=normalize,
            truncate_dim=truncate_dim,
            return_steps=return_steps,
        )
        return encode_stream(self, texts, options, window=window)

    @contextmanager
    def inference(self) -> Iterator[Engine]:
        """The generation engine, for as long as the block lasts: eval mode, and no other thread is inside.

        Set `engine_config` to change how it runs.
        """
        with self._lock, without_autocast(self.device):
            compute_on_one_thread_in_child()
            with rewriting_weights():
                if self._merged is not None:
                    self._merged.refresh()
            outermost, was_training = self._mode_outside is None, self.training
            if outermost:
                self._mode_outside = was_training
            self._set_mode(False)
            try:
                if self._engine is None or not self._engine.fits(self.causal_lm, self.engine_config):
                    self._engine = None  # its buffers go before new ones come
                    self._engine = Engine(self.causal_lm, self.engine_config)
                yield self._engine
            finally:
                self._set_mode(was_training)
                if outermost:
                    self._mode_outside = None

    def merge_adapter(self) -> None:
        """Folds the LoRA adapter into the base weights: encoding is faster, `save_pretrained` still saves the adapter.

        `unmerge_adapter` and `train` put the exact original weights back; until then a copy of them stays in the host's
        memory. Without an adapter, or merged already, nothing happens. `load_state_dict` and `state_dict` work on the
        weights apart; another adapter or another state of it is merged anew before the next text is encoded.
        """
        with self._lock, rewriting_weights():
            if self._merged is None and hasattr(self.base, "peft_config"):
                self._merged = MergedAdapter(self.base)

    def unmerge_adapter(self) -> None:
        """Takes the adapter out again, bitwise.

        Raises:
            RuntimeError: a merged weight was overwritten since, so that nobody knows what it is without the adapter.
        """
        with self._lock, rewriting_weights():
            if self._merged is not None:
                self._merged.close()
                self._merged = None

    def quantize_weights(self, kind: str = "int8") -> None:
        """Stores the decoder's matrices in 8 bits (weight only), for inference: less memory, fewer bytes per step.

        The embedding table and the head stay as they are: soft tokens are made of them. What it costs in quality
        depends on the model: compare embeddings before and after (docs/engine.md).

        Args:
            kind: "int8" or "fp8" (torchao's weight-only layouts).

        Raises:
            ModuleNotFoundError: torchao is not installed.
            ValueError: another kind, or an adapter that is not folded in for good.
        """
        from gircse.quantization import quantize_weights

        with self._lock, rewriting_weights():
            quantize_weights(self, kind)
            self._engine = None

    def train(self, mode: bool = True) -> GIRCSE:
        """Training needs the adapter apart from the base: a merged one is taken out. What trains of an adapter in half
        precision becomes float32."""
        with self._lock:
            if mode:
                self.unmerge_adapter()
                if train_in_float32(self):
                    self._engine = None
            return self._set_mode(mode)

    def _set_mode(self, training: bool) -> GIRCSE:
        return super().train(training)

    def inspect(
        self,
        texts: str | Sequence[str],
        *,
        instruction: str | None = None,
        num_steps: int | None = None,
        top_n: int = 8,
        max_length: int | None = None,
    ) -> list[TextInspection]:
        """What the soft tokens say: per text and step the top tokens, their probabilities, the entropy, and how far the
        embedding moved (cosine to the step before). See `gircse.inspection`."""
        from gircse.inspection import inspect

        return inspect(self, texts, instruction=instruction, num_steps=num_steps, top_n=top_n, max_length=max_length)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Recompute the prompt pass in backward instead of keeping its activations (training only, `model.train()`).

        Non-reentrant, so the gradient through keys and values is exact; the K steps are not checkpointed.

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
        # the newer name of the two where there are both: the older one warns there
        enable = getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)
        enable(kwargs, **options)

    def _unwrapped(self) -> PreTrainedModel:
        """The transformers model, below a PEFT wrapper."""
        base: Any = self.base
        if not hasattr(base, "peft_config"):
            return base
        kinds = sorted({str(c.peft_type).rsplit(".", 1)[-1] for c in base.peft_config.values() if c.is_prompt_learning})
        if kinds:
            raise ValueError(
                f"base: got a PEFT model of type {', '.join(kinds)}, expected LoRA-like layers in the decoder"
            )
        return below_peft(base)
