"""Distillation: the loss is its formula, the student learns the teacher's embeddings, nothing is half-written."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from gircse import GIRCSE
from gircse.cli import main
from gircse.data.retrieval_task import RetrievalTask
from gircse.data.rows import Row
from gircse.train import train
from gircse.train.checkpoint import list_checkpoints
from gircse.train.config import TrainConfig
from gircse.train.distill import distill
from gircse.train.distill_config import DistillConfig
from gircse.train.distill_loss import distillation_loss

WORDS = ["red", "blue", "fox", "dog", "tree", "sea", "hill", "rain"]
ROWS = [
    Row("retrieve the echo", f"{a} {b}", (f"{b} {a}",), (f"{a} {a}", f"{b} {b}")[: i % 3])
    for i, (a, b) in enumerate((a, b) for a in WORDS for b in WORDS if a != b)
]


@pytest.fixture(scope="module")
def teacher(base, tmp_path_factory):
    """A LoRA folder with K = 3, a few steps from its base."""
    settings = TrainConfig(
        model=str(base), output=str(tmp_path_factory.mktemp("teacher") / "run"), batch_size=8, num_steps=3, max_steps=8,
        learning_rate=1e-2, progress=False,
    )  # fmt: skip
    return train(settings, rows=ROWS).folder


def config(teacher, tmp_path, **options):
    defaults = {
        "teacher": str(teacher), "output": str(tmp_path / "run"), "batch_size": 8, "max_steps": 6,
        "learning_rate": 1e-2, "temperature": 0.1, "progress": False,
    }  # fmt: skip
    return DistillConfig(**{**defaults, **options})


def plain_loss(queries, documents, wanted_queries, wanted_documents, tau, weight):
    """The docstring's formula, one number at a time."""
    unit = lambda v: v / v.pow(2).sum().sqrt()  # noqa: E731
    pairs = [*zip(queries, wanted_queries, strict=True), *zip(documents, wanted_documents, strict=True)]
    cosine = sum(1 - unit(a) @ unit(b) for a, b in pairs) / len(pairs)
    kl = 0.0
    for query, wanted in zip(queries, wanted_queries, strict=True):
        ours = torch.stack([unit(query) @ unit(d) for d in documents]) / tau
        theirs = torch.stack([unit(wanted) @ unit(d) for d in wanted_documents]) / tau
        p, q = theirs.exp() / theirs.exp().sum(), ours.exp() / ours.exp().sum()
        kl = kl + (p * (p.log() - q.log())).sum() / len(queries)
    return cosine + weight * kl, cosine, kl


def test_the_loss_and_its_gradient_are_the_formula():
    torch.manual_seed(1)
    tensors = [torch.randn(n, 5, dtype=torch.float64, requires_grad=n_grad) for n, n_grad in
               ((3, True), (7, True), (3, False), (7, False))]  # fmt: skip
    loss = distillation_loss(*tensors, temperature=0.3, kl_weight=0.7)
    expected = plain_loss(*tensors, 0.3, 0.7)
    for one, other in zip(loss, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=0)
    for one, other in zip(
        torch.autograd.grad(loss.total, tensors[:2]), torch.autograd.grad(expected[0], tensors[:2]), strict=True
    ):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-14)
    assert torch.autograd.gradcheck(
        lambda q, d: distillation_loss(q, d, *tensors[2:], temperature=0.3, kl_weight=0.7).total, tensors[:2]
    )


def test_the_loss_of_the_teacher_itself_is_zero_whatever_the_length():
    queries, documents = torch.randn(3, 5), torch.randn(6, 5)
    parts = distillation_loss(3 * queries, 0.1 * documents, queries, documents, temperature=0.05, kl_weight=1.0)
    assert all(abs(part) < 1e-5 for part in parts)


def test_half_precision_embeddings_give_a_float32_loss():
    rows = torch.randn(3, 5).bfloat16()
    assert distillation_loss(rows, rows, rows, rows, temperature=0.1, kl_weight=1.0).total.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "documents", "message"),
    [
        ({"temperature": 0.0}, 3, "temperature: got 0.0"),
        ({"kl_weight": -1.0}, 3, "kl_weight: got -1.0"),
        ({}, 2, r"teacher_documents: got shape \(2, 5\), expected the student's \(3, 5\)"),
    ],
)
def test_impossible_arguments_are_refused(options, documents, message):
    rows = torch.randn(3, 5)
    with pytest.raises(ValueError, match=message):
        distillation_loss(rows, rows, rows, rows[:documents], **{"temperature": 0.1, "kl_weight": 1.0, **options})


def test_the_student_learns_the_teachers_embeddings(base, teacher, tmp_path):
    task = RetrievalTask.from_rows(ROWS)
    result = distill(config(teacher, tmp_path, max_steps=60), rows=ROWS, task=task)
    parts = {name: [entry[name] for entry in result.log] for name in ("loss", "cosine", "kl")}
    for values in parts.values():
        assert np.mean(values[-5:]) < 0.6 * np.mean(values[:5])
    assert result.agreement["after"] > result.agreement["before"] + 0.05

    texts = ["a red fox", "the sea", "dog tree", "rain on a hill"]
    wanted = GIRCSE.from_pretrained(teacher).encode(texts)
    student = GIRCSE.from_pretrained(result.folder)
    fresh = GIRCSE.from_pretrained(base, num_steps=0)
    closeness = lambda model: (model.encode(texts) * wanted).sum(1).mean()  # noqa: E731
    assert closeness(student) > closeness(fresh) + 0.05  # texts that it was not trained on
    assert student.config.num_steps == 0
    assert np.array_equal(student.encode(texts), result.model.encode(texts))

    lines = [
        "teacher, K = 0",
        "teacher, K = 1",
        "teacher, K = 2",
        "teacher, K = 3",
        "student, before",
        "student, after",
    ]
    assert list(result.quality) == lines
    assert all(line in result.table() for line in lines)
    written = json.loads((tmp_path / "run" / "distill_result.json").read_text())
    assert written == {"agreement": result.agreement, "quality": result.quality}
    logged = [json.loads(line) for line in (tmp_path / "run" / "distill_log.jsonl").read_text().splitlines()]
    assert logged == result.log


def test_the_first_loss_is_that_of_the_base_against_the_teacher(base, teacher, tmp_path):
    """LoRA starts at zero: the student of the first step is the plain base. A document of several rows counts once."""
    result = distill(config(teacher, tmp_path, max_steps=1, batch_size=len(ROWS)), rows=ROWS)
    model, base = GIRCSE.from_pretrained(teacher), GIRCSE.from_pretrained(base, num_steps=0)
    queries = [row.query for row in ROWS]
    documents = list(dict.fromkeys(text for row in ROWS for text in (*row.positives, *row.negatives)))
    embed = lambda m: (m.encode(queries, instruction=ROWS[0].instruction), m.encode(documents))  # noqa: E731
    pairs = [torch.from_numpy(e) for e in (*embed(base), *embed(model))]
    expected = distillation_loss(*pairs, temperature=0.1, kl_weight=1.0)
    assert result.log[0]["learning_rate"] == 1e-2  # the only step trains
    assert not torch.equal(torch.from_numpy(result.model.encode(queries)), torch.from_numpy(base.encode(queries)))
    assert result.log[0]["cosine"] == pytest.approx(expected.cosine.item(), rel=1e-4)
    assert result.log[0]["kl"] == pytest.approx(expected.kl.item(), rel=1e-3)


def test_it_can_go_on_from_the_teachers_adapter(base, teacher, tmp_path):
    result = distill(config(teacher, tmp_path, init="teacher", max_steps=12, learning_rate=1e-3), rows=ROWS)
    assert result.agreement["after"] > result.agreement["before"]
    student = GIRCSE.from_pretrained(result.folder)
    assert np.array_equal(student.encode(["sea fox"]), result.model.encode(["sea fox"]))
    # what it started from is the teacher's adapter, not the base
    before = torch.from_numpy(GIRCSE.from_pretrained(teacher).encode(["fox"], num_steps=0))
    plain = torch.from_numpy(GIRCSE.from_pretrained(base).encode(["fox"], num_steps=0))
    assert not torch.allclose(before, plain, atol=1e-3)


def numbers(log):
    return [[entry[name] for name in ("step", "loss", "cosine", "kl", "grad_norm", "batch")] for entry in log]


def test_a_resumed_run_is_bitwise_the_unbroken_one(base, teacher, tmp_path):
    settings = config(teacher, tmp_path, lora_dropout=0.1, max_steps=4, save_every=2, micro_batch_tokens=300)
    whole = distill(settings, rows=ROWS)
    assert whole.log[0]["micro_batches"] > 2
    shutil.rmtree(list_checkpoints(tmp_path / "run")[-1])
    again = distill(replace(settings, resume=True), rows=ROWS)
    assert numbers(again.log) == numbers(whole.log)
    assert again.log[:2] == whole.log[:2]  # kept, and not computed again
    assert again.agreement == whole.agreement
    assert np.array_equal(again.model.encode(["red fox"]), whole.model.encode(["red fox"]))
    with pytest.raises(ValueError, match="resume: the data have changed"):
        distill(replace(settings, resume=True), rows=ROWS[1:])
    with pytest.raises(ValueError, match="resume: the run was started with another model: .* has another teacher"):
        distill(replace(settings, resume=True, teacher=str(base)), rows=ROWS)


def test_gradient_caching_gives_the_same(teacher, tmp_path):
    runs = [
        distill(config(teacher, tmp_path, output=str(tmp_path / str(budget)), max_steps=3, micro_batch_tokens=budget),
                rows=ROWS)
        for budget in (100_000, 300)
    ]  # fmt: skip
    assert [run.log[0]["micro_batches"] > 2 for run in runs] == [False, True]
    for one, other in zip(*(run.log for run in runs), strict=True):
        for name in ("loss", "cosine", "kl", "grad_norm"):
            assert other[name] == pytest.approx(one[name], rel=1e-4)


def test_the_teachers_prompt_template_stays(teacher, tmp_path):
    model = GIRCSE.from_pretrained(teacher)
    model.config = type(model.config)(num_steps=3, prompt_template="{instruction}: {text}")
    result = distill(config(teacher, tmp_path, max_steps=1), rows=ROWS, teacher=model)
    assert GIRCSE.from_pretrained(result.folder).config.prompt_template == "{instruction}: {text}"


def test_a_full_model_is_a_teacher_too(base, teacher, tmp_path):
    result = distill(config(base, tmp_path, num_steps=2, max_steps=1), rows=ROWS)
    assert GIRCSE.from_pretrained(result.folder).num_steps == 0
    with pytest.raises(ValueError, match="init: got 'teacher', but the teacher has no LoRA adapter"):
        distill(config(base, tmp_path, output=str(tmp_path / "b"), init="teacher"), rows=ROWS)


def test_a_teacher_without_steps_is_refused_and_nothing_is_written(teacher, tmp_path):
    model = GIRCSE.from_pretrained(teacher, num_steps=0)
    with pytest.raises(ValueError, match="teacher: got a model with K = 0"):
        distill(config(teacher, tmp_path), rows=ROWS, teacher=model)
    with pytest.raises(ValueError, match="teacher: got none, expected a folder, a hub name or a model in memory"):
        distill(config("", tmp_path), rows=ROWS)  # transformers would read the current folder
    assert not (tmp_path / "run").exists()


def test_it_does_not_share_a_folder_with_a_training_run(teacher, tmp_path):
    """Both have checkpoints/, where a resumed distillation would find those of the training."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "train_log.jsonl").touch()
    with pytest.raises(FileExistsError, match="holds a run already"):
        distill(config(teacher, tmp_path), rows=ROWS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "half"}, "init: got 'half', expected 'fresh' or 'teacher'"),
        ({"init": "teacher", "lora_r": 8}, "lora_r: got 8, expected no value beside init = 'teacher'"),
        ({"init": "teacher", "lora_dropout": 0.1}, "lora_dropout: got 0.1, expected no value beside init = 'teacher'"),
        ({"num_steps": 0}, "num_steps: got 0, expected an integer >= 1"),
        ({"temperature": 0}, "temperature: got 0.0, expected a number > 0"),
        ({"kl_weight": float("nan")}, "kl_weight: got nan"),
    ],
)
def test_settings_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        DistillConfig(**options)


def test_the_command(teacher, tmp_path, capsys):
    data = tmp_path / "rows.jsonl"
    lines = [
        {"prompt": row.instruction, "query": row.query, "pos": row.positives, "neg": row.negatives} for row in ROWS
    ]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    # fmt: off
    arguments = [
        "distill", "--teacher", str(teacher), "--data", str(data), "--output", str(tmp_path / "run"),
        "--batch-size", "8", "--max-steps", "2", "--eval-data", str(data), "--no-progress",
    ]
    # fmt: on
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "teacher, K = 3" in out
    assert "distilled 2 steps" in out
    assert main(arguments) == 2
    assert "holds a run already" in capsys.readouterr().err
