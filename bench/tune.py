#!/usr/bin/env python
"""Write the kernels' config table, `kernels/gircse_kernels/configs.json`: offline, never in a user's process.

    python bench/tune.py --static              # no GPU: by what the compiler reports
    python bench/tune.py --out configs.json    # on a GPU: by time, for its own architecture

The entries that the table has are filled again, each with the best of its kernel's candidates below. A candidate is
compiled for the target first: it must fit the shared memory and spill nothing. On a GPU the fastest of those is taken,
by the time of the whole op; without one the first. Entries of other architectures stay as they are, and so do the
choices for many rows, which `bench/suite/candidates.json` asks for.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from gircse_kernels import launching, plan, soft_embed
from gircse_kernels.plan import Config

from bench.cases import BOTH, FORWARD, Matrices
from bench.op_engines import Problem, draw_matrices, ours
from bench.static.compile_report import PRODUCTS, SHARED_LIMIT, compile_launch, key
from bench.static.launches import DEVICES, Call, launches
from bench.suite.alternatives import CHOICE, Alternative, using
from bench.suite.candidates import race

VOCAB, WIDTH = 151_936, 1024  # of what is timed, where the entry is for any width
INNER, COLUMNS = 3584, 8192  # of the float32 product that is timed
_SECONDS = 2.0  # of timing for each entry


class Slot(NamedTuple):
    """One entry of the table to fill."""

    kernel: str
    itemsize: int
    rows: int
    width: int  # 0: any

    @property
    def launched(self) -> str:
        """Name of the kernel that takes the entry."""
        return "product_kernel" if self.kernel == "matmul" else f"{self.kernel}_kernel"

    @property
    def call(self) -> Call:
        """What is compiled and timed."""
        if self.kernel == "matmul":
            return Call("product", (self.rows, INNER, COLUMNS), "float32")
        width, dtype = self.width or WIDTH, "float32" if self.itemsize == 4 else "bfloat16"
        return Call("soft_embed", (self.rows, VOCAB, width, width), dtype, True, self.kernel == "score_grad")

    def alternative(self, config: Config) -> Alternative:
        """This entry with that config, whatever the table says."""
        found: dict[str, Any] = {self.kernel: config._asdict()}
        return {**found, CHOICE: {"epilogue": True}} if self.kernel == "weights_product" else found


def slots(arch: int) -> list[Slot]:
    """The entries of the architecture, or of the newest one before it."""
    return [
        Slot(kernel, entry["itemsize"], entry["rows"], entry.get("width", 0))
        for kernel, by_arch in plan.table().items()
        if kernel != CHOICE
        for entry in by_arch[max((name for name in by_arch if int(name[3:]) <= arch), key=lambda name: int(name[3:]))]
    ]


def candidates(slot: Slot) -> Iterator[Config]:
    """In order of preference where nothing can be measured."""
    rows = min(slot.rows, 128)
    if slot.kernel == "one_row":
        tiles = sorted((4, 8, 16, 32), key=lambda tile: abs(tile * slot.width - 4096))  # the tile that was timed
        for tile, piece, warps in product(tiles, (1024, 512, 256, 128, 64), (4, 8)):
            fits = tile * slot.width <= 8192 and (slot.width % piece == 0 or slot.width < piece <= 2 * slot.width)
            for stages in (3, 4) if fits else ():
                yield Config({"BLOCK_V": tile, "PIECE": piece}, warps, stages, 16 // warps)
    elif slot.kernel == "few_rows":
        for tile, piece, (groups, warps), stages, per_sm in product(
            (32, 16, 64), (128, 256, 64), ((1, 4), (4, 4), (8, 8), (1, 8)), (3, 2), (2, 1)
        ):
            if slot.width % piece == 0:
                yield Config({"BLOCK_T": 16, "BLOCK_V": tile, "PIECE": piece, "GROUPS": groups}, warps, stages, per_sm)
    elif slot.kernel in ("weights", "score_grad"):
        for (tall, tile), warps in product(((1, 2048), (2, 1024), (1, 1024), (4, 512)), (4, 8)):
            yield Config({"BLOCK_T": tall, "BLOCK_V": tile}, warps, 1)
    elif slot.kernel == "weights_product":
        for tile, warps, stages in ((256, 8, 3), (256, 4, 4), (128, 8, 4), (128, 4, 4)):
            yield Config({"BLOCK_T": rows, "BLOCK_V": tile, "BLOCK_K": 64}, warps, stages)
    else:
        for cols, warps, stages, depth in product((128, 64), (4, 8), (4, 3, 2), (32, 16)):
            blocks = {"BLOCK_M": rows, "BLOCK_N": cols, "BLOCK_K": depth, "GROUP": 8}
            yield Config(blocks, warps, stages, 3 if rows < 128 else 1)


def accept(slot: Slot, config: Config, arch: int) -> bool:
    """Whether everything that the call launches with the entry compiles within the limits."""
    done: set[str] = set()
    with using(slot.alternative(config)):
        started = launches(slot.call, DEVICES[arch])
    for launch in started:
        name = key(launch, arch)
        if launch.name != slot.launched or name in done:
            continue
        done.add(name)
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # where Triton prints a program that ptxas refuses
                facts = compile_launch(launch, arch)
        except Exception:  # the compiler itself gave up (out of registers, unsupported shape)
            return False
        slow = launch.name in PRODUCTS and not facts["instructions"]
        if facts["stack"] or facts["shared"] > SHARED_LIMIT[arch] or slow or facts["programs"] < config.per_sm:
            return False
    return bool(done)


def choose_static(job: tuple[Slot, int]) -> dict[str, Any] | None:
    slot, arch = job
    chosen = next((config for config in candidates(slot) if accept(slot, config, arch)), None)
    return None if chosen is None else entry(slot, chosen)


def choose_measured(job: tuple[Slot, int]) -> dict[str, Any] | None:
    slot, arch = job
    passing = [config for config in candidates(slot) if accept(slot, config, arch)]
    alternatives = {str(index): slot.alternative(config) for index, config in enumerate(passing)}
    found = race(timed(slot), alternatives, torch.device("cuda", torch.cuda.current_device()), _SECONDS)
    if not found.seconds:
        return None
    best = found.winner
    return {**entry(slot, passing[int(best)]), "ms": round(found.seconds[best] * 1e3, 4), "tried": len(passing)}


def timed(slot: Slot) -> Callable[[], Any]:
    """The whole op, on the present GPU."""
    call = slot.call
    if slot.kernel == "matmul":
        a, b = torch.randn(slot.rows, INNER, device="cuda"), torch.randn(INNER, COLUMNS, device="cuda")
        out = a.new_empty(slot.rows, COLUMNS)
        return lambda: launching.tf32x3_product(a, b, out, add=False)
    _, vocab, width, _ = call.sizes
    matrices = draw_matrices(Matrices(vocab, width, call.tied), getattr(torch, call.dtype), "cuda")
    return Problem.draw(slot.rows, BOTH if call.backward else FORWARD, *matrices).call(ours)


def entry(slot: Slot, config: Config) -> dict[str, Any]:
    found: dict[str, Any] = {"itemsize": slot.itemsize, "rows": slot.rows}
    if slot.width:
        found["width"] = slot.width
    return {
        **found,
        "blocks": config.blocks,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "per_sm": config.per_sm,
    }


def to_text(table: dict[str, dict[str, list[dict[str, Any]]]]) -> str:
    """JSON with one entry a line, so that a change of the table reads as one."""
    kernels = []
    for kernel, by_arch in table.items():
        archs = []
        for arch, entries in by_arch.items():
            lines = ",\n".join(f"      {json.dumps(e)}" for e in entries)
            archs.append(f'    "{arch}": [\n{lines}\n    ]')
        kernels.append(f'  "{kernel}": {{\n' + ",\n".join(archs) + "\n  }")
    return "{\n" + ",\n".join(kernels) + "\n}\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--static", action="store_true", help="no GPU: choose by what the compiler reports")
    parser.add_argument(
        "--arch", type=int, nargs="+", default=list(SHARED_LIMIT), choices=list(SHARED_LIMIT), help="static only"
    )
    parser.add_argument("--kernel", nargs="+", help="fill these kernels' entries only")
    parser.add_argument("--jobs", type=int, default=2, help="static only: processes")
    parser.add_argument("--out", type=Path, default=plan.TABLE, help="where the table is written")
    options = parser.parse_args()
    if not options.static and not torch.cuda.is_available():
        parser.error("no GPU here: use --static")
    archs = options.arch if options.static else [soft_embed.device_of(torch.device("cuda", 0)).arch]
    jobs = [
        (slot, arch) for arch in archs for slot in slots(arch) if not options.kernel or slot.kernel in options.kernel
    ]
    if options.static:
        with ProcessPoolExecutor(options.jobs) as pool:
            chosen = list(pool.map(choose_static, jobs))
    else:
        chosen = [choose_measured(job) for job in jobs]
    table = {kernel: dict(by_arch) for kernel, by_arch in plan.table().items()}
    for kernel, arch in dict.fromkeys((slot.kernel, arch) for slot, arch in jobs):
        table[kernel][f"sm_{arch}"] = [
            found
            for (slot, slot_arch), found in zip(jobs, chosen, strict=True)
            if found and slot.kernel == kernel and slot_arch == arch
        ]
    options.out.write_text(to_text(table), encoding="utf-8")
    for (slot, arch), found in zip(jobs, chosen, strict=True):
        print(f"sm_{arch} {slot}: {found or 'none fits'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
