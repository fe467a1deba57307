#!/usr/bin/env python
"""A corpus of short texts on Ray against one process: start-up, the time inside the workers, the whole job, memory.

    python bench/ray_encode.py --out bench/results/ray-encode-cpu.json    # eight minutes on two idle cores

Each run is a new process, and the ways take turns. The model is tiny, with random weights and SmolLM2's tokenizer, so
that a cluster adds as much as it ever does; `--model` takes another. Encoding is counted in processor seconds, which
other programs on the machine disturb less than the clock.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.provenance import checkout_environment, provenance
from bench.records import save, to_json
from bench.tables import Column, column, table
from gircse.corpora import EncodeJob, ray_data
from gircse.corpora.ray_data import EncodingActor

_WATCHED = "BENCH_WATCHED"  # the folder that workers write their times into
_WORDS = ("red", "blue", "fox", "owl", "tide", "moon", "city", "stone", "runs", "sleeps", "under", "over")


@dataclass(frozen=True)
class Way:
    """How a corpus is encoded. The process or every worker has one thread of PyTorch."""

    name: str
    kind: str  # stream | files | ray
    workers: int = 1


STREAM = Way("encode_stream", "stream")
FILES = Way("gircse encode", "files")
RAY = Way("gircse encode --ray, 1 worker", "ray")
WAYS = (STREAM, FILES, RAY, Way("gircse encode --ray, 2 workers", "ray", workers=2))
COLUMNS: list[Column] = [
    column("way", "way.name"),
    column("rows", "rows", "{:,}"),
    column("first row s", "first", "{:.1f}"),
    column("all s", "whole", "{:.1f}"),
    column("encoding, processor s", "inside", "{:.1f}"),
    column("over encode_stream", "of_stream", "{:.2f}"),
    column("process MiB", "driver_bytes", "{:,.0f}", 2**-20),
    column("worker MiB", "worker_bytes", "{:,.0f}", 2**-20),
]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench/ray_encode.py", description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="a folder (default: a tiny one)")
    parser.add_argument("--rows", type=int, default=10_000, help="of the pairs")
    parser.add_argument("--many", type=int, default=100_000, help="of the runs that show whether memory grows; 0: none")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON record")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)  # as in every process that is measured
    origin = provenance("cpu", "ray-encode")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = options.model or tiny_model(folder / "model")
        points = [
            *compare(model, folder, options.rows, WAYS, options.repeats),
            *(compare(model, folder, options.many, (FILES, RAY), 1) if options.many else ()),
        ]
    record = {"benchmark": "ray-encode", "model": options.model or "tiny", "points": points, "provenance": origin}
    print(f"{origin['device']}, torch {origin['torch']}, sources {origin['sources']}\n\n{table(COLUMNS, points)}\n")
    if options.out:
        save(record, options.out)
    print(to_json(record))
    return 0


def compare(model: str, folder: Path, rows: int, ways: Sequence[Way], repeats: int) -> list[dict[str, Any]]:
    """Medians of runs that take turns, and for the encoding the median of its ratios to the `encode_stream` of the same
    turn."""
    texts = write_corpus(folder / f"{rows}.parquet", rows)
    runs: dict[str, list[dict[str, float]]] = {way.name: [] for way in ways}
    for turn in range(repeats):
        for way in ways:
            runs[way.name].append(run(model, texts, folder / f"{turn} {rows} {way.name}", way))
    points = []
    for way in ways:
        point = {key: median(run[key] for run in runs[way.name]) for key in runs[way.name][0]}
        if STREAM in ways:
            pairs = zip(runs[way.name], runs[STREAM.name], strict=True)
            point["of_stream"] = median(one["inside"] / stream["inside"] for one, stream in pairs)
        points.append({"way": asdict(way), "rows": rows, "repeats": repeats, **point})
    return points


def run(model: str, texts: Path, folder: Path, way: Way) -> dict[str, float]:
    """One process from its start to its end.

    Returns:
        Seconds until the first window begins and of all; processor seconds of encoding, the sum over the workers; the
        peak of the process' resident memory and, on Ray, that of the largest worker.
    """
    folder.mkdir()
    argv = [sys.executable, __file__, "child", model, str(texts), str(folder), json.dumps(asdict(way))]
    threads = {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", "RAY_DATA_DISABLE_PROGRESS_BARS": "1"}
    start = time.time()
    done = subprocess.run(argv, env=checkout_environment(**threads), capture_output=True, text=True, check=False)
    whole = time.time() - start
    if done.returncode:
        raise SystemExit(f"bench/ray_encode.py: {way.name}: {done.stderr[-2000:]}")
    driver = json.loads((folder / "driver.json").read_text())
    workers = [json.loads(path.read_text()) for path in folder.glob("worker-*.json")]
    found = {
        "first": min(worker["first"] for worker in workers) - start,
        "inside": sum(worker["inside"] for worker in workers),
        "whole": whole,
        "driver_bytes": driver["peak"],
    }
    return found | ({"worker_bytes": max(worker["peak"] for worker in workers)} if way.kind == "ray" else {})


def child(model: str, texts: str, folder: Path, way: Way) -> None:
    """One run."""
    from gircse.corpora.encode_files import encode_files
    from gircse.corpora.sources import Source

    job = EncodeJob(model, num_steps=1, load={"device": "cpu"})
    out, source = str(folder / "out"), Source.of([texts], "text")
    if way.kind == "stream":
        stream(job, source, folder)
    elif way.kind == "files":
        watch(folder)
        encode_files(source, out, job)
    else:
        import ray

        from gircse.corpora.ray_files import encode_files_on_ray

        ray.init(
            address="local",
            num_cpus=way.workers + 2,
            object_store_memory=500_000_000,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
            runtime_env={"env_vars": {_WATCHED: str(folder)}},
        )
        ray_data.EncodingActor = WatchedActor  # type: ignore[misc]
        encode_files_on_ray(source, out, job, id_column="id", rows_per_task=4096, workers=way.workers)
    (folder / "driver.json").write_text(json.dumps({"peak": peak()}))


class WatchedActor(EncodingActor):
    def __init__(self, job: EncodeJob, threads: int, id_column: str | None) -> None:
        super().__init__(job, threads, id_column)
        watch(Path(os.environ[_WATCHED]))


def watch(folder: Path) -> None:
    """From now on a `TextEncoder` of this process writes down its processor seconds and its memory."""
    from gircse.corpora.text_encoder import TextEncoder

    encode, first, inside = TextEncoder.__call__, 0.0, 0.0

    def timed(self: TextEncoder, given: Any, first_row: int | None = None) -> Any:
        nonlocal first, inside
        first, before = first or time.time(), time.process_time()
        result = encode(self, given, first_row)
        inside += time.process_time() - before
        note(folder, first, inside)
        return result

    TextEncoder.__call__ = timed  # type: ignore[method-assign]


def stream(job: EncodeJob, source: Any, folder: Path) -> None:
    """`encode_stream` of all texts, with the windows of the other ways."""
    from gircse.corpora.job import WINDOW
    from gircse.corpora.text_encoder import TextEncoder

    model = TextEncoder(job).model
    (whole,) = source.tables(range(source.total), source.total)
    texts = whole["text"].to_pylist()
    first, before = time.time(), time.process_time()
    for _ in model.encode_stream(texts, window=WINDOW, num_steps=job.num_steps):
        pass
    note(folder, first, time.process_time() - before)


def note(folder: Path, first: float, inside: float) -> None:
    (folder / f"worker-{os.getpid()}.json").write_text(json.dumps({"first": first, "inside": inside, "peak": peak()}))


def peak() -> int:
    """The most bytes that this process had in memory. (`ru_maxrss` would begin with the parent's.)"""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def write_corpus(path: Path, rows: int) -> Path:
    """3 to 12 words a text, in an order that a generator with a fixed seed draws."""
    import random

    import pyarrow as pa
    import pyarrow.parquet as pq

    draw = random.Random(0)
    texts = [" ".join(draw.choices(_WORDS, k=draw.randint(3, 12))) for _ in range(rows)]
    pq.write_table(pa.table({"id": range(rows), "text": texts}), path, row_group_size=10_000)
    return path


def tiny_model(folder: Path) -> str:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from gircse.demo.smollm2 import smollm2_path

    tokenizer = AutoTokenizer.from_pretrained(smollm2_path())
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model("llama", vocab_size=len(tokenizer), tie_word_embeddings=True, **sizes)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(sys.argv[2], sys.argv[3], Path(sys.argv[4]), Way(**json.loads(sys.argv[5])))
    else:
        sys.exit(main())
