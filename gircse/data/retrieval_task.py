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
    def document_instruction(self) -> str | None:
        """The instruction that documents carry, too: the task's if it is symmetric (docs/method.md §2), else None."""
        return self.instruction if is_symmetric(self.instruction) else None

    @property
    def own_documents(self) -> list[set[int]]:
        """For each query the documents that are the query itself; a ranking leaves them out.

        There are none unless the task is symmetric, because otherwise the model reads a query and a document of the
        same text differently. A document that is named as relevant stays.
        """
        places: dict[str, set[int]] = {}
        if is_symmetric(self.instruction):
            for place, text in enumerate(self.documents):
                places.setdefault(text, set()).add(place)
        own = [places.get(query, set()) for query in self.queries]
        return [same - set(relevant) for same, relevant in zip(own, self.relevant, strict=True)]

    @classmethod
    def from_rows(cls, rows: Iterable[Row]) -> RetrievalTask:
        """Training rows as a task whose documents are all their different positives and negatives.

        Raises:
            ValueError: the rows have more than one instruction; they must be evaluated one instruction at a time.
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
