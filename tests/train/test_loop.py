"""The training loop: it learns, logs, and does what its settings say."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

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
from gircse.train.step import RowTokenizer, tokenize_rows
from tests.plain import plain_losses, plain_objective, plain_rollout
from tests.tiny_models import tiny_model

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
    settings = config(base, tmp_path, max_steps=60, save_every=29, contrastive_temperature=0.1)
    result = train(settings, rows=ROWS)
    first = np.mean([entry["loss"] for entry in result.log[:10]])
    last = np.mean([entry["loss"] for entry in result.log[-10:]])
    assert last < 0.8 * first
    assert [c.name for c in list_checkpoints(tmp_path / "run")] == ["step-000058", "step-000060"]
    assert GIRCSE.from_pretrained(list_checkpoints(tmp_path / "run")[0]).encode(["red"]).shape == (1, 32)
    assert [entry["step"] for entry in result.log] == list(range(1, 61))
    logged = [json.loads(line) for line in (tmp_path / "run" / "train_log.jsonl").read_text().splitlines()]
    assert logged == result.log
    assert len(logged[0]["losses"]) == 3
    again = GIRCSE.from_pretrained(result.folder)
    assert again.config == GircseConfig(num_steps=3, query_max_length=256, passage_max_length=2048)
    assert np.array_equal(again.encode(["red fox", "sea"]), result.model.encode(["red fox", "sea"]))
    stock = dict(tiny_model("llama").named_parameters())
    for name, parameter in result.model.base.get_base_model().named_parameters():
        if "lora_" in name:
            assert parameter.requires_grad
            assert parameter.dtype == torch.float32
        else:
            assert not parameter.requires_grad
            assert torch.equal(parameter, stock[name.replace(".base_layer", "")])


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
    # the only step of a run trains, too
    assert result.log[0]["learning_rate"] == 3e-3
    weights = dict(result.model.named_parameters())
    moved = [name for name, weight in weights.items() if "lora_B" in name and bool(weight.abs().max() > 1e-3)]
    assert len(moved) == 14  # Adam's first step is as long as the learning rate


def test_gradient_checkpointing_changes_nothing_but_memory(base, tmp_path):
    runs = [
        train(config(base, tmp_path, output=str(tmp_path / str(on)), max_steps=2, **options), rows=ROWS)
        for on, options in enumerate(({}, {"gradient_checkpointing": True, "checkpointed_layers": 1}))
    ]
    for one, other in zip(*(run.log for run in runs), strict=True):
        np.testing.assert_allclose(one["losses"], other["losses"], rtol=1e-4)


@pytest.mark.parametrize("num_steps", [0, 1, 3])
def test_without_stepwise_only_the_last_loss_counts(base, tmp_path, num_steps):
    result = train(config(base, tmp_path, num_steps=num_steps, stepwise=False, max_steps=2), rows=ROWS)
    assert len(result.log[0]["losses"]) == max(num_steps, 1)
    assert result.log[0]["loss"] == result.log[0]["losses"][-1]
    assert result.model.encode(["red"]).shape == (1, 32)


def test_negatives_and_targets_of_a_batch(base, tmp_path):
    settings = config(base, tmp_path)
    examples = [Example("a:1", "q", "p", ("n", "m")), Example("a:2", "qq", "pp"), Example("a:3", "r", "p", ("n",))]
    tokenized = partial(tokenize_rows, RowTokenizer(GIRCSE.from_pretrained(base), settings, 3), examples)
    whole = tokenized(settings)
    assert list(map(len, whole.queries)) == [1, 2, 1]
    assert list(map(len, whole.passages)) == [1, 1, 1, 2, 1, 1]
    assert whole.target.tolist() == [0, 3, 4]
    assert (whole.texts, whole.tokens) == (9, 11)
    assert whole.mask.tolist() == [[False, False, False, False, True, False], [False] * 6, [True] + [False] * 5]
    second = tokenized(settings, share=slice(1, 3))
    assert second.queries == whole.queries[1:]
    assert second.passages == whole.passages[3:]
    assert second.target.tolist() == [0, 1]
    assert torch.equal(second.mask, whole.mask[1:])
    with_queries = tokenized(replace(settings, include_queries=True), share=slice(1, 3)).mask
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


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    ("rows", "options"),
    [
        # the copies of a positive, which are right answers, too
        ([Row("retrieve", f"query {word}", ("same",)) for word in WORDS[:4]], {}),
        # copies of a row, as documents and as queries
        ([Row("retrieve", "red fox", ("an animal",))] * 4, {"include_queries": True}),
        # one positive a line: lines of one query do not push the positives of each other away
        ([Row("retrieve", "red fox", (word,)) for word in WORDS[:4]], {}),
        ([Row("retrieve", "red fox", (word,)) for word in WORDS[:4]], {"micro_batch_tokens": 30}),
    ],
    ids=["positives", "rows", "lines", "lines in micro-batches"],
)
def test_right_answers_are_no_negatives(base, tmp_path, rows, options, symmetric):
    """With all of them masked nothing is left to be confused with, and the loss is 0."""
    losses = []
    for filtered in (True, False):
        settings = config(
            base, tmp_path, output=str(tmp_path / str(filtered)), max_steps=1, lora_dropout=0.0, symmetric=symmetric,
            filter_false_negatives=filtered, **options,
        )  # fmt: skip
        losses.append(train(settings, rows=rows).log[0]["losses"])
    assert losses[0] == [0, 0, 0]
    assert min(losses[1]) > 0.1


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


def test_what_is_no_new_run_or_no_run_to_resume_is_refused(base, tmp_path):
    settings = config(base, tmp_path, max_steps=1)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        train(replace(settings, resume=True), rows=ROWS)
    train(settings, rows=ROWS)
    with pytest.raises(FileExistsError, match="holds a run already"):
        train(settings, rows=ROWS)
    with pytest.raises(ValueError, match=r"learning_rate: was 0.003, is 1e-05"):
        train(replace(settings, learning_rate=1e-5, resume=True), rows=ROWS)


def test_a_bad_row_stops_before_anything_starts(base, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "p", "query": "q", "pos": ["d"]}\n{"prompt": "p", "query": 3, "pos": ["d"]}\n')
    with pytest.raises(DataError, match=r"rows.jsonl:2: "):
        train(config(base, tmp_path, data=(str(data),)))
    assert not (tmp_path / "run").exists()


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
