"""Texts of the study as token ids: the batches of every run and the test set of every corpus, in one file."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bench.quality_corpora import StudyCorpus
from gircse.data.rows import parse_row
from gircse.encode.tokens import PromptTokenizer
from gircse.lm.config import GircseConfig
from gircse.train.batches import TrainingData, mask_of
from gircse.train.config import TrainConfig


class Batch(NamedTuple):
    """One step of all runs.

    Attributes:
        ids, lengths: [runs, texts, N] and [runs, texts]; of each run the queries, then their documents.
        mask: [runs, queries, documents] bool, True where a document does not count for a query.
    """

    ids: Tensor
    lengths: Tensor
    mask: Tensor


class HeldOut(NamedTuple):
    """Token ids of a corpus's queries and documents [n, N], which document answers a query, graded pairs [pairs, 3]."""

    query_ids: Tensor
    query_lengths: Tensor
    document_ids: Tensor
    document_lengths: Tensor
    relevant: Tensor
    pairs: Tensor


@dataclass(frozen=True)
class GroupTokens:
    """What the runs (corpus, seed) read, padded on the right.

    Attributes:
        runs: in the order of the arrays.
        arrays: "ids" [steps, runs, texts, N], "lengths", "masks", and for each corpus "CORPUS.query_ids" and so on.
        corpora: {name: its sizes and fingerprint}.
    """

    runs: list[tuple[str, int]]
    arrays: dict[str, Tensor]
    corpora: dict[str, Any]

    def batch(self, step: int, device: torch.device) -> Batch:
        ids, lengths, masks = (self.arrays[name][step].to(device) for name in ("ids", "lengths", "masks"))
        return Batch(ids.long(), lengths.long(), masks)

    def held_out(self, corpus: str) -> HeldOut:
        return HeldOut(*(self.arrays[f"{corpus}.{field}"] for field in HeldOut._fields))

    @classmethod
    def of(cls, corpora: list[StudyCorpus], seeds: list[int], tokenizer: Any, config: TrainConfig) -> GroupTokens:
        """The batches are those of `gircse.train.train` with the settings `config` and each seed."""
        model = SimpleNamespace(tokenizer=tokenizer, config=GircseConfig())
        lengths = (config.query_max_length, config.passage_max_length)
        width, steps = max(lengths), config.max_steps or 1

        def tokens(texts: list[str], limit: int, instruction: str | None = None) -> list[list[int]]:
            return PromptTokenizer(model, instruction, limit)(texts).rows  # type: ignore[arg-type]

        runs, ids, masks = [], [], []
        arrays: dict[str, Tensor] = {}
        for corpus in corpora:
            rows = [parse_row(row) for row in corpus.rows()]
            for seed in seeds:
                data = TrainingData.open(replace(config, seed=seed), rows=rows)
                runs.append((corpus.name, seed))
                batches = [data.batch(step) for step in range(steps)]
                masks.append(
                    torch.stack(
                        [
                            torch.zeros(len(b), len(b), dtype=torch.bool) if (mask := mask_of(b)) is None else mask
                            for b in batches
                        ]
                    )
                )
                ids.append(
                    [
                        row
                        for b in batches
                        for row in tokens([e.query for e in b], lengths[0])
                        + tokens([e.positive for e in b], lengths[1])
                    ]
                )
            query, document = (
                tokens(corpus.queries, lengths[0], corpus.instruction),
                tokens(corpus.documents, lengths[1]),
            )
            for kind, each in (("query", query), ("document", document)):
                arrays[f"{corpus.name}.{kind}_ids"], arrays[f"{corpus.name}.{kind}_lengths"] = _padded(each, width)
            arrays[f"{corpus.name}.relevant"] = torch.tensor(corpus.relevant)
            arrays[f"{corpus.name}.pairs"] = torch.tensor(corpus.pairs, dtype=torch.float64)
        padded, lens = _padded([row for own in ids for row in own], width)
        shape = (len(runs), steps, -1)
        arrays["ids"] = padded.view(*shape, width).transpose(0, 1).contiguous()
        arrays["lengths"] = lens.view(*shape).transpose(0, 1).contiguous()
        arrays["masks"] = torch.stack(masks, dim=1)
        return cls(runs, arrays, {corpus.name: sizes(corpus) for corpus in corpora})

    def save(self, path: Path) -> None:
        head = json.dumps({"runs": self.runs, "corpora": self.corpora})
        np.savez_compressed(path, head=np.array(head), **{k: v.numpy() for k, v in self.arrays.items()})

    @classmethod
    def load(cls, path: Path) -> GroupTokens:
        with np.load(path) as file:
            head = json.loads(str(file["head"]))
            arrays = {name: torch.from_numpy(file[name]) for name in file.files if name != "head"}
        return cls([(corpus, seed) for corpus, seed in head["runs"]], arrays, head["corpora"])


def sizes(corpus: StudyCorpus) -> dict[str, Any]:
    return {
        "fingerprint": corpus.fingerprint,
        "training": len(corpus.training),
        "queries": len(corpus.queries),
        "documents": len(corpus.documents),
        "pairs": len(corpus.pairs),
    }


def _padded(rows: list[list[int]], width: int) -> tuple[Tensor, Tensor]:
    """-> ids [n, width] int32, lengths [n] int32."""
    ids = torch.zeros(len(rows), width, dtype=torch.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.int32)
    return ids, torch.tensor([len(row) for row in rows], dtype=torch.int32)
