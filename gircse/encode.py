"""Texts to embeddings: windows of texts, tokenised one ahead in a thread, through the engine, back in order."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gircse.instruction_length import warn_if_nothing_is_left
from gircse.integers import check_integer
from gircse.prompts import format_query

if TYPE_CHECKING:
    from gircse.model import GIRCSE

# Texts that are sorted and batched together. Larger ones make more even batches, smaller ones give results sooner.
WINDOW = 16384
STREAM_WINDOW = 2048
AUTO = "auto"


@dataclass(frozen=True)
class EncodeOptions:
    """What `GIRCSE.encode` and `encode_stream` have in common, checked.

    Attributes:
        num_steps: K, or the most steps of a row where `tolerance` is set.
        tolerance: None, or rows stop once their embedding moves less than this, twice in a row.
        dim: width of the result.
    """

    instruction: str | None
    num_steps: int
    tolerance: float | None
    batch_size: int | None
    max_length: int
    normalize: bool
    dim: int
    return_steps: bool

    @classmethod
    def of(
        cls,
        model: GIRCSE,
        *,
        instruction: str | None,
        num_steps: int | str | None,
        tolerance: float,
        max_steps: int,
        batch_size: int | None,
        max_length: int | None,
        normalize: bool,
        truncate_dim: int | None,
        return_steps: bool,
    ) -> EncodeOptions:
        """
        Raises:
            TypeError, ValueError: an argument out of range, by name.
        """
        adaptive = isinstance(num_steps, str)
        if adaptive:
            if num_steps != AUTO:
                raise ValueError(f"num_steps: got {num_steps!r}, expected an integer >= 0 or {AUTO!r}")
            if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)) or not 0 < tolerance <= 2:
                raise ValueError(f"tolerance: got {tolerance!r}, expected a number above 0 (a cosine distance)")
            max_steps = check_integer("max_steps", max_steps, least=1)
        steps = model.config.with_steps(max_steps if adaptive else num_steps).num_steps  # type: ignore[arg-type]
        if batch_size is not None:
            batch_size = check_integer("batch_size", batch_size, least=1)
        if truncate_dim is not None:
            truncate_dim = check_integer("truncate_dim", truncate_dim, least=1, most=model.embedding_dimension)
        if instruction is not None:
            check_text("instruction", instruction, "str or None")
        for name, flag in (("normalize", normalize), ("return_steps", return_steps)):
            if not isinstance(flag, (bool, np.bool_)):
                raise TypeError(f"{name}: got {type(flag).__name__}, expected a bool")
        limit = prompt_limit(model, model.config.max_length(instruction, max_length), steps)
        warn_if_nothing_is_left(model, instruction, limit)
        return cls(
            instruction=instruction,
            num_steps=steps,
            tolerance=float(tolerance) if adaptive else None,
            batch_size=batch_size,
            max_length=limit,
            normalize=normalize,
            dim=truncate_dim or model.embedding_dimension,
            return_steps=return_steps,
        )

    @property
    def columns(self) -> int:
        """Embeddings kept per text."""
        return max(self.num_steps, 1) if self.return_steps else 1


def encode(
    model: GIRCSE, texts: str | Sequence[str], options: EncodeOptions, *, show_progress_bar: bool | None
) -> np.ndarray:
    """See `GIRCSE.encode`."""
    single = isinstance(texts, str)
    texts = check_texts(texts)
    windows = (texts[start : start + WINDOW] for start in range(0, len(texts), WINDOW))
    embeddings = np.empty((len(texts), options.columns, options.dim), dtype=np.float32)
    start = 0
    with _progress(len(texts), show_progress_bar) as update:
        for block in _embed_windows(model, windows, options, update):
            embeddings[start : start + len(block)] = block
            start += len(block)
    if not options.return_steps:
        embeddings = embeddings[:, 0]
    return embeddings[0] if single else embeddings


def encode_stream(model: GIRCSE, texts: Iterable[str], options: EncodeOptions, *, window: int) -> Iterator[np.ndarray]:
    """See `GIRCSE.encode_stream`."""
    window = check_integer("window", window, least=1)
    return _stream(model, _iterator(texts, (str, bytes, dict), "an iterable of strings"), options, window)


def _stream(model: GIRCSE, texts: Iterator[str], options: EncodeOptions, window: int) -> Iterator[np.ndarray]:
    for block in _embed_windows(model, _windows(texts, window), options, lambda count: None):
        yield from (block if options.return_steps else block[:, 0])


def _windows(texts: Iterator[str], size: int) -> Iterator[list[str]]:
    """Blocks of `size` texts. Where the source fails, what it gave before is passed on first."""
    index, failure = 0, None
    while failure is None:
        block: list[str] = []
        try:
            for text in islice(texts, min(size, sys.maxsize)):
                check_text(f"texts[{index + len(block)}]", text)
                block.append(text)
        except Exception as error:
            failure = error
        if block:
            yield block
        elif failure is None:
            return
        index += len(block)
    raise failure


def _embed_windows(
    model: GIRCSE, windows: Iterator[list[str]], options: EncodeOptions, update: Callable[[int], object]
) -> Iterator[np.ndarray]:
    """[n, columns, dim] of each window, in order; tokenises one window ahead in a thread."""
    cut = total = 0
    tokenizer = _Tokenizer(model, options.instruction, options.max_length)
    try:
        for rows, cut_here in _one_ahead(windows, tokenizer):
            cut, total = cut + cut_here, total + len(rows)
            yield _embed(model, rows, options, update)
    finally:
        _warn_cut(cut, total, tokenizer)


def _one_ahead(windows: Iterator[list[str]], tokenize: _Tokenizer) -> Iterator[Tokens]:
    """The windows tokenised; the next one is in work while the consumer has this one. Only the caller's thread touches
    the source.

    Raises:
        RuntimeError: in a process that was forked meanwhile: the thread that tokenises stayed in the other one.
    """
    process = os.getpid()
    with ThreadPoolExecutor(1, thread_name_prefix="gircse-tokenize") as pool:
        waiting: Future[Tokens] | None = None
        failure: Exception | None = None
        while failure is None:
            if os.getpid() != process:
                raise RuntimeError(
                    f"encode_stream: got process {os.getpid()}, forked from {process}, which began this stream; "
                    "expected the same one, or a new stream"
                )
            ahead = None
            try:
                ahead = pool.submit(tokenize, next(windows))
            except Exception as error:  # the end, or a source that fails: what it gave before is embedded first
                failure = error
            if waiting is not None:
                yield waiting.result()
            waiting = ahead
        if not isinstance(failure, StopIteration):
            raise failure


def _embed(model: GIRCSE, rows: list[list[int]], options: EncodeOptions, update: Callable[[int], object]) -> np.ndarray:
    """[n, columns, dim] float32 of one window."""
    embeddings = np.empty((len(rows), options.columns, options.dim), dtype=np.float32)

    def keep(chosen: list[int], states: Tensor, counts: Tensor) -> None:
        embeddings[chosen] = finish(model, states, counts, options).cpu().numpy()
        update(len(chosen))

    with model.inference() as engine:
        engine.run(
            rows,
            options.num_steps,
            keep,
            temperature=model.config.temperature,
            include_prompt=model.config.include_prompt_state,
            settled=None if options.tolerance is None else _settled(model, options.tolerance),
            max_rows=options.batch_size,
        )
    return embeddings


def finish(model: GIRCSE, states: Tensor, counts: Tensor, options: EncodeOptions) -> Tensor:
    """States [n, K, D], of which the first `counts` [n] count, -> embeddings [n, columns, dim] float32.

    With `return_steps` a row that stopped early keeps its last embedding from there on.
    """
    pooled = model.pool(states)
    last = (counts - 1).to(pooled.device)[:, None]
    if options.return_steps:
        last = torch.arange(pooled.shape[1], device=pooled.device).minimum(last)
    pooled = pooled.gather(1, last[..., None].expand(-1, -1, pooled.shape[2]))[..., : options.dim].float()
    return F.normalize(pooled, dim=-1) if options.normalize else pooled


def _settled(model: GIRCSE, tolerance: float) -> Callable[[Tensor], Tensor]:
    """[n, k, D] states -> [n] bool: the embedding moved less than `tolerance` in both of the last two steps.

    Two, because one small step is often followed by a larger one.
    """

    def settled(states: Tensor) -> Tensor:
        pooled = model.pool(states)
        if pooled.shape[1] < 3:
            return pooled.new_zeros(len(pooled), dtype=torch.bool)
        moved = 1 - F.cosine_similarity(pooled[:, -3:-1], pooled[:, -2:], dim=-1)
        return (moved < tolerance).all(dim=1)

    return settled


def check_texts(texts: str | Sequence[str]) -> list[str]:
    """A list of strings; a single string becomes a list of one.

    Raises:
        TypeError: `texts` is not a sequence, or holds something that is not a string (its index is named).
        ValueError: a string is no Unicode text.
    """
    if isinstance(texts, str):
        check_text("texts", texts)
        return [texts]
    texts = list(_iterator(texts, (bytes, dict, set), "a string or a list of strings"))
    for index, text in enumerate(texts):
        check_text(f"texts[{index}]", text)
    return texts


def _iterator(texts: Iterable[str], refused: tuple[type, ...], expected: str) -> Iterator[str]:
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


class _Tokenizer:
    """Texts -> prompts -> `Tokens`, without special tokens, cut to `max_length` where the tokenizer truncates."""

    def __init__(self, model: GIRCSE, instruction: str | None, max_length: int) -> None:
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
    model: GIRCSE, texts: Sequence[str], *, instruction: str | None, max_length: int, num_steps: int
) -> list[list[int]]:
    """Token ids of each prompt, without special tokens, cut to `max_length` with one counted warning.

    Raises:
        TypeError, ValueError: an instruction that is not a string, a `max_length` below 1.
    """
    if instruction is not None:
        check_text("instruction", instruction, "str or None")
    tokenizer = _Tokenizer(model, instruction, prompt_limit(model, max_length, num_steps))
    rows, cut = tokenizer(texts)
    _warn_cut(cut, len(rows), tokenizer)
    return rows


def prompt_limit(model: GIRCSE, max_length: int, num_steps: int) -> int:
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


def _warn_cut(cut: int, total: int, tokenizer: _Tokenizer) -> None:
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


@contextmanager
def _progress(total: int, show: bool | None) -> Iterator[Callable[[int], object]]:
    """Yields what is told how many more texts are done. Without a bar tqdm and its locks stay out of it: a fork would
    leave the child with them taken."""
    if not (show if show is not None else total > 64 and sys.stderr.isatty()):
        yield lambda count: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, desc="encode", unit="text", dynamic_ncols=True) as bar:
        yield bar.update
