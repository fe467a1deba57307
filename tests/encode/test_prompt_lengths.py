"""How many tokens a text may have: two limits that are saved with the model, and an argument over both."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import numpy as np
import pytest

import gircse
from gircse import GIRCSE, GircseConfig
from gircse.cli import main
from gircse.data.retrieval_task import RetrievalTask
from gircse.data.rows import Row
from gircse.evaluation.metrics import metrics_by_step
from gircse.evaluation.retrieval import evaluate_retrieval
from gircse.sentence_transformers import GIRCSEModule
from gircse.train import train
from gircse.train.config import TrainConfig
from gircse.train.distill import distill
from gircse.train.distill_config import DistillConfig
from tests.tiny_models import tiny_model, tiny_tokenizer

QUERY, PASSAGE = 30, 60
INSTRUCTION = "retrieve"  # with the template 24 characters, each of them a token
TEXT = "the answer comes late in a text that is longer than both limits, much longer"
WORDS = ["red", "blue", "fox", "dog", "tree", "sea", "hill", "rain"]
# as long as a passage may be, and told apart by their ends alone
ROWS = [Row(INSTRUCTION, word, (f"{'x' * 40} {word}",)) for word in WORDS]


def model(**config) -> GIRCSE:
    settings = GircseConfig(num_steps=2, query_max_length=QUERY, passage_max_length=PASSAGE, **config)
    return GIRCSE(tiny_model("llama"), tiny_tokenizer(), settings).eval()


@pytest.mark.filterwarnings("ignore:.*cut at the end")
def test_a_text_has_the_limit_of_a_query_or_of_a_passage(tmp_path):
    ours = model()
    ours.save_pretrained(tmp_path / "model")
    for found in (ours, GIRCSE.from_pretrained(tmp_path / "model")):
        for instruction, limit in ((INSTRUCTION, QUERY), (None, PASSAGE), ("", PASSAGE)):
            cut = found.encode(TEXT, instruction=instruction, max_length=limit)
            assert np.array_equal(found.encode(TEXT, instruction=instruction), cut)
            assert np.array_equal(next(found.encode_stream([TEXT], instruction=instruction)), cut)
            assert not np.allclose(found.encode(TEXT, instruction=instruction, max_length=limit + 1), cut, atol=1e-4)
            shown = found.inspect(TEXT, instruction=instruction)[0].steps
            assert shown == found.inspect(TEXT, instruction=instruction, max_length=limit)[0].steps


LONG = "retrieve what has to do with the text at hand"


@pytest.mark.filterwarnings("ignore:.*cut at the end")
def test_an_instruction_that_leaves_nothing_of_the_texts_is_named(base, tmp_path):
    ours, prefix = model(), len(f"Instruct: {LONG}\nQuery:")
    whole = rf"'{LONG}' alone has {prefix} tokens: nothing of its texts is read"
    for limit in (prefix - 10, prefix):
        with pytest.warns(UserWarning, match=f"max_length: got {limit}, but the instruction {whole}"):
            same = ours.encode(["red", "blue"], instruction=LONG, max_length=limit)
        assert np.array_equal(*same)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*nothing of its texts")
        ours.encode(["red"], instruction=LONG, max_length=prefix + 1)
        ours.encode(["red"], max_length=1)
    rows = [Row(LONG, word, (word,)) for word in WORDS]
    lengths = {"query_max_length": QUERY, "passage_max_length": PASSAGE, "batch_size": 4, "max_steps": 2}
    settings = TrainConfig(model=str(base), output=str(tmp_path / "run"), num_steps=2, progress=False, **lengths)
    with pytest.warns(UserWarning, match=f"query_max_length: got {QUERY}, but the instruction {whole}") as caught:
        folder = train(settings, rows=rows).folder
    assert sum("nothing of its texts" in str(w.message) for w in caught) == 2  # by default shown once: the same text
    assert len({str(w.message) for w in caught if "nothing of its texts" in str(w.message)}) == 1
    student = DistillConfig(teacher=str(folder), output=str(tmp_path / "student"), progress=False, **lengths)
    with pytest.warns(UserWarning, match=f"query_max_length: got {QUERY}, but the instruction {whole}"):
        distill(student, rows=rows)
    symmetric = [Row("s" * 50, word, (word,)) for word in WORDS]
    with pytest.warns(UserWarning, match=f"passage_max_length: got {PASSAGE}, but the instruction 's+' alone has 67"):
        train(replace(settings, output=str(tmp_path / "symmetric")), rows=symmetric)


@pytest.mark.filterwarnings("ignore:.*cut at the end")
def test_sentence_transformers_has_the_same_limits(tmp_path):
    ours = model()
    ours.save_pretrained(tmp_path / "model")
    st = gircse.load(tmp_path / "model", instruction=INSTRUCTION)
    np.testing.assert_allclose(st.encode_query(TEXT), ours.encode(TEXT, instruction=INSTRUCTION), atol=1e-6)
    np.testing.assert_allclose(st.encode_document(TEXT), ours.encode(TEXT), atol=1e-6)
    st.save_pretrained(str(tmp_path / "st"))
    again = gircse.load(tmp_path / "st")
    np.testing.assert_allclose(again.encode_query(TEXT), st.encode_query(TEXT), atol=1e-6)
    np.testing.assert_allclose(again.encode_document(TEXT), st.encode_document(TEXT), atol=1e-6)
    short = GIRCSEModule(model(), max_seq_length=40)
    assert [short.preprocess([TEXT], prompt)["input_ids"].shape[1] for prompt in (None, "query: ")] == [40, 40]


@pytest.mark.filterwarnings("ignore:.*cut at the end")
def test_an_evaluation_cuts_queries_and_documents_where_the_model_does():
    ours, task = model(), RetrievalTask.from_rows(ROWS)
    queries = ours.encode(task.queries, instruction=INSTRUCTION, return_steps=True)
    for length in (None, QUERY):
        documents = ours.encode(task.documents, max_length=length or PASSAGE, return_steps=True)
        expected = metrics_by_step(queries, documents, task.relevant, [1, 2])
        assert evaluate_retrieval(ours, task, steps=[1, 2], max_length=length) == expected
    # cut at the limit of queries all documents are the same, and nothing is found
    assert evaluate_retrieval(ours, task, steps=[1], max_length=QUERY)[1]["mrr@10"] == pytest.approx(1 / len(ROWS))
    symmetric = RetrievalTask("same", task.queries, task.documents, task.relevant)
    documents = ours.encode(task.documents, instruction="same", max_length=PASSAGE, return_steps=True)
    queries = ours.encode(task.queries, instruction="same", return_steps=True)
    expected = metrics_by_step(queries, documents, task.relevant, [1, 2])
    assert evaluate_retrieval(ours, symmetric, steps=[1, 2]) == expected


def test_training_and_distillation_save_their_limits_and_evaluate_with_them(base, tmp_path, capsys):
    data = tmp_path / "rows.jsonl"
    data.write_text(
        "".join(json.dumps({"prompt": r.instruction, "query": r.query, "pos": r.positives}) + "\n" for r in ROWS)
    )
    lengths = ["--query-max-length", "30", "--passage-max-length", "60"]
    files = ["--data", str(data), "--eval-data", str(data), "--batch-size", "8", "--max-steps", "1", "--no-progress"]
    commands = {
        "run": ["train", "--model", str(base), "--num-steps", "2"],
        "student": ["distill", "--teacher", str(tmp_path / "run" / "model")],
    }
    for output, command in commands.items():
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*cut at the end")  # no document is too long
            assert main([*command, *lengths, *files, "--output", str(tmp_path / output)]) == 0
        found = GIRCSE.from_pretrained(tmp_path / output / "model")
        assert (found.config.query_max_length, found.config.passage_max_length) == (QUERY, PASSAGE)
    log = json.loads((tmp_path / "run" / "train_log.jsonl").read_text())
    trained = GIRCSE.from_pretrained(tmp_path / "run" / "model")
    expected = evaluate_retrieval(trained, RetrievalTask.from_rows(ROWS), steps=[2], max_length=PASSAGE)
    assert log["evaluation"]["2"] == pytest.approx(expected[2])
