"""`bench/run.py` on tiny models: what it prints and leaves, and above all when it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import run, training
from bench.agreement import Disagreement
from bench.batches import check_lengths, draw_lengths, random_batch
from bench.engines import ENGINES, cached
from bench.floors import measure_ceilings
from bench.provenance import ROOT, sources_hash
from bench.shapes import SHAPES, meta_model
from gircse.architecture import CausalLM
from gircse.attention import ATTENTION_NAME
from gircse.floors import Ceilings, ModelFacts
from tests.tiny_models import tiny_model

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
    assert {c["engine"] for c in record["agreement"]["checks"]} == {"cached", "recompute-official"}
    assert (tmp_path / "x" / "p.png").is_file()


def _without_mask(lm, ids, mask, steps):
    return cached(lm, ids, torch.ones_like(mask), steps)


def _one_step_short(lm, ids, mask, steps):
    states = cached(lm, ids, mask, steps)
    return torch.cat([states[:, :-1], states[:, -2:-1]], dim=1) if steps > 1 else states


def _warmer(lm, ids, mask, steps):
    from gircse.rollout import rollout

    return rollout(lm, ids, mask, steps, temperature=1.1).steps if steps else cached(lm, ids, mask, 0)


def _wrong_in_large_batches(lm, ids, mask, steps):
    states = cached(lm, ids, mask, steps)
    return states.flip(0) if len(ids) > 4 else states


def _nan(lm, ids, mask, steps):
    return cached(lm, ids, mask, steps) * float("nan")


_WRONG = [_without_mask, _one_step_short, _warmer, _wrong_in_large_batches, _nan]
_GROSS = [_without_mask, _wrong_in_large_batches, _nan]


@pytest.mark.parametrize(
    ("wrong", "dtype"), [*((wrong, "float32") for wrong in _WRONG), *((wrong, "bfloat16") for wrong in _GROSS)]
)
def test_refuses_to_time_a_wrong_engine(bench, monkeypatch, capsys, tmp_path, wrong, dtype):
    monkeypatch.setitem(ENGINES, "cached", replace(ENGINES["cached"], run=wrong))
    assert bench("--steps", "3", "--batch", "6", "--dtype", dtype) == 1
    printed = capsys.readouterr()
    assert "texts/s" not in printed.out
    assert "cached disagrees with recompute" in printed.err
    assert "cosine distance" in printed.err
    assert "no speed is reported" in printed.err
    assert not (tmp_path / "record.json").exists()


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


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_training_engines_agree(folder, dtype):
    engines = ["recompute", "cached", "recompute-official"]
    differences = training.check_agreement(_job(folder, dtype=dtype), engines)
    assert [d.engine for d in differences] == engines[1:]
    if dtype == "float64":
        assert differences[0].measured["gradient error"] < 1e-5


def _cut_gradient(lm, ids, mask, steps):
    return cached(lm, ids, mask, steps) * 0.5 + cached(lm, ids, mask, steps).detach() * 0.5


@pytest.mark.parametrize("wrong", [_without_mask, _one_step_short, _cut_gradient])
def test_refuses_to_time_a_wrong_training_step(folder, monkeypatch, wrong):
    monkeypatch.setitem(ENGINES, "cached", replace(ENGINES["cached"], run=wrong))
    with pytest.raises(Disagreement, match="gradient error"):
        training.check_agreement(_job(folder), ["cached"])


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
