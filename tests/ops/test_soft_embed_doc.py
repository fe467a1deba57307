"""The code of docs/soft_embed.md, from top to bottom: what is plain and what takes its place give the same."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]


def test_the_code_of_the_page_runs_and_equals_the_plain_code() -> None:
    text = (ROOT / "docs" / "soft_embed.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    namespace: dict[str, Any] = {}
    compared = 0
    torch.manual_seed(0)
    try:
        for block in blocks:
            namespace.pop("plain", None)
            exec(compile(block, "docs/soft_embed.md", "exec"), namespace)
            if "plain" in namespace:
                torch.testing.assert_close(
                    namespace["token"],
                    namespace["plain"],
                    rtol=1e-4,
                    atol=1e-4,
                    msg=lambda text, b=block: f"{b}\n{text}",
                )
                compared += 1
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert compared == text.count("# plain") >= 7


def test_its_links_lead_somewhere() -> None:
    text = (ROOT / "docs" / "soft_embed.md").read_text(encoding="utf-8")
    headings = {
        re.sub(r"[^\w -]", "", line).strip().lower().replace(" ", "-") for line in re.findall(r"^## (.*)", text, re.M)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= headings
