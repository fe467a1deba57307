"""The code of docs/soft_embed.md, from top to bottom."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]


def test_the_code_of_the_page_runs() -> None:
    text = (ROOT / "docs" / "soft_embed.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 5
    namespace: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "docs/soft_embed.md", "exec"), namespace)
    assert namespace["token"].shape == (4, 32)
    facts = namespace["soft"].facts
    assert facts.softcap == 30.0
    assert abs(facts.embed_scale - 32**0.5) < 1e-5
    assert isinstance(namespace["mixed"], torch.Tensor)


def test_its_links_lead_somewhere() -> None:
    text = (ROOT / "docs" / "soft_embed.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (ROOT / "docs" / target).exists(), target
