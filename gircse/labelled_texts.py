"""Texts with labels, for clustering: JSON Lines of {"text", "label"}."""

from __future__ import annotations

import json
from dataclasses import dataclass

from gircse.data_error import MAX_REPORTED, DataError


@dataclass(frozen=True)
class LabelledTexts:
    """Texts to cluster and their labels, one each."""

    texts: list[str]
    labels: list[str]
    instruction: str | None = None

    @classmethod
    def read(cls, path: str, *, instruction: str | None = None) -> LabelledTexts:
        """JSON Lines of {"text": str, "label": str or int}; blank lines are allowed.

        Raises:
            DataError: a line that is not that (named), fewer than two labels. OSError: no such file.
        """
        texts, labels, problems = [], [], []
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except json.JSONDecodeError as error:
                    problems.append(f"{path}:{number}: not JSON: {error.msg} at column {error.colno}")
                    continue
                text, label = (record.get("text"), record.get("label")) if isinstance(record, dict) else (None, None)
                if not isinstance(text, str) or isinstance(label, bool) or not isinstance(label, (str, int)):
                    problems.append(f'{path}:{number}: expected an object with "text" (string) and "label"')
                    continue
                texts.append(text)
                labels.append(str(label))
        if not problems and len(set(labels)) < 2:
            problems.append(f"{path}: got {len(set(labels))} different labels, expected two or more")
        if problems:
            raise DataError(problems[:MAX_REPORTED], len(problems))
        return cls(texts, labels, instruction)
