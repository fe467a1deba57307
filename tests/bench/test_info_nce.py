"""`bench/info_nce.py`: several ranks, and the floor."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from bench import info_nce
from tests.forkserver import CONTEXT


def test_the_exchange_between_ranks_is_measured(monkeypatch, capsys) -> None:
    start = torch.multiprocessing.start_processes

    def forked(*arguments: Any, start_method: str, **options: Any) -> Any:
        assert start_method == "spawn"  # which would import everything anew, once in each rank
        return start(*arguments, start_method=CONTEXT.get_start_method(), **options)

    monkeypatch.setattr(torch.multiprocessing, "start_processes", forked)
    monkeypatch.setattr(sys, "argv", ["bench/info_nce.py", "--ranks", "3", "--smoke", "--repeats", "1"])
    assert info_nce.main() == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["ranks"] == 3
    assert record["exchange_seconds"] > 0
    assert record["seconds"] > 0


def test_the_floor_is_that_of_six_products() -> None:
    size = info_nce.Size(8, 24, 5, 16)
    work = info_nce.floor(size, torch.bfloat16)
    assert work.flops == 6 * 5 * 8 * 24 * 16
    assert work.bytes == 2 * 2 * 5 * 16 * (8 + 24)
