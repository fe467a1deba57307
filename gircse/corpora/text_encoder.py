"""`TextEncoder`: a table of texts to the same table with embeddings, by a model that is loaded once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from gircse.corpora.columns import check_values, embedding_column, texts_of
from gircse.corpora.job import EncodeJob
from gircse.encode.pipeline import EncodeOptions
from gircse.model import GIRCSE

_SHOWN = 60  # characters of a text in an error


class TextEncoder:
    """`encoder(table)` is the table with the job's columns of embeddings behind its own.

    Args:
        job: what to encode. Its model is loaded here, with its adapter merged.

    Raises:
        ValueError, TypeError: an option of the job is none of `GIRCSE.from_pretrained` or `GIRCSE.encode`, or out of
            range.
    """

    _process: int | None = None  # which process loaded the model; none in a copy

    def __init__(self, job: EncodeJob) -> None:
        from transformers.utils import logging

        logging.disable_progress_bar()  # one bar for each of many processes
        self.job = job
        self.model = GIRCSE.from_pretrained(job.model, adapter=job.adapter, merge_adapter=True, **job.load)
        # the arguments are checked now, not when a table comes
        options, *_ = [EncodeOptions.of(self.model, **self._options(column)) for column in job.columns]
        self._shape = (options.columns, options.dim) if job.return_steps else (options.dim,)
        self._process = os.getpid()

    def __call__(self, table: pa.Table, first_row: int | None = None) -> pa.Table:
        """
        Args:
            table: any columns. A null text gives a null embedding.
            first_row: the number of its first row, for errors that name a row; default: rows are counted from 0.

        Raises:
            ValueError: a row cannot be encoded and the job says "raise"; a column is missing.
            TypeError: a column does not hold strings.
            RuntimeError: the process is not the one that loaded the model.
        """
        if self._process != os.getpid():
            raise RuntimeError(
                "TextEncoder: called in another process than the one that loaded the model (as by "
                "datasets.map(num_proc=..)), expected one process, or a TextEncoder made in each"
            )
        self.job.check_columns(table.column_names)
        for column in self.job.columns:
            for name, values in zip(
                self.job.outputs(column), self._encoded(table[column], column, first_row), strict=True
            ):
                table = table.append_column(name, values)
        return table

    def _encoded(self, values: pa.ChunkedArray, column: str, first_row: int | None) -> list[pa.Array]:
        texts, reasons = texts_of(column, values)
        good = [row for row, text in enumerate(texts) if text is not None]
        embeddings = np.zeros((len(texts), *self._shape), np.float32)
        missing = np.ones(len(texts), dtype=bool)
        if reasons and self.job.on_error == "raise":
            self._refuse(column, min(reasons), first_row, reasons[min(reasons)])
        for rows, found in self._tried(good, texts, self._options(column)):
            if isinstance(found, Exception):
                reason = " ".join(f"{type(found).__name__}: {found}".split())
                if self.job.on_error == "raise":
                    self._refuse(column, rows[0], first_row, f"{texts[rows[0]]!r:.{_SHOWN}}: {reason}", found)
                reasons[rows[0]] = reason
            else:
                embeddings[rows], missing[rows] = found, False
        result, scales = embedding_column(embeddings, missing, self.job.output_dtype)
        columns = [result] if scales is None else [result, scales]
        if self.job.on_error == "null":
            columns.append(pa.array([reasons.get(row) for row in range(len(texts))], pa.string()))
        return columns

    def _tried(
        self, rows: list[int], texts: list[str | None], options: dict[str, Any]
    ) -> Iterator[tuple[list[int], Any]]:
        """Rows with their embeddings, or a single row with its exception. A batch that fails is halved."""
        if not rows:
            return
        found: Any
        try:
            found = self.model.encode([texts[row] or "" for row in rows], show_progress_bar=False, **options)
            check_values(found, self.job.output_dtype)
        except Exception as error:
            if is_broken_device(error):
                raise
            found = error
        if len(rows) == 1 or not isinstance(found, Exception):
            yield rows, found
            return
        half = len(rows) // 2
        yield from self._tried(rows[:half], texts, options)
        yield from self._tried(rows[half:], texts, options)

    def _options(self, column: str) -> dict[str, Any]:
        """The arguments of `GIRCSE.encode`."""
        job = self.job
        own = {"instruction": job.instruction_of(column), "num_steps": job.num_steps, "return_steps": job.return_steps}
        return {**job.encode, **own}

    def _refuse(
        self, column: str, row: int, first_row: int | None, reason: str, cause: Exception | None = None
    ) -> None:
        where = f"row {row} of this table" if first_row is None else f"row {first_row + row}"
        raise ValueError(f"{column}: {where} cannot be encoded: {reason}") from cause

    def __getstate__(self) -> dict[str, Any]:
        """Hugging Face's datasets hashes a function by its pickle, and takes an earlier result for the same hash. So
        the pickle has the job and a digest of the weights; it cannot encode."""
        digest = hashlib.sha256()
        for name, tensor in self.model.base.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
        return {"job": self.job, "weights": digest.hexdigest()}


def is_broken_device(error: BaseException) -> bool:
    """Whether a CUDA context gives nothing but errors from now on, as after an illegal access: only another process can
    go on."""
    broken = getattr(torch, "AcceleratorError", ())
    return isinstance(error, broken) and not isinstance(error, torch.OutOfMemoryError)
