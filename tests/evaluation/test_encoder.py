from __future__ import annotations

import copy

import numpy as np
import pytest

mteb = pytest.importorskip("mteb")

from mteb import mocks  # noqa: E402
from mteb.abstasks.task_metadata import TaskMetadata  # noqa: E402
from mteb.models import CompressionWrapper  # noqa: E402
from mteb.types import PromptType  # noqa: E402
from peft import LoraConfig  # noqa: E402
from sentence_transformers.util import quantize_embeddings  # noqa: E402

from gircse import GIRCSE, GircseConfig  # noqa: E402
from gircse.evaluation.encoder import GIRCSEEncoder  # noqa: E402
from gircse.evaluation.instructions import ENGLISH_V2, task_instruction, text_instruction  # noqa: E402
from gircse.evaluation.offline_tasks import StdlibRelatednessSTS  # noqa: E402
from gircse.evaluation.step_store import StepStore  # noqa: E402
from gircse.lm.prompts import is_symmetric  # noqa: E402
from tests.tiny_models import tiny_model, tiny_tokenizer  # noqa: E402

ENGLISH = {task.metadata.name: task.metadata for task in mteb.get_benchmark("MTEB(eng, v2)").tasks}
TEXTS = ["one", "another text", "one"]
# a token of the tiny model is a character: a short instruction leaves room for the texts
SHORT = {"max_length": 64, "instructions": {"StdlibRelatednessSTS": "x"}}


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
    for extra in ({"num_steps": 20}, {"precision": "int8", "truncate_dim": 8}):
        with pytest.raises(ValueError, match=f"encode_kwargs: got {list(extra)[-1]}; .* GIRCSEEncoder"):
            encode(encoder, metadata(prompt="x"), **extra)


@pytest.mark.parametrize("precision", ["int8", "binary"])
def test_precision_is_sentence_transformers_and_part_of_the_results_name(model, tmp_path, precision):
    encoder, cache = GIRCSEEncoder(model, num_steps=2, **SHORT), mteb.ResultCache(tmp_path)
    expected = quantize_embeddings(model.encode(TEXTS, instruction="retrieve", num_steps=2), precision)
    found = encode(encoder, metadata(prompt="retrieve"), precision=precision)
    assert found.dtype == expected.dtype
    assert np.array_equal(found, expected)

    task = mocks.MockRetrievalTask()
    for kwargs in ({}, {"precision": precision}):
        result = mteb.evaluate(encoder, task, cache=cache, encode_kwargs=kwargs, show_progress_bar=False)
        assert result.task_results[0].get_score() > 0
    paths = [str(path.parent) for path in tmp_path.rglob(f"{task.metadata.name}.json")]
    assert len(paths) == 2
    assert sum(f"output_dtypes_{precision}" in path for path in paths) == 1


def test_what_mtebs_wrappers_add_is_kept(model):
    encoder = GIRCSEEncoder(model, num_steps=2)
    wrapped = CompressionWrapper(encoder).mteb_model_meta
    assert wrapped.experiment_kwargs.items() >= {"num_steps": 2, "max_length": 512}.items()
    assert wrapped.experiment_name != GIRCSEEncoder(model, num_steps=2).mteb_model_meta.experiment_name
    assert encoder.at_steps(3).mteb_model_meta.experiment_kwargs["num_steps"] == 3


def test_fields_of_mtebs_metadata(model, tmp_path):
    fields = {
        "languages": ["eng-Latn"],
        "license": "apache-2.0",
        "release_date": "2026-11-27",
        "adapted_from": "me/base",
        "open_weights": True,
    }
    encoder = GIRCSEEncoder(model, num_steps=2, name="me/mine", revision="v1", n_embedding_parameters=7, **fields)
    for meta in (encoder.mteb_model_meta, encoder.at_steps(3).mteb_model_meta):
        assert {name: getattr(meta, name) for name in fields} == fields
        assert (meta.name, meta.revision, meta.n_embedding_parameters) == ("me/mine", "v1", 7)
    plain = GIRCSEEncoder(model).mteb_model_meta
    assert plain.n_embedding_parameters == model.base.get_input_embeddings().weight.numel()
    assert plain.n_active_parameters == plain.n_parameters - plain.n_embedding_parameters
    for bad, words in (({"licence": "mit"}, "licence: expected a field of"), ({"embed_dim": 3}, "embed_dim: expected")):
        with pytest.raises(TypeError, match=words):
            GIRCSEEncoder(model, **bad)
    with pytest.raises(ValueError, match="languages"):
        GIRCSEEncoder(model, languages=["English"])


def test_results_are_found_again_as_the_page_says(model, tmp_path):
    cache, task = mteb.ResultCache(tmp_path), mocks.MockSTSTask()
    encoder = GIRCSEEncoder(model, num_steps=2, name="me/mine")
    five = encoder.at_steps(5)
    scores = {}
    for one in (encoder, five):
        result = mteb.evaluate(one, task, cache=cache, show_progress_bar=False)
        scores[one.num_steps] = result.task_results[0].get_score()
    of_one = cache.load_results(models=[five.mteb_model_meta])
    assert [result.task_results[0].get_score() for result in of_one.model_results] == [
        pytest.approx(scores[5], abs=1e-6)
    ]
    by_name = cache.load_results(models=["me/mine"], load_experiments="match_name")
    assert sorted(result.experiment_name for result in by_name.model_results) == sorted(
        one.mteb_model_meta.experiment_name for one in (encoder, five)
    )


def tiny_gircse() -> GIRCSE:
    return GIRCSE(tiny_model("llama"), tiny_tokenizer(), GircseConfig(num_steps=2)).eval()


def change_in_place(model):
    model.base.lm_head.weight.data.mul_(-1)  # no version counter sees this


def change_the_object(model):
    state = tiny_model("llama", seed=3).state_dict()
    model.base.load_state_dict(state)


def change_the_adapter(model):
    model.base.set_adapter("other")


def change_its_strength(model):
    for layer in model.base.modules():
        if hasattr(layer, "active_adapters") and hasattr(layer, "scaling"):
            layer.scaling["default"] *= 3


def change_the_config(model):
    model.config = GircseConfig(num_steps=2, pooling="last", temperature=3.0)


CHANGES = [change_in_place, change_the_object, change_the_adapter, change_its_strength, change_the_config]


def adapted_model() -> GIRCSE:
    base = tiny_model("llama")
    for name in ("other", "default"):
        base.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False), name)
    return GIRCSE(base, tiny_tokenizer(), GircseConfig(num_steps=2)).eval()


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_has_another_name(tmp_path, change):
    """In mteb's cache and in a store, whatever was changed; a pinned encoder keeps its name."""
    model = adapted_model() if "adapter" in change.__name__ or "strength" in change.__name__ else tiny_gircse()
    cache, task = mteb.ResultCache(tmp_path), metadata(prompt="x")
    with StepStore([2], tmp_path / "store") as store:
        encoder = GIRCSEEncoder(model, store=store)
        pinned = encoder.with_these_weights()
        before, path = encode(encoder, task), cache.get_task_result_path("Mine", encoder.mteb_model_meta)
        change(model)
        after = encode(encoder, task)
        np.testing.assert_allclose(after, model.encode(TEXTS, instruction="x", num_steps=2), atol=1e-6, rtol=0)
        assert np.abs(after - before).max() > 1e-3
        assert cache.get_task_result_path("Mine", encoder.mteb_model_meta) != path
        assert cache.get_task_result_path("Mine", pinned.mteb_model_meta) == path


def test_no_score_of_other_weights(tmp_path):
    """Evaluate, change the weights, evaluate again: the score of a new encoder without a cache."""
    model, cache = tiny_gircse(), mteb.ResultCache(tmp_path)
    encoder = GIRCSEEncoder(model, **SHORT)
    scores = []
    for one, kept in ((encoder, cache), (encoder, cache), (GIRCSEEncoder(model, **SHORT), None)):
        result = mteb.evaluate(one, StdlibRelatednessSTS(), cache=kept, show_progress_bar=False)
        scores.append(result.task_results[0].get_score())
        if len(scores) == 1:
            change_in_place(model)
    assert scores[1] == pytest.approx(scores[2], abs=1e-6)
    assert abs(scores[1] - scores[0]) > 1e-4


def test_a_revision_names_its_weights_only(model):
    other = copy.deepcopy(model)
    encoder = GIRCSEEncoder(other, revision="v1")
    assert encoder.mteb_model_meta.revision == "v1"
    change_in_place(other)
    with pytest.raises(ValueError, match="revision: got 'v1' for weights that have changed since"):
        encoder.mteb_model_meta  # noqa: B018


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
