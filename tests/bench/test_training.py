"""One training step, engine against engine: what is measured, and a wrong step is found."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import train_check, training
from bench.agreement import OK, UNCHECKED, WRONG
from bench.engines import ENGINES
from bench.shapes import meta_model, pretrained_model, random_model
from gircse.lm.causal_lm import CausalLM
from gircse.roofline import Ceilings, ModelFacts
from tests.bench import wrong_engines
from tests.bench.test_run import narrow
from tests.script import run_script
from tests.tiny_models import CONFIGS

CEILINGS = Ceilings(flops_per_s=1e11, bytes_per_s=1e10)


def _job(**changes) -> training.TrainJob:
    return replace(training.TrainJob(2, 1, 12, "fixed", 3, "float32", "cpu", 0), **changes)


def _trainable(folder: Path, job: training.TrainJob) -> CausalLM:
    return training.trainable(job, pretrained_model(str(folder), dtype=job.torch_dtype, device="cpu"))


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_training_engines_agree(folder, dtype):
    engines = ["recompute", "cached", "recompute-ours"]
    job = _job(dtype=dtype)
    differences = train_check.check(job, engines, _trainable(folder, job))
    assert {d.engine for d in differences} == set(engines[1:])
    assert {d.verdict for d in differences} == {OK}
    if dtype == "float64":
        assert differences[0].measured["gradient error"] < 1e-5


@pytest.mark.parametrize(
    ("config", "num_steps"),
    [(CONFIGS["llama-tied"](), 10), (narrow("smollm2-135m", 2), 3)],
    ids=["llama", "smollm2-135m"],
)
def test_rounding_in_half_precision_is_no_mistake_in_training(config, num_steps):
    job = _job(length=24, distribution="uniform", num_steps=num_steps, dtype="bfloat16")
    lm = training.trainable(job, random_model(config, dtype=torch.bfloat16, device="cpu"))
    differences = train_check.check(job, ["recompute", "cached"], lm)
    assert {d.verdict for d in differences} == {OK}, differences


# In half precision the float32 copy finds what is wrong in every dtype, by the same comparison: one of these is enough.
@pytest.mark.parametrize(
    ("wrong", "dtype"),
    [
        (wrong_engines.without_mask, "float32"),
        (wrong_engines.one_step_short, "float32"),
        (wrong_engines.cut_gradient, "float32"),
        (wrong_engines.wrong_position, "float32"),
        (wrong_engines.without_a_norm, "float32"),
        (wrong_engines.wrong_position, "bfloat16"),
        (wrong_engines.in_half_only(wrong_engines.one_step_short), "bfloat16"),
        (wrong_engines.in_half_only(wrong_engines.cut_gradient), "bfloat16"),
        (wrong_engines.in_half_only(wrong_engines.wrong_in_large_batches), "bfloat16"),
    ],
)
def test_a_wrong_training_step_is_found(folder, monkeypatch, wrong, dtype):
    monkeypatch.setitem(ENGINES, "cached", replace(ENGINES["cached"], run=wrong))
    job = _job(dtype=dtype, queries=5)
    differences = train_check.check(job, ["cached", "recompute-ours"], _trainable(folder, job))
    assert WRONG in {d.verdict for d in differences if d.engine == "cached"}
    assert {d.verdict for d in differences if d.engine != "cached"} == {OK}


def test_training_engines_take_turns_on_one_model(folder):
    """Only the one that is to be checkpointed is."""
    job = _job(checkpointing=("recompute",))
    lm = _trainable(folder, job)
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
    job = _job()
    lm = _trainable(folder, job)
    runners = training.here(lm, job, ["recompute-ours", "cached"])
    facts = ModelFacts.of(meta_model(lm.config, torch.float32))
    rows = list(training.measure(runners, job, facts, CEILINGS, [3], 1))
    assert [("failed" in row, row["engine"]) for row in rows] == [(True, "recompute-ours"), (False, "cached")]
    assert {d.engine: d.verdict for d in train_check.check(job, ["recompute-ours", "cached"], lm, runners)} == {
        "recompute-ours": UNCHECKED, "cached": OK,
    }  # fmt: skip


def test_train_mode_from_a_shell_elsewhere(folder, tmp_path):
    """A process of its own, its own ceilings, another working directory."""
    options = ["--train", "--model", str(folder), "--device", "cpu", "--checkpointing", "recompute"]
    options += ["--batch", "2", "--length", "10", "--steps", "0", "2", "--repeats", "2", "--mixed", "--out", "t.json"]
    record = json.loads(run_script("bench/run.py", options, tmp_path).splitlines()[-1])
    assert record == json.loads((tmp_path / "t.json").read_text())
    assert (tmp_path / "t.png").is_file()
    assert [(p["engine"], p["num_steps"]) for p in record["points"]] == [
        ("recompute", 0), ("cached", 0), ("recompute", 2), ("cached", 2),
    ]  # fmt: skip
    assert record["checkpointing"] == ["recompute"]
    assert all(p["time_over_zero"] > 0 for p in record["points"])
    for point in record["points"]:
        assert point["peak_extra_bytes"] == point["peak_bytes"] - point["loaded_bytes"] > 0
        assert point["loaded_bytes"] > 4 * record["model"]["parameters"]
        assert len(point["runs"]) == 2
    assert {c["what"].split(",")[0][-11:] for c in record["agreement"]["checks"]} >= {"timed batch"}
