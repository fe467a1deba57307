"""Facts of an architecture are probed at load time; one that does not hold refuses the model."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from gircse import GIRCSE, UnsupportedModelError
from gircse.architecture import CausalLM
from tests.tiny_models import _COMMON, CONFIGS, definition, tiny_model, tiny_tokenizer


@pytest.mark.parametrize("name", CONFIGS)
def test_facts_give_the_models_own_soft_token(name):
    model = tiny_model(name, dtype=torch.float64)
    lm = CausalLM.from_model(model)
    ids = torch.tensor([[3, 17, 99]])
    hidden = lm.body(input_ids=ids).last_hidden_state[0, -1]
    probs = model(input_ids=ids).logits[0, -1].softmax(-1)
    expected = probs @ model.get_input_embeddings()(torch.arange(model.config.vocab_size))
    torch.testing.assert_close(lm.soft_embed(hidden), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_architecture_passes_in_every_dtype(name, dtype):
    model = GIRCSE(tiny_model(name).to(dtype), tiny_tokenizer())
    ids = torch.tensor([[3, 17, 99]])
    steps = model.rollout(ids, torch.ones_like(ids), 2)
    assert steps.dtype == dtype
    assert steps.isfinite().all()


@pytest.mark.parametrize(
    ("kind", "extra", "fact", "value"),
    [
        ("cohere", {"logit_scale": 0.25}, "logit_scale", 0.25),
        ("granite", {"logits_scaling": 4.0, "embedding_multiplier": 3.0}, "logit_scale", 0.25),
        ("gemma2", {"head_dim": 8, "final_logit_softcapping": 2.0}, "softcap", 2.0),
    ],
)
def test_scales_and_caps_of_the_config_are_read(kind, extra, fact, value):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **_COMMON, **extra)).eval()
    assert getattr(CausalLM.from_model(model).facts(), fact) == value


def test_a_head_bias_is_part_of_the_logits():
    torch.manual_seed(0)
    config = AutoConfig.for_model("phi", **{k: v for k, v in _COMMON.items() if k != "num_key_value_heads"})
    model = AutoModelForCausalLM.from_config(config).eval()
    torch.nn.init.normal_(model.lm_head.bias)
    lm = CausalLM.from_model(model)
    assert lm.head_options()["bias"] is model.lm_head.bias


def test_a_wrong_embedding_scale_is_refused():
    model = tiny_model("gemma3")
    layer = model.get_input_embeddings()
    forward = layer.forward
    layer.forward = lambda ids: 2 * forward(ids)
    with pytest.raises(UnsupportedModelError, match=r"gemma3.*embed_scale"):
        GIRCSE(model, tiny_tokenizer())


def test_a_layer_between_body_and_head_is_refused():
    model = tiny_model("llama")
    head = model.lm_head
    forward = head.forward
    head.forward = lambda hidden: forward(hidden) + 1
    with pytest.raises(UnsupportedModelError, match="head_weight"):
        GIRCSE(model, tiny_tokenizer())
    del head.forward
    forward_of_model = model.forward

    def changed(*args, **kwargs):
        output = forward_of_model(*args, **kwargs)
        output.logits = output.logits * 1.5
        return output

    model.forward = changed
    with pytest.raises(UnsupportedModelError, match="head_weight"):
        GIRCSE(model, tiny_tokenizer())


def test_a_model_without_attention_interface_is_refused():
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "mamba", vocab_size=131, hidden_size=32, num_hidden_layers=2, state_size=8, pad_token_id=0, eos_token_id=0
    )
    with pytest.raises(UnsupportedModelError, match="mamba"):
        GIRCSE(AutoModelForCausalLM.from_config(config).eval(), tiny_tokenizer())


def test_a_model_without_head_is_refused():
    with pytest.raises(UnsupportedModelError, match="head"):
        GIRCSE(tiny_model("llama").model, tiny_tokenizer())


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gemma3", "gpt2"])
def test_ordinary_calls_keep_working(name):
    """Padding and sliding windows still hold when somebody calls the model as usual."""
    stock, ours = tiny_model(name, attn=definition(name)), tiny_model(name)
    GIRCSE(ours, tiny_tokenizer())
    ids = torch.randint(3, 131, (2, 11))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    expected = stock(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    got = ours(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)
    generated = ours.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    assert torch.equal(generated, stock.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False))
