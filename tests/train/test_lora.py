"""The model of a training run: fresh or saved adapters, in float32, on layers that are there."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig

from gircse import GIRCSE
from gircse.data.rows import Row
from gircse.lm.lora import unfuse_lora
from gircse.train import train
from gircse.train.batches import TrainingData
from gircse.train.config import TrainConfig
from gircse.train.lora import lora_targets, trainable_model
from gircse.train.plan.predict import plan
from gircse.train.run_config import LORA_TARGETS
from gircse.train.step import RowTokenizer, contrastive_backward, tokenize_rows
from gircse.train.update import adamw, clipped_step
from tests.tiny_models import tiny_model, tiny_tokenizer

WORDS = ["red", "blue", "fox", "dog"]
ROWS = [Row("find the echo", f"{a} {b}", (f"{b} {a}",)) for a in WORDS for b in WORDS if a != b]


def config(base, tmp_path, **options) -> TrainConfig:
    defaults = {"model": str(base), "output": str(tmp_path / "run"), "batch_size": 4, "num_steps": 3, "max_steps": 2}
    return TrainConfig(**{**defaults, "learning_rate": 3e-3, "progress": False, **options})


def lora_parameters(settings: TrainConfig) -> int:
    return plan(settings, gpu="h100", length=16).memory["LoRA weights"]


def test_it_goes_on_from_a_saved_adapter(base, tmp_path):
    """On the base that the adapter names, with its own rank; the first step is where the last run ended."""
    first = train(config(base, tmp_path, lora_r=3, lora_dropout=0.0), rows=ROWS)
    settings = config(base, tmp_path, model="", adapter=str(first.folder), output=str(tmp_path / "more"))
    more = train(settings, rows=ROWS)
    model, losses = GIRCSE.from_pretrained(first.folder, is_trainable=True), []
    for adapted in (model, first.model):
        examples = TrainingData.open(settings, rows=ROWS).batch(0)
        rows = tokenize_rows(RowTokenizer(adapted, settings, 3), examples, settings)
        losses.append(contrastive_backward(adapted, rows, settings, num_steps=3)[1].tolist())
    np.testing.assert_allclose(losses, [more.log[0]["losses"]] * 2, rtol=1e-5)
    shapes = {parameter.shape[0] for name, parameter in more.model.named_parameters() if "lora_A" in name}
    assert shapes == {3}
    assert not np.allclose(more.model.encode("red"), first.model.encode("red"), atol=1e-4)
    assert np.array_equal(GIRCSE.from_pretrained(more.folder).encode("red"), more.model.encode("red"))
    planned = [lora_parameters(replace(settings, model=str(base), **options)) for options in ({}, {"adapter": None})]
    assert planned == [planned[1] * 3 // 16, planned[1]]
    assert planned[0] == sum(p.nbytes for p in more.model.parameters() if p.requires_grad)
    with pytest.raises(ValueError, match="with an adapter on it, .* to train an adapter further, name its folder as"):
        train(replace(settings, model=str(first.folder), adapter=None, output=str(tmp_path / "x")), rows=ROWS)
    with pytest.raises(ValueError, match="model: got none, expected a folder, a hub name or a model in memory"):
        trainable_model(config("", tmp_path))  # transformers would read the current folder
    with pytest.raises(ValueError, match="lora_r: got 3, expected no value beside `adapter`, which has its own"):
        replace(settings, lora_r=3)


def test_a_frozen_adapter_is_not_trained_in_vain(base, tmp_path):
    folder = train(config(base, tmp_path, max_steps=1), rows=ROWS).folder
    ids = torch.tensor([[5, 6, 7]])
    frozen = GIRCSE.from_pretrained(folder)
    assert not frozen.rollout(ids, torch.ones_like(ids)).requires_grad
    frozen.train()
    with pytest.raises(
        ValueError, match=r"model: got frozen weights only, .* from_pretrained\(folder, is_trainable=True"
    ):
        frozen.rollout(ids, torch.ones_like(ids))
    with torch.no_grad():
        frozen.rollout(ids, torch.ones_like(ids))
    model = GIRCSE.from_pretrained(folder, is_trainable=True).train()
    model.rollout(ids, torch.ones_like(ids)).sum().backward()
    assert {name.rsplit(".", 3)[-3] for name, p in model.named_parameters() if p.grad is not None} == {
        "lora_A",
        "lora_B",
    }
    assert not any(p.requires_grad for name, p in model.named_parameters() if "lora_" not in name)


def test_adapters_of_a_half_precision_base_train_in_float32(base):
    """Added by transformers, which leaves them in the base's dtype; at this rate most of them would not move there."""
    model = GIRCSE.from_pretrained(base, dtype="bfloat16")
    adapter = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model.base.add_adapter(adapter)
    weights = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert {p.dtype for p in weights.values()} == {torch.bfloat16}
    optimizer = torch.optim.AdamW(weights.values(), lr=1e-5, weight_decay=0.0)
    model.train()
    assert {p.dtype for p in weights.values()} == {torch.float32}
    assert model.base.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    before = {name: p.detach().clone() for name, p in weights.items()}
    ids = torch.tensor([[5, 6, 7]])
    model.rollout(ids, torch.ones_like(ids)).float().sum().backward()
    optimizer.step()
    for name, parameter in weights.items():
        assert (parameter != before[name])[parameter.grad != 0].float().mean() > 0.99
    assert np.isfinite(model.encode(["red"])).all()


def test_a_step_has_the_gradients_of_pefts_layers():
    """In float64, divided into micro-batches, with checkpointing, by the block and with the exact gradient; the second
    step reads the weights that the optimizer of a run has changed."""
    settings = TrainConfig(
        model="", batch_size=4, num_steps=3, lora_dropout=0.0, gradient_checkpointing=True, micro_batch_tokens=80
    )

    def steps(fused: bool) -> list[list[torch.Tensor]]:
        torch.manual_seed(0)
        model = trainable_model(settings, GIRCSE(tiny_model("qwen2", dtype=torch.float64), tiny_tokenizer())).train()
        weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in weights:  # B starts at zero, which gives A no gradient
            torch.nn.init.normal_(parameter, std=0.1)
        if not fused:
            unfuse_lora(model.base)
        optimizer = adamw(weights, learning_rate=0.1, weight_decay=0.0)
        tokenizer, results = RowTokenizer(model, settings, 3), []
        for num_steps, factor in ((3, 0.0), (2, 1.0)):
            rows = tokenize_rows(tokenizer, TrainingData.open(settings, rows=ROWS).batch(0), settings)
            loss, losses, passes = contrastive_backward(
                model, rows, settings, num_steps=num_steps, soft_token_gradient=factor
            )
            assert passes > 1
            results.append([losses, *(parameter.grad.clone() for parameter in weights)])
            clipped_step(optimizer, weights, loss, 1e3)
            optimizer.zero_grad()
        return results

    for ours, theirs in zip(steps(True), steps(False), strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
            assert b.any()


def test_a_head_that_no_step_gives_a_gradient_is_not_trained_in_vain():
    settings = TrainConfig(num_steps=2, lora_targets=("q_proj", "lm_head"))
    with pytest.raises(ValueError, match="soft_token_gradient: got 0 and an adapter on the model's head"):
        trainable_model(settings, GIRCSE(tiny_model("llama"), tiny_tokenizer()))
    some = replace(settings, soft_token_gradient="0:0.5@1")
    assert trainable_model(some, GIRCSE(tiny_model("llama"), tiny_tokenizer())) is not None


def test_adapted_layers_are_asked_for_by_names_that_exist(base):
    model = tiny_model("llama")
    assert lora_targets(model) == list(LORA_TARGETS)
    assert lora_targets(model, ("q_proj", "self_attn.v_proj")) == ["q_proj", "self_attn.v_proj"]
    with pytest.raises(ValueError, match="lora_targets: the model has no layer named k_porj, proj$"):
        lora_targets(model, ("q_proj", "k_porj", "proj"))
    with pytest.raises(ValueError, match="lora_targets: norm is a LlamaRMSNorm, expected linear layers"):
        lora_targets(model, ("norm",))
    with pytest.raises(ValueError, match="lora_targets: mlp is a LlamaMLP, expected linear layers"):
        lora_targets(model, ("q_proj", "mlp"))


def test_models_with_other_layer_names_adapt_all_linear_layers():
    adapted = trainable_model(TrainConfig(num_steps=2), GIRCSE(tiny_model("gpt2"), tiny_tokenizer()))
    names = {n.split(".lora_A")[0].rsplit(".", 1)[-1] for n, _ in adapted.named_parameters() if "lora_A" in n}
    assert names == {"c_attn", "c_proj", "c_fc"}
