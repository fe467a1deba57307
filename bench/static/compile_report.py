"""Compile every launch of given problems for GPUs that need not be there, and report what the compiler made of it.

    python -m bench.static.compile_report --arch 80 90 --out report.json

The launches are the launcher's own: it runs on meta tensors with `launch` replaced by a recorder, so what is compiled
here is what a device of that architecture would run. Reported for each: registers, stack (spills), shared memory and
its limit, tensor-core instructions. Needs no GPU; Triton brings the assembler. Without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import subprocess
import sys
import tempfile
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from gircse_kernels import decode_attention, info_nce, launching, plan, soft_embed
from gircse_kernels.plan import Config, Device, Problem
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# bytes of shared memory that one program may use
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
NUM_SMS = {80: 108, 90: 132, 100: 148}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
MMA = ("wgmma.mma_async", "mma.sync", "tcgen05.mma")
NO_PRODUCT = (
    "merge_kernel",
    "constants_kernel",
    "pool_kernel",
    "pool_grad_kernel",
    "decode_merge_kernel",
    "decode_attention_kernel",  # its float32 products are exact, off the tensor cores; `is_good` checks the others
)  # the kernels without a matrix product that must be on the tensor cores
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Launch(NamedTuple):
    """One recorded launch."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    config: Config
    constants: dict[str, Any]


class Case(NamedTuple):
    """A call of the op to compile: the problem, and what of it is asked for."""

    name: str
    problem: Problem
    dtype: str
    backward: str = ""  # "", "hidden" (frozen matrices) or "all"
    stats: bool = False  # a forward also keeps what backward needs
    options: bool = False  # bias, soft-cap and temperature of each row
    noise: bool = False  # seed of each row
    threshold: bool = False  # lowest score of each row
    contrastive: bool = False  # the InfoNCE of T rows against V candidates, instead
    decode_heads: tuple[int, int] | None = None  # instead, decode attention of T rows on V slots: H and H_kv


def record(case: Case, device: Device) -> list[Launch]:
    """The launches of the case on that device, none of them run."""
    launches: list[Launch] = []
    original = launching.launch
    launching.launch = lambda kernel, grid, arguments, config, **constants: launches.append(
        Launch(kernel, grid, arguments, config, constants)
    )
    try:
        _call(case, device)
    finally:
        launching.launch = original
    return launches


def _call(case: Case, device: Device, ready: Callable[[], object] = lambda: None) -> None:
    """The case on meta tensors; `ready` is called between making the inputs and the call."""
    if case.contrastive:
        _call_info_nce(case, device, ready)
        return
    if case.decode_heads is not None:
        _call_decode_attention(case, *case.decode_heads, ready)
        return
    problem, dtype = case.problem, DTYPES[case.dtype]

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    rows = problem.rows
    inputs = soft_embed.Inputs(
        empty(rows, problem.width),
        empty(problem.vocab, problem.width),
        None if problem.tied else empty(problem.vocab, problem.value_width),
        empty(problem.vocab) if case.options else None,
        empty(rows, dtype=torch.float32) if case.options else None,
        empty(rows, dtype=torch.int64) if case.noise else None,
        empty(rows, dtype=torch.float32) if case.threshold else None,
    )
    options = soft_embed.Options(softcap=30.0 if case.options else None)
    if not case.backward:
        ready()
        soft_embed.forward(inputs, options, stats=case.stats, exact=case.stats, device=device)
        return
    everything = case.backward == "all"
    vector, grad = empty(rows, dtype=torch.float32), empty(rows, problem.value_width)
    saved = soft_embed.Saved(empty(rows, problem.value_width, dtype=torch.float32), vector, vector, vector)
    statistics = vector if case.stats else None
    needs = soft_embed.Needs(True, everything, everything and not problem.tied, everything, everything)
    ready()
    soft_embed.backward(grad, statistics, statistics, inputs, saved, options, needs, device=device)


def _call_info_nce(case: Case, device: Device, ready: Callable[[], object]) -> None:
    """Five steps, both directions; with `options` a mask and an excluded candidate for each row."""
    rows, candidates, width, num_steps = case.problem.rows, case.problem.vocab, case.problem.width, 5
    empty = functools.partial(torch.empty, device="meta")
    steps = empty((rows, num_steps, width), dtype=DTYPES[case.dtype])
    docs = empty((num_steps, candidates, width))
    target = empty(rows, dtype=torch.int64)
    mask = empty((rows, candidates), dtype=torch.bool) if case.options else None
    exclude = target if case.options else None
    ready()
    pooled = info_nce.pool(steps, "mean")
    found = info_nce.sums(pooled.vectors, docs, target, 0.02, mask=mask, exclude=exclude, device=device)
    if case.backward:
        weight = empty(num_steps)
        grad = torch.empty_like(pooled.vectors)
        info_nce.gradients(
            pooled.vectors, docs, target, 0.02, found.peak, found.total, weight,
            mask=mask, exclude=exclude, grad_rows=grad, device=device,
        )  # fmt: skip
        info_nce.pool_gradient(grad, pooled, "mean", empty(steps.shape, dtype=steps.dtype))


def _call_decode_attention(case: Case, heads: int, kv_heads: int, ready: Callable[[], object]) -> None:
    """With `options` a window and a soft-cap."""
    rows, slots, width, value_width = case.problem[:4]
    empty = functools.partial(torch.empty, dtype=DTYPES[case.dtype], device="meta")
    query, key = empty((rows, heads, width)), empty((rows, kv_heads, slots, width))
    value = empty((rows, kv_heads, slots, value_width))
    position = empty(rows, dtype=torch.int64)
    ready()
    decode_attention.decode_attention(
        query, key, value, position,
        scale=width**-0.5, window=slots // 2 if case.options else None, softcap=50.0 if case.options else None,
    )  # fmt: skip


class Allocations(TorchDispatchMode):
    """Bytes of all fresh tensors that are alive at once, at most."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.seen:
                    self.seen.add(storage._cdata)
                    self.alive += storage.nbytes()
                    self.peak = max(self.peak, self.alive)
                    weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        return result

    def _free(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.alive -= size


def allocated_bytes(case: Case, device: Device) -> int:
    """Peak bytes that a call allocates beyond its inputs, results included; nothing is run."""
    with Allocations() as mode:
        before = []
        original = launching.launch
        launching.launch = lambda *_, **__: None
        try:
            _call(case, device, lambda: before.append(mode.alive))
        finally:
            launching.launch = original
    return mode.peak - before[0]


def signature(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], list[Any]]]:
    """Types, constants and divisibility hints of a launch, as Triton specialises it when it is called."""
    types: dict[str, str] = {}
    constants = {**launch.constants, **launch.config.blocks}
    hints: dict[tuple[int, ...], list[Any]] = {}
    values = iter(launch.arguments)
    for index, parameter in enumerate(launch.kernel.params):
        name = parameter.name
        if parameter.is_constexpr:
            types[name] = "constexpr"
            continue
        value = next(values)
        special = not parameter.do_not_specialize
        if value is None or (special and isinstance(value, int) and value == 1):
            types[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            types[name] = (
                "*"
                + {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "int64": "i64", "int8": "i8"}[
                    str(value.dtype).removeprefix("torch.")
                ]
            )
            hints[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            types[name] = "fp32"
        else:
            types[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if special and value % 16 == 0:
                hints[(index,)] = [["tt.divisibility", 16]]
    return types, constants, hints


def compile_launch(launch: Launch, arch: int) -> dict[str, Any]:
    """Registers, stack, shared memory and matrix instructions of one launch."""
    types, constants, hints = signature(launch)
    kernel = triton.compile(
        ASTSource(fn=launch.kernel, signature=types, constexprs=constants, attrs=hints),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": launch.config.num_warps, "num_stages": launch.config.num_stages},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [str(CUOBJDUMP), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    ptx = kernel.asm["ptx"]
    return {
        "registers": found["REG"],
        "stack": found["STACK"] + found["LOCAL"],
        "shared": kernel.metadata.shared,
        "shared_limit": SHARED_LIMIT[arch],
        "instructions": {name: ptx.count(name) for name in MMA if name in ptx},
        "async_copies": ptx.count("cp.async"),
    }


def key(launch: Launch, arch: int) -> str:
    """What decides the compiled code."""
    types, constants, hints = signature(launch)
    config = launch.config
    return repr((launch.kernel.__name__, arch, types, constants, hints, config.num_warps, config.num_stages))


def describe(launch: Launch) -> dict[str, Any]:
    config = launch.config
    return {
        "kernel": launch.kernel.__name__,
        "blocks": dict(config.blocks),
        "widths": [launch.constants[n] for n in ("WIDTH_0", "WIDTH_1") if n in launch.constants],
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "grid": list(launch.grid),
    }


def report(cases: Iterable[Case], archs: Sequence[int], jobs: int = 2) -> list[dict[str, Any]]:
    """One entry for each distinct kernel of the cases and architectures; `cases` names those that launch it."""
    cases = list(cases)
    entries: dict[str, dict[str, Any]] = {}
    work: list[tuple[int, int, int]] = []
    for arch in archs:
        for i_case, case in enumerate(cases):
            for i_launch, launch in enumerate(record(case, Device(arch, NUM_SMS[arch]))):
                name = key(launch, arch)
                if name not in entries:
                    entries[name] = {"arch": arch, "dtype": case.dtype, "cases": Counter(), **describe(launch)}
                    work.append((arch, i_case, i_launch))
                entries[name]["cases"][case.name] += 1
    with ProcessPoolExecutor(jobs) as pool:
        results = list(pool.map(_compile_job, [(cases[c], a, i) for a, c, i in work], chunksize=1))
    for entry, result in zip(entries.values(), results, strict=True):
        entry.update(result, cases=sorted(entry["cases"]))
    return list(entries.values())


def _compile_job(job: tuple[Case, int, int]) -> dict[str, Any]:
    case, arch, index = job
    return compile_launch(record(case, Device(arch, NUM_SMS[arch]))[index], arch)


def decode_cases(options: bool = False) -> list[Case]:
    """Decode attention with every entry of its table, in one split and in several; 80 columns padded to 128."""
    cases = []
    for padded, itemsize in decode_attention.TABLE:
        for width in (padded, 80) if padded == 128 else (padded,):
            for dtype in ("bfloat16", "float16") if itemsize == 2 else ("float32",):
                for slots in (decode_attention.SLICE, 4 * decode_attention.SLICE):
                    problem = Problem(64, slots, width, width, False, itemsize)
                    name = f"decode_attention, d = {width}, S = {slots}"
                    cases.append(Case(name, problem, dtype, options=options, decode_heads=(14, 2)))
    return cases


def table_cases(options: bool = False, noise: bool = False, threshold: bool = False) -> list[Case]:
    """Problems that between them launch every entry of the config tables, in the variants that users run.

    With `options` they also have bias, soft-cap and a temperature for each row, with `noise` a seed for each, with
    `threshold` a lowest score.
    """
    cases = []
    for kernel, by_arch in plan.table().items():
        slots = {(e["itemsize"], e["rows"], e.get("width", 0)) for entries in by_arch.values() for e in entries}
        for itemsize, rows, width in sorted(slots):
            dtype, columns = "float32" if itemsize == 4 else "bfloat16", width or 1024
            tied, untied = (Problem(rows, 50_304, columns, columns, is_tied, itemsize) for is_tied in (True, False))
            name = f"{kernel}, T = {rows}" + (f", D = {width}" if width else "")
            for stats in (False, True):
                if kernel == "one_pass":
                    cases.append(Case(name, tied, dtype, "", stats, options, noise, threshold))
                elif kernel in ("score", "weigh"):
                    cases.append(Case(name, untied, dtype, "", stats, options, noise, threshold))
                elif stats:
                    cases += [Case(name, p, dtype, "all", True, options, noise, threshold) for p in (tied, untied)]
                else:
                    cases.append(Case(name, tied, dtype, "hidden", False, options, noise, threshold))
    for rows in (16, 64, plan.ROW_BLOCK):
        problem = Problem(rows, 8192, 1024, 1024, False, 4)
        cases.append(Case(f"info_nce, B = {rows}", problem, "float32", "all", False, options, contrastive=True))
    return cases if noise or threshold else cases + decode_cases(options)


def is_good(entry: dict[str, Any]) -> bool:
    """Nothing spilled, shared memory within the limit, matrix products on the tensor cores."""
    anywhere = entry["kernel"] in NO_PRODUCT
    if entry["kernel"] == "decode_attention_kernel":
        anywhere = entry["dtype"] == "float32"
    products = bool(entry["instructions"]) or anywhere
    return entry["stack"] == 0 and entry["shared"] <= entry["shared_limit"] and products


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90], choices=sorted(SHARED_LIMIT))
    parser.add_argument("--options", action="store_true", help="with bias, soft-cap and temperature of each row")
    parser.add_argument("--noise", action="store_true", help="with Gumbel noise")
    parser.add_argument("--threshold", action="store_true", help="with a lowest score of each row")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--out", type=Path, help="write the report to this JSON file")
    options = parser.parse_args()
    entries = report(table_cases(options.options, options.noise, options.threshold), options.arch, options.jobs)
    for e in entries:
        print(
            f"{'ok ' if is_good(e) else 'BAD'} sm_{e['arch']} {e['dtype']:8} {e['kernel']:18} "
            f"{e['blocks']} {e['widths']} "
            f"warps {e['num_warps']} stages {e['num_stages']}: {e['registers']} registers, stack {e['stack']}, "
            f"shared {e['shared'] / 1024:.0f} of {e['shared_limit'] / 1024:.0f} KiB, {e['instructions']}"
        )
    if options.out:
        options.out.write_text(json.dumps(entries) + "\n", encoding="utf-8")
    return 0 if all(map(is_good, entries)) else 1


if __name__ == "__main__":
    sys.exit(main())
