"""The tables of docs/kernels.md: the traffic model, and what the compiler made of the config table."""

from __future__ import annotations

from typing import Any

from gircse_kernels.plan import OnePass, Problem, plan_forward

from bench.cases import MODELS
from bench.documents import Results, block
from bench.info_nce import COLUMNS as INFO_NCE
from bench.info_nce import Size
from bench.static import traffic
from bench.static.compile_report import is_good
from bench.static.launches import DEVICES
from bench.tables import Column, markdown

_MODELS = ("smollm2-135m", "qwen2.5-0.5b", "qwen3-0.6b", "llama-3.2-1b", "qwen3-4b", "mistral-7b", "qwen2.5-7b")
_H100 = DEVICES[90]
_MANY = 1024


@block("traffic")
def traffic_forward(_: Results) -> str:
    """No record: the model itself, for an H100."""
    rows = [_forward(name, t) for name in _MODELS for t in (1, 16, 64, 256, _MANY)]
    columns: list[Column] = [
        ("model", lambda r: r["model"]),
        ("T", lambda r: str(r["rows"])),
        ("plan", lambda r: r["plan"]),
        ("floor MB", lambda r: f"{r['floor'].bytes / 1e6:,.0f}"),
        ("matrices and rows / floor", lambda r: f"{r['main'] / r['floor'].bytes:.2f}"),
        ("partials / floor", lambda r: f"{r['partial'] / r['floor'].bytes:.2f}"),
        ("FLOPs / floor", lambda r: f"{r['flops'] / r['floor'].flops:.2f}"),
    ]
    return markdown(columns, rows)


def _problem(name: str, rows: int) -> Problem:
    model = MODELS[name]
    return Problem(rows, model.vocab, model.width, model.width, model.tied, 2)


def _forward(name: str, rows: int) -> dict[str, Any]:
    problem = _problem(name, rows)
    plan, work = plan_forward(problem, _H100), traffic.forward_work(problem, _H100)
    how = (
        f"one pass, {plan.splits} splits"
        if isinstance(plan, OnePass)
        else f"two passes, {traffic.cdiv(problem.vocab, plan.chunk)} chunks, {plan.splits} splits"
    )
    return {
        "model": name,
        "rows": rows,
        "plan": how,
        "floor": traffic.forward_floor(problem),
        "main": sum(w.matrix_bytes + w.row_bytes for w in work),
        "partial": sum(w.partial_bytes for w in work),
        "flops": sum(w.flops for w in work),
    }


@block("traffic-kernels")
def traffic_kernels(_: Results) -> str:
    """Kernel by kernel, for one model in each regime."""
    rows = []
    for name, t, backward in (
        ("qwen2.5-0.5b", 16, False),
        ("mistral-7b", 64, False),
        ("qwen2.5-0.5b", _MANY, False),
        ("qwen2.5-0.5b", _MANY, True),
    ):
        problem = _problem(name, t)
        floor = (traffic.backward_floor if backward else traffic.forward_floor)(problem)
        case = f"{name}, T = {t}{', backward' if backward else ''}"
        works = (traffic.backward_work if backward else traffic.forward_work)(problem, _H100)
        rows += [{"case": case, "work": work, "floor": floor} for work in works]
    columns: list[Column] = [
        ("case", lambda r: r["case"]),
        ("kernel", lambda r: f"`{r['work'].kernel}`"),
        ("launches", lambda r: str(r["work"].launches)),
        ("matrix MB", lambda r: f"{r['work'].matrix_bytes / 1e6:,.1f}"),
        ("partial MB", lambda r: f"{r['work'].partial_bytes / 1e6:,.1f}"),
        ("rows MB", lambda r: f"{r['work'].row_bytes / 1e6:,.1f}"),
        ("bytes / floor", lambda r: f"{r['work'].bytes / r['floor'].bytes:.2f}"),
        ("FLOPs / floor", lambda r: f"{r['work'].flops / r['floor'].flops:.2f}"),
    ]
    return markdown(columns, rows)


@block("kernels")
def kernels(results: Results) -> str:
    """One line for each kernel, tiles and architecture; its variants (statistics, tied, gradients) at their worst."""
    record = results.named("kernels-compile")
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
        ("tensor cores", lambda r: r["instructions"]),
    ]
    return markdown(columns, rows) + "\n" + _summary(record) + results.mark(record)


def _summary(record: dict[str, Any]) -> str:
    lines = []
    for name, what in (
        ("plain", "all variants that training and encoding launch"),
        ("scores", "with bias, soft-cap and a temperature for each row"),
        ("noise", "with Gumbel noise"),
    ):
        entries = record[name]
        spilled = [e for e in entries if not is_good(e)]
        worst = max((e["stack"] for e in spilled), default=0)
        lines.append(
            f"- {what}: {len(entries)} kernels, {len(spilled)} of them spill"
            + (f", at most {worst} bytes a thread" if spilled else "")
        )
    return "\n".join(lines) + "\n"


@block("info-nce")
def info_nce(results: Results) -> str:
    """Every record of the loss, and the share of the exchange between ranks."""
    found = [r for r in results.records.values() if r.get("benchmark") in ("info_nce", "info_nce-ranks")]
    if not found:
        return "no record yet: `python bench/info_nce.py`"
    parts = []
    for record in found:
        origin = record["provenance"]
        where = f"{origin['device']}, torch {origin['torch']}; `{origin['command']}`{results.mark(record)}"
        if record["benchmark"] == "info_nce":
            parts.append(f"{where}\n\n{markdown(INFO_NCE, record['points'])}")
            continue
        share = record["exchange_seconds"] / record["seconds"]
        size = Size(*(record[name] for name in Size._fields))
        parts.append(
            f"{where}: {record['ranks']} processes, each {size}: exchange is {share:.0%} of a step; "
            f"with a ring a step takes {record['ring_seconds'] / record['seconds']:.2f} times as long"
        )
    return "\n\n".join(parts)
