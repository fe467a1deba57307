"""`bench/run.py` on tiny models: what it prints and leaves, and above all what it does not believe."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import encode_check, run, throughput, train_check, training
from bench.agreement import OK, UNCHECKED, WRONG
from bench.batches import check_lengths, draw_lengths, random_batch
from bench.engines import ENGINES, cached
from bench.floors import measure_ceilings
from bench.provenance import ROOT, sources_hash
from bench.shapes import SHAPES, meta_model, random_model
from gircse.lm.attention import ATTENTION_NAME
from gircse.lm.causal_lm import CausalLM
from gircse.roofline import Ceilings, ModelFacts
from tests.tiny_models import CONFIGS, tiny_model

CEILINGS = Ceilings(flops_per_s=1e11, bytes_per_s=1e10)
H100 = Ceilings(flops_per_s=790e12, bytes_per_s=3.0e12)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "tiny-llama"
    tiny_model("llama-tied").save_pretrained(path)
    return path


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


def test_table_record_and_plot(bench, tmp_path, capsys):
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
    assert {"date", "device", "torch", "triton", "transformers", "commit", "sources"} <= record["provenance"].keys()
    assert record["agreement"]["worst"]["relative error"] < 1e-4


def test_more_engines_and_no_reference(bench, tmp_path, capsys):
    assert (
        bench("--steps", "2", "--engines", "cached", "--official-waste", "--plot", str(tmp_path / "x" / "p.png")) == 0
    )
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [p["engine"] for p in record["points"]] == ["cached", "recompute-official"]
    assert all(p["speedup_over_recompute"] is None for p in record["points"])
    checked = {c["engine"] for c in record["agreement"]["checks"]}
    assert checked == {"cached", "recompute-official", "official-eval"}  # timed rows are held against the last
    assert {p["verdict"] for p in record["points"]} == {OK}
    assert (tmp_path / "x" / "p.png").is_file()


def _without_mask(lm, ids, mask, steps):
    return cached(lm, ids, torch.ones_like(mask), steps)


def _one_step_short(lm, ids, mask, steps):
    states = cached(lm, ids, mask, steps)
    return torch.cat([states[:, :-1], states[:, -2:-1]], dim=1) if steps > 1 else states


def _warmer(lm, ids, mask, steps):
    from gircse.lm.rollout import rollout

    return rollout(lm, ids, mask, steps, temperature=1.1).steps if steps else cached(lm, ids, mask, 0)


@contextmanager
def _method(owner, name, replacement):
    before = getattr(owner, name)
    setattr(owner, name, replacement)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _wrong_position(lm, ids, mask, steps):
    """Every soft token stands where the last prompt token stood."""
    run_body = CausalLM.run_body

    def late(self, kv_pass, position_ids, **inputs):
        return run_body(self, kv_pass, position_ids - int("inputs_embeds" in inputs), **inputs)

    with _method(CausalLM, "run_body", late):
        return cached(lm, ids, mask, steps)


def _without_a_norm(lm, ids, mask, steps):
    with _method(lm.body.layers[0].post_attention_layernorm, "forward", lambda hidden: hidden):
        return cached(lm, ids, mask, steps)


def _wrong_in_large_batches(lm, ids, mask, steps):
    states = cached(lm, ids, mask, steps)
    return states.flip(0) if len(ids) > 4 else states


def _nan(lm, ids, mask, steps):
    return cached(lm, ids, mask, steps) * float("nan")


def _another_shape(lm, ids, mask, steps):
    return cached(lm, ids, mask, steps)[..., :-1]


def _raises_in_float32_when_padded(lm, ids, mask, steps):
    if lm.head_weight.dtype == torch.float32 and not mask.all():
        raise RuntimeError("no such kernel")
    return cached(lm, ids, mask, steps)


def _in_half_only(wrong):
    """A mistake that the float32 copy of the model does not make."""

    def run(lm, ids, mask, steps):
        return (wrong if lm.head_weight.dtype == torch.bfloat16 else cached)(lm, ids, mask, steps)

    return run


_WRONG = [_without_mask, _one_step_short, _warmer, _wrong_position, _without_a_norm, _wrong_in_large_batches, _nan]
_GROSS = [_without_mask, _one_step_short, _without_a_norm, _wrong_in_large_batches, _nan]


@pytest.mark.parametrize(
    ("wrong", "dtype"),
    [
        *((wrong, dtype) for wrong in [*_WRONG, _another_shape] for dtype in ("float32", "bfloat16")),
        (_without_mask, "float16"),
        *((_in_half_only(wrong), "bfloat16") for wrong in _GROSS),
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
    monkeypatch.setitem(ENGINES, "cached", replace(ENGINES["cached"], run=_raises_in_float32_when_padded))
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
        (CONFIGS["qwen2"](), 1, []),
        (CONFIGS["gemma"](), 3, []),
        (narrow("smollm2-135m", 2), 8, []),
        (narrow("qwen2.5-0.5b", 1), 2, []),
    ],
    ids=["llama", "qwen2", "gemma", "smollm2-135m", "qwen2.5-0.5b"],
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
        (["--negatives", "2"], "belong to --train"),
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


@pytest.mark.parametrize(
    ("name", "rows", "length", "milliseconds"),
    [
        ("mistral-7b", 1, 64, 4.83),
        ("mistral-7b", 256, 512, 10.55),
        ("qwen2.5-7b", 64, 64, 5.16),
        ("qwen2.5-0.5b", 1, 64, 0.330),
        ("qwen2.5-0.5b", 64, 512, 0.464),
        ("smollm2-135m", 64, 64, 0.121),
        ("smollm2-135m", 256, 512, 1.11),
    ],
)
def test_floor_of_a_step_on_an_h100(name, rows, length, milliseconds):
    """The figures worked out by hand for the engine (3.0 TB/s, 790 TFLOP/s, bfloat16)."""
    facts = ModelFacts.of(meta_model(SHAPES[name].config(), torch.bfloat16))
    step = H100.seconds(facts.inference([length] * rows, 1)[1:])
    assert step * 1e3 == pytest.approx(milliseconds, rel=0.04)


def test_the_baseline_is_stock():
    """The reference engines run on PyTorch's and transformers' own parts, and leave the model as it was."""
    lm = CausalLM.from_model(tiny_model("llama"))
    before = [type(m) for m in lm.model.modules()]
    with ENGINES["recompute"].attached(lm):
        assert lm.config._attn_implementation == "sdpa"
        assert all(type(m) is torch.nn.Linear for m in lm.model.modules() if isinstance(m, torch.nn.Linear))
    assert [type(m) for m in lm.model.modules()] == before
    assert lm.config._attn_implementation == ATTENTION_NAME


def test_flops_of_the_prompt_and_of_a_training_step():
    """Against PyTorch's own counter of what a tiny model multiplies (attention apart, which it counts uncausally)."""
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny_model("llama", attn="eager")
    facts = ModelFacts.of(model)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.base_model(torch.ones(2, 7, dtype=torch.long))
    attention = 4 * facts.layers * facts.heads * facts.head_dim
    causal = counter.get_total_flops() - attention * (2 * 7 * 7 - 2 * 28)
    assert facts.prompt([7, 7]).flops == pytest.approx(causal, rel=1e-3)  # some versions count the rotary angles
    forward, whole = facts.inference([7, 7], 2), facts.training([7, 7], 2)
    assert whole[: len(forward)] == forward
    assert len(whole) == 2 * len(forward)


def test_sliding_window_limits_the_pairs():
    facts = ModelFacts.of(tiny_model("mistral"))
    assert facts.window == 5
    assert facts._pairs(4) == 10
    assert facts._pairs(8) == sum(min(i, 5) for i in range(1, 9))


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


@pytest.mark.parametrize("name", ["a.py", "configs.json", "deeper/b.py"])
def test_sources_hash_sees_a_changed_file(tmp_path, monkeypatch, name):
    package = tmp_path / "some_kernels"
    (package / "deeper").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "notes.txt").write_text("no source")
    monkeypatch.syspath_prepend(tmp_path)
    before = sources_hash(["some_kernels"])
    (package / "notes.txt").write_text("still none")
    assert before == sources_hash(["some_kernels"])
    (package / name).write_text("1\n")
    after = sources_hash(["some_kernels"])
    assert before != after
    assert after == sources_hash(["some_kernels"])
    assert len(sources_hash()) == 16


def _job(folder: Path, **changes) -> training.TrainJob:
    job = training.TrainJob(None, str(folder), None, 2, 1, 12, "fixed", 3, "float32", "cpu", 0)
    return replace(job, **changes)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_training_engines_agree(folder, dtype):
    engines = ["recompute", "cached", "recompute-official"]
    differences = train_check.check(_job(folder, dtype=dtype), engines)
    assert {d.engine for d in differences} == set(engines[1:])
    assert {d.verdict for d in differences} == {OK}
    if dtype == "float64":
        assert differences[0].measured["gradient error"] < 1e-5


@pytest.mark.parametrize(
    ("config", "num_steps"),
    [(CONFIGS["llama-tied"](), 10), (narrow("smollm2-135m", 2), 5)],
    ids=["llama", "smollm2-135m"],
)
def test_rounding_in_half_precision_is_no_mistake_in_training(config, num_steps):
    job = training.TrainJob(None, "given", None, 2, 1, 24, "uniform", num_steps, "bfloat16", "cpu", 0)
    lm = training.trainable(job, random_model(config, dtype=torch.bfloat16, device="cpu"))
    differences = train_check.check(job, ["recompute", "cached"], lm)
    assert {d.verdict for d in differences} == {OK}, differences


def _cut_gradient(lm, ids, mask, steps):
    states = cached(lm, ids, mask, steps)
    return states * 0.5 + states.detach() * 0.5


@pytest.mark.parametrize(
    ("wrong", "dtype"),
    [
        *(
            (wrong, dtype)
            for wrong in (_without_mask, _one_step_short, _cut_gradient, _wrong_position, _without_a_norm)
            for dtype in ("float32", "bfloat16")
        ),
        *((_in_half_only(wrong), "bfloat16") for wrong in (_without_mask, _one_step_short, _cut_gradient)),
        (_in_half_only(_wrong_in_large_batches), "bfloat16"),
    ],
)
def test_a_wrong_training_step_is_found(folder, monkeypatch, wrong, dtype):
    monkeypatch.setitem(ENGINES, "cached", replace(ENGINES["cached"], run=wrong))
    differences = train_check.check(_job(folder, dtype=dtype, queries=5), ["cached", "recompute-ours"])
    assert WRONG in {d.verdict for d in differences if d.engine == "cached"}
    assert {d.verdict for d in differences if d.engine != "cached"} == {OK}


def test_training_in_this_process(folder):
    """As on a GPU: engines that take turns on one model; only the one that is to be checkpointed is."""
    job = _job(folder, checkpointing=("recompute",))
    lm = training.trainable(job)
    runners = training.here(lm, job, ["recompute", "cached"])
    facts = ModelFacts.of(meta_model(lm.config, torch.float32))
    found = training.measure(runners, job, facts, CEILINGS, [0, 3], 2, interleave=False)
    assert [next(found)["num_steps"] for _ in range(2)] == [0, 0]
    rows = list(found)
    assert [(row["engine"], row["num_steps"], len(row["runs"])) for row in rows] == [
        ("recompute", 3, 2),
        ("cached", 3, 2),
    ]
    assert all(row["time_over_zero"] > 0 for row in rows)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in lm.model.modules())
    differences = train_check.check(job, ["recompute", "cached"], lm, runners)
    assert len(differences) == 2
    assert {d.verdict for d in differences} == {OK}


def test_a_training_step_that_fails_costs_the_others_nothing(folder, monkeypatch):
    def fails(lm, ids, mask, steps):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    monkeypatch.setitem(ENGINES, "recompute-ours", replace(ENGINES["recompute-ours"], run=fails))
    job = _job(folder)
    lm = training.trainable(job)
    runners = training.here(lm, job, ["recompute-ours", "cached"])
    facts = ModelFacts.of(meta_model(lm.config, torch.float32))
    rows = list(training.measure(runners, job, facts, CEILINGS, [3], 1))
    assert [("failed" in row, row["engine"]) for row in rows] == [(False, "cached"), (True, "recompute-ours")]
    assert {d.engine: d.verdict for d in train_check.check(job, ["recompute-ours", "cached"], lm, runners)} == {
        "recompute-ours": UNCHECKED, "cached": OK,
    }  # fmt: skip


def test_train_mode_from_a_shell_elsewhere(folder, tmp_path):
    """The real thing: its own processes, its own ceilings, another working directory."""
    command = [sys.executable, str(ROOT / "bench" / "run.py"), "--train", "--model", str(folder), "--device", "cpu"]
    command += ["--batch", "2", "--length", "10", "--steps", "0", "2", "--repeats", "2", "--mixed", "--out", "t.json"]
    command += ["--checkpointing", "recompute"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert record == json.loads((tmp_path / "t.json").read_text())
    assert (tmp_path / "t.png").is_file()
    assert [(p["engine"], p["num_steps"]) for p in record["points"]] == [
        ("recompute", 0), ("cached", 0), ("recompute", 2), ("cached", 2),
    ]  # fmt: skip
    assert record["checkpointing"] == ["recompute"]
    assert all(p["time_over_zero"] > 0 for p in record["points"])
    for point in record["points"]:
        assert point["peak_bytes"] > point["loaded_bytes"] > 1 << 26
        assert point["peak_extra_bytes"] == pytest.approx(point["peak_bytes"] - point["loaded_bytes"], rel=1e-3)
        assert len(point["runs"]) == 2
    assert {c["what"].split(",")[0][-11:] for c in record["agreement"]["checks"]} >= {"timed batch"}


def test_a_worker_that_dies_is_reported(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(training.WorkerError, match="engine cached ended early \\(exit code 1\\)"):
        training.Worker(_job(folder), "cached", tmp_path / "r.pt")
