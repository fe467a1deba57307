"""Labelled texts: what is read, and that every bad line is named."""

from __future__ import annotations

import pytest

from gircse.data.labelled_texts import LabelledTexts
from gircse.data.rows import DataError


def test_texts_and_labels_are_read(tmp_path):
    (tmp_path / "labels.jsonl").write_text('{"text": "a", "label": 1}\n\n{"text": "", "label": "x", "more": 0}\n')
    found = LabelledTexts.read(str(tmp_path / "labels.jsonl"), instruction="cluster them")
    assert found == LabelledTexts(["a", ""], ["1", "x"], "cluster them")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"text": "a", "label": 1}\n{"text": 5, "label": 2}\n', r"labels\.jsonl:2: expected an object with"),
        ('{"text": "a"}\n', r"labels\.jsonl:1: expected"),
        ('["a", 1]\n', r"labels\.jsonl:1: expected"),
        ('{"text": "a", "label": true}\n', r"labels\.jsonl:1: expected"),
        ("{\n", r"labels\.jsonl:1: invalid JSON"),
        ('{"text": "a", "label": 1}\n\n{"text": "b", "label": 1}\n', "got 1 different labels"),
    ],
)
def test_bad_labels_are_named(tmp_path, lines, message):
    (tmp_path / "labels.jsonl").write_text(lines)
    with pytest.raises(DataError, match=message):
        LabelledTexts.read(str(tmp_path / "labels.jsonl"))
