"""Texts with labels, for clustering: JSON Lines of {"text", "label"}."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gircse.data.errors import DataError, Problems
from gircse.data.jsonl import check_unicode, open_jsonl, parse_line, read_lines


@dataclass(frozen=True)
class LabelledTexts:
    """Texts to cluster and their labels, one each."""

    texts: list[str]
    labels: list[str]
    instruction: str | None = None

    @classmethod
    def read(cls, path: str, *, instruction: str | None = None) -> LabelledTexts:
        """JSON Lines of {"text": str, "label": str or int}, plain or gzip; blank lines are allowed.

        Raises:
            DataError: lines that are not that (named), fewer than two labels, no such file.
        """
        texts, labels, problems = [], [], Problems()
        with open_jsonl(Path(path)) as (file, _):
            for line in read_lines(file, Path(path), problems):
                try:
                    text, label = _text_and_label(parse_line(line.content))
                except ValueError as error:
                    problems.add(f"{path}:{line.number}", error)
                    continue
                texts.append(text)
                labels.append(label)
        problems.check()
        if len(set(labels)) < 2:
            raise DataError([f"{path}: got {len(set(labels))} different labels, expected two or more"])
        return cls(texts, labels, instruction)


def _text_and_label(record: object) -> tuple[str, str]:
    text, label = (record.get("text"), record.get("label")) if isinstance(record, dict) else (None, None)
    if not isinstance(text, str) or isinstance(label, bool) or not isinstance(label, (str, int)):
        raise ValueError('expected an object with "text" (string) and "label"')
    return check_unicode(text, '"text"'), check_unicode(str(label), '"label"')
