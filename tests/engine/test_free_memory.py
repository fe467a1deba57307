"""Memory that can be had: the machine's, or what a container's control groups leave of it, of either version."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gircse.engine import config as engine_config
from gircse.engine import free_memory
from gircse.engine.config import EngineConfig, Limits
from gircse.engine.free_memory import container_bytes, free_bytes
from gircse.train import micro_batch_size as token_budget

CPU = torch.device("cpu")
MIB = 1 << 20
UNLIMITED = str(9223372036854771712)  # how version 1 says it


def machine(folder: Path, groups: str, files: dict[str, str]) -> tuple[Path, Path]:
    """A /proc/self/cgroup and a /sys/fs/cgroup with these files, written as the kernel writes them."""
    (folder / "groups").write_text(groups)
    for name, text in files.items():
        path = folder / "mounted" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return folder / "groups", folder / "mounted"


def stat(inactive: int, active: int, prefix: str = "") -> str:
    return f"anon 5\n{prefix}inactive_file {inactive}\n{prefix}active_file {active}\nslab 7"


CASES = {
    # the container's own group is the root of what it sees
    "version 2": ("0::/\n", {"memory.max": "1000", "memory.current": "300"}, [700]),
    "version 2, path of the host": ("0::/pod/abc\n", {"memory.max": "1000", "memory.current": "300"}, [700]),
    "version 2, outside of the namespace": ("0::/../..\n", {"memory.max": "1000", "memory.current": "300"}, [700]),
    "version 2, cached files are free": (
        "0::/\n",
        {"memory.max": "1000", "memory.current": "900", "memory.stat": stat(400, 150)},
        [650],
    ),
    "version 2, throttled above a lower mark": (
        "0::/\n",
        {"memory.max": "1000", "memory.high": "800", "memory.current": "300"},
        [700, 500],
    ),
    "version 2, a group and the one around it": (
        "0::/slice/unit\n",
        {
            "slice/unit/memory.max": "max",
            "slice/unit/memory.current": "100",
            "slice/memory.max": "2000",
            "slice/memory.current": "1500",
        },
        [500],
    ),
    "version 2, no limit": ("0::/\n", {"memory.max": "max", "memory.high": "max", "memory.current": "5"}, []),
    "version 1": (
        "5:cpu,cpuacct:/a\n4:memory:/docker/1\n0::/\n",
        {
            "memory/memory.limit_in_bytes": "1000",
            "memory/memory.usage_in_bytes": "700",
            "memory/memory.stat": stat(1, 1) + "\n" + stat(100, 50, "total_"),
        },
        [450],
    ),
    "version 1, a group and the one around it": (
        "4:memory:/slurm/job\n",
        {
            "memory/slurm/job/memory.limit_in_bytes": "3000",
            "memory/slurm/job/memory.usage_in_bytes": "1000",
            "memory/memory.limit_in_bytes": UNLIMITED,
            "memory/memory.usage_in_bytes": "5000",
        },
        [2000, int(UNLIMITED) - 5000],
    ),
    "no control groups": ("", {}, []),
    "nonsense": ("what is this\n", {"memory.max": "1000", "memory.current": "?"}, []),
}


@pytest.mark.parametrize(("groups", "files", "expected"), CASES.values(), ids=CASES.keys())
def test_what_a_container_leaves(tmp_path, groups, files, expected):
    assert container_bytes(*machine(tmp_path, groups, files)) == expected


def test_no_file_at_all(tmp_path):
    assert container_bytes(tmp_path / "none", tmp_path) == []


def test_it_is_that_of_the_machine_or_less(monkeypatch):
    assert 1 << 20 < free_bytes(CPU) < 1 << 50
    for left, expected in (([], 900), ([300, 700], 300), ([-50], 0)):
        monkeypatch.setattr(free_memory, "container_bytes", lambda left=left: left)
        monkeypatch.setattr(free_memory, "_machine_bytes", lambda: 900)
        assert free_bytes(CPU) == expected


def test_memory_of_graphs_is_not_free(monkeypatch):
    def segment(device, pool, total, allocated):
        return {"device": device, "segment_pool_id": pool, "total_size": total, "allocated_size": allocated}

    segments = [segment(1, (0, 0), 100, 30), segment(1, (0, 7), 1000, 0), segment(0, (0, 0), 5000, 0)]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (400, 9000))
    assert free_bytes(torch.device("cuda", 1)) == 400 + 70


def test_the_engine_and_the_training_probe_ask_the_same_function(monkeypatch):
    assert token_budget.free_bytes is engine_config.free_bytes is free_bytes
    monkeypatch.setattr(free_memory, "container_bytes", lambda: [400 * MIB])
    assert Limits.of(EngineConfig(), CPU, kv_token_bytes=MIB).kv_tokens == 100  # a quarter
