"""Texts to token ids: the checks of texts, the prompt template, the cut to a length, and padding."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from gircse.integers import check_integer
from gircse.lm.prompts import format_query

if TYPE_CHECKING:
    from gircse.embedder import Embedder


def check_texts(texts: str | Sequence[str]) -> list[str]:
    """A list of strings; a single string becomes a list of one.

    Raises:
        TypeError: `texts` is not a sequence, or holds something that is not a string (its index is named).
        ValueError: a string is no Unicode text.
    """
    if isinstance(texts, str):
        check_text("texts", texts)
        return [texts]
    texts = list(as_iterator(texts, (bytes, dict, set), "a string or a list of strings"))
    for index, text in enumerate(texts):
        check_text(f"texts[{index}]", text)
    return texts


def as_iterator(texts: Iterable[str], refused: tuple[type, ...], expected: str) -> Iterator[str]:
    try:
        if not isinstance(texts, refused):
            return iter(texts)
    except TypeError:  # also of what has an __iter__, such as a 0-dimensional tensor
        pass
    raise TypeError(f"texts: got {type(texts).__name__}, expected {expected}")


def check_text(name: str, text: object, expected: str = "str") -> None:
    """
    Raises:
        TypeError: not a string. ValueError: it holds half of a surrogate pair, which no tokenizer takes.
    """
    if not isinstance(text, str):
        raise TypeError(f"{name}: got {type(text).__name__}, expected {expected}")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            at = error.start
            raise ValueError(
                f"{name}: got {text[at]!r} at character {at}, expected Unicode text: half a pair"
            ) from None


class Tokens(NamedTuple):
    """Token ids of each prompt, and how many prompts were cut."""

    rows: list[list[int]]
    cut: int


class PromptTokenizer:
    """Texts -> prompts -> `Tokens`, without special tokens, cut to `max_length` where the tokenizer truncates."""

    def __init__(self, model: Embedder, instruction: str | None, max_length: int) -> None:
        self.tokenizer, self.template = model.tokenizer, model.config.prompt_template
        self.from_left = model.tokenizer.truncation_side == "left"
        self.eos = [model.tokenizer.eos_token_id] if model.config.append_eos else []
        self.instruction, self.max_length = instruction, max_length

    def __call__(self, texts: Sequence[str]) -> Tokens:
        if not texts:
            return Tokens([], 0)
        prompts = [format_query(self.instruction, text, self.template) for text in texts]
        ids: list[list[int]] = self.tokenizer(prompts, add_special_tokens=False, verbose=False)["input_ids"]
        keep = self.max_length - len(self.eos)
        # an empty prompt has no last token to start from: it is the end-of-sequence (= padding) token
        rows = [self._cut(row, keep) + self.eos or [self.tokenizer.pad_token_id] for row in ids]
        return Tokens(rows, sum(len(row) > keep for row in ids))

    def _cut(self, row: list[int], keep: int) -> list[int]:
        return row[max(len(row) - keep, 0) :] if self.from_left else row[:keep]


def tokenize(
    model: Embedder, texts: Sequence[str], *, instruction: str | None, max_length: int, num_steps: int
) -> list[list[int]]:
    """Token ids of each prompt, without special tokens, cut to `max_length` with one counted warning.

    Raises:
        TypeError, ValueError: an instruction that is not a string, a `max_length` below 1.
    """
    if instruction is not None:
        check_text("instruction", instruction, "str or None")
    tokenizer = PromptTokenizer(model, instruction, prompt_limit(model, max_length, num_steps))
    rows, cut = tokenizer(texts)
    warn_cut(cut, len(rows), tokenizer)
    return rows


def prompt_limit(model: Embedder, max_length: int, num_steps: int) -> int:
    """`max_length`, or less where the model's positions must hold the steps as well.

    Raises:
        ValueError: `max_length` below 1, or more steps than positions.
    """
    max_length = check_integer("max_length", max_length, least=1)
    positions = model.causal_lm.max_positions
    if positions is None or max_length + num_steps <= positions:
        return max_length
    if num_steps >= positions:
        raise ValueError(f"num_steps: got {num_steps}, expected fewer than the model's {positions} positions")
    return positions - num_steps


def warn_cut(cut: int, total: int, tokenizer: PromptTokenizer) -> None:
    if cut:
        end = "beginning (the tokenizer's truncation_side)" if tokenizer.from_left else "end"
        warnings.warn(
            f"{cut} of {total} texts are longer than max_length={tokenizer.max_length} tokens and were cut at the "
            + end,
            stacklevel=4,
        )


def pad(rows: Sequence[Sequence[int]], *, pad_id: int) -> tuple[Tensor, Tensor]:
    """Rows of token ids -> input_ids, attention_mask [B, N] int64 on the CPU, padded on the right."""
    lengths = torch.tensor([len(row) for row in rows])
    input_ids = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(row) for row in rows], batch_first=True, padding_value=pad_id
    )
    return input_ids, (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
