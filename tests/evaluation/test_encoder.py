from __future__ import annotations

import numpy as np
import pytest

mteb = pytest.importorskip("mteb")

from mteb.abstasks.task_metadata import TaskMetadata  # noqa: E402
from mteb.types import PromptType  # noqa: E402

from gircse.evaluation.encoder import GIRCSEEncoder  # noqa: E402
from gircse.evaluation.instructions import ENGLISH_V2, task_instruction, text_instruction  # noqa: E402
from gircse.evaluation.step_store import StepStore  # noqa: E402
from gircse.prompts import is_symmetric  # noqa: E402

ENGLISH = {task.metadata.name: task.metadata for task in mteb.get_benchmark("MTEB(eng, v2)").tasks}
TEXTS = ["one", "another text", "one"]


def metadata(name="Mine", type="Retrieval", prompt=None):
    return TaskMetadata(
        dataset={"path": "a/b", "revision": "1"},
        name=name,
        description="",
        prompt=prompt,
        type=type,
        eval_langs=["eng-Latn"],
        main_score="ndcg_at_10",
    )


def encode(encoder, task, prompt_type=None, texts=TEXTS, **kwargs):
    batches = [{"text": texts[:2]}, {"text": texts[2:]}]
    return encoder.encode(
        batches, task_metadata=task, hf_split="test", hf_subset="default", prompt_type=prompt_type, **kwargs
    )


def test_the_table_is_the_benchmark():
    assert set(ENGLISH_V2) == set(ENGLISH)
    assert len(ENGLISH_V2) == 41


@pytest.mark.parametrize("name", ENGLISH)
def test_documents_are_bare_in_retrieval_and_nowhere_else(name):
    task = ENGLISH[name]
    asymmetric = task.type in ("Retrieval", "Reranking")
    assert is_symmetric(ENGLISH_V2[name]) != asymmetric
    assert text_instruction(task, PromptType.query) == text_instruction(task, None) == ENGLISH_V2[name]
    assert text_instruction(task, PromptType.document) == (None if asymmetric else ENGLISH_V2[name])


def test_instructions_of_other_tasks_come_from_mteb():
    assert task_instruction(metadata(prompt="retrieve it")) == "retrieve it"
    both = metadata(prompt={"query": "retrieve it", "document": "this is it"})
    assert text_instruction(both, PromptType.query) == "retrieve it"
    assert text_instruction(both, PromptType.document) == "this is it"
    assert text_instruction(both, PromptType.document, {"Mine": "retrieve it"}) is None
    assert task_instruction(both, {"Mine": "ours"}) == "ours"
    assert task_instruction(mteb.get_task("NFCorpus").metadata)


@pytest.mark.parametrize("prompt_type", [None, PromptType.query, PromptType.document])
def test_embeds_what_encode_embeds(model, tmp_path, prompt_type):
    task = metadata(prompt="retrieve it")
    instruction = None if prompt_type is PromptType.document else "retrieve it"
    with StepStore([2, 5], tmp_path) as store:
        stored = GIRCSEEncoder(model, num_steps=5, store=store)
        for k in (2, 5):
            expected = model.encode(TEXTS, instruction=instruction, num_steps=k)
            plain = encode(GIRCSEEncoder(model, num_steps=k), task, prompt_type, batch_size=32)
            np.testing.assert_allclose(plain, expected, atol=1e-6)
            np.testing.assert_allclose(encode(stored.at_steps(k), task, prompt_type), expected, atol=1e-6)
        assert store.encoded == 2


def test_encoder_only(model, tmp_path):
    task = metadata(prompt="retrieve it")
    with StepStore([0], tmp_path) as store:
        got = encode(GIRCSEEncoder(model, num_steps=0, store=store), task)
    np.testing.assert_allclose(got, model.encode(TEXTS, instruction="retrieve it", num_steps=0), atol=1e-6)


def test_what_changes_a_score_is_in_the_name_of_the_result(model, tmp_path):
    cache = mteb.ResultCache(tmp_path)

    def path(encoder):
        return cache.get_task_result_path("STS12", encoder.mteb_model_meta)

    five = GIRCSEEncoder(model, num_steps=5)
    others = [
        five.at_steps(20),
        GIRCSEEncoder(model, num_steps=5, max_length=77),
        GIRCSEEncoder(model, num_steps=5, instructions={"STS12": "another"}),
        GIRCSEEncoder(model, num_steps=5, name="me/mine"),
    ]
    assert len({path(encoder) for encoder in [five, *others]}) == 5
    assert path(GIRCSEEncoder(model)) == path(five) == path(five.at_steps(20).at_steps(5))
    assert "num_steps_5" in str(path(five))
    assert "num_steps_20" in str(path(others[0]))
    meta = five.mteb_model_meta
    assert meta.embed_dim == 32
    assert meta.n_parameters == sum(p.numel() for p in model.base.parameters())
    assert meta.to_dict()["similarity_fn_name"] == "cosine"


def test_arguments_that_the_cache_does_not_know_are_refused(model):
    encoder = GIRCSEEncoder(model)
    for extra in ({"num_steps": 20}, {"precision": "int8"}):
        with pytest.raises(ValueError, match=f"encode_kwargs: got {next(iter(extra))}; .* GIRCSEEncoder"):
            encode(encoder, metadata(prompt="x"), **extra)


def test_wrong_arguments_are_named(model, tmp_path):
    with pytest.raises(ValueError, match="name: got 'mine', expected 'organisation/name'"):
        GIRCSEEncoder(model, name="mine")
    with pytest.raises(ValueError, match="num_steps: got -1"):
        GIRCSEEncoder(model, num_steps=-1)
    with StepStore([1, 5], tmp_path) as store:
        with pytest.raises(ValueError, match=r"num_steps: got 2, expected one of the store's \(1, 5\)"):
            GIRCSEEncoder(model, num_steps=2, store=store)
        with pytest.raises(ValueError, match=r"num_steps: got 2, expected one of the store's \(1, 5\)"):
            GIRCSEEncoder(model, num_steps=5, store=store).at_steps(2)
