"""`GIRCSE`: a causal LM that embeds texts by generating soft tokens, with all that users call on texts and folders."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gircse.embedder import Embedder
from gircse.encode.devices import encode_on
from gircse.encode.pipeline import STREAM_WINDOW, EncodeOptions, encode, encode_stream
from gircse.inspect.soft_tokens import TextInspection, inspect
from gircse.lm.load import load_pretrained
from gircse.lm.save import save_pretrained


class GIRCSE(Embedder):
    """Generative text embeddings from a causal LM (GIRCSE, arXiv 2509.24291).

    Args:
        base: a `PreTrainedModel` with a language-model head, or a `peft.PeftModel` (LoRA) around one. It is switched to
            the rollout's attention function; its ordinary calls keep working.
        tokenizer: its tokenizer.
        config: K, pooling, temperature and prompt template; the defaults are the paper's.

    Raises:
        gircse.UnsupportedModelError: the architecture fails a probe (see `gircse.lm.causal_lm`).
    """

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
            attn_implementation: None or "gircse", the rollout's attention (SDPA underneath), which carries its keys and
                values.
            trust_remote_code: allow the checkpoint to run its own modelling code.
            merge_adapter: call the method of that name, for the fastest encoding.
            is_trainable: the adapter goes on training. Otherwise it is frozen, and in training mode `rollout` refuses
                the model. Without an adapter all weights train.

        Raises:
            FileNotFoundError: the folder, or the base that an adapter names, does not exist.
            ValueError: an argument is bad, or the adapter does not fit the base.
            gircse.UnsupportedModelError: the architecture fails a probe.
        """
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

        Every file is first written elsewhere and then moved into place; other files in `path` stay. Loaded again, the
        adapter is called "default". A few numbers of its base are saved too, so that loading can refuse another base
        (`gircse.lm.base_fingerprint`).

        Raises:
            ValueError: the model has adapters of which several or none are active; nothing is written.
        """
        save_pretrained(path, base=self.base, lm=self.causal_lm.model, tokenizer=self.tokenizer, config=self.config)

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
        decoding: str | None = None,
        jacobi_tolerance: float | None = None,
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
            max_length: the most tokens of a prompt, instruction included. Longer ones are cut at the end (at the
                beginning where the tokenizer's `truncation_side` is "left"), with one warning that counts them.
                Default: the config's `query_max_length` with an instruction, its `passage_max_length` without.
            normalize: scale every embedding to length 1.
            truncate_dim: keep the first dimensions only (before normalisation).
            return_steps: give the embeddings after 1, 2, .., K steps, in the time of the last. Entry k - 1 is exactly
                `encode(texts, num_steps=k)` (up to K = 32; beyond, to rounding), with Jacobi decoding to its tolerance
                only. A text that stopped early keeps its last embedding.
            decoding: "sequential", "jacobi" (all steps together, in a few passes) or "auto" (whichever is faster for
                the texts of a batch; embeddings depend on it, to the tolerance); default: the config's.
            jacobi_tolerance: with "jacobi" and "auto", a text is done when a pass moves its last embedding by less,
                1 - cosine; 0 gives the sequential result. Default: the config's. Sequential decoding takes none.
            show_progress_bar: default: on a terminal, for more than 64 texts.
            devices: spread the texts over these devices, each with a copy of the model during the call.

        Returns:
            float32 [n, D], or [n, K, D] with `return_steps` ([n, max_steps, D] with "auto"); in the order of `texts`.
            An empty text is embedded as its end-of-sequence token. The same text gives the same embedding, to
            rounding, whatever it is encoded with.

        Raises:
            TypeError: a text is not a string; the message names its index.
            ValueError: a text is no Unicode (half of a surrogate pair), or an argument is out of range.
        """
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
            decoding=decoding,
            jacobi_tolerance=jacobi_tolerance,
        )
        if devices is not None:
            return encode_on(devices, self, texts, options, show_progress_bar=show_progress_bar)
        return encode(self, texts, options, show_progress_bar=show_progress_bar)

    def encode_stream(
        self, texts: Iterable[str], *, window: int = STREAM_WINDOW, **options: Any
    ) -> Iterator[np.ndarray]:
        """Embeds an iterable of unknown length in bounded memory: yields one embedding per text, in order.

        Args:
            texts: strings. They are read in the caller's thread, at most two windows ahead of the embeddings. If the
                iterable raises, the embeddings of all texts before come first, then its exception.
            window: number of texts that are held at once, sorted by length and batched together.
            options: the arguments of `encode` from `instruction` to `jacobi_tolerance`.

        The consumer may stop at any time (`close()`, `break`).

        Yields:
            float32 [D], or [K, D] with `return_steps`.
        """
        return encode_stream(self, texts, EncodeOptions.of(self, **options), window=window)

    def inspect(
        self,
        texts: str | Sequence[str],
        *,
        instruction: str | None = None,
        num_steps: int | None = None,
        top_n: int = 8,
        max_length: int | None = None,
    ) -> list[TextInspection]:
        """Describes the soft tokens: per text and step the top tokens, their probabilities, the entropy, and how far
        the embedding moved (cosine to the step before). See `gircse.inspect.soft_tokens`."""
        return inspect(self, texts, instruction=instruction, num_steps=num_steps, top_n=top_n, max_length=max_length)
