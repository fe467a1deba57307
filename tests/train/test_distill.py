"""Distillation: the loss is its formula, the student learns the teacher's embeddings, nothing is half-written."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from gircse import GIRCSE
from gircse.cli import main
from gircse.data.retrieval_task import RetrievalTask
from gircse.data.rows import Row
from gircse.train import train
from gircse.train.config import TrainConfig
from gircse.train.distill import distill, distillation_loss
from gircse.train.distill_config import DistillConfig
from tests.tiny_models import tiny_model, tiny_tokenizer

WORDS = ["red", "blue", "fox", "dog", "tree", "sea", "hill", "rain"]
ROWS = [
    Row("retrieve the echo", f"{a} {b}", (f"{b} {a}",), (f"{a} {a}", f"{b} {b}")[: i % 3])
    for i, (a, b) in enumerate((a, b) for a in WORDS for b in WORDS if a != b)
]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A LoRA folder with K = 3, a few steps from its base."""
    folder = tmp_path_factory.mktemp("teacher")
    tiny_model("llama").save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    settings = TrainConfig(
        model=str(folder / "base"), output=str(folder / "run"), batch_size=8, num_steps=3, max_steps=8,
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
    found = distillation_loss(*tensors, temperature=0.3, kl_weight=0.7)
    expected = plain_loss(*tensors, 0.3, 0.7)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=0)
    for one, other in zip(
        torch.autograd.grad(found.total, tensors[:2]), torch.autograd.grad(expected[0], tensors[:2]), strict=True
    ):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-14)
    assert torch.autograd.gradcheck(
        lambda q, d: distillation_loss(q, d, *tensors[2:], temperature=0.3, kl_weight=0.7).total, tensors[:2]
    )


def test_the_loss_of_the_teacher_itself_is_zero_whatever_the_length():
    queries, documents = torch.randn(3, 5), torch.randn(6, 5)
    found = distillation_loss(3 * queries, 0.1 * documents, queries, documents, temperature=0.05, kl_weight=1.0)
    assert all(abs(part) < 1e-5 for part in found)


def test_half_precision_embeddings_give_a_float32_loss():
    rows = torch.randn(3, 5).bfloat16()
    assert distillation_loss(rows, rows, rows, rows, temperature=0.1, kl_weight=1.0).total.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [({"temperature": 0.0}, "temperature: got 0.0"), ({"kl_weight": -1.0}, "kl_weight: got -1.0")],
)
def test_impossible_numbers_are_refused(options, message):
    rows = torch.randn(3, 5)
    with pytest.raises(ValueError, match=message):
        distillation_loss(rows, rows, rows, rows, **{"temperature": 0.1, "kl_weight": 1.0, **options})


def test_shapes_must_agree():
    rows = torch.randn(3, 5)
    with pytest.raises(ValueError, match=r"teacher_documents: got shape \(2, 5\), expected the student's \(3, 5\)"):
        distillation_loss(rows, rows, rows, rows[:2], temperature=0.1, kl_weight=1.0)


def test_the_student_learns_the_teachers_embeddings(teacher, tmp_path):
    task = RetrievalTask.from_rows(ROWS)
    result = distill(config(teacher, tmp_path, max_steps=60), rows=ROWS, task=task)
    parts = {name: [entry[name] for entry in result.log] for name in ("loss", "cosine", "kl")}
    for values in parts.values():
        assert np.mean(values[-5:]) < 0.6 * np.mean(values[:5])
    assert result.agreement["after"] > result.agreement["before"] + 0.05

    texts = ["a red fox", "the sea", "dog tree", "rain on a hill"]
    wanted = GIRCSE.from_pretrained(teacher).encode(texts)
    student = GIRCSE.from_pretrained(result.folder)
    fresh = GIRCSE.from_pretrained(tiny_base(teacher), num_steps=0)
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


def tiny_base(teacher):
    return json.loads((teacher / "adapter_config.json").read_text())["base_model_name_or_path"]


def test_the_first_loss_is_that_of_the_base_against_the_teacher(teacher, tmp_path):
    """LoRA starts at zero: the student of the first step is the plain base. A document of several rows counts once."""
    result = distill(config(teacher, tmp_path, max_steps=1, batch_size=len(ROWS)), rows=ROWS)
    model, base = GIRCSE.from_pretrained(teacher), GIRCSE.from_pretrained(tiny_base(teacher), num_steps=0)
    queries = [row.query for row in ROWS]
    documents = list(dict.fromkeys(text for row in ROWS for text in (*row.positives, *row.negatives)))
    embed = lambda m: (m.encode(queries, instruction=ROWS[0].instruction), m.encode(documents))  # noqa: E731
    pairs = [torch.from_numpy(e) for e in (*embed(base), *embed(model))]
    expected = distillation_loss(*pairs, temperature=0.1, kl_weight=1.0)
    assert result.log[0]["learning_rate"] == 1e-2  # the only step trains
    assert not torch.equal(torch.from_numpy(result.model.encode(queries)), torch.from_numpy(base.encode(queries)))
    assert result.log[0]["cosine"] == pytest.approx(expected.cosine.item(), rel=1e-4)
    assert result.log[0]["kl"] == pytest.approx(expected.kl.item(), rel=1e-3)


def test_it_can_go_on_from_the_teachers_adapter(teacher, tmp_path):
    result = distill(config(teacher, tmp_path, init="teacher", max_steps=12, learning_rate=1e-3), rows=ROWS)
    assert result.agreement["after"] > result.agreement["before"]
    student = GIRCSE.from_pretrained(result.folder)
    assert np.array_equal(student.encode(["sea fox"]), result.model.encode(["sea fox"]))
    # what it started from is the teacher's adapter, not the base
    before = torch.from_numpy(GIRCSE.from_pretrained(teacher).encode(["fox"], num_steps=0))
    plain = torch.from_numpy(GIRCSE.from_pretrained(tiny_base(teacher)).encode(["fox"], num_steps=0))
    assert not torch.allclose(before, plain, atol=1e-3)


def test_two_runs_are_bitwise_the_same(teacher, tmp_path):
    runs = [
        distill(config(teacher, tmp_path, output=str(tmp_path / name), lora_dropout=0.1, max_steps=3), rows=ROWS)
        for name in ("a", "b")
    ]
    one, other = ([{k: v for k, v in entry.items() if k != "seconds"} for entry in run.log] for run in runs)
    assert one == other
    assert np.array_equal(*(run.model.encode(["red fox"]) for run in runs))


def test_the_teachers_prompt_template_stays(teacher, tmp_path):
    model = GIRCSE.from_pretrained(teacher)
    model.config = type(model.config)(num_steps=3, prompt_template="{instruction}: {text}")
    result = distill(config(teacher, tmp_path, max_steps=1), rows=ROWS, teacher=model)
    assert GIRCSE.from_pretrained(result.folder).config.prompt_template == "{instruction}: {text}"


def test_a_full_model_is_a_teacher_too(teacher, tmp_path):
    result = distill(config(tiny_base(teacher), tmp_path, num_steps=2, max_steps=1), rows=ROWS)
    assert GIRCSE.from_pretrained(result.folder).num_steps == 0
    with pytest.raises(ValueError, match="init: got 'teacher', but the teacher has no LoRA adapter"):
        distill(config(tiny_base(teacher), tmp_path, output=str(tmp_path / "b"), init="teacher"), rows=ROWS)


def test_a_teacher_without_steps_is_refused_and_nothing_is_written(teacher, tmp_path):
    model = GIRCSE.from_pretrained(teacher, num_steps=0)
    with pytest.raises(ValueError, match="teacher: got a model with K = 0"):
        distill(config(teacher, tmp_path), rows=ROWS, teacher=model)
    assert not (tmp_path / "run").exists()


def test_a_finished_run_is_not_overwritten(teacher, tmp_path):
    distill(config(teacher, tmp_path, max_steps=1), rows=ROWS)
    with pytest.raises(FileExistsError, match="output: .*run holds a run already"):
        distill(config(teacher, tmp_path, max_steps=1), rows=ROWS)


def test_fewer_rows_than_a_batch(teacher, tmp_path):
    with pytest.raises(ValueError, match="batch_size: got 8, expected at most the number of rows, 3"):
        distill(config(teacher, tmp_path), rows=ROWS[:3])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "half"}, "init: got 'half', expected 'fresh' or 'teacher'"),
        ({"num_steps": 0}, "num_steps: got 0, expected an integer >= 1"),
        ({"temperature": 0}, "temperature: got 0.0, expected a number > 0"),
        ({"kl_weight": float("nan")}, "kl_weight: got nan"),
        ({"max_negatives": -1}, "max_negatives: got -1"),
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
