"""Saved folders: what is in them, who reads them, and what is refused."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch

pytest.importorskip("sentence_transformers")
from peft import LoraConfig, PeftModel, get_peft_model
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize, Router
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from transformers import AutoModelForCausalLM

import gircse
from gircse import GIRCSE, GircseConfig
from gircse.sentence_transformers import GIRCSEModule
from gircse.sentence_transformers.modeling_gircse_folder import CODE
from tests.tiny_models import tiny_model, tiny_tokenizer

TEXTS = ["a text", "another, longer text", "x"]
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


def same(one, other, **options) -> None:
    np.testing.assert_allclose(one.encode(TEXTS, **options), other.encode(TEXTS, **options), atol=1e-6, rtol=0)


def test_a_whole_model(tmp_path):
    config = GircseConfig(num_steps=3, pooling="weighted", temperature=0.7, append_eos=True)
    module = GIRCSEModule(GIRCSE(tiny_model("llama"), tiny_tokenizer(), config).eval(), max_seq_length=30)
    st = SentenceTransformer(
        modules=[module, Normalize()], prompts={"topic": "t: "}, similarity_fn_name="dot", truncate_dim=20, device="cpu"
    )
    st.save_pretrained(str(tmp_path / "saved"))
    modules = json.loads((tmp_path / "saved/modules.json").read_text())
    assert [(entry["path"], entry["type"].split(".")[-1]) for entry in modules] == [
        ("", "GIRCSEModule"),
        ("1_Normalize", "Normalize"),
    ]
    assert modules[0]["type"] == "modeling_gircse.GIRCSEModule"
    assert {path.name for path in (tmp_path / "saved").iterdir()} >= {
        "config.json",
        "config_sentence_transformers.json",
        "gircse_config.json",
        "model.safetensors",
        *CODE,
        "sentence_bert_config.json",
        "tokenizer.json",
    }
    again = gircse.load(tmp_path / "saved")
    assert [type(m) for m in again] == [GIRCSEModule, Normalize]
    assert (again.max_seq_length, again.truncate_dim, again.similarity_fn_name) == (30, 20, "dot")
    assert again.prompts["topic"] == "t: "
    assert again[0].model.config == config
    same(st, again, prompt_name="topic")
    plain = GIRCSE.from_pretrained(tmp_path / "saved")
    assert plain.config == config
    np.testing.assert_allclose(
        plain.encode(TEXTS, truncate_dim=20), again.encode(TEXTS, normalize_embeddings=True), atol=1e-6, rtol=0
    )


@pytest.mark.usefixtures("add_adapter")
def test_a_folder_that_gircse_saved(base_folder, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    model = GIRCSE(get_peft_model(base, LORA), tiny_tokenizer(), GircseConfig(num_steps=2)).eval()
    model.save_pretrained(tmp_path / "ours")
    st = gircse.load(tmp_path / "ours", instruction="Find it")
    np.testing.assert_allclose(st.encode_query(TEXTS), model.encode(TEXTS, instruction="Find it"), atol=1e-6, rtol=0)
    assert st.active_adapters() == ["default"]
    st.save_pretrained(str(tmp_path / "st"))
    again = gircse.load(tmp_path / "st")
    assert again.prompts["query"] == "Instruct: Find it\nQuery:"
    same(st, again)
    same(gircse.load(base_folder, adapter=tmp_path / "ours", num_steps=2), again)
    assert gircse.load(tmp_path / "st", num_steps=7, prompts={"query": ""}).prompts["query"] == ""
    assert gircse.load(tmp_path / "st", num_steps=7, max_seq_length=3).max_seq_length == 3


@pytest.mark.usefixtures("add_adapter")
def test_add_adapter_is_saved_and_read_by_both(base_folder, tmp_path):
    """An adapter of any name, on the head too."""
    st = gircse.load(base_folder, num_steps=3)
    bare = st.encode(TEXTS)
    st.add_adapter(LoraConfig(r=4, init_lora_weights=False, target_modules=["lm_head", "q_proj"]), adapter_name="mine")
    st.save_pretrained(str(tmp_path / "adapted"))
    names = {path.name for path in (tmp_path / "adapted").iterdir()}
    assert names >= {"adapter_config.json", "adapter_model.safetensors"}
    assert "model.safetensors" not in names
    assert not np.allclose(bare, st.encode(TEXTS), atol=1e-3)
    same(st, gircse.load(tmp_path / "adapted"))
    ours = GIRCSE.from_pretrained(tmp_path / "adapted")
    assert isinstance(ours.base, PeftModel)
    same(st, ours)
    st.disable_adapters()
    np.testing.assert_allclose(st.encode(TEXTS), bare, atol=1e-6, rtol=0)
    st.enable_adapters()
    st.delete_adapter("mine")
    np.testing.assert_allclose(st.encode(TEXTS), bare, atol=1e-6, rtol=0)
    st.save_pretrained(str(tmp_path / "adapted"))
    same(gircse.load(tmp_path / "adapted"), st)


@pytest.mark.usefixtures("add_adapter")
def test_merged_for_encoding(base_folder, tmp_path):
    st = gircse.load(base_folder, num_steps=3)
    st.add_adapter(LORA)
    expected = st.encode(TEXTS)
    weights = {name: p.clone() for name, p in st.named_parameters()}
    st[0].model.merge_adapter()
    np.testing.assert_allclose(st.encode(TEXTS), expected, atol=1e-5, rtol=0)
    st.save_pretrained(str(tmp_path / "adapted"))
    same(gircse.load(tmp_path / "adapted", merge_adapter=True), st)
    st.train()
    assert all((weights[name] == p).all() for name, p in st.named_parameters())


@pytest.mark.usefixtures("add_adapter")
def test_an_adapter_must_name_its_base(base_folder, tmp_path):
    in_memory = SentenceTransformer(modules=[GIRCSEModule(GIRCSE(tiny_model("llama"), tiny_tokenizer()))], device="cpu")
    in_memory.add_adapter(LORA)
    with pytest.raises(ValueError, match="built in memory and has no name or path.* set its name_or_path"):
        in_memory.save_pretrained(str(tmp_path / "lost"))
    in_memory.transformers_model.name_or_path = str(base_folder)  # the same weights
    in_memory.save_pretrained(str(tmp_path / "found"))
    same(in_memory, gircse.load(tmp_path / "found"))

    st = gircse.load(base_folder)
    st.add_adapter(LORA)
    with pytest.raises(ValueError, match="is the base model's own folder"):
        st.save_pretrained(str(base_folder))
    assert not (base_folder / "adapter_config.json").exists()


@pytest.mark.usefixtures("add_adapter", "modules_cache")
def test_modules_in_a_router(base_folder, tmp_path):
    """Two of ours, one with an adapter; by both readers, and what the plain one saves again."""
    adapted = gircse.load(base_folder, num_steps=3, device="cpu")
    adapted.add_adapter(LORA)
    other = GIRCSEModule(GIRCSE(tiny_model("llama", seed=1), tiny_tokenizer(), GircseConfig(num_steps=2)).eval())
    router = Router.for_query_document([adapted[0]], [other, Normalize()])
    st = SentenceTransformer(modules=[router, Normalize()], prompts={"query": "q: "}, device="cpu")

    def check(again, atol):
        for encode in ("encode_query", "encode_document"):
            ours, expected = (getattr(model, encode)(TEXTS, return_steps=True) for model in (again, st))
            np.testing.assert_allclose(ours, expected, atol=atol, rtol=0)

    st.save_pretrained(str(tmp_path / "saved"))
    for again in (gircse.load(tmp_path / "saved"), gircse.load(tmp_path / "saved", merge_adapter=True)):
        assert isinstance(again[0].sub_modules["query"][0], GIRCSEModule)
        check(again, 1e-5)
    plain = SentenceTransformer(str(tmp_path / "saved"), trust_remote_code=True, device="cpu")
    check(plain, 1e-5)
    plain.save_pretrained(str(tmp_path / "twice"))
    check(SentenceTransformer(str(tmp_path / "twice"), trust_remote_code=True, device="cpu"), 1e-5)
    check(gircse.load(tmp_path / "twice"), 1e-5)
    longer = gircse.load(tmp_path / "saved", num_steps=4, max_seq_length=90, instruction="Find it", dtype="float64")
    assert longer.encode_query(TEXTS, return_steps=True).shape == (3, 4, 32)
    assert (longer.max_seq_length, longer.prompts["query"]) == (90, "Instruct: Find it\nQuery:")
    assert {p.dtype for p in longer[0].sub_modules["document"].parameters()} == {torch.float64}
    trained = gircse.load(tmp_path / "saved", is_trainable=True)[0].sub_modules["query"]
    assert {name.split(".")[-3] for name, p in trained.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    with pytest.raises(ValueError, match="starts with .*Router, expected a GIRCSEModule"):
        gircse.load(tmp_path / "saved", adapter=tmp_path / "saved")
    SentenceTransformer(modules=[Router({"query": [StaticEmbedding(tiny_tokenizer(), embedding_dim=8)]})]).save(
        str(tmp_path / "stock")
    )
    with pytest.raises(ValueError, match="Router, expected a GIRCSEModule on one of its routes"):
        gircse.load(tmp_path / "stock")


@pytest.mark.usefixtures("modules_cache")
@pytest.mark.parametrize("instruction", [None, "Find it"])  # the cards of a symmetric model and of a search model
def test_the_cards_lines_work(base_folder, tmp_path, instruction):
    st = gircse.load(base_folder, instruction=instruction, device="cpu")
    names: dict = {"gircse": gircse}
    st.save_pretrained(str(tmp_path / "saved"))
    for folder in (tmp_path / "saved", tmp_path / "again"):
        card = (folder / "README.md").read_text(encoding="utf-8")
        (block,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
        block = block.replace("sentence_transformers_model_id", str(folder))
        (ours,) = re.findall(r"^# (model = gircse\.load\(.*\))$", block, flags=re.MULTILINE)
        for lines in (block, re.sub(r"^model = .*$", ours, block, flags=re.MULTILINE)):
            exec(lines, names)
            if instruction is None:
                np.testing.assert_allclose(names["embeddings"], st.encode(names["sentences"]), atol=1e-5, rtol=0)
            else:
                expected = st.encode_query(names["queries"])
                np.testing.assert_allclose(names["query_embeddings"], expected, atol=1e-5, rtol=0)
            assert isinstance(names["model"][0], GIRCSEModule) == (lines is not block)
        if folder.name == "saved":  # a card made by the plain file is the same
            SentenceTransformer(str(folder), trust_remote_code=True, device="cpu").save_pretrained(
                str(tmp_path / "again")
            )


def test_what_is_refused(base_folder, tmp_path):
    gircse.load(base_folder).save_pretrained(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        SentenceTransformer(str(tmp_path / "saved"))
    (tmp_path / "saved/modules.json").write_text(
        json.dumps([{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.Transformer"}])
    )
    with pytest.raises(ValueError, match=r"starts with .*Transformer, expected a GIRCSEModule"):
        gircse.load(tmp_path / "saved")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        gircse.load(tmp_path / "nothing" / "here")
    for options, words in (
        ({"backend": "onnx"}, "backend: got 'onnx'"),
        ({"model_kwargs": {"device_map": "auto"}}, "got device_map, expected dtype only"),
        ({"model_kwargs": {"attn_implementation": "eager"}}, "attn_implementation: got 'eager'"),
    ):
        with pytest.raises(ValueError, match=words):
            GIRCSEModule.load(str(base_folder), **options)
