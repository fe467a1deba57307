"""The tables of docs/kernels.md: the forms and their traffic, and what the compiler made of the config table."""

from __future__ import annotations

from typing import Any

from gircse_kernels.plan import SCRATCH_BYTES, plan_backward, plan_select

from bench.documents import Results, block
from bench.info_nce import Size
from bench.static import plans, traffic
from bench.static.compile_report import is_good
from bench.static.launches import DEVICES
from bench.tables import Column, markdown

_H100 = DEVICES[90]


@block("forms")
def forms(_: Results) -> str:
    """No record: the plan and the traffic model, one problem for each form, on an H100."""
    lines = [plans.line(model, rows, "bf16", _H100) for model, rows in (("qwen2.5-0.5b", 1), ("qwen2.5-0.5b", 16))]
    wide, many = plans.line("mistral-7b", 64, "bf16", _H100), plans.line("qwen2.5-0.5b", 1024, "bf16", _H100)
    given = plans.given_logits("qwen2.5-0.5b", 1024, _H100)
    rows = [
        _form("1. one row", "T = 1, tied, half precision, D <= 2048", lines[0], lines[0].work),
        _form("2. few rows", "T <= 32, else the same", lines[1], lines[1].work),
        _form("3. many rows, one chunk", "all other, P fits the scratch", wide, wide.work),
        _form("3. many rows, several chunks", "all other", many, many.work),
        _form("3. many rows, one product", "logits are given", given, given.work),
    ]
    for name, when, line, kept in (
        ("backward, P kept", f"P fits {SCRATCH_BYTES >> 20} MiB", wide, True),
        ("backward, scores recomputed", "all other", many, False),
        ("backward, one product", "logits are given", given, False),
    ):
        work = traffic.backward_work(line.problem, _H100, kept=kept)
        rows.append(_form(name, when, line, work, backward=True))
    for line in (lines[1], plans.line("qwen2.5-7b", 64, "bf16", _H100)):
        plan = plan_select(*line.problem[:2], line.problem.itemsize, _H100, 32)
        rows.append(
            _form(
                "lists, top_k = 30",
                "top_k or top_n of at most 256",
                line,
                traffic.lists_work(line.problem, _H100, 30, 32),
            )
            | {"floor": traffic.lists_floor(line.problem, 30), "scratch": plan.scratch(line.problem.vocab)}
        )
    columns: list[Column] = [
        ("form", lambda r: r["form"]),
        ("when", lambda r: r["when"]),
        ("for example", lambda r: r["case"]),
        ("launches", lambda r: str(r["launches"])),
        ("MB", lambda r: f"{r['bytes'] / 1e6:,.0f}"),
        ("bytes / floor", lambda r: f"{r['bytes'] / r['floor'].bytes:.2f}"),
        ("GFLOP", lambda r: f"{r['flops'] / 1e9:,.1f}"),
        ("FLOPs / floor", lambda r: f"{r['flops'] / r['floor'].flops:.2f}"),
        ("scratch MiB", lambda r: f"{r['scratch'] / 2**20:.1f}"),
    ]
    return markdown(columns, rows)


def _form(
    name: str, when: str, line: plans.Line, work: list[traffic.Work], *, backward: bool = False
) -> dict[str, Any]:
    problem = line.problem
    plan = plan_backward(problem, _H100, False, False) if backward else line.plan
    return {
        "form": name,
        "when": when,
        "case": f"{line.model}, T = {problem.rows}",
        "launches": sum(w.launches for w in work),
        "bytes": sum(w.bytes for w in work),
        "flops": sum(w.flops for w in work),
        "floor": (traffic.backward_floor if backward else traffic.forward_floor)(problem),
        "scratch": plan.scratch(problem),
    }


@block("plans")
def choices(_: Results) -> str:
    """No record: what the plan chooses for many problems, on an H100."""
    return markdown(plans.COLUMNS, plans.lines(_H100))


@block("kernels")
def kernels(results: Results) -> str:
    """One line for each kernel, tiles and architecture; its variants (statistics, tied, gradients) at their worst."""
    record = results.records.get("kernels-compile")
    if record is None:
        return "no record yet: `python bench/compile_kernels.py`"
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for entry in record["plain"]:
        blocks = " ".join(f"{name.removeprefix('BLOCK_')}={size}" for name, size in entry["blocks"].items())
        dtype = "fp32" if entry["dtype"] == "float32" else "bf16"
        shape = (entry["kernel"], entry["arch"], dtype, blocks, entry["num_warps"], entry["num_stages"])
        found.setdefault(shape, []).append(entry)
    rows = [
        {
            "kernel": kernel.removesuffix("_kernel"),
            "arch": arch,
            "dtype": dtype,
            "tiles": f"{blocks}, {warps} warps, {stages} stages",
            "registers": max(e["registers"] for e in entries),
            "stack": max(e["stack"] for e in entries),
            "shared": max(e["shared"] for e in entries) / 1024,
            "limit": entries[0]["shared_limit"] / 1024,
            "programs": min(e["programs"] for e in entries),
            "instructions": ", ".join(sorted({name for e in entries for name in e["instructions"]})) or "-",
        }
        for (kernel, arch, dtype, blocks, warps, stages), entries in sorted(found.items())
    ]
    columns: list[Column] = [
        ("kernel", lambda r: r["kernel"]),
        ("sm", lambda r: str(r["arch"])),
        ("dtype", lambda r: r["dtype"]),
        ("tiles", lambda r: r["tiles"]),
        ("registers", lambda r: str(r["registers"])),
        ("stack", lambda r: str(r["stack"])),
        ("shared KiB (limit)", lambda r: f"{r['shared']:.0f} ({r['limit']:.0f})"),
        ("programs per SM", lambda r: str(r["programs"])),
        ("tensor cores", lambda r: r["instructions"]),
    ]
    return markdown(columns, rows) + "\n" + _summary(record) + results.mark(record)


_VARIANTS = {
    "plain": "all variants that training and encoding launch",
    "scores": "with bias, soft-cap and a temperature for each row",
    "noise": "with Gumbel noise",
    "threshold": "with top-k, top-p or min-p",
}


def _summary(record: dict[str, Any]) -> str:
    lines = []
    for name, what in _VARIANTS.items():
        if name not in record:
            continue
        entries = record[name]
        spilled = [e for e in entries if not is_good(e)]
        worst = max((e["stack"] for e in spilled), default=0)
        more = f", at most {worst} bytes a thread" if spilled else ""
        lines.append(f"- {what}: {len(entries)} kernels, {len(spilled)} of them spill{more}")
    return "\n".join(lines) + "\n"


@block("info-nce")
def info_nce(results: Results) -> str:
    """The share of the exchange between ranks; docs/performance.md has the times of one process."""
    parts = []
    for record in results.of("info_nce-ranks").values():
        origin, size = record["provenance"], Size(*(record[name] for name in Size._fields))
        where = f"{origin['device']}, torch {origin['torch']}; `{origin['command']}`{results.mark(record)}"
        share = record["exchange_seconds"] / record["seconds"]
        parts.append(f"{where}: {record['ranks']} processes, each {size}: exchange is {share:.0%} of a step")
    return "\n\n".join(parts) or "no record yet: `python bench/info_nce.py --ranks 2`"
