"""The tables and figures of docs/performance.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench import big_batch
from bench.cases import BOTH, CASES, H100, MODELS, Case
from bench.documents import NO_RECORD, Record, Results, block
from bench.op_plots import plot_op_floors, plot_op_rows
from bench.plots import draw as drawn_by
from bench.records import describe, problems
from bench.suite.summary import COLUMNS, lines_of
from bench.tables import OPS, REPLAY, Column, columns_of, markdown
from bench.verdict import is_good

_FLOOR_ROWS = (1, 64, 256, 1024)
_FLOOR_MODELS = ("smollm2-135m", "qwen2.5-0.5b", "qwen3-0.6b", "llama-3.2-1b", "qwen3-4b", "mistral-7b", "qwen2.5-7b")


@block("op-floors")
def op_floors(_: Results) -> str:
    """No record: arithmetic at the ceilings of an H100."""
    rows = [{"model": name} for name in _FLOOR_MODELS]

    def microseconds(t: int, what: str = "forward") -> Callable[[dict[str, Any]], str]:
        return lambda row: f"{Case(row['model'], t, what).floor(H100) * 1e6:,.0f}"

    columns: list[Column] = [
        ("model", lambda row: row["model"]),
        ("V x D", lambda row: str(MODELS[row["model"]])),
        *((f"T = {t}", microseconds(t)) for t in _FLOOR_ROWS),
        ("T = 1024, forward + backward", microseconds(1024, BOTH)),
    ]
    return markdown(columns, rows)


def _mebibytes(name: str) -> Callable[[dict[str, Any]], str]:
    def value(point: dict[str, Any]) -> str:
        found = point["peak_extra_bytes"].get(name)
        return "-" if found is None else f"{found / 2**20:,.0f}"

    return value


def _row_milliseconds(name: str) -> Column:
    """A dash where a record is from before it was measured, and where it failed."""
    return f"{name} ms", lambda p: f"{p['milliseconds'][name]:,.1f}" if name in p["milliseconds"] else "-"


_ROWS: list[Column] = [
    ("pass", lambda p: p["pass"]),
    ("T", lambda p: str(p["rows"])),
    ("floor ms", lambda p: f"{p['floor_milliseconds']:,.1f}" if "floor_milliseconds" in p else "-"),
    _row_milliseconds("ours"),
    _row_milliseconds("eager"),
    _row_milliseconds("compiled"),
    ("x eager", lambda p: f"{p['speedup']:.2f}x"),
    ("eager extra MiB", _mebibytes("eager")),
    ("ours extra MiB", _mebibytes("ours")),
]


@block("ops-cpu")
def ops_cpu(results: Results) -> str:
    parts = []
    for name, record in results.records.items():
        if record.get("benchmark") == "soft_embed":
            tied = "tied" if record["tied"] else "untied"
            matrices = f"{record['vocab']} x {record['hidden']}, {tied}"
            what = f"{record['shape']} ({matrices}), {record['dtype']}; worst error over eager's, against float64: "
            what += f"{record['worst_error_over_eager']:.2f}."
            figure = results.figure(name, f"soft_embed and eager PyTorch, {matrices}", record, plot_op_rows)
            parts += [_caption(results, name, record, what), markdown(_ROWS, record["points"]), figure]
    return "\n\n".join(parts) or "no record yet: `python bench/soft_embed.py --out bench/results/soft_embed-cpu.json`"


@block("suite-gpu")
def suite_gpu(results: Results) -> str:
    """Every line of the GPU suite, a table for each device."""
    devices: dict[str, list[Record]] = {}
    for record in results.records.values():
        if record.get("lines") and record["provenance"].get("cuda"):
            devices.setdefault(record["provenance"]["device"], []).append(record)
    parts = []
    for device, records in sorted(devices.items()):
        lines = [
            {**line, "case": line["case"] + results.mark(record)} for record in records for line in lines_of([record])
        ]
        parts += [f"**{device}**: {versions(records)}.", markdown(COLUMNS, lines)]
    return "\n\n".join(parts) or NO_RECORD


@block("ops-gpu")
def ops_gpu(results: Results) -> str:
    """A table and a figure for each device."""
    order = {case.name: number for number, case in enumerate(CASES)}
    devices: dict[str, list[Record]] = {}
    for record in results.of("op"):
        if record["device"] == "cuda" and record["case"] in order:
            devices.setdefault(record["provenance"]["device"], []).append(record)
    parts = []
    for device, records in sorted(devices.items()):
        records.sort(key=lambda record: order[record["case"]])
        parts += _device(results, device, records)
    return "\n\n".join(parts) or NO_RECORD


def _device(results: Results, device: str, records: list[Record]) -> list[str]:
    marked = [{**record, "case": record["case"] + results.mark(record)} for record in records]
    present = {record["case"] for record in records}
    absent = [case.name for case in CASES if case.name not in present]
    asked = [record for record in records if record["met"] is not None]
    stale = next(filter(None, map(results.mark, asked)), "")
    slug = "-".join(device.lower().split())
    met = sum(record["met"] and is_good(record) for record in asked)
    parts = [
        f"**{device}**: {versions(records)}. {met} of {len(asked)} targets met{stale}.",
        markdown(OPS, marked),
        results.figure(f"soft_embed-{slug}", f"time over floor on {device}", records, plot_op_floors),
    ]
    parts += [
        f"Before that, `tests/gpu`: {record['summary'].strip('= ')}{results.mark(record)}"
        for record in results.of("tests")
        if record["provenance"]["device"] == device
    ]
    replayed = [record for record in marked if record["replay"]]
    if replayed:
        parts += ["Launch overhead, separated:", markdown(REPLAY, replayed)]
    if absent:
        parts.append(f"No record yet of: {', '.join(absent)}.")
    return parts


def _over_floor(p: Record) -> str:
    floor = p.get("floor_milliseconds")
    return "-" if floor is None else f"{p['milliseconds']['ours'] / floor:.2f}"


_LOSS: list[Column] = [
    ("B", lambda p: f"{p['rows']:,}"),
    ("M", lambda p: f"{p['candidates']:,}"),
    ("K", lambda p: str(p["num_steps"])),
    ("D", lambda p: f"{p['width']:,}"),
    ("floor ms", lambda p: f"{p['floor_milliseconds']:,.1f}" if "floor_milliseconds" in p else "-"),
    _row_milliseconds("ours"),
    ("time/floor", _over_floor),
    _row_milliseconds("eager"),
    ("K losses ms", _row_milliseconds("separate")[1]),
    ("ours extra MiB", _mebibytes("ours")),
    ("eager extra MiB", _mebibytes("eager")),
]


@block("info-nce-floors")
def info_nce_floors(results: Results) -> str:
    parts = []
    for name, record in results.records.items():
        if record.get("benchmark") == "info_nce":
            what = f"hidden states in {record['dtype']}, products in float32."
            parts += [_caption(results, name, record, what), markdown(_LOSS, record["points"])]
    return "\n\n".join(parts) or "no record yet: `python bench/info_nce.py`"


@block("throughput-cpu")
def throughput_cpu(results: Results) -> str:
    return _runs(results, "throughput", "python bench/run.py", cuda=False)


@block("throughput-gpu")
def throughput_gpu(results: Results) -> str:
    return _runs(results, "throughput", "python bench/run.py --device cuda", cuda=True)


_CORPUS = "python bench/run.py --model PATH --corpus FILE"


@block("corpus-cpu")
def corpus_cpu(results: Results) -> str:
    return _runs(results, "corpus", _CORPUS, cuda=False)


@block("corpus-gpu")
def corpus_gpu(results: Results) -> str:
    return _runs(results, "corpus", _CORPUS, cuda=True)


@block("training-cpu")
def training_cpu(results: Results) -> str:
    return _runs(results, "training", "python bench/run.py --train", cuda=False)


@block("training-gpu")
def training_gpu(results: Results) -> str:
    return _runs(results, "training", "python bench/run.py --train", cuda=True)


@block("big-batch")
def large_batches(results: Results) -> str:
    parts = []
    for name, record in results.records.items():
        if record.get("benchmark") == "big-batch":
            model, batch, share = record["model"], record["batch"], record["points"][1]["measured_share"]
            what = (
                f"{model['name']}, {model['dtype']}; {batch['queries']} queries with a positive each, "
                f"{batch['length']} tokens, K = {record['num_steps']}, LoRA dropout {batch['dropout']}."
            )
            parts += [_caption(results, name, record, what), markdown(big_batch.COLUMNS, record["points"])]
            parts.append(
                f"Gradient caching takes {record['time_ratio']:.2f} x the time of one-shot micro-batches of the same "
                f"total ({share:.0%} of these measured, scaled up), peak memory {record['peak_bytes'] / 1e9:.2f} GB."
            )
    return "\n\n".join(parts) or "no record yet: `python bench/big_batch.py`"


def _runs(results: Results, benchmark: str, command: str, *, cuda: bool) -> str:
    parts = []
    for name, record in results.records.items():
        if record.get("benchmark") == benchmark and record["model"]["device"].startswith("cuda") == cuda:
            model, batch = describe(record)
            parts.append(_caption(results, name, record, f"{model}; {batch}."))
            if record["points"]:  # none where every engine failed
                alt = f"{benchmark}: {model}, {batch}"
                figure = results.figure(name.replace("/", "-"), alt, record, drawn_by(record))
                parts += [markdown(columns_of(record), record["points"]), figure]
            parts += problems(record)
    return "\n\n".join(parts) or f"no record yet: `{command}`"


def _caption(results: Results, name: str, record: Record, what: str) -> str:
    """The record's name, what it measured, where."""
    return f"`{name}.json`{results.mark(record)}: {what} {versions([record])}; `{record['provenance']['command']}`"


def versions(records: list[Record]) -> str:
    """Machine, versions, days and sources of one or more records, each distinct value once."""

    def distinct(key: str, length: int | None = None) -> str:
        return ", ".join(sorted({str(record["provenance"][key])[:length] for record in records}))

    device = records[0]["provenance"]
    where = (
        f"driver {distinct('driver')}" if device["driver"] else f"{distinct('device')}, {distinct('threads')} threads"
    )
    return (
        f"{where}, torch {distinct('torch')}, triton {distinct('triton')}, {distinct('date', 10)}, "
        f"commit {distinct('commit')}, sources {distinct('sources')}"
    )
