"""What makes up a batch: rows of one source or of all, written for the model, and which candidates are false negatives.

A batch is the whole contrastive batch of a step, whatever the number of processes that share it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gircse.data.false_negatives import false_negatives
from gircse.data.rows import Row, format_passage, format_row
from gircse.data.sampling import BatchSampler, SourceSchedule, source_seed
from gircse.data.sources import JoinedSource, RecordSource, Source, open_sources

if TYPE_CHECKING:
    from torch import Tensor

    from gircse.train.config import TrainConfig


@dataclass(frozen=True)
class Example:
    """A row as one step uses it, every text written as the model reads it.

    Attributes:
        id: where it comes from, "file:line" or "source:row number", for messages.
        query: the query's prompt.
        positive: the one positive of this step.
        negatives: the hard negatives of this step, maybe none; rows of a batch may have different numbers of them.
        other_positives: the row's further positives. They are no candidates; see `mask_of`.
        instruction: of the row; the texts hold it already, where they carry it.
    """

    id: str
    query: str
    positive: str
    negatives: tuple[str, ...] = ()
    other_positives: tuple[str, ...] = ()
    instruction: str = ""


class TrainingData:
    """The rows of a training run and the batch of each step: a pure function of the data, the settings and the step.

    Homogeneous batches (the default) take all rows of a batch from one source, so that every negative is of the same
    task. The source of each batch is drawn by weight; the default weights are the numbers of whole batches in the
    sources, so an epoch passes once through each. Mixed batches draw every row: without weights an epoch is a
    permutation of all rows of all sources; with weights every batch has each source's share of rows, rounded up or
    down, and a row may come twice in a batch where its source begins anew. In each source, rows come in permutations.

    Attributes:
        num_rows: rows of all sources.
        steps_per_epoch: batches in one pass over as many rows as there are.
        sources: in the order of `config.data`.
        fingerprint: hexadecimal; the same for the same rows in the same order.
    """

    def __init__(self, sources: Sequence[Source], config: TrainConfig) -> None:
        """See `open`.

        Raises:
            ValueError: fewer rows than a batch needs, or weights that do not fit the sources.
        """
        self.sources = list(sources)
        self.num_rows = sum(map(len, self.sources))
        self.fingerprint = hashlib.blake2b(
            json.dumps([[len(source), source.fingerprint] for source in self.sources]).encode(), digest_size=16
        ).hexdigest()
        self._template = config.gircse_config().prompt_template
        self._max_negatives = config.max_negatives
        self._batch_size, seed, weights = config.batch_size, config.seed, config.weights
        if weights and len(weights) != len(self.sources):
            raise ValueError(f"weights: got {len(weights)}, expected one for each of the {len(self.sources)} sources")
        self._row_by_row = config.batching == "mixed" and len(self.sources) > 1 and bool(weights)
        self._drawn_from = self.sources
        if config.batching == "mixed" and not self._row_by_row:
            self._drawn_from = [JoinedSource(self.sources)]
        self._check_size()
        batches = [len(source) // self._batch_size for source in self._drawn_from]
        self.steps_per_epoch = self.num_rows // self._batch_size if self._row_by_row else sum(batches)
        self._samplers = [
            BatchSampler(len(source), 1 if self._row_by_row else self._batch_size, seed=source_seed(seed, number))
            for number, source in enumerate(self._drawn_from)
        ]
        self._schedule = SourceSchedule(
            weights if weights and len(self._drawn_from) > 1 else batches,
            period=self._batch_size if self._row_by_row else self.steps_per_epoch,
            seed=seed,
        )

    @classmethod
    def open(cls, config: TrainConfig, *, rows: Sequence[Row] | None = None) -> TrainingData:
        """Checks every row of `config.data` (or `rows`, as one source in memory) and returns the data.

        Files may be larger than memory, see `gircse.data.sources`.

        Raises:
            DataError: bad rows, each with file, line and reason.
            ValueError: no data, fewer rows than a batch needs, settings that do not fit the sources.
        """
        if rows is not None:
            rows = list(rows)
            return cls([RecordSource("rows", rows, instruction="")] if rows else [], config)
        return cls(open_sources(config.data, config.instructions), config)

    def batch(self, step: int) -> list[Example]:
        """The `config.batch_size` examples of a step (from 0).

        Which of several positives and negatives is used is another draw in every epoch.

        Raises:
            DataError: a file is no longer what was checked; names the line.
        """
        return [self._example(*drawn) for drawn in self._draw(step)]

    def _draw(self, step: int) -> Iterator[tuple[int, int, int]]:
        """(source, how many draws of that source came before, row) of each example of a step."""
        if self._row_by_row:
            for place in range(self._batch_size):
                source, before = self._schedule.draw(step * self._batch_size + place)
                yield source, before, self._samplers[source].batch(before)[0]
        else:
            source, before = self._schedule.draw(step)
            for row in self._samplers[source].batch(before):
                yield source, before, row

    def _example(self, number: int, before: int, index: int) -> Example:
        source, sampler = self._drawn_from[number], self._samplers[number]
        row = source.row(index)
        chosen = sampler.positive(before, index, len(row.positives))
        query, positive, negatives = format_row(row, positive=chosen, template=self._template)
        wanted = len(negatives) if self._max_negatives is None else self._max_negatives
        kept = sampler.negatives(before, index, len(negatives), wanted)
        return Example(
            id=source.place(index),
            query=query,
            positive=positive,
            negatives=tuple(negatives[i] for i in kept),
            other_positives=tuple(
                format_passage(row.instruction, text, self._template)
                for i, text in enumerate(row.positives)
                if i != chosen
            ),
            instruction=row.instruction,
        )

    def _check_size(self) -> None:
        if not self.num_rows:
            raise ValueError("data: got no training rows, expected at least one file or data set")
        if self._row_by_row:
            smallest, size = "all sources", self.num_rows
        else:
            source = min(self._drawn_from, key=len)
            smallest, size = source.name, len(source)
        if size < self._batch_size:
            hint = " (batching = 'mixed' fills a batch from all sources)" if len(self._drawn_from) > 1 else ""
            raise ValueError(
                f"batch_size: got {self._batch_size}, expected at most the number of rows, {size} in {smallest}{hint}"
            )

    def to_json(self) -> str:
        """What the data were, to be saved with the run."""
        sources = [
            {"name": source.name, "rows": len(source), "fingerprint": source.fingerprint} for source in self.sources
        ]
        return json.dumps(sources, indent=2) + "\n"

    def check_continues(self, path: Path) -> None:
        """Raises ValueError if the data are not those of a run that saved `to_json` in `path`."""
        try:
            was = [(s["rows"], s["fingerprint"]) for s in json.loads(path.read_text(encoding="utf-8"))]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(f"{path}: cannot be read: {error!r}") from None
        now = [(len(source), source.fingerprint) for source in self.sources]
        if was == now:
            return
        if len(was) != len(now):
            raise ValueError(f"resume: the run was started with {len(was)} sources of data, now there are {len(now)}")
        changed = [
            f"{source.name}: had {old[0]:,} rows, has {new[0]:,}"
            if old[0] != new[0]
            else f"{source.name}: {new[0]:,} rows, but others"
            for source, old, new in zip(self.sources, was, now, strict=True)
            if old != new
        ]
        raise ValueError("resume: the data have changed since the run was started: " + "; ".join(changed))


def mask_of(examples: Sequence[Example], *, include_queries: bool = False) -> Tensor | None:
    """`false_negatives` of a batch, with the candidates in the order [positive of row 0, its negatives, positive of
    row 1, ..]. Texts are compared as the model reads them, with every run of white space as one space and none at the
    ends; case and punctuation count."""
    candidates: list[str] = []
    target = []
    for example in examples:
        target.append(len(candidates))
        candidates += map(_one_spaced, (example.positive, *example.negatives))
    return false_negatives(
        [_one_spaced(example.query) for example in examples],
        candidates,
        target,
        other_positives=[list(map(_one_spaced, example.other_positives)) for example in examples],
        include_queries=include_queries,
    )


def _one_spaced(text: str) -> str:
    return " ".join(text.split())
