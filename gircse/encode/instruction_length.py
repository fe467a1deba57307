"""An instruction so long that nothing of the text after it is read: every text would be the same one."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING

from gircse.lm.prompts import is_symmetric

if TYPE_CHECKING:
    from gircse.embedder import Embedder


def warn_if_nothing_is_left(
    model: Embedder, instruction: str | None, max_length: int, name: str = "max_length"
) -> None:
    """Warns where the prompt up to the text has no fewer tokens than a prompt may have.

    Args:
        max_length: tokens of a prompt.
        name: of the argument or setting that says so.
    """
    if not instruction or getattr(model.tokenizer, "truncation_side", "right") == "left":  # which cuts the instruction
        return
    before = model.config.prompt_template.split("{text}")[0].replace("{instruction}", instruction)
    keep = max_length - model.config.append_eos
    if len(before.encode()) < keep:  # no token is shorter than a byte
        return
    tokens = len(model.tokenizer(before, add_special_tokens=False, verbose=False)["input_ids"])
    if tokens >= keep:
        shown = instruction if len(instruction) <= 60 else instruction[:60] + ".."
        warnings.warn(
            f"{name}: got {max_length}, but the instruction {shown!r} alone has {tokens} tokens: nothing of its texts "
            "is read, and all of them are the same",
            stacklevel=4,
        )


def warn_of_rows(
    model: Embedder, instructions: Iterable[str], *, query_max_length: int, passage_max_length: int
) -> None:
    """`warn_if_nothing_is_left` for the instructions of training rows, whose passages carry them in symmetric tasks."""
    for instruction in sorted(set(instructions)):
        warn_if_nothing_is_left(model, instruction, query_max_length, "query_max_length")
        if is_symmetric(instruction):
            warn_if_nothing_is_left(model, instruction, passage_max_length, "passage_max_length")
