"""docs/scale.md: its Python blocks run, and its searches find what `encode` finds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.test_docs import SUBSTITUTES, _blocks

PAGE = Path(__file__).parents[2] / "docs" / "scale.md"
TEXTS = [f"{color} {animal}" for color in ("red", "blue") for animal in ("fox", "dog", "owl", "cat")]


def test_blocks_run(base, model, tmp_path, monkeypatch, capsys):
    for package in ("datasets", "faiss", "duckdb"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").mkdir()
    table = pa.table({"id": range(len(TEXTS)), "text": TEXTS})
    pq.write_table(table, tmp_path / "corpus" / "0.parquet")
    expected = model.encode(TEXTS, num_steps=1)
    # what the block of Ray writes, whose dataset tests/corpora/test_ray.py tests
    (tmp_path / "embeddings").mkdir()
    lists = pa.FixedSizeListArray.from_arrays(pa.array(expected.reshape(-1)), expected.shape[1])
    pq.write_table(table.append_column("embedding", lists), tmp_path / "embeddings" / "0.parquet")
    names: dict = {"path": base}
    blocks = [block for block in _blocks(PAGE, "python") if "import ray" not in block]
    assert len(blocks) == 3
    for number, block in enumerate(blocks):
        for shown, real in SUBSTITUTES.items():
            block = block.replace(shown, real)
        exec(compile(block, f"scale.md, block {number}", "exec"), names)
    np.testing.assert_allclose(np.array(names["ds"].with_format("numpy")["embedding"][:]), expected, atol=1e-6)
    np.testing.assert_allclose(names["array"], expected, atol=1e-6)
    best = np.argsort(-(model.encode("a red fox", num_steps=1) @ expected.T))[:5]
    assert names["rows"][0].tolist() == best.tolist()
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == str([TEXTS[i] for i in best])
    assert [text for text, _ in eval(printed[1])] == [TEXTS[i] for i in best]
