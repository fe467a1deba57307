from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

from bench import info_nce

ROOT = Path(__file__).resolve().parents[2]


def test_ring_and_gather_are_measured_and_agree() -> None:
    """The workers hold the ring's losses and gradients against ours before they time anything."""
    command = [sys.executable, "bench/info_nce.py", "--ranks", "3", "--smoke", "--repeats", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["ranks"] == 3
    assert min(record[name] for name in ("seconds", "ring_seconds", "exchange_seconds")) > 0


def test_the_floor_is_that_of_six_products() -> None:
    size = info_nce.Size(8, 24, 5, 16)
    work = info_nce.floor(size, torch.bfloat16)
    assert work.flops == 6 * 5 * 8 * 24 * 16
    assert work.bytes == 2 * 2 * 5 * 16 * (8 + 24)
