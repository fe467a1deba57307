#!/usr/bin/env python
"""`stepwise_info_nce` against eager PyTorch and K separate losses: time and peak extra memory, forward and backward.

    python bench/info_nce.py                     # on a CPU: two minutes
    python bench/info_nce.py --device cuda       # the sizes of a GPU
    python bench/info_nce.py --ranks 2           # two gloo processes: the share of a step that their exchange takes

`separate` calls the loss once for each step on vectors that plain PyTorch has pooled, as one would use a
memory-efficient loss that knows no steps. Extra memory is what is allocated at the peak beyond inputs and gradients.
Losses and gradients are compared with float64 before any clock is read. The floor counts what must be computed, 6 K B M
D FLOPs (similarities, and the gradients of both sides), and moved, vectors and gradients once. On a CPU that is at the
float32 ceilings of the same run, on a GPU at the bfloat16 ones, with the three or six products of bfloat16 parts that
the accuracy takes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from torch import Tensor

from bench.floors import measure_ceilings
from bench.memory import give_back, peak_extra_bytes
from bench.provenance import provenance
from bench.records import save, to_json
from bench.tables import Column, column, table
from bench.timing import interleaved, seconds
from bench.verdict import WrongResultError
from gircse.ops import info_nce_parallel, pool_steps, stepwise_info_nce
from gircse.ops.info_nce_reference import info_nce_reference
from gircse.roofline import Work


class Size(NamedTuple):
    """B queries, M candidates, K steps, width D; whether eager PyTorch is tried at all."""

    rows: int
    candidates: int
    num_steps: int
    width: int
    eager: bool = True

    def __str__(self) -> str:
        return f"B = {self.rows:,}, M = {self.candidates:,}, K = {self.num_steps}, D = {self.width:,}"


CPU = (Size(512, 2048, 5, 256), Size(1024, 4096, 5, 576), Size(8192, 16384, 5, 64, eager=False))
CUDA = (Size(4096, 8192, 5, 3584), Size(65_536, 131_072, 5, 1024, eager=False))
SMOKE = (Size(40, 80, 3, 24),)


def separate(queries: Tensor, docs: Tensor) -> Tensor:
    """K losses of vectors that plain PyTorch has pooled."""
    pooled = [pool_steps(steps) for steps in (queries, docs)]
    return torch.cat(
        [stepwise_info_nce(*(p[:, k : k + 1] for p in pooled), pooling="last") for k in range(queries.shape[1])]
    )


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "eager": info_nce_reference,
    "separate": separate,
    "ours": stepwise_info_nce,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the hidden states")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="a tiny size")
    parser.add_argument("--ranks", type=int, help="measure the exchange between so many processes instead")
    parser.add_argument("--out", type=Path, help="write the record to this JSON file")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.set_float32_matmul_precision("highest")
    if options.ranks:
        record = {"benchmark": "info_nce-ranks", **measure_ranks(options)}
    else:
        sizes = SMOKE if options.smoke else CUDA if device.type == "cuda" else CPU
        dtype = getattr(torch, options.dtype)
        rate, products = arithmetic(device, dtype)
        ceilings = measure_ceilings(device, rate)
        points = [
            {"worst_error": check(device, dtype, size.width)}
            | measure(size, device, dtype, options.repeats)
            | {"floor_milliseconds": ceilings.seconds([floor(size, dtype, products)]) * 1e3}
            for size in sizes
        ]
        record = {"benchmark": "info_nce", "dtype": options.dtype, "repeats": options.repeats, "points": points}
        record["ceilings"] = vars(ceilings)
    record["provenance"] = provenance(device, record["benchmark"])
    print(report(record))
    if options.out:
        save(record, options.out)
    print(to_json(record))
    return 0


def steps(size: Size, device: torch.device, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Positives about as similar to their queries as the most similar of the other candidates: losses of order one."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(rows: int) -> Tensor:
        return torch.randn(rows, size.num_steps, size.width, generator=generator, device=device)

    queries, docs = normal(size.rows), normal(size.candidates)
    docs[:: size.candidates // size.rows][: size.rows] += 4 * size.width**-0.5 * queries
    return queries.to(dtype).requires_grad_(), docs.to(dtype).requires_grad_()


def arithmetic(device: torch.device, dtype: torch.dtype) -> tuple[torch.dtype, int]:
    """What is multiplied there, and how many such products make one that is accurate enough for steps in `dtype`."""
    if device.type != "cuda":
        return torch.float32, 1
    return torch.bfloat16, 6 if dtype == torch.float32 else 3


def floor(size: Size, dtype: torch.dtype, each: int = 1) -> Work:
    """Forward and backward; the K steps' pooled vectors are K different ones, so nothing is shared between steps."""
    vectors = size.num_steps * size.width * (size.rows + size.candidates)
    products = size.num_steps * size.rows * size.candidates * size.width
    return Work(6 * products * each, 2 * dtype.itemsize * vectors)


def measure(
    size: Size, device: torch.device, dtype: torch.dtype, repeats: int, names: Iterable[str] = tuple(LOSSES)
) -> dict[str, Any]:
    """The point of one size: times and memory of those losses, interleaved."""
    queries, docs = steps(size, device, dtype)

    def call(name: str) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(LOSSES[name](queries, docs).sum(), (queries, docs))

    runs = {name: call(name) for name in names if name != "eager" or size.eager}
    gradients = sum(t.numel() * t.itemsize for t in (queries, docs))
    peaks = {}
    for name, run in runs.items():
        run()
        give_back(device)
        peaks[name] = peak_extra_bytes(run, device) - gradients
    times = interleaved(runs, device, repeats)
    return {
        **size._asdict(),
        "milliseconds": {name: timing.seconds * 1e3 for name, timing in times.items()},
        "spread": {name: timing.spread for name, timing in times.items()},
        "peak_extra_bytes": peaks,
    }


def checked(width: int) -> Size:
    """What `check` compares."""
    return Size(96, 288, 3, width)


def check(device: torch.device, dtype: torch.dtype, width: int) -> float:
    """Worst relative error of losses and gradients against float64, on a size that float64 can hold.

    Raises:
        WrongResultError: it is more than rounding explains.
    """
    queries, docs = steps(checked(width), device, dtype)
    wide = [t.detach().double().requires_grad_() for t in (queries, docs)]
    exact = info_nce_reference(*wide)
    losses = stepwise_info_nce(queries, docs)
    wanted, got = torch.autograd.grad(exact.sum(), wide), torch.autograd.grad(losses.sum(), (queries, docs))
    pairs = [(losses, exact), *zip(got, wanted, strict=True)]
    worst = max(((a.double() - b).norm() / b.norm()).item() for a, b in pairs)
    if not worst <= (1e-4 if dtype == torch.float32 else 8e-3):
        raise WrongResultError(f"relative error {worst:.2g} of losses and gradients against float64 on {device}")
    return worst


def measure_ranks(options: argparse.Namespace) -> dict[str, Any]:
    """Median seconds of a loss and its gradients on one of several ranks, and of the exchange in it."""
    size = Size(32, 64, 3, 24) if options.smoke else Size(256, 1024, 5, 1024)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            _rank, (options.ranks, size, folder, options.repeats), nprocs=options.ranks, start_method="spawn"
        )
        times = torch.load(Path(folder) / "times.pt", weights_only=True)
    return {"ranks": options.ranks, "repeats": options.repeats, **size._asdict(), **times}


def _rank(rank: int, ranks: int, size: Size, folder: str, repeats: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    queries, docs = steps(size, torch.device("cpu"), torch.float32, seed=rank)

    def run() -> None:
        losses = stepwise_info_nce(queries, docs, group=dist.group.WORLD)
        torch.autograd.grad(losses.sum(), (queries, docs))

    times: dict[str, list[float]] = {"seconds": [], "exchange_seconds": []}
    run()
    for _ in range(repeats):
        dist.barrier()
        times["seconds"].append(seconds(run, queries.device))
        with _timed_exchange(times["exchange_seconds"]):
            run()
    if rank == 0:
        torch.save({name: statistics.median(found) for name, found in times.items()}, Path(folder) / "times.pt")
    dist.destroy_process_group()


@contextmanager
def _timed_exchange(runs: list[float]) -> Iterator[None]:
    """Appends the seconds that the exchange between ranks takes inside, without the wait for a slower rank."""
    from gircse.ops import info_nce_op

    exchanged = 0.0

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            nonlocal exchanged
            dist.barrier()
            before = time.perf_counter()
            result = function(*arguments)
            exchanged += time.perf_counter() - before
            return result

        return run

    names = ("gather", "scatter_sum", "shares")
    for name in names:
        setattr(info_nce_op, name, timed(getattr(info_nce_parallel, name)))
    try:
        yield
    finally:
        for name in names:
            setattr(info_nce_op, name, getattr(info_nce_parallel, name))
    runs.append(exchanged)


def report(record: dict[str, Any]) -> str:
    origin = record["provenance"]
    where = f"{origin['device']}, torch {origin['torch']}, sources {origin['sources']}"
    if record["benchmark"] == "info_nce":
        return f"{where}\n\n{table(COLUMNS, record['points'])}\n\nforward and backward, both sides; medians"
    share = record["exchange_seconds"] / record["seconds"]
    size = Size(*(record[name] for name in Size._fields))
    return f"{where}\n{record['ranks']} processes, each {size}: {record['seconds']:.3f} s, {share:.0%} of it exchange"


COLUMNS: list[Column] = [
    column("B", "rows", "{:,}"),
    column("M", "candidates", "{:,}"),
    column("K", "num_steps"),
    column("D", "width", "{:,}"),
    column("floor ms", "floor_milliseconds", "{:,.1f}"),
    column("ours ms", "milliseconds.ours", "{:,.1f}"),
    ("time/floor", lambda point: f"{point['milliseconds']['ours'] / point['floor_milliseconds']:.2f}"),
    column("eager ms", "milliseconds.eager", "{:,.1f}"),
    column("K losses ms", "milliseconds.separate", "{:,.1f}"),
    *(column(f"{name} extra MiB", f"peak_extra_bytes.{name}", "{:,.0f}", 2**-20) for name in ("ours", "eager")),
    column("K losses extra MiB", "peak_extra_bytes.separate", "{:,.0f}", 2**-20),
]


if __name__ == "__main__":
    sys.exit(main())
