"""The training loop: it learns, logs, checkpoints whole, and resumes to bitwise the same losses."""

from __future__ import annotations

import json
import math
import time
from dataclasses import astuple, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gircse import GIRCSE, GircseConfig, ops
from gircse.data.errors import DataError
from gircse.data.rows import Row
from gircse.data.sampling import BatchSampler
from gircse.train import train
from gircse.train.batches import Example
from gircse.train.checkpoint import list_checkpoints
from gircse.train.config import TrainConfig
from gircse.train.lora import trainable_model
from gircse.train.schedule import learning_rate
from gircse.train.step import collate
from tests import training_process
from tests.plain import plain_losses, plain_objective, plain_rollout
from tests.tiny_models import tiny_model, tiny_tokenizer

WORDS = ["red", "blue", "fox", "dog", "tree", "sea", "hill", "rain"]
ROWS = [
    Row("find the echo", f"{a} {b}", (f"{b} {a}",), (f"{a} {a}", f"{b} {b}")[: i % 3])
    for i, (a, b) in enumerate((a, b) for a in WORDS for b in WORDS if a != b)
]


def config(base, tmp_path, **options):
    defaults = {
        "model": str(base),
        "output": str(tmp_path / "run"),
        "batch_size": 4,
        "num_steps": 3,
        "max_steps": 6,
        "learning_rate": 3e-3,
        "save_every": 2,
        "progress": False,
    }
    return TrainConfig(**{**defaults, **options})


def test_it_learns_and_leaves_a_loadable_model(base, tmp_path):
    settings = config(base, tmp_path, max_steps=60, contrastive_temperature=0.1)
    result = train(settings, rows=ROWS)
    first = np.mean([entry["loss"] for entry in result.log[:10]])
    last = np.mean([entry["loss"] for entry in result.log[-10:]])
    assert last < 0.8 * first
    assert [entry["step"] for entry in result.log] == list(range(1, 61))
    logged = [json.loads(line) for line in (tmp_path / "run" / "train_log.jsonl").read_text().splitlines()]
    assert logged == result.log
    assert len(logged[0]["losses"]) == 3
    again = GIRCSE.from_pretrained(result.folder)
    assert again.config == GircseConfig(num_steps=3, query_max_length=256, passage_max_length=2048)
    assert np.array_equal(again.encode(["red fox", "sea"]), result.model.encode(["red fox", "sea"]))


def test_only_lora_weights_move(base, tmp_path):
    result = train(config(base, tmp_path), rows=ROWS)
    stock = dict(tiny_model("llama").named_parameters())
    trained = result.model.base.get_base_model()
    for name, parameter in trained.named_parameters():
        plain = name.replace(".base_layer", "")
        if "lora_" in name:
            assert parameter.requires_grad
            assert parameter.dtype == torch.float32
        else:
            assert not parameter.requires_grad
            assert torch.equal(parameter, stock[plain])


def test_the_step_is_the_plain_objective_of_the_batch(base, tmp_path):
    """The logged losses of the first step are those of docs/method.md §3-6, computed row by row without cache."""
    settings = config(base, tmp_path, max_steps=1, lora_dropout=0.0)
    result = train(settings, rows=ROWS)
    model = GIRCSE.from_pretrained(base, num_steps=3)
    stock = tiny_model("llama")
    queries, docs, target = [], [], []
    sampler = BatchSampler(len(ROWS), 4, seed=0)
    tokens = lambda text: torch.tensor(model.tokenizer(text, add_special_tokens=False)["input_ids"])  # noqa: E731
    for i in sampler.batch(0):
        instruct = f"Instruct: {ROWS[i].instruction}\nQuery:"
        queries.append(plain_rollout(stock, tokens(instruct + ROWS[i].query), 3)[1])
        target.append(len(docs))
        docs += [plain_rollout(stock, tokens(instruct + t), 3)[1] for t in (*ROWS[i].positives, *ROWS[i].negatives)]
    losses = plain_losses(torch.stack(queries), torch.stack(docs), torch.tensor(target))
    np.testing.assert_allclose(result.log[0]["losses"], losses.tolist(), rtol=1e-4)
    assert result.log[0]["loss"] == pytest.approx(plain_objective(losses).item(), rel=1e-4)


def test_gradient_checkpointing_changes_nothing_but_memory(base, tmp_path):
    plain = train(config(base, tmp_path, output=str(tmp_path / "a")), rows=ROWS)
    checkpointed = train(config(base, tmp_path, output=str(tmp_path / "b"), gradient_checkpointing=True), rows=ROWS)
    for one, other in zip(plain.log, checkpointed.log, strict=True):
        np.testing.assert_allclose(one["losses"], other["losses"], rtol=1e-4)


@pytest.mark.parametrize("num_steps", [0, 1])
def test_the_baselines_are_options(base, tmp_path, num_steps):
    result = train(config(base, tmp_path, num_steps=num_steps, stepwise=False), rows=ROWS)
    assert len(result.log[0]["losses"]) == 1
    assert result.log[0]["loss"] == result.log[0]["losses"][0]
    assert result.model.encode(["red"]).shape == (1, 32)


def test_without_stepwise_only_the_last_loss_counts(base, tmp_path):
    result = train(config(base, tmp_path, stepwise=False, max_steps=1), rows=ROWS)
    assert len(result.log[0]["losses"]) == 3
    assert result.log[0]["loss"] == result.log[0]["losses"][2]


def test_negatives_and_targets_of_a_batch(base, tmp_path):
    settings = config(base, tmp_path)
    examples = [Example("a:1", "q", "p", ("n", "m")), Example("a:2", "qq", "pp"), Example("a:3", "r", "p", ("n",))]
    model = trainable_model(settings)
    batch = collate(model, examples, settings)
    assert list(map(len, batch.queries)) == [1, 2, 1]
    assert list(map(len, batch.passages)) == [1, 1, 1, 2, 1, 1]
    assert batch.target.tolist() == [0, 3, 4]
    assert (batch.texts, batch.tokens) == (9, 11)
    assert batch.mask.tolist() == [[False, False, False, False, True, False], [False] * 6, [True] + [False] * 5]
    second = collate(model, examples, settings, share=slice(1, 3))
    assert second.queries == batch.queries[1:]
    assert second.passages == batch.passages[3:]
    assert second.target.tolist() == [0, 1]
    assert torch.equal(second.mask, batch.mask[1:])
    with_queries = collate(model, examples, replace(settings, include_queries=True), share=slice(1, 3)).mask
    assert torch.equal(with_queries, torch.cat([second.mask, torch.zeros(2, 3, dtype=torch.bool)], 1))


def test_a_range_of_steps_is_drawn_per_batch(base, tmp_path):
    settings = config(base, tmp_path, num_steps="2:5", max_steps=12, inference_steps=4)
    result = train(settings, rows=ROWS)
    assert [len(entry["losses"]) for entry in result.log] == [settings.steps_at(step) for step in range(12)]
    assert {len(entry["losses"]) for entry in result.log} == {2, 3, 4, 5}
    assert GIRCSE.from_pretrained(result.folder).config.num_steps == 4


def first_losses(base, tmp_path, name, rows, **options):
    settings = config(base, tmp_path, output=str(tmp_path / name), max_steps=1, lora_dropout=0.0, **options)
    return train(settings, rows=rows).log[0]["losses"]


def test_duplicates_of_the_positive_do_not_count(base, tmp_path):
    """Four rows with the same positive: without the others' copies of it there is nothing to be confused with."""
    rows = [Row("retrieve", f"query {word}", ("same",)) for word in WORDS[:4]]
    assert first_losses(base, tmp_path, "filtered", rows) == [0, 0, 0]
    kept = first_losses(base, tmp_path, "kept", rows, filter_false_negatives=False)
    np.testing.assert_allclose(kept, math.log(4), rtol=1e-5)


@pytest.mark.parametrize("symmetric", [False, True])
def test_copies_of_a_row_are_no_negatives_of_each_other(base, tmp_path, symmetric):
    """Neither as documents nor as queries: the loss is 0, and was 12.2 where the copied queries counted."""
    rows = [Row("retrieve", "red fox", ("an animal",))] * 4
    options = {"include_queries": True, "symmetric": symmetric}
    assert first_losses(base, tmp_path, "filtered", rows, **options) == [0, 0, 0]
    kept = first_losses(base, tmp_path, "kept", rows, filter_false_negatives=False, **options)
    assert min(kept) > math.log(4)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("micro_batch_tokens", [None, 30])
def test_one_positive_a_line(base, tmp_path, micro_batch_tokens, symmetric):
    """Lines of one query do not push the positives of each other away, also over micro-batches."""
    rows = [Row("retrieve", "red fox", (word,)) for word in WORDS[:4]]
    options = {"micro_batch_tokens": micro_batch_tokens, "symmetric": symmetric}
    assert first_losses(base, tmp_path, "filtered", rows, **options) == [0, 0, 0]
    kept = first_losses(base, tmp_path, "kept", rows, filter_false_negatives=False, **options)
    assert min(kept) > 0.1


def test_options_of_the_loss_reach_it(base, tmp_path, monkeypatch):
    seen = {}
    loss, objective = ops.stepwise_info_nce, ops.icr_objective

    def stepwise_info_nce(queries, docs, target, **options):
        seen.update(options, target=target.tolist())
        return loss(queries, docs, target, **options)

    def icr_objective(losses, **options):
        seen.update(options)
        return objective(losses, **options)

    monkeypatch.setattr(ops, "stepwise_info_nce", stepwise_info_nce)
    monkeypatch.setattr(ops, "icr_objective", icr_objective)
    rows = [Row("retrieve", f"q{i}", ("p",)) for i in range(4)]
    train(
        config(base, tmp_path, max_steps=1, include_queries=True, symmetric=True, detach_previous=True, reg_weight=0.5),
        rows=rows,
    )
    assert seen["include_queries"] is seen["symmetric"] is seen["detach_previous"] is True
    assert seen["reg_weight"] == 0.5
    others = ~torch.eye(4, dtype=torch.bool)
    assert torch.equal(seen["mask"], torch.cat([others, torch.zeros_like(others)], 1))


def test_several_files_with_weights(base, tmp_path):
    files = [write_rows(tmp_path / f"{name}.jsonl", ROWS[:20]) for name in "ab"]
    settings = config(base, tmp_path, data=tuple(map(str, files)), weights=(1.0, 3.0), max_steps=2)
    train(settings)
    saved = json.loads((tmp_path / "run" / "train_data.json").read_text())
    assert [(source["name"], source["rows"]) for source in saved] == [(str(file), 20) for file in files]
    write_rows(files[1], ROWS[:19])
    with pytest.raises(ValueError, match=r"resume: the data have changed .*b\.jsonl: had 20 rows, has 19"):
        train(replace(settings, resume=True))
    write_rows(files[1], ROWS[:20])
    train(replace(settings, resume=True))


def write_rows(path: Path, rows: list[Row]) -> Path:
    fields = ("prompt", "query", "pos", "neg")
    path.write_text("".join(json.dumps(dict(zip(fields, astuple(row), strict=True))) + "\n" for row in rows))
    return path


def losses_of(run: Path) -> list[list[float]]:
    return [json.loads(line)["losses"] for line in (run / "train_log.jsonl").read_text().splitlines()]


def started(base, data, output, *extra):
    """A process that runs `gircse train`, what it writes to stderr beside its output folder."""
    # fmt: off
    arguments = [
        "train", "--model", str(base), "--data", str(data), "--output", str(output),
        "--batch-size", "4", "--num-steps", "3", "--max-steps", "12", "--save-every", "3",
        "--learning-rate", "3e-3", "--device", "cpu", "--no-progress", *extra,
    ]
    # fmt: on
    return training_process.command(arguments, output.parent / "stderr.txt")


def completed(process, folder):
    process.join(100)
    assert process.exitcode == 0, (folder / "stderr.txt").read_text()


def test_a_killed_run_resumes_to_bitwise_the_same_losses(base, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    completed(started(base, data, tmp_path / "whole"), tmp_path)
    # killed after the seventh step has been logged: its newest checkpoint is step 6
    log = tmp_path / "cut" / "train_log.jsonl"
    killed = started(base, data, tmp_path / "cut")
    while killed.is_alive() and not (log.exists() and log.read_bytes().count(b"\n") >= 7):
        time.sleep(0.001)
    killed.kill()
    killed.join()
    done = int(list_checkpoints(tmp_path / "cut")[-1].name.removeprefix("step-"))
    assert done >= 6
    with log.open("a") as file:
        file.write('{"step": 9, "los')  # the line a kill can leave behind
    completed(started(base, data, tmp_path / "cut", "--resume"), tmp_path)
    assert losses_of(tmp_path / "cut") == losses_of(tmp_path / "whole")
    weights = [(tmp_path / run / "model" / "adapter_model.safetensors").read_bytes() for run in ("cut", "whole")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(("total", "ratio"), [(1, 0.03), (4, 0.5), (6, 0.0), (10, 0.25), (3, 0.9)])
def test_every_step_trains(total, ratio):
    """Warm-up starts above zero; the peak is reached at its end; the decay is linear and its last step not zero."""
    rates = [learning_rate(2.0, step, total_steps=total, warmup_ratio=ratio) for step in range(total)]
    warmup = math.ceil(ratio * total)
    assert rates[:warmup] == [2.0 * (step + 1) / warmup for step in range(warmup)]
    assert rates[warmup:] == [2.0 * left / (total - warmup) for left in range(total - warmup, 0, -1)]
    assert min(rates) > 0
    assert max(rates) == 2.0


def test_one_step_changes_the_weights(base, tmp_path):
    result = train(config(base, tmp_path, max_steps=1), rows=ROWS)
    assert result.log[0]["learning_rate"] == 3e-3
    weights = dict(result.model.named_parameters())
    moved = [name for name, weight in weights.items() if "lora_B" in name and bool(weight.abs().max() > 1e-3)]
    assert len(moved) == 14  # Adam's first step is as long as the learning rate


def test_checkpoints_are_loadable_models_and_only_the_newest_are_kept(base, tmp_path):
    train(config(base, tmp_path), rows=ROWS)
    checkpoints = list_checkpoints(tmp_path / "run")
    assert [c.name for c in checkpoints] == ["step-000004", "step-000006"]
    assert GIRCSE.from_pretrained(checkpoints[0]).encode(["red"]).shape == (1, 32)


def test_a_run_is_not_overwritten(base, tmp_path):
    train(config(base, tmp_path, max_steps=1), rows=ROWS)
    with pytest.raises(FileExistsError, match="holds a run already"):
        train(config(base, tmp_path, max_steps=1), rows=ROWS)


def test_resume_with_other_settings_is_refused(base, tmp_path):
    settings = config(base, tmp_path)
    train(settings, rows=ROWS)
    with pytest.raises(ValueError, match=r"learning_rate: was 0.003, is 1e-05"):
        train(replace(settings, learning_rate=1e-5, resume=True), rows=ROWS)


def test_nothing_to_resume(base, tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        train(config(base, tmp_path, resume=True), rows=ROWS)


@pytest.mark.parametrize("name", ["training_state.pt", "adapter_model.safetensors"])
def test_a_damaged_checkpoint_is_named(base, tmp_path, name):
    settings = config(base, tmp_path)
    train(settings, rows=ROWS)
    path = list_checkpoints(tmp_path / "run")[-1] / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="checkpoint .*step-000006 cannot be read"):
        train(replace(settings, resume=True), rows=ROWS)


def test_a_bad_row_stops_before_anything_starts(base, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "p", "query": "q", "pos": ["d"]}\n{"prompt": "p", "query": 3, "pos": ["d"]}\n')
    with pytest.raises(DataError, match=r"rows.jsonl:2: "):
        train(config(base, tmp_path, data=(str(data),)))
    assert not (tmp_path / "run").exists()


def test_an_infinite_loss_stops_and_keeps_the_checkpoint(base, tmp_path, monkeypatch):
    objective, calls = ops.icr_objective, []

    def breaks_at_the_fourth(losses, **options):
        calls.append(1)
        return objective(losses, **options) * (float("nan") if len(calls) == 4 else 1)

    monkeypatch.setattr(ops, "icr_objective", breaks_at_the_fourth)
    with pytest.raises(
        FloatingPointError, match=r"step 4: the loss is nan, .*; its batch is rows:row \d+, rows:row \d+"
    ):
        train(config(base, tmp_path), rows=ROWS)
    assert [c.name for c in list_checkpoints(tmp_path / "run")] == ["step-000002"]


def test_evaluation_hook_runs_and_leaves_training_alone(base, tmp_path):
    seen = []

    def evaluate(model):
        seen.append(model.encode(["red"]).shape)
        return {"score": 1.0}

    with_hook = train(config(base, tmp_path, output=str(tmp_path / "a"), eval_every=2), rows=ROWS, evaluate=evaluate)
    without = train(config(base, tmp_path, output=str(tmp_path / "b")), rows=ROWS)
    assert len(seen) == 3
    assert [e["step"] for e in with_hook.log if "evaluation" in e] == [2, 4, 6]
    assert [e["losses"] for e in with_hook.log] == [e["losses"] for e in without.log]


def test_too_few_rows_and_unknown_targets(base, tmp_path):
    with pytest.raises(ValueError, match="batch_size: got 4, expected at most the number of rows, 3"):
        train(config(base, tmp_path), rows=ROWS[:3])
    with pytest.raises(ValueError, match="no layer named nothing"):
        train(config(base, tmp_path, lora_targets=("nothing",)), rows=ROWS)


def test_models_with_other_layer_names_adapt_all_linear_layers(tmp_path):
    model = GIRCSE(tiny_model("gpt2"), tiny_tokenizer())
    adapted = trainable_model(TrainConfig(num_steps=2), model)
    names = {n.split(".lora_A")[0].rsplit(".", 1)[-1] for n, _ in adapted.named_parameters() if "lora_A" in n}
    assert names == {"c_attn", "c_proj", "c_fc"}
