"""Compile kernels for GPUs that need not be there, and report what the compiler made of them.

The launches are those of the ops (`bench.static.launches`), so what is compiled here is what a device of that
architecture would run. Reported for each kernel: registers, stack (spills), shared memory and its limit, tensor-core
instructions, and how many programs fit one multiprocessor. Triton brings the assembler. The command that writes the
record is `python bench/compile_kernels.py`. Needs a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from gircse_kernels import plan
from gircse_kernels.decoder import attention
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from bench.static.launches import DEVICES, Call, Launch, launches
from bench.suite.alternatives import using

# Bytes of shared memory that one program may use; 1 KiB more of each program is the system's.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
REGISTERS, THREADS = 65_536, 2048  # of a multiprocessor
TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.bool: "i1",
}
MMA = ("wgmma.mma_async", "mma.sync", "tcgen05.mma")
PRODUCTS = (  # the kernels whose matrix products must be on the tensor cores
    "few_rows_kernel",
    "weights_product_kernel",
    "product_kernel",
    "decode_attention_kernel",  # of half precision; its float32 products are exact, off the tensor cores
)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


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
            types[name] = f"*{TYPES[value.dtype]}"
            hints[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, TensorDescriptor):
            types[name] = f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
        elif isinstance(value, float):
            types[name] = "fp32"
        else:
            types[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if special and value % 16 == 0:
                hints[(index,)] = [["tt.divisibility", 16]]
    return types, constants, hints


def compiled(launch: Launch, arch: int) -> Any:
    """What Triton makes of a launch for that architecture."""
    types, constants, hints = signature(launch)
    return triton.compile(
        ASTSource(fn=launch.kernel, signature=types, constexprs=constants, attrs=hints),
        target=GPUTarget("cuda", arch, 32),
        options=launch.config.options,
    )


def dump(kernel: Any, tool: str, option: str) -> str:
    """What a tool that Triton carries, cuobjdump or nvdisasm, says about the binary of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        return subprocess.run([str(TOOLS / tool), option, file.name], capture_output=True, text=True, check=True).stdout


def compile_launch(launch: Launch, arch: int) -> dict[str, Any]:
    """Registers, stack, shared memory and matrix instructions of one launch."""
    kernel = compiled(launch, arch)
    usage = dump(kernel, "cuobjdump", "--dump-resource-usage")
    found = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    ptx = kernel.asm["ptx"]
    return {
        "registers": found["REG"],
        "stack": found["STACK"] + found["LOCAL"],
        "shared": kernel.metadata.shared,
        "shared_limit": SHARED_LIMIT[arch],
        "programs": programs(launch.config.num_warps, found["REG"], kernel.metadata.shared, arch),
        "instructions": {name: ptx.count(name) for name in MMA if name in ptx},
        "async_copies": ptx.count("cp.async"),
        "dependent": "griddepcontrol.wait" in ptx,
        "wide_accesses": len(re.findall(r"\b(?:ld|st)\.global\S*\.v4\.b32", ptx)),
    }


def key(launch: Launch, arch: int) -> str:
    """What decides the compiled code."""
    types, constants, hints = signature(launch)
    return repr((launch.kernel.__name__, arch, types, constants, hints, launch.config.options))


def programs(num_warps: int, registers: int, shared: int, arch: int) -> int:
    """How many programs one multiprocessor holds at once: by its threads, registers and shared memory.

    Registers are given to a warp in units of 256, 8 for each of its threads.
    """
    warp = 32 * (-(-registers // 8) * 8)
    by_shared = (SHARED_LIMIT[arch] + 1024) // (shared + 1024)
    return min(32, THREADS // (32 * num_warps), REGISTERS // (warp * num_warps), by_shared)


def describe(launch: Launch) -> dict[str, Any]:
    config = launch.config
    return {
        "kernel": launch.name,
        "blocks": dict(config.blocks),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "grid": list(launch.grid),
    }


def report(cases: Iterable[Case], archs: Sequence[int], jobs: int = 2) -> list[dict[str, Any]]:
    """One entry for each distinct kernel of the cases and architectures; `calls` names those that launch it."""
    entries: dict[str, dict[str, Any]] = {}
    work: list[tuple[Case, int, int]] = []
    for arch in archs:
        for case in cases:
            for index, launch in enumerate(case.launches(arch)):
                name = key(launch, arch)
                if name not in entries:
                    entries[name] = {"arch": arch, "dtype": case.call.dtype, "calls": Counter(), **describe(launch)}
                    work.append((case, arch, index))
                entries[name]["calls"][case.call.name] += 1
    with ProcessPoolExecutor(jobs) as pool:
        results = list(pool.map(_compile_job, work, chunksize=1))
    for entry, result in zip(entries.values(), results, strict=True):
        entry.update(result, calls=sorted(entry["calls"]))
    return list(entries.values())


def _compile_job(job: tuple[Case, int, int]) -> dict[str, Any]:
    case, arch, index = job
    return compile_launch(case.launches(arch)[index], arch)


class Case(NamedTuple):
    """A call, and what is chosen for it instead of what the table says: JSON of `bench.suite.alternatives`."""

    call: Call
    alternative: str = "{}"

    def launches(self, arch: int) -> list[Launch]:
        with using(json.loads(self.alternative)):
            return launches(self.call, DEVICES[arch])


def decode_cases(*variants: str) -> list[Case]:
    """Decode attention with every entry of its table, in one split and in several; 80 columns padded to 128."""
    return [
        Case(Call("decode_attention", (64, slots, width, width, 14, 2), dtype, variants=variants))
        for padded, itemsize in attention.TABLE
        for width in ((padded, 80) if padded == 128 else (padded,))
        for dtype in (("bfloat16", "float16") if itemsize == 2 else ("float32",))
        for slots in (attention.SLICE, 4 * attention.SLICE)
    ]


# D, H, H_kv, d, r / 2, I: every width of a block, heads that are no power of two, columns that are not rotated
_DECODERS = {
    "qwen2.5-0.5b": (896, 14, 2, 64, 32, 4864),
    "gemma-3-1b": (1152, 4, 1, 256, 128, 6912),
    "phi-4-mini": (3072, 24, 8, 128, 48, 8192),
    "qwen2.5-32b": (5120, 40, 8, 128, 64, 27648),
}


def decoder_cases(*variants: str) -> list[Case]:
    """The kernels between the products of a layer; also where a launch must not start before the one in
    front of it has ended."""
    calls = [Call("decoder", (64, *sizes), "bfloat16", variants=variants) for sizes in _DECODERS.values()]
    calls += [Call("decoder", (64, *_DECODERS["qwen2.5-0.5b"]), "float32", variants=variants)]
    return [*map(Case, calls), Case(calls[0], '{"plan": {"DEPENDENT_LAUNCH": false}}')]


def table_cases(*variants: str) -> list[Case]:
    """Calls that between them launch every entry of the config table, in the variants that users run.

    `variants`, other than "statistics" and "matrices", are those of all calls.
    """
    widths = sorted({e["width"] for entries in plan.table()["few_rows"].values() for e in entries})
    cases = [
        Case(Call("soft_embed", (rows, 50_304, width, width), "bfloat16", variants=(*statistics, *variants)))
        for width in widths
        for rows in (1, 16, plan.FEW_ROWS)
        for statistics in ((), ("statistics",))
    ]
    for rows in (64, plan.ROW_BLOCK):
        for dtype in ("bfloat16", "float32"):
            for tied in (True, False):
                call = Call("soft_embed", (rows, 50_304, 1024, 1024), dtype, tied, True, variants)
                trained = call._replace(variants=("statistics", *variants, "matrices"))
                cases += [Case(call), Case(trained), *(Case(call, other) for other in _OTHERS)]
            given = Call("soft_embed", (rows, 50_304, 0, 1024), dtype, False, True, (*variants, "hard", "matrices"))
            cases += [Case(given), Case(given._replace(variants=variants))]
    for dtype in ("bfloat16", "float32"):
        truncated = Call("soft_embed", (64, 50_304, 1024, 1024), dtype, True, True, variants)
        chosen = (("statistics", *variants, "top_k", "matrices"), (*variants, "top_k"), (*variants, "top_p"))
        cases += [Case(truncated._replace(variants=each)) for each in chosen]
    if {"noise", "threshold"}.isdisjoint(variants):  # which no other op has
        for dtype in ("bfloat16", "float32"):
            cases.append(Case(Call("info_nce", (64, 8192, 1, 1024), dtype, backward=True, variants=variants)))
        cases += [Case(Call("product", (rows, 1024, 8192), "float32")) for rows in (16, 64, plan.ROW_BLOCK)]
        cases += [*decode_cases(*variants), *decoder_cases(*variants)]
    return cases


# What a measurement may choose in the place of the committed choice for many rows.
_OTHERS = ('{"many_rows": {"epilogue": true}}', '{"many_rows": {"half_scores": false}}', '{"plan": {"KEPT_BYTES": 0}}')


def is_good(entry: dict[str, Any]) -> bool:
    """Nothing spilled, shared memory within the limit, matrix products on the tensor cores."""
    exact = entry["kernel"] == "decode_attention_kernel" and entry["dtype"] == "float32"
    products = bool(entry["instructions"]) or exact or entry["kernel"] not in PRODUCTS
    return entry["stack"] == 0 and entry["shared"] <= entry["shared_limit"] and products
