"""`bench/run.py` on tiny models: what it prints and leaves, and above all what it does not believe."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from bench import encode_check, run, throughput
from bench.agreement import OK, UNCHECKED, WRONG
from bench.batches import check_lengths, draw_lengths, random_batch
from bench.engines import ENGINES, cached
from bench.floors import measure_ceilings
from bench.shapes import SHAPES, meta_model, random_model
from gircse.engine.step import StepRunner
from gircse.engine.step_cost import StepCost
from gircse.lm.attention import ATTENTION_NAME
from gircse.lm.causal_lm import CausalLM
from gircse.roofline import Ceilings, ModelFacts
from tests.bench import wrong_engines
from tests.tiny_models import CONFIGS, tiny_model

CEILINGS = Ceilings(flops_per_s=1e11, bytes_per_s=1e10)


@pytest.fixture
def bench(folder, tmp_path, monkeypatch):
    """Runs main() with the tiny model; the ceilings are given, not measured."""
    monkeypatch.setattr(run, "measure_ceilings", lambda *_: CEILINGS)

    def call(*arguments: str) -> int:
        out = ["--out", str(tmp_path / "record.json")]
        return run.main(
            ["--model", str(folder), "--device", "cpu", "--length", "12", "--repeats", "2", *out, *arguments]
        )

    return call


def test_table_record_and_plot(bench, tmp_path, capsys, monkeypatch):
    steps = [StepCost(2, 64, 1, 1), StepCost(4, 48, 19, 2_000_000), StepCost(8, 48, 20, 3_000_000)]
    monkeypatch.setattr(StepRunner, "costs", steps)  # a CPU captures none; the batch has three rows
    assert bench("--steps", "0", "1", "3", "--batch", "3", "--mixed") == 0
    printed = capsys.readouterr().out.splitlines()
    record = json.loads(printed[-1])
    assert record == json.loads((tmp_path / "record.json").read_text())
    assert (tmp_path / "record.png").read_bytes().startswith(b"\x89PNG")

    header = next(line for line in printed if line.startswith("engine "))
    assert all(
        name in header
        for name in ("texts/s", "tokens/s", "x recompute", "x official", "of single-pass", "time/floor", "p95 ms")
    )
    start = printed.index(header) + 2
    shown = [line.split()[:2] for line in printed[start : printed.index("", start)]]
    timed = [
        ["single-pass", "0"],
        *([name, k] for k in "013" for name in ("recompute", "official-eval", "cached", "graph")),
    ]
    assert shown == timed
    assert [[p["engine"], str(p["num_steps"])] for p in record["points"]] == timed

    tokens = record["batch"]["prompt_tokens"]
    assert 12 < tokens < 36
    for point in record["points"]:
        assert point["texts_per_second"] == pytest.approx(3 / point["seconds"], rel=1e-4)
        assert point["tokens_per_second"] == pytest.approx(
            (tokens + 3 * point["num_steps"]) / point["seconds"], rel=1e-4
        )
        assert point["time_over_floor"] == pytest.approx(point["seconds"] / point["floor_seconds"], rel=1e-4)
        assert len(point["runs"]) == 2
        captured = point["engine"] == "graph" and point["num_steps"] > 0
        assert point.get("step_launches") == (19 if captured else None)
        assert point.get("step_bytes") == (2_000_000 if captured else None)
    assert "kernels a step" in header
    assert {"date", "device", "torch", "triton", "transformers", "commit", "sources"} <= record["provenance"].keys()
    assert record["agreement"]["worst"]["relative error"] < 1e-4


def test_more_engines_and_no_reference(bench, tmp_path, capsys):
    assert bench("--steps", "2", "--engines", "cached", "recompute-ours", "--plot", str(tmp_path / "x" / "p.png")) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [p["engine"] for p in record["points"]] == ["cached", "recompute-ours"]
    assert all(p["speedup_over_recompute"] is None for p in record["points"])
    checked = {c["engine"] for c in record["agreement"]["checks"]}
    assert checked == {"cached", "recompute-ours", "official-eval"}  # timed rows are compared with the last
    assert {p["verdict"] for p in record["points"]} == {OK}
    assert (tmp_path / "x" / "p.png").is_file()


@pytest.mark.parametrize(
    ("wrong", "dtype"),
    [
        *((wrong, "float32") for wrong in wrong_engines.EVERY),
        (wrong_engines.warmer, "bfloat16"),  # the float32 copy finds it, by the same comparison
        *((wrong_engines.in_half_only(wrong), "bfloat16") for wrong in wrong_engines.GROSS),
        (wrong_engines.without_mask, "float16"),
    ],
)
def test_a_wrong_engine_is_marked_and_its_speed_is_there(bench, monkeypatch, capsys, tmp_path, wrong, dtype):
    monkeypatch.setitem(ENGINES, "cached", replace(ENGINES["cached"], run=wrong))
    arguments = ["--steps", "3", "--batch", "6", "--distribution", "uniform", "--dtype", dtype, "--latency", "1"]
    assert bench(*arguments, "--engines", "recompute", "cached", "graph") == 1
    printed = capsys.readouterr()
    assert "WRONG: cached disagrees with recompute on" in printed.err
    assert "NOT ALL engines agree" in printed.out
    assert "WRONG: graph" not in printed.err
    record = json.loads((tmp_path / "record.json").read_text())
    assert {p["engine"]: p["verdict"] for p in record["points"]} == {"recompute": OK, "cached": WRONG, "graph": OK}
    assert all(p["texts_per_second"] > 0 for p in record["points"])
    row = next(line for line in printed.out.splitlines() if line.startswith("cached "))
    assert row.endswith("WRONG")
    assert "plot: none" in printed.out


def test_what_could_not_be_compared_is_unchecked(bench, monkeypatch, capsys):
    monkeypatch.setitem(ENGINES, "cached", replace(ENGINES["cached"], run=wrong_engines.raises_in_float32_when_padded))
    arguments = ["--steps", "2", "--dtype", "bfloat16", "--engines", "recompute", "cached"]
    assert bench(*arguments) == 1
    printed = capsys.readouterr()
    record = json.loads(printed.out.splitlines()[-1])
    assert [p["verdict"] for p in record["points"]] == [OK, UNCHECKED]
    assert "UNCHECKED: cached could not be compared with recompute on 4 rows" in printed.err
    assert "RuntimeError: no such kernel" in printed.err


def test_no_room_for_the_float32_copy(bench, monkeypatch, capsys):
    def too_large(lm):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    monkeypatch.setattr(encode_check, "twin", too_large)
    assert bench("--steps", "2", "--dtype", "bfloat16") == 1
    printed = capsys.readouterr()
    record = json.loads(printed.out.splitlines()[-1])
    assert {p["engine"]: p["verdict"] for p in record["points"]}["graph"] == UNCHECKED
    assert "a float32 copy of the model: out of memory" in printed.err


def test_an_engine_that_fails_costs_the_others_nothing(bench, monkeypatch, capsys):
    def fails(lm, ids, mask, steps):
        if steps:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return cached(lm, ids, mask, steps)

    monkeypatch.setitem(ENGINES, "cached", replace(ENGINES["cached"], run=fails))
    assert bench("--steps", "0", "2", "--engines", "recompute", "cached", "graph") == 1
    printed = capsys.readouterr()
    record = json.loads(printed.out.splitlines()[-1])
    assert [(p["engine"], p["num_steps"]) for p in record["points"]] == [
        ("recompute", 0), ("cached", 0), ("graph", 0), ("recompute", 2), ("graph", 2),
    ]  # fmt: skip
    assert record["failures"][0] == {"engine": "cached", "num_steps": 2, "failed": "out of memory"}
    assert "FAILED: cached from K = 2 on: out of memory" in printed.err


def narrow(name, layers):
    """The widths of a published model, few layers and a small vocabulary, which decides nothing here but the time."""
    config = SHAPES[name].config(layers)
    config.vocab_size = 2048
    return config


@pytest.mark.parametrize(
    ("config", "rows", "others"),
    [
        (CONFIGS["llama-tied"](), 6, ["recompute"]),
        (CONFIGS["gemma"](), 3, []),
        (narrow("smollm2-135m", 2), 4, []),
    ],
    ids=["llama", "gemma", "smollm2-135m"],
)
def test_rounding_in_half_precision_is_no_mistake(config, rows, others):
    """Twenty steps in bfloat16."""
    model = random_model(config, dtype=torch.bfloat16, device="cpu")
    lm, facts = CausalLM.from_model(model), ModelFacts.of(model)
    engines = ["official-eval", "cached", "graph", *others]
    lengths = draw_lengths(rows, 12, distribution="uniform", seed=1)
    batch = random_batch(config.vocab_size, lengths, seed=1, device="cpu")
    points = list(throughput.measure(lm, facts, CEILINGS, batch, engines, [20], 1))
    checks = encode_check.check(lm, engines, 20, 12, seed=0, timed=[encode_check.Timed("rows", batch, points)])
    assert {check.engine for check in checks} >= {"official-eval", "cached", "graph"}
    assert {check.verdict for check in checks} == {OK}, [check for check in checks if check.verdict != OK]


def test_points_are_finished_one_k_after_the_other():
    lm = CausalLM.from_model(tiny_model("llama"))
    batch = random_batch(131, [5, 3], seed=0, device="cpu")
    found = throughput.measure(
        lm, ModelFacts.of(lm.model), CEILINGS, batch, ["cached", "recompute"], [0, 2], 50,
        interleave=False, most_seconds=0.0,
    )  # fmt: skip
    first = next(found)
    assert first.point == throughput.Point("cached", 0)
    assert len(first.row["runs"]) == 1  # no time for another
    assert first.embeddings.shape == (2, 32)
    rest = list(found)
    assert [(m.point.engine, m.point.num_steps) for m in rest] == [("recompute", 0), ("cached", 2), ("recompute", 2)]
    assert rest[1].row["time_over_zero"] == pytest.approx(rest[1].row["seconds"] / first.row["seconds"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engines", "magic"], "--engines: got 'magic', expected single-pass, recompute"),
        (["--train", "--engines", "single-pass"], "--engines: got 'single-pass'"),
        (["--steps", "-1"], "--steps: got -1, expected at least 0"),
        (["--train", "--checkpointing", "graph"], "--checkpointing: got 'graph', expected recompute, cached"),
        (["--batch", "0"], "--batch: got 0"),
        (["--negatives", "2"], "belongs to --train"),
        (["--length", "9000"], "8192 positions"),
        (["--layers", "31"], "layers: got 31, expected 1 to 30"),
        (["--device", "toaster"], "--device: got 'toaster'"),
        (["--device", "cuda:99"], "--device: got 'cuda:99'"),
        (["--shape", "gpt-9"], "invalid choice"),
        (["--dtype", "int8"], "invalid choice"),
        (["--model", "/no/such/folder"], "/no/such/folder does not exist"),
        (["--model", "x", "--shape", "mistral-7b"], "not allowed with"),
        (["--out", "/tmp"], "--out: /tmp is a folder"),
        (["--wat"], "unrecognized arguments"),
    ],
)
def test_bad_options(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        run.main(arguments)
    printed = capsys.readouterr()
    assert exit.value.code == 2
    assert message in printed.err
    assert printed.err.startswith("bench/run.py: error: ")
    assert printed.err.count("\n") == 1
    assert not printed.out


def test_a_folder_without_a_model(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        run.main(["--model", str(tmp_path)])
    assert exit.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_shapes_have_the_published_number_of_parameters(name):
    published = {"smollm2-135m": 134.5e6, "qwen2.5-0.5b": 494e6, "llama-3.2-1b": 1.236e9}
    published |= {"mistral-7b": 7.24e9, "qwen2.5-7b": 7.62e9}
    facts = ModelFacts.of(meta_model(SHAPES[name].config(), torch.bfloat16))
    assert facts.parameters == SHAPES[name].parameters
    assert facts.parameters == pytest.approx(published[name], rel=1e-3)
    assert facts.itemsize == 2


def test_the_baseline_is_stock():
    """The reference engines run on PyTorch's and transformers' own parts, and leave the model as it was."""
    lm = CausalLM.from_model(tiny_model("llama"))
    before = [type(m) for m in lm.model.modules()]
    with ENGINES["recompute"].attached(lm):
        assert lm.config._attn_implementation == "sdpa"
        assert all(type(m) is torch.nn.Linear for m in lm.model.modules() if isinstance(m, torch.nn.Linear))
    assert [type(m) for m in lm.model.modules()] == before
    assert lm.config._attn_implementation == ATTENTION_NAME


def test_ceilings_are_measured():
    ceilings = measure_ceilings("cpu", torch.float32)
    assert 1e9 < ceilings.flops_per_s < 1e14
    assert 1e8 < ceilings.bytes_per_s < 1e13


@pytest.mark.parametrize("distribution", ["lognormal", "uniform"])
def test_batches(distribution):
    lengths = draw_lengths(40, 90, distribution=distribution, seed=3)
    assert max(lengths) == 90
    assert min(lengths) >= 1
    assert len(set(lengths)) > 10
    assert lengths == draw_lengths(40, 90, distribution=distribution, seed=3)
    batch = random_batch(131, check_lengths(6), seed=0, device="cpu")
    assert batch.lengths == [6, 6, 3, 1]
    assert batch.attention_mask[:, -1].all()  # padded on the left
