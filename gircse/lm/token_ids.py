"""Token ids that come in: whether the model can take them, checked before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_rows(
    rows: Sequence[Sequence[int]], vocabulary: int, num_steps: int = 0, *, positions: int | None = None
) -> None:
    """
    Raises:
        ValueError: a row without a token or with too many, or a token id that the embedding table has no row for.
    """
    for index, row in enumerate(rows):
        if not len(row):
            raise ValueError(f"rows[{index}]: got no token, expected at least one")
        if positions is not None and len(row) + num_steps > positions:
            raise ValueError(
                f"rows[{index}]: got {len(row)} tokens and num_steps={num_steps}, expected at most {positions} "
                "positions together"
            )
    if len(rows):
        check_ids(min(map(min, rows)), max(map(max, rows)), vocabulary)


def check_ids(low: int, high: int, vocabulary: int) -> None:
    """Raises ValueError if token ids from `low` to `high` are not all in the embedding table."""
    if low < 0 or high >= vocabulary:
        why = (
            ": the tokenizer has tokens that the model has no embeddings for (base.resize_token_embeddings makes them)"
            if low >= 0
            else ""
        )
        raise ValueError(f"input_ids: got {low} to {high}, expected token ids from 0 to {vocabulary - 1}{why}")


def check_prompt(
    input_ids: Tensor, attention_mask: Tensor, num_steps: int, *, positions: int | None, vocabulary: int
) -> None:
    """Of `GIRCSE.rollout`. Values are looked at only where that is cheap.

    Raises:
        TypeError, ValueError: wrong ranks, shapes or dtypes, a row without a token, too many tokens, unknown ones.
    """
    for name, value in (("input_ids", input_ids), ("attention_mask", attention_mask)):
        if not isinstance(value, Tensor) or value.is_floating_point() or value.is_complex():
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name}: got {got}, expected an integer tensor [B, N]")
        if value.device.type == "meta" or value.layout != torch.strided:
            raise ValueError(f"{name}: got {value.layout} on {value.device}, expected a dense tensor with values")
        if value.ndim != 2 or value.shape[1] == 0:
            raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected [B, N] with N >= 1")
    if input_ids.shape != attention_mask.shape:
        raise ValueError(
            f"attention_mask: got shape {tuple(attention_mask.shape)}, expected input_ids' {tuple(input_ids.shape)}"
        )
    if positions is not None and input_ids.shape[1] + num_steps > positions:
        raise ValueError(
            f"input_ids: got {input_ids.shape[1]} tokens and num_steps={num_steps}, expected at most {positions} "
            "positions together (max_position_embeddings, or the length from which on rotary frequencies change)"
        )
    if _readable(attention_mask) and not attention_mask.bool().any(dim=1).all():
        rows = (~attention_mask.bool().any(dim=1)).nonzero().flatten().tolist()
        raise ValueError(f"attention_mask: rows {rows[:8]} have no token, expected at least one in every row")
    if _readable(input_ids) and input_ids.numel():
        check_ids(int(input_ids.min()), int(input_ids.max()), vocabulary)


def _readable(tensor: Tensor) -> bool:
    """Where looking at values costs no device synchronisation and no break in a compiled graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()
