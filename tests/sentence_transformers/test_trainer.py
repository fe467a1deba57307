"""`SentenceTransformerTrainer` with both losses: LoRA by `add_adapter`, checkpoints, resuming, the saved adapter."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

pytest.importorskip("sentence_transformers")
pytest.importorskip("datasets")
pytest.importorskip("accelerate")
from datasets import Dataset
from peft import LoraConfig
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)

import gircse
from gircse.sentence_transformers import CachedGIRCSELoss, GIRCSELoss

WORDS = ["red", "green", "blue", "white", "black", "brown", "pink", "grey"]
TEXTS = ["what is red", "a red thing", "x"]
NAMES = {field.name for field in dataclasses.fields(SentenceTransformerTrainingArguments)}
CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in NAMES else "gradient_checkpointing"


def rows() -> Dataset:
    return Dataset.from_dict(
        {
            "anchor": [f"what is {word}" for word in WORDS],
            "positive": [f"a {word} thing" for word in WORDS],
            "negative": [f"not {word}" for word in WORDS],
        }
    )


def trainer(st, loss, folder, rate=1e-2, **options) -> SentenceTransformerTrainer:
    arguments = SentenceTransformerTrainingArguments(
        str(folder),
        per_device_train_batch_size=4,
        learning_rate=rate,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        prompts={"anchor": st[0].format_prompt("Find it")},
        **options,
    )
    return SentenceTransformerTrainer(st, arguments, train_dataset=rows(), eval_dataset=rows(), loss=loss)


def adapted(base_folder) -> SentenceTransformer:
    st = gircse.load(base_folder, num_steps=3, device="cpu")
    st.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.05))
    return st


@pytest.mark.usefixtures("add_adapter")
@pytest.mark.parametrize(
    ("kind", "options", "checkpointing"),
    [(GIRCSELoss, {}, True), (CachedGIRCSELoss, {"mini_batch_size": 3}, False)],
)
def test_training(base_folder, tmp_path, kind, options, checkpointing):
    st = adapted(base_folder)
    before = {name: p.clone() for name, p in st.named_parameters()}
    untrained = st.encode(TEXTS)
    work = trainer(st, kind(st, **options), tmp_path / "run", max_steps=8, **{CHECKPOINTING: checkpointing})
    first = work.evaluate()["eval_loss"]
    work.train()
    assert work.evaluate()["eval_loss"] < first
    assert all(np.isfinite([entry["loss"] for entry in work.state.log_history if "loss" in entry]))
    changed = {name for name, p in st.named_parameters() if not (before[name] == p).all()}
    assert changed == {name for name in before if "lora_" in name}

    st.save_pretrained(str(tmp_path / "final"))
    trained = st.encode(TEXTS)
    assert not np.allclose(trained, untrained, atol=1e-3)
    for again in (
        gircse.load(tmp_path / "final"),
        gircse.GIRCSE.from_pretrained(tmp_path / "final"),
        gircse.load(tmp_path / "run/checkpoint-8"),
    ):
        np.testing.assert_allclose(again.encode(TEXTS), trained, atol=1e-6, rtol=0)
    assert kind.__name__ in (tmp_path / "final/README.md").read_text()  # the model card


@pytest.mark.usefixtures("add_adapter")
def test_resuming(base_folder, tmp_path):
    st = adapted(base_folder)
    work = trainer(st, GIRCSELoss(st), tmp_path / "run", max_steps=4)
    work.train()
    expected = st.encode(TEXTS)
    other = adapted(base_folder)
    work = trainer(other, GIRCSELoss(other), tmp_path / "run", max_steps=4)
    work.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    np.testing.assert_allclose(other.encode(TEXTS), expected, atol=1e-5, rtol=0)


@pytest.mark.usefixtures("add_adapter")
def test_a_saved_adapter_goes_on_training(base_folder, tmp_path):
    adapted(base_folder).save_pretrained(str(tmp_path / "first"))
    frozen = gircse.load(tmp_path / "first")
    for kind in (GIRCSELoss, CachedGIRCSELoss):
        with pytest.raises(ValueError, match=r"model: got frozen weights only, .* is_trainable=True"):
            trainer(frozen, kind(frozen), tmp_path / "run", max_steps=1).train()
    for kind in (GIRCSELoss, CachedGIRCSELoss):
        st = gircse.load(tmp_path / "first", is_trainable=True)
        before = {name: p.clone() for name, p in st.named_parameters()}
        trainer(st, kind(st), tmp_path / "run", max_steps=1).train()
        changed = {name for name, p in st.named_parameters() if not (before[name] == p).all()}
        assert changed == {name for name in before if "lora_B" in name}  # lora_A gets its gradient through lora_B = 0
    with pytest.raises(ValueError, match="is_trainable: got True with merge_adapter=True"):
        gircse.load(tmp_path / "first", is_trainable=True, merge_adapter=True)


@pytest.mark.usefixtures("add_adapter")
def test_in_bfloat16(base_folder, tmp_path):
    """Adapter weights are float32, so a learning rate of the docs moves them; and after the trainer's autocast the
    model encodes and is evaluated without one."""
    st = gircse.load(base_folder, num_steps=2, dtype="bfloat16")
    st.encode(TEXTS)
    st.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    before = {name: p.clone() for name, p in st.named_parameters() if "lora_" in name}
    work = trainer(st, CachedGIRCSELoss(st, mini_batch_size=4), tmp_path / "run", max_steps=2, bf16=True, rate=1e-5)
    work.train()
    for name, p in st.named_parameters():
        assert p.dtype == (torch.float32 if name in before else torch.bfloat16), name
        if name in before:
            assert float((p != before[name]).float().mean()) > 0.9, name
    assert np.isfinite(work.evaluate()["eval_loss"])
    trained = st.encode(TEXTS)
    st.save_pretrained(str(tmp_path / "final"))
    np.testing.assert_allclose(gircse.load(tmp_path / "final").encode(TEXTS), trained, atol=1e-2, rtol=0)


@pytest.mark.usefixtures("add_adapter")
def test_under_bf16_of_the_trainer_float32_weights_encode_as_before(base_folder, tmp_path):
    st = adapted(base_folder)
    work = trainer(st, GIRCSELoss(st), tmp_path / "run", max_steps=1, bf16=True)
    work.train()
    trained = st.encode(TEXTS)
    assert np.isfinite(work.evaluate()["eval_loss"])
    st.save_pretrained(str(tmp_path / "final"))
    again = gircse.load(tmp_path / "final")  # never under autocast
    np.testing.assert_allclose(st.encode(TEXTS), trained, atol=1e-6, rtol=0)
    np.testing.assert_allclose(again.encode(TEXTS), trained, atol=1e-5, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        np.testing.assert_allclose(st.encode(TEXTS), trained, atol=1e-5, rtol=0)
    np.testing.assert_allclose(st.encode(TEXTS), trained, atol=1e-6, rtol=0)


def test_a_label_column_is_refused(base_folder, tmp_path):
    st = gircse.load(base_folder, num_steps=2)
    work = trainer(st, GIRCSELoss(st), tmp_path / "run", max_steps=1)
    work.train_dataset = rows().add_column("label", [1] * len(WORDS))
    with pytest.raises(ValueError, match="labels: got 4 of them, expected none"):
        work.train()
    work.train_dataset = rows().add_column("id", list(range(len(WORDS))))
    with pytest.raises(TypeError, match="got int, expected str.* remove others, such as ids"):
        work.train()
