"""The tables and figures of docs/performance.md; the first of them is in `blocks_glance.py`."""

from __future__ import annotations

import re

from bench import big_batch, info_nce, soft_token_gradient
from bench.cases import BOTH, CASES, H100, MODELS, PASSES, Case
from bench.documents import NO_RECORD, Record, Results, block
from bench.plots import BLACK, GREY, Figure, Panel, Series
from bench.records import columns_of, describe, figure_of, problems
from bench.suite.summary import COLUMNS, lines_of
from bench.tables import Column, column, filled, markdown
from bench.verdict import is_good

_FLOOR_ROWS = (1, 64, 256, 1024)
_FLOOR_MODELS = ("smollm2-135m", "qwen2.5-0.5b", "qwen3-0.6b", "llama-3.2-1b", "qwen3-4b", "mistral-7b", "qwen2.5-7b")
_ENGINES = {"ours": 0, "eager": 1, "compiled": 2}  # and their colours


@block("op-floors")
def op_floors(_: Results) -> str:
    """Arithmetic at the ceilings of an H100; it needs no record."""
    jobs = [(t, "forward", f"T = {t}") for t in _FLOOR_ROWS] + [(1024, BOTH, "T = 1024, forward + backward")]
    rows = [
        {"model": name, "shape": str(MODELS[name])}
        | {title: f"{Case(name, t, what).floor(H100) * 1e6:,.0f}" for t, what, title in jobs}
        for name in _FLOOR_MODELS
    ]
    titles = [title for _, _, title in jobs]
    return markdown([column("model", "model"), column("V x D", "shape"), *(column(t, t) for t in titles)], rows)


_ROWS: list[Column] = [
    column("pass", "pass"),
    column("T", "rows"),
    column("floor ms", "floor_milliseconds", "{:,.1f}"),
    *(column(f"{name} ms", f"milliseconds.{name}", "{:,.1f}") for name in _ENGINES),
    column("x eager", "speedup", "{:.2f}x"),
    *(column(f"{name} extra MiB", f"peak_extra_bytes.{name}", "{:,.0f}", 2**-20) for name in ("eager", "ours")),
]


@block("ops-cpu")
def ops_cpu(results: Results) -> str:
    parts = []
    for name, record in results.of("soft_embed").items():
        matrices = f"{record['vocab']} x {record['hidden']}, {'tied' if record['tied'] else 'untied'}"
        what = f"{record['shape']} ({matrices}), {record['dtype']}; worst error over eager's, against float64: "
        what += f"{record['worst_error_over_eager']:.2f}."
        figure = results.figure(name, f"soft_embed and eager PyTorch, {matrices}", _rows_figure(record, matrices))
        parts += [_caption(results, name, record, what), markdown(_ROWS, record["points"]), figure]
    return "\n\n".join(parts) or "no record yet: `python bench/soft_embed.py --out bench/results/soft_embed-cpu.json`"


def _rows_figure(record: Record, matrices: str) -> Figure:
    """Milliseconds against T, a panel for each pass, with how many times as fast as eager ours is."""
    panels = []
    for what in PASSES:
        points = [point for point in record["points"] if point["pass"] == what]
        rows = [point["rows"] for point in points]
        notes = [f"{point['speedup']:.1f}x" if point["speedup"] else "" for point in points]
        lines = [
            Series(
                label=name,
                x=rows,
                y=[point["milliseconds"][name] for point in points],
                color=color,
                notes=notes if name == "ours" else (),
            )
            for name, color in _ENGINES.items()
            if all(name in point["milliseconds"] for point in points)
        ]
        if all("floor_milliseconds" in point for point in points):
            floors = [point["floor_milliseconds"] for point in points]
            lines.append(Series(label="floor", x=rows, y=floors, color=GREY, style="dotted"))
        axes = {"x_label": "T, rows", "y_label": "milliseconds", "x_scale": "log2", "y_scale": "log"}
        panels.append(Panel(series=lines, title=what, x_ticks=rows, **axes))
    origin = record["provenance"]
    caption = f"{origin['device']}, torch {origin['torch']}"
    title = f"soft_embed, {matrices}, {record['dtype']}"
    return Figure(panels=panels, title=title, caption=caption, columns=2)


@block("suite-gpu")
def suite_gpu(results: Results) -> str:
    """Every line of the GPU suite, a table for each device."""
    parts = []
    for device, records in results.by_device("op", "throughput", "training", "info_nce", "plan", cuda=True).items():
        records = [record for record in records if record.get("lines")]
        lines = [line | {"case": line["case"] + results.mark(r)} for r in records for line in lines_of([r])]
        if lines:
            parts += [f"**{device}**: {versions(records)}.", markdown(COLUMNS, lines)]
    return "\n\n".join(parts) or NO_RECORD


def _engine(name: str, title: str) -> Column:
    """Milliseconds of an engine; why there are none, where it failed."""
    number = column(title, f"engines.{name}.milliseconds", "{:.4g}")[1]
    return title, lambda record: record["failures"].get(name) or number(record)


def _ours(record: Record) -> str:
    """Ours, with a mark where the results are not right."""
    return f"{record['milliseconds']:.4g}" + ("" if is_good(record) else f" {record['agreement']['verdict']}")


def _met(record: Record) -> str:
    return "-" if record["met"] is None else "yes" if record["met"] else f"NO: {'; '.join(record['misses'])}"


_OPS: list[Column] = [
    column("case", "case"),
    column("floor ms", "floor_milliseconds", "{:.4g}"),
    ("ours ms", _ours),
    column("time/floor", "over_floor", "{:.2f}"),
    ("eager ms", lambda r: r["failures"].get("eager") or column("", "eager_milliseconds", "{:.4g}")[1](r)),
    _engine("compiled", "compiled ms"),
    column("x eager", "speedup", "{:.2f}x"),
    column("x eager, plain calls", "plain_speedup", "{:.2f}x"),
    column("extra MiB", "extra_bytes", "{:.1f}", 2**-20),
    column("of eager's", "memory_ratio", "{:.3f}"),
    ("target", lambda record: record["target"] or "-"),
    ("met", _met),
]
# graph replays and plain calls, and what the host spends on launching a plain call
_LAUNCHES: list[Column] = [
    column("case", "case"),
    *(column(f"{name} ms, graph", f"replay.milliseconds.{name}", "{:.4g}") for name in ("ours", "eager")),
    *(_engine(name, f"{name} ms, plain call") for name in ("ours", "eager")),
    *(column(f"host us: {name}", f"replay.host_microseconds.{name}", "{:.0f}") for name in ("ours", "eager")),
    ("no graph because", lambda record: "; ".join(f"{k}: {v}" for k, v in record["replay"]["why"].items()) or "-"),
]


@block("ops-gpu")
def ops_gpu(results: Results) -> str:
    """Two tables and a figure for each device."""
    order = {case.name: number for number, case in enumerate(CASES)}
    parts = []
    for device, records in results.by_device("op", cuda=True).items():
        records = sorted((r for r in records if r["case"] in order), key=lambda record: order[record["case"]])
        rows = [{**record, "case": record["case"] + results.mark(record)} for record in records]
        asked = [record for record in records if record["met"] is not None]
        met = sum(record["met"] and is_good(record) for record in asked)
        stale = next(filter(None, map(results.mark, asked)), "")
        name, alt = f"soft_embed-{'-'.join(device.lower().split())}", f"time over floor on {device}"
        parts += [
            f"**{device}**: {versions(records)}. {met} of {len(asked)} targets met{stale}.",
            markdown(_OPS, rows),
            results.figure(name, alt, _floors_figure(records)),
        ]
        for record in results.by_device("tests", cuda=True).get(device, []):
            parts.append(f"Before that, `tests/gpu`: {record['summary'].strip('= ')}{results.mark(record)}")
        replayed = [row for row in rows if row["replay"]]
        if replayed:
            parts += ["Launch overhead, separated:", markdown(filled(_LAUNCHES, replayed), replayed)]
        absent = order.keys() - {record["case"] for record in records}
        if absent:
            parts.append(f"No record yet of: {', '.join(sorted(absent, key=order.__getitem__))}.")
    return "\n\n".join(parts) or NO_RECORD


def _milliseconds(record: Record, engine: str) -> float:
    """As the table has it: of a CUDA graph's replay where the engine was captured, else of a single call."""
    replayed = (record["replay"] or {}).get("milliseconds", {})
    return replayed.get(engine, record["engines"][engine]["milliseconds"])


def _floors_figure(records: list[Record]) -> Figure:
    """A line for each case: every engine's time over the floor, and the target where there is one for it."""
    series = []
    for name, color in _ENGINES.items():
        ran = [(y, record) for y, record in enumerate(records) if record["engines"][name] is not None]
        x = [_milliseconds(record, name) / record["floor_milliseconds"] for _, record in ran]
        series.append(Series(label=name, x=x, y=[y for y, _ in ran], color=color, style="dots"))
    bounds = [(record["targets"].get("over_floor"), y) for y, record in enumerate(records)]
    bounds = [(bound, y) for bound, y in bounds if bound is not None]
    target = Series(label="target", x=[x for x, _ in bounds], y=[y for _, y in bounds], color=BLACK, style="dots")
    names = [record["case"] for record in records]
    panel = Panel(series=[*series, target], x_label="time / floor", x_scale="log2", rows=names)
    origin = records[0]["provenance"]
    caption = f"{origin['device']}, torch {origin['torch']}, triton {origin['triton']}"
    return Figure(panels=[panel], caption=caption, height=1.4 + 0.24 * len(records))


@block("info-nce-floors")
def info_nce_floors(results: Results) -> str:
    parts = []
    for name, record in results.of("info_nce").items():
        what = f"hidden states in {record['dtype']}, products in float32."
        parts += [_caption(results, name, record, what), markdown(info_nce.COLUMNS, record["points"])]
    return "\n\n".join(parts) or "no record yet: `python bench/info_nce.py`"


@block("soft-token-gradient")
def soft_tokens(results: Results) -> str:
    parts = []
    for name, record in results.of("soft-token-gradient").items():
        what = (
            f"forward and backward of {record['rows']} texts of {record['length']} tokens, SmolLM2-135M with LoRA, "
            "float32; operators (views left out) of 4 texts, Qwen2.5-0.5B of 4 layers, bfloat16."
        )
        parts += [_caption(results, name, record, what), markdown(soft_token_gradient.COLUMNS, record["points"])]
    return "\n\n".join(parts) or "no record yet: `python bench/soft_token_gradient.py`"


_COMMANDS = {
    "throughput": "python bench/run.py",
    "corpus": "python bench/run.py --model PATH --corpus FILE",
    "training": "python bench/run.py --train",
}


def _runs(benchmark: str, device: str) -> None:
    """Registers the block of all records of one kind on CPUs ("cpu") or on GPUs ("gpu")."""

    @block(f"{benchmark}-{device}")
    def runs(results: Results) -> str:
        parts = []
        for name, record in results.of(benchmark).items():
            if record["model"]["device"].startswith("cuda") != (device == "gpu"):
                continue
            model, batch = describe(record)
            parts.append(_caption(results, name, record, f"{model}; {batch}."))
            if record["points"]:  # none where every engine failed
                alt = f"{benchmark}: {model}, {batch}"
                figure = results.figure(name.replace("/", "-"), alt, figure_of(record))
                parts += [markdown(columns_of(record), record["points"]), figure]
            if benchmark == "training" and device == "cpu":
                counted = record.get("memory_counts", "the resident size of a process of its own")  # older records
                parts.append(f"Peak memory: {counted}.")
            parts += problems(record)
        on_gpu = " --device cuda" if device == "gpu" else ""
        return "\n\n".join(parts) or f"no record yet: `{_COMMANDS[benchmark]}{on_gpu}`"


for _benchmark in _COMMANDS:
    for _device in ("cpu", "gpu"):
        _runs(_benchmark, _device)


@block("big-batch")
def large_batches(results: Results) -> str:
    parts = []
    for name, record in results.of("big-batch").items():
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


def _caption(results: Results, name: str, record: Record, what: str) -> str:
    """The record's name, what it measured, where, and how it is made again; `report.py` draws the picture."""
    command = re.sub(r" --plot \S+", "", record["provenance"]["command"])
    return f"`{name}.json`{results.mark(record)}: {what} {versions([record])}; `{command}`"


def versions(records: list[Record]) -> str:
    """Machine, versions, days and sources of one or more records, each distinct value once."""

    def distinct(key: str, length: int | None = None) -> str:
        return ", ".join(sorted({str(record["provenance"][key])[:length] for record in records}))

    on_gpu = records[0]["provenance"]["driver"]
    where = f"driver {distinct('driver')}" if on_gpu else f"{distinct('device')}, {distinct('threads')} threads"
    return (
        f"{where}, torch {distinct('torch')}, triton {distinct('triton')}, {distinct('date', 10)}, "
        f"commit {distinct('commit')}, sources {distinct('sources')}"
    )
