"""A retrieval task: queries, documents, and which documents are relevant to which query."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from gircse.data.rows import Row
from gircse.lm.prompts import is_symmetric


@dataclass(frozen=True)
class RetrievalTask:
    """Queries, the documents to search, and for each query the indices of its relevant documents."""

    instruction: str | None
    queries: list[str]
    documents: list[str]
    relevant: list[set[int]]

    @property
    def own_documents(self) -> list[set[int]]:
        """For each query the document that is the query itself, which search does not count: its text, where the task
        is symmetric (otherwise a query is not written as a document is), unless it is named as relevant."""
        places: dict[str, set[int]] = {}
        if is_symmetric(self.instruction):
            for place, text in enumerate(self.documents):
                places.setdefault(text, set()).add(place)
        own = [places.get(query, set()) for query in self.queries]
        return [found - set(relevant) for found, relevant in zip(own, self.relevant, strict=True)]

    @classmethod
    def from_rows(cls, rows: Iterable[Row]) -> RetrievalTask:
        """Training rows as a task: all their distinct positives and negatives are the documents.

        Raises:
            ValueError: the rows have more than one instruction (evaluate them apart).
        """
        rows = list(rows)
        instructions = sorted({row.instruction for row in rows})
        if len(instructions) > 1:
            raise ValueError(f"rows: got {len(instructions)} instructions, expected one; first two: {instructions[:2]}")
        index: dict[str, int] = {}
        for row in rows:
            for text in (*row.positives, *row.negatives):
                index.setdefault(text, len(index))
        relevant: dict[str, set[int]] = {}
        for row in rows:
            relevant.setdefault(row.query, set()).update(index[text] for text in row.positives)
        return cls(instructions[0] if instructions else None, list(relevant), list(index), list(relevant.values()))
