"""Texts to embeddings: tokenise, sort by length, batch under a token budget, roll out, restore the order."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gircse.prompts import format_query

if TYPE_CHECKING:
    from gircse.model import GIRCSE

# Prompt tokens of one batch. Enough rows to keep the matrix products busy, few enough to stay small beside the weights.
TOKEN_BUDGET = {"cpu": 4096, "cuda": 32768}
MAX_ROWS = {"cpu": 64, "cuda": 512}


def encode(
    model: GIRCSE,
    texts: str | Sequence[str],
    *,
    instruction: str | None,
    num_steps: int | None,
    batch_size: int | None,
    max_length: int,
    normalize: bool,
    truncate_dim: int | None,
    return_steps: bool,
    show_progress_bar: bool | None,
) -> np.ndarray:
    """See `GIRCSE.encode`."""
    single = isinstance(texts, str)
    texts = check_texts(texts)
    num_steps = model.config.with_steps(num_steps).num_steps
    _check_positive("batch_size", batch_size, optional=True)
    _check_positive("truncate_dim", truncate_dim, optional=True, at_most=model.embedding_dimension)
    dim = truncate_dim or model.embedding_dimension
    ids = tokenize(model, texts, instruction=instruction, max_length=max_length, num_steps=num_steps)
    embeddings = np.empty((len(texts), max(num_steps, 1) if return_steps else 1, dim), dtype=np.float32)

    batches = list(_batches(ids, batch_size, model.device.type))
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(), _progress(len(texts), show_progress_bar, len(batches) > 1) as progress:
            for rows in batches:
                input_ids, mask = pad([ids[row] for row in rows], pad_id=model.tokenizer.pad_token_id)
                pooled = model.pool(model.rollout(input_ids, mask, num_steps))
                pooled = (pooled if return_steps else pooled[:, -1:])[..., :dim].float()
                embeddings[rows] = (F.normalize(pooled, dim=-1) if normalize else pooled).cpu().numpy()
                progress.update(len(rows))
    finally:
        model.train(was_training)
    if not return_steps:
        embeddings = embeddings[:, 0]
    return embeddings[0] if single else embeddings


def check_texts(texts: str | Sequence[str]) -> list[str]:
    """A list of strings; a single string becomes a list of one.

    Raises:
        TypeError: `texts` is not a sequence, or holds something that is not a string (its index is named).
    """
    if isinstance(texts, str):
        return [texts]
    if isinstance(texts, (bytes, dict, set)) or not hasattr(texts, "__iter__"):
        raise TypeError(f"texts: got {type(texts).__name__}, expected a string or a list of strings")
    texts = list(texts)
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"texts[{index}]: got {type(text).__name__}, expected str")
    return texts


def tokenize(
    model: GIRCSE, texts: Sequence[str], *, instruction: str | None, max_length: int, num_steps: int
) -> list[list[int]]:
    """Token ids of each prompt, without special tokens, cut at the end to `max_length` with one counted warning.

    Raises:
        TypeError, ValueError: an instruction that is not a string, a `max_length` below 1.
    """
    if instruction is not None and not isinstance(instruction, str):
        raise TypeError(f"instruction: got {type(instruction).__name__}, expected str or None")
    _check_positive("max_length", max_length)
    positions = model.causal_lm.max_positions
    if positions is not None and max_length + num_steps > positions:
        if num_steps >= positions:
            raise ValueError(f"num_steps: got {num_steps}, expected fewer than the model's {positions} positions")
        max_length = positions - num_steps
    if not texts:
        return []
    template, tokenizer = model.config.prompt_template, model.tokenizer
    prompts = [format_query(instruction, text, template) for text in texts]
    ids: list[list[int]] = tokenizer(prompts, add_special_tokens=False, verbose=False)["input_ids"]
    eos = [tokenizer.eos_token_id] if model.config.append_eos else []
    keep = max_length - len(eos)
    cut = sum(len(row) > keep for row in ids)
    if cut:
        warnings.warn(
            f"{cut} of {len(ids)} texts are longer than max_length={max_length} tokens and were cut at the end",
            stacklevel=4,
        )
    # an empty prompt has no last token to start from: it is the end-of-sequence (= padding) token
    return [row[:keep] + eos or [tokenizer.pad_token_id] for row in ids]


def pad(rows: Sequence[Sequence[int]], *, pad_id: int) -> tuple[Tensor, Tensor]:
    """Rows of token ids -> input_ids, attention_mask [B, N] int64 on the CPU, padded on the right."""
    lengths = torch.tensor([len(row) for row in rows])
    input_ids = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(row) for row in rows], batch_first=True, padding_value=pad_id
    )
    return input_ids, (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()


def _batches(ids: Sequence[Sequence[int]], batch_size: int | None, device: str) -> Iterator[list[int]]:
    """Row indices of each batch, longest first: the largest batch comes at once, and the time left is overestimated.

    Batches do not depend on K, so the prefixes of a long rollout are bitwise those of a short one.
    """
    order = sorted(range(len(ids)), key=lambda row: -len(ids[row]))
    start = 0
    while start < len(order):
        longest = len(ids[order[start]])
        budget = TOKEN_BUDGET.get(device, TOKEN_BUDGET["cuda"]) // longest
        rows = batch_size or max(1, min(budget, MAX_ROWS.get(device, MAX_ROWS["cuda"])))
        yield order[start : start + rows]
        start += rows


def _progress(total: int, show: bool | None, worth_it: bool):
    from tqdm.auto import tqdm

    shown = show if show is not None else worth_it and sys.stderr.isatty()
    return tqdm(total=total, desc="encode", unit="text", disable=not shown, dynamic_ncols=True)


def _check_positive(name: str, value: int | None, *, optional: bool = False, at_most: int | None = None) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name}: got {value!r}, expected an integer >= 1")
    if at_most is not None and value > at_most:
        raise ValueError(f"{name}: got {value}, expected at most {at_most}")
