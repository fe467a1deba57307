"""Texts to embeddings: windows of texts, tokenised one ahead in a thread, go through the engine and back in order."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gircse.encode.tokens import (
    PromptTokenizer,
    Tokens,
    as_iterator,
    check_text,
    check_texts,
    prompt_limit,
    warn_cut,
    warn_if_nothing_is_left,
)
from gircse.engine.jacobi import Jacobi
from gircse.integers import check_integer

if TYPE_CHECKING:
    from gircse.embedder import Embedder

# Number of texts that are sorted and batched together. More make the batches more even; fewer give results sooner.
WINDOW = 16384
STREAM_WINDOW = 2048
AUTO = "auto"


@dataclass(frozen=True)
class EncodeOptions:
    """The arguments of `GIRCSE.encode` and `encode_stream`, checked.

    Attributes:
        num_steps: K, or the most steps of a row where `tolerance` is set.
        tolerance: None, or rows stop once their embedding moves less than this, twice in a row.
        dim: width of the result.
        jacobi: how all steps are made together; None: one step after the other.
    """

    instruction: str | None
    num_steps: int
    tolerance: float | None
    batch_size: int | None
    max_length: int
    normalize: bool
    dim: int
    return_steps: bool
    jacobi: Jacobi | None

    @classmethod
    def of(
        cls,
        model: Embedder,
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
    ) -> EncodeOptions:
        """See `GIRCSE.encode`.

        Raises:
            TypeError, ValueError: an argument is out of range; the message names it.
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
            jacobi=Jacobi.of(model.config.with_decoding(decoding, jacobi_tolerance)),
        )

    @property
    def columns(self) -> int:
        """Number of embeddings that are kept per text."""
        return max(self.num_steps, 1) if self.return_steps else 1


def encode(
    model: Embedder, texts: str | Sequence[str], options: EncodeOptions, *, show_progress_bar: bool | None
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


def encode_stream(
    model: Embedder, texts: Iterable[str], options: EncodeOptions, *, window: int
) -> Iterator[np.ndarray]:
    """See `GIRCSE.encode_stream`."""
    window = check_integer("window", window, least=1)
    return _stream(model, as_iterator(texts, (str, bytes, dict), "an iterable of strings"), options, window)


def _stream(model: Embedder, texts: Iterator[str], options: EncodeOptions, window: int) -> Iterator[np.ndarray]:
    for block in _embed_windows(model, _windows(texts, window), options, lambda count: None):
        yield from (block if options.return_steps else block[:, 0])


def _windows(texts: Iterator[str], size: int) -> Iterator[list[str]]:
    """Blocks of `size` texts. If the source raises, the texts that it gave before come first."""
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
    model: Embedder, windows: Iterator[list[str]], options: EncodeOptions, update: Callable[[int], object]
) -> Iterator[np.ndarray]:
    """[n, columns, dim] of each window, in order. A thread tokenises one window ahead."""
    cut = total = 0
    tokenizer = PromptTokenizer(model, options.instruction, options.max_length)
    try:
        for rows, cut_here in _one_ahead(windows, tokenizer):
            cut, total = cut + cut_here, total + len(rows)
            yield _embed(model, rows, options, update)
    finally:
        warn_cut(cut, total, tokenizer)


def _one_ahead(windows: Iterator[list[str]], tokenize: PromptTokenizer) -> Iterator[Tokens]:
    """The windows tokenised. A thread works on the next one while the consumer has this one. Only the caller's thread
    reads the source.

    Raises:
        RuntimeError: the process was forked meanwhile, and the thread that tokenises is in the parent.
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
            except Exception as error:  # the end, or an error of the source, which comes after the texts before it
                failure = error
            if waiting is not None:
                yield waiting.result()
            waiting = ahead
        if not isinstance(failure, StopIteration):
            raise failure


def _embed(
    model: Embedder, rows: list[list[int]], options: EncodeOptions, update: Callable[[int], object]
) -> np.ndarray:
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
            jacobi=options.jacobi,
        )
    return embeddings


def finish(model: Embedder, states: Tensor, counts: Tensor, options: EncodeOptions) -> Tensor:
    """States [n, K, D], of which the first `counts` [n] count, -> embeddings [n, columns, dim] float32.

    With `return_steps` a row that stopped early keeps its last embedding from there on.
    """
    pooled = model.pool(states)
    last = (counts - 1).to(pooled.device)[:, None]
    if options.return_steps:
        last = torch.arange(pooled.shape[1], device=pooled.device).minimum(last)
    pooled = pooled.gather(1, last[..., None].expand(-1, -1, pooled.shape[2]))[..., : options.dim].float()
    return F.normalize(pooled, dim=-1) if options.normalize else pooled


def _settled(model: Embedder, tolerance: float) -> Callable[[Tensor], Tensor]:
    """[n, k, D] states -> [n] bool: the embedding moved less than `tolerance` in both of the last two steps.

    It takes two, because a larger step often follows a single small one.
    """

    def settled(states: Tensor) -> Tensor:
        pooled = model.pool(states)
        if pooled.shape[1] < 3:
            return pooled.new_zeros(len(pooled), dtype=torch.bool)
        moved = 1 - F.cosine_similarity(pooled[:, -3:-1], pooled[:, -2:], dim=-1)
        return (moved < tolerance).all(dim=1)

    return settled


@contextmanager
def _progress(total: int, show: bool | None) -> Iterator[Callable[[int], object]]:
    """Yields a function that is called with the number of further texts done. Without a bar, tqdm is not imported: a
    fork could leave the child with its locks held."""
    if not (show if show is not None else total > 64 and sys.stderr.isatty()):
        yield lambda count: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, desc="encode", unit="text", dynamic_ncols=True) as bar:
        yield bar.update
