"""Every Python block of docs/sentence_transformers.md runs, in order, in one namespace."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("sentence_transformers")
pytest.importorskip("datasets")
pytest.importorskip("accelerate")

PAGE = Path(__file__).parents[2] / "docs" / "sentence_transformers.md"


@pytest.mark.usefixtures("add_adapter")
def test_the_page_runs(base_folder, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 6
    names = {"path": str(base_folder), "output": str(tmp_path / "saved")}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{PAGE.name}, block {number + 1}", "exec"), names)
    assert (tmp_path / "saved" / "adapter_config.json").is_file()
