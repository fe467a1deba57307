from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_ring_and_gather_are_measured_and_agree() -> None:
    """The workers hold the ring's losses and gradients against ours before they time anything."""
    command = [sys.executable, "bench/info_nce.py", "--ranks", "3", "--smoke", "--repeats", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["ranks"] == 3
    assert min(record[name] for name in ("seconds", "ring_seconds", "exchange_seconds")) > 0
