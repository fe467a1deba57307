"""Runs of sharded encoding, in threads and in processes, with an encoder that needs no model."""

from __future__ import annotations

import inspect
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from gircse.encode.sharded import Rank, ShardReport, encode_sharded

REPOSITORY = Path(__file__).resolve().parents[2]
SIZE = 4  # texts of a shard, unless a test says otherwise


def embed(_model: object, texts: list[str]) -> np.ndarray:
    """[n, 3]: the number in the text, and two things that tell texts apart."""
    rows = [[float(text.split()[-1]), len(text), text.count("o")] for text in texts]
    return np.array(rows, dtype=np.float32).reshape(len(texts), 3)


def texts_of(n: int) -> list[str]:
    return [f"text {'o' * (i % 5)} {i}" for i in range(n)]


class Encoder:
    """Remembers what it was asked; raises at its `die_at`-th call, as a process that is killed."""

    def __init__(self, die_at: int | None = None) -> None:
        self.calls: list[list[str]] = []
        self.loads = 0
        self.die_at = die_at

    def load(self) -> object:
        self.loads += 1
        return object()

    def __call__(self, model: object, texts: list[str]) -> np.ndarray:
        if self.die_at is not None and len(self.calls) == self.die_at:
            raise KeyboardInterrupt
        self.calls.append(texts)
        return embed(model, texts)


def run(encoder: Encoder, input: str, output: Path, rank: int = 0, world_size: int = 1, **options: Any) -> ShardReport:
    options = {"settings": {"model": "m", "num_steps": 2}, "shard_size": SIZE, "timeout": 10.0, **options}
    return encode_sharded(encoder.load, encoder, input, str(output), rank=Rank(rank, world_size), **options)


def run_ranks(encoders: list[Encoder], input: str, output: Path, **options: Any) -> list[ShardReport]:
    """All ranks of a world at the same time, in threads: what they share is the folder."""
    reports: list[ShardReport | BaseException] = [KeyboardInterrupt()] * len(encoders)

    def work(rank: int) -> None:
        try:
            reports[rank] = run(encoders[rank], input, output, rank, len(encoders), **options)
        except BaseException as error:
            reports[rank] = error

    threads = [threading.Thread(target=work, args=(r,)) for r in range(len(encoders))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for report in reports:
        if isinstance(report, BaseException):
            raise report
    return reports  # type: ignore[return-value]


def loaded(folder: Path) -> np.ndarray:
    return np.concatenate([np.load(path) for path in sorted(folder.glob("shard-*.npy"))])


def states(folder: Path) -> dict[str, tuple[int, int]]:
    """What changes when a file is written again."""
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.glob("shard-*.npy")}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


WORKER = f"""
from __future__ import annotations
import sys, time
import numpy as np
from gircse.encode.sharded import Rank, encode_sharded

{inspect.getsource(embed)}
input, output, log, rank, world_size, seconds = sys.argv[1:]

def encode(model, texts):
    time.sleep(float(seconds))
    with open(log, "a") as file:
        file.write(texts[0] + chr(10))
    return embed(model, texts)

rank = Rank(int(rank), int(world_size))
encode_sharded(object, encode, input, output, settings={{}}, shard_size=4, rank=rank, timeout=20)
"""


def start_worker(input: str, output: Path, log: Path, rank: int, world_size: int, seconds: float) -> subprocess.Popen:
    arguments = [input, str(output), str(log), str(rank), str(world_size), str(seconds)]
    return subprocess.Popen([sys.executable, "-c", WORKER, *arguments], cwd=REPOSITORY)


def wait_for(happened, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.005)
