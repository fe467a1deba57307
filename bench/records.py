"""The record of a run: what is printed, saved and plotted, all from the same dictionary."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.agreement import OK, Difference, mark, worst
from bench.engines import ENGINES, GRAPH, NO_REUSE, OFFICIAL_EVAL, REFERENCE, SINGLE_PASS
from bench.plots import BLACK, GREY, Figure, Panel, Series
from bench.provenance import provenance
from bench.tables import Column, column, filled, table
from gircse.files.atomic import new_file

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from gircse.roofline import ModelFacts

UNSTEADY = 0.3  # spread above which a median of a few runs says little
_COLUMNS: list[Column] = [
    column("engine", "engine"),
    column("K", "num_steps"),
    column("seconds", "seconds", "{:.4g}"),
    column("spread", "spread", "{:.0%}"),
    column("texts/s", "texts_per_second", "{:,.4g}"),
    column("tokens/s", "tokens_per_second", "{:,.0f}"),
    column("x recompute", "speedup_over_recompute", "{:.2f}x"),
    column("x official", "speedup_over_official", "{:.2f}x"),
    column("of single-pass", "texts_ratio_to_single_pass", "{:.0%}"),
    column("peak GiB", "peak_bytes", "{:.2f}", 2**-30),
    column("over model GiB", "peak_extra_bytes", "{:.2f}", 2**-30),
    column("peak/recompute", "peak_ratio_to_recompute", "{:.2f}"),
    column("floor s", "floor_seconds", "{:.4g}"),
    column("time/floor", "time_over_floor", "{:.2f}"),
    column("time(K)/time(0)", "time_over_zero", "{:.2f}"),
    column("floor(K)/floor(0)", "floor_over_zero", "{:.2f}"),
    column("kernels a step", "step_launches", "{:,}"),
    column("GB a step", "step_bytes", "{:.3g}", 1e-9),
    column("1 text p50 ms", "latency_p50", "{:,.4g}", 1e3),
    column("p95 ms", "latency_p95", "{:,.4g}", 1e3),
    ("check", lambda row: "-" if row.get("verdict", OK) == OK else row["verdict"]),
]
# These engines have the same colour in every picture.
_COLORED = ("cached", REFERENCE, OFFICIAL_EVAL, GRAPH, NO_REUSE)


def columns_of(record: dict[str, Any]) -> list[Column]:
    """The columns that a record of `bench/run.py` fills."""
    return filled(_COLUMNS, record["points"])


def describe(record: dict[str, Any]) -> tuple[str, str]:
    """(model, batch), a line each."""
    model, batch = record["model"], record["batch"]
    depth = f", cut to {model['layers']} layers" if model["truncated"] else ""
    weights = "random weights" if model["random"] else "its own weights"
    what = f"{model['name']} ({model['parameters'] / 1e6:,.1f}M parameters, {weights}{depth}), {model['dtype']}"
    if record["benchmark"] == "corpus":
        return what, _describe_corpus(batch)
    lengths = f"{batch['length']} prompt tokens each"
    distribution = batch.get("distribution") or ("lognormal" if batch["mixed"] else "fixed")
    if distribution != "fixed":
        lengths = f"1 to {batch['length']} prompt tokens, {distribution} ({batch['prompt_tokens']} in all)"
    if batch.get("shared_prefix"):
        lengths += f", the first {batch['shared_prefix']} of all the same"
    rows = f"{batch['texts']} texts"
    if record["benchmark"] == "training":
        steps = ", ".join(map(str, record["num_steps"]))
        rows = f"{batch['queries']} queries + {batch['texts'] - batch['queries']} passages, K = {steps}"
    return what, f"{rows}, {lengths}"


def _describe_corpus(batch: dict[str, Any]) -> str:
    shared = f", the first {batch['shared_prefix']} of all the same" if batch["shared_prefix"] else ""
    return (
        f"{batch['texts']} texts of {batch['corpus']}, {batch['shortest']} to {batch['longest']} prompt tokens{shared} "
        f"({batch['prompt_tokens']} in all); {OFFICIAL_EVAL} in batches of {batch['official_batch']} in file order"
    )


def report(record: dict[str, Any]) -> str:
    """The screen: what, where, how well the engines agree, the table, how to read it."""
    origin, ceilings, checks = record["provenance"], record["ceilings"], record["agreement"]["checks"]
    threads = f", {origin['threads']} threads" if record["model"]["device"] == "cpu" else f", driver {origin['driver']}"
    agreed = ", ".join(f"{name} {value:.1e}" for name, value in record["agreement"]["worst"].items())
    verb = "engines agree" if not problems(record) else "NOT ALL engines agree"
    lines = [
        *describe(record),
        f"{origin['device']}{threads}; torch {origin['torch']}, transformers {origin['transformers']}, "
        f"triton {origin['triton']}; commit {origin['commit']}, sources {origin['sources']}",
        f"measured ceilings: {ceilings['flops_per_s'] / 1e9:,.0f} GFLOP/s ({record['model']['dtype']}), "
        f"{ceilings['bytes_per_s'] / 1e9:,.1f} GB/s",
        f"{verb} with {_against(record)} ({len(checks)} checks): worst {agreed}" if checks else "nothing was compared",
        "",
        table(columns_of(record), record["points"]),
        "",
        f"medians of {record['repeats']} interleaved runs; spread = (slowest - fastest) / median",
        "tokens = prompt tokens + K generated positions per text, whatever the engine computes",
        "floor = least time of the job (prompt once, K cached steps) at the measured ceilings: gircse/roofline.py",
    ]
    if any("latency_p50" in row for row in record["points"]):
        lines.append(f"1 text: seconds of one text alone, percentiles of {record['latency_runs']} runs")
    lines += problems(record)
    for name, kept in record.get("generation", {}).items():
        if kept["not_captured"] is not None:
            lines.append(f"NOT CAPTURED: {name} ran its step eagerly: {kept['not_captured']}")
        if kept["not_fused"] is not None:
            lines.append(f"NOT FUSED: {name} ran the model's own decoder: {kept['not_fused']}")
    unsteady = sum(row["spread"] > UNSTEADY for row in record["points"])
    if unsteady:
        lines.append(
            f"UNSTEADY: {unsteady} of {len(record['points'])} points spread over more than {UNSTEADY:.0%}; "
            "the machine was busy with something else, do not quote these"
        )
    return "\n".join(lines)


def figure_of(record: dict[str, Any]) -> Figure:
    """The picture of a record of `bench/run.py`."""
    (model, batch), origin = describe(record), record["provenance"]
    where = f"{origin['device']}, torch {origin['torch']}, transformers {origin['transformers']}, {origin['date'][:10]}"
    caption = f"{model}; {batch}\n{where}, commit {origin['commit'] or 'none'}, sources {origin['sources']}"
    if record["benchmark"] == "training":
        rows = [row for row in record["points"] if row["num_steps"] == max(record["num_steps"])]
        size = {"width": 9.4, "height": 1.9 + 0.55 * len(rows)}
        return Figure(panels=_step_panels(rows), title="One training step", caption=caption, columns=2, **size)
    panels = _encoding_panels(record["points"], record["batch"]["texts"])
    title = f"Encoding speed against K (labels: times as fast as {OFFICIAL_EVAL})"
    return Figure(panels=panels, title=title, caption=caption, columns=2, width=12.4, height=5.2)


def _step_panels(rows: list[dict[str, Any]]) -> list[Panel]:
    """Seconds and peak memory of one training step, an engine a bar."""
    names, floor = [row["engine"] for row in rows], rows[0]["floor_seconds"]
    gib = [[row[key] * 2**-30 for row in rows] for key in ("loaded_bytes", "peak_extra_bytes")]
    peak, y = [sum(pair) for pair in zip(*gib, strict=True)], range(len(rows))
    faster = [row["speedup_over_recompute"] if row["engine"] != REFERENCE else None for row in rows]
    notes = [f"{r['seconds']:.3g} s" + (f" ({x:.1f}x)" if x else "") for r, x in zip(rows, faster, strict=True)]
    seconds = Series(label="measured", x=[row["seconds"] for row in rows], y=y, color=0, style="bar", notes=notes)
    least = Series(label="floor", x=[floor, floor], y=[-0.5, len(rows) - 0.5], color=GREY, style="dotted")
    extra = Series(label="peak", x=peak, y=y, color=0, style="bar", notes=[f"{p:.2f} GiB" for p in peak])
    loaded = Series(label="before the step", x=gib[0], y=y, color=GREY, style="bar")
    return [
        Panel(series=[seconds, least], x_label="seconds per step", rows=names),
        Panel(series=[extra, loaded], x_label="peak memory, GiB", rows=names),
    ]


def _encoding_panels(rows: list[dict[str, Any]], texts: int) -> list[Panel]:
    """Left: texts per second against K, the single pass as a star. Right: how the time grows with K."""
    floor = {row["num_steps"]: row for row in rows}
    steps = sorted(floor)
    dotted: dict[str, Any] = {"label": "floor of the job", "color": GREY, "style": "dotted"}
    left = [Series(x=steps, y=[texts / floor[k]["floor_seconds"] for k in steps], **dotted)]
    right = [Series(x=steps, y=[floor[k]["floor_over_zero"] for k in steps], **dotted)]
    names = list(dict.fromkeys(row["engine"] for row in rows))
    order = [*_COLORED, *(name for name in names if name not in (*_COLORED, SINGLE_PASS))]
    for name in names:
        line = [row for row in rows if row["engine"] == name]
        x, rates = [row["num_steps"] for row in line], [row["texts_per_second"] for row in line]
        if name == SINGLE_PASS:
            left.append(Series(label="single pass (K = 0)", x=x, y=rates, color=BLACK, style="dots"))
            continue
        faster = [row.get("speedup_over_official") if name == GRAPH and row["num_steps"] else None for row in line]
        notes = [f"{ratio:.1f}x" if ratio else "" for ratio in faster]
        ends = [(texts / max(row["runs"]), texts / min(row["runs"])) for row in line]
        look: dict[str, Any] = {"label": name, "color": order.index(name) % 7}
        left.append(Series(x=x, y=rates, notes=notes, ends=ends, **look))
        grown = [row for row in line if row["time_over_zero"] is not None]
        right.append(Series(x=[r["num_steps"] for r in grown], y=[r["time_over_zero"] for r in grown], **look))
    axes: dict[str, Any] = {"x_label": "K, generated soft tokens per text", "x_ticks": steps, "y_scale": "log"}
    return [
        Panel(series=left, y_label="texts per second", **axes),
        Panel(series=right, y_label="time at K / time at K = 0", **axes),
    ]


def problems(record: dict[str, Any]) -> list[str]:
    """A line for each comparison that failed or could not be made, and for each point that could not be timed; older
    records have neither."""
    lines = [
        f"{check['verdict']}: {Difference.from_json(check).describe(_against(record))}"
        for check in record["agreement"]["checks"]
        if check.get("verdict", OK) != OK
    ]
    failed = {(row["engine"], row["failed"]): row for row in reversed(record.get("failures", []))}
    return lines + [f"FAILED: {name} from K = {row['num_steps']} on: {why}" for (name, why), row in failed.items()]


def _against(record: dict[str, Any]) -> str:
    return OFFICIAL_EVAL if record["benchmark"] == "corpus" else REFERENCE


def save(record: dict[str, Any], path: Path) -> None:
    """Whole or not at all: a file that exists is a finished record."""
    with new_file(path) as temporary:
        temporary.write_text(to_json(record) + "\n", encoding="utf-8")


def to_json(record: dict[str, Any]) -> str:
    """One line; numbers to six significant digits."""
    return json.dumps(_rounded(record), ensure_ascii=False, allow_nan=False)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None  # JSON has no NaN
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return value


def judged(rows: list[dict[str, Any]], checks: list[Difference]) -> dict[str, Any]:
    """The points with their verdicts, those that failed apart, and what was compared."""
    points = [row for row in rows if "failed" not in row]
    mark(points, checks)
    return {
        "agreement": {"worst": worst(checks), "checks": [check.to_json() for check in checks]},
        "points": points,
        "failures": [row for row in rows if "failed" in row],
    }


def settings(
    benchmark: str, options: Any, config: PretrainedConfig, facts: ModelFacts, lengths: list[int]
) -> dict[str, Any]:
    """The head of a record: which benchmark, what was asked for, of which model, and where.

    Args:
        options: of `bench.options.parse`, or an object with the same names.
        lengths: prompt tokens of every text.
    """
    return {
        "benchmark": benchmark,
        "provenance": provenance(options.device, benchmark),
        "model": {
            "name": options.name,
            "architecture": config.model_type,
            "random": options.model is None,
            "truncated": options.layers is not None,
            "dtype": options.dtype,
            "device": options.device,
            **facts.to_json(),
        },
        "batch": {
            "texts": len(lengths),
            "length": options.length,
            "distribution": options.distribution,
            "prompt_tokens": sum(lengths),
            "seed": options.seed,
        },
        "engines": {name: ENGINES[name].summary for name in options.engines},
        "num_steps": options.steps,
        "repeats": options.repeats,
    }
