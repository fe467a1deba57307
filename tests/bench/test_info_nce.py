"""`bench/info_nce.py`: several ranks, and the floor."""

from __future__ import annotations

import json
import subprocess
import sys

import torch

from bench import info_nce
from bench.provenance import ROOT


def test_the_exchange_between_ranks_is_measured() -> None:
    command = [sys.executable, "bench/info_nce.py", "--ranks", "3", "--smoke", "--repeats", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["ranks"] == 3
    assert record["exchange_seconds"] > 0
    assert record["seconds"] > 0


def test_the_floor_is_that_of_six_products() -> None:
    size = info_nce.Size(8, 24, 5, 16)
    work = info_nce.floor(size, torch.bfloat16)
    assert work.flops == 6 * 5 * 8 * 24 * 16
    assert work.bytes == 2 * 2 * 5 * 16 * (8 + 24)
