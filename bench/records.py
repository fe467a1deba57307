"""The record of a run: what is printed, saved and plotted, all from the same dictionary."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.agreement import OK, Difference, mark, worst
from bench.engines import ENGINES, OFFICIAL_EVAL, REFERENCE
from bench.provenance import provenance
from bench.tables import columns_of, table
from gircse.files.atomic import new_file

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from gircse.roofline import ModelFacts

UNSTEADY = 0.3  # spread above which a median of a few runs says little


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
    model, batch = describe(record)
    origin, ceilings = record["provenance"], record["ceilings"]
    threads = f", {origin['threads']} threads" if record["model"]["device"] == "cpu" else f", driver {origin['driver']}"
    agreed = ", ".join(f"{name} {value:.1e}" for name, value in record["agreement"]["worst"].items())
    checks = record["agreement"]["checks"]
    disagree = "" if not problems(record) else "NOT ALL "
    lines = [
        model,
        batch,
        f"{origin['device']}{threads}; torch {origin['torch']}, transformers {origin['transformers']}, "
        f"triton {origin['triton']}; commit {origin['commit']}, sources {origin['sources']}",
        f"measured ceilings: {ceilings['flops_per_s'] / 1e9:,.0f} GFLOP/s ({record['model']['dtype']}), "
        f"{ceilings['bytes_per_s'] / 1e9:,.1f} GB/s",
        f"{disagree}engines agree with {_against(record)} ({len(checks)} checks): worst {agreed}"
        if checks
        else "one engine, nothing to compare",
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
    unsteady = [row for row in record["points"] if row["spread"] > UNSTEADY]
    if unsteady:
        lines.append(
            f"UNSTEADY: {len(unsteady)} of {len(record['points'])} points spread over more than {UNSTEADY:.0%}; "
            "the machine was busy with something else, do not quote these"
        )
    return "\n".join(lines)


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


def settings(options: Any, config: PretrainedConfig, facts: ModelFacts, lengths: list[int]) -> dict[str, Any]:
    """What was asked for, of which model, and where.

    Args:
        options: of `bench.options.parse`, or an object with the same names.
        lengths: prompt tokens of every text.
    """
    return {
        "provenance": provenance(options.device),
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
