"""Facts of an architecture are probed at load time; one that does not hold refuses the model."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from gircse import GIRCSE, GircseConfig, UnsupportedModelError
from gircse.lm.attention import ATTENTION_NAME, _attention_function
from gircse.lm.causal_lm import CausalLM
from tests.plain import plain_rollout
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


def test_a_head_and_a_table_of_different_vocabularies_are_refused():
    model = tiny_model("llama")
    model.set_input_embeddings(torch.nn.Embedding(140, 32))
    with pytest.raises(UnsupportedModelError, match="output head of 131 rows and an input embedding of 140"):
        GIRCSE(model, tiny_tokenizer())


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


def switched_in_one_layer(model):
    attention = model.model.layers[0].self_attn
    attention.config = copy.deepcopy(attention.config)
    attention.config._attn_implementation = "sdpa"


@pytest.mark.parametrize(
    ("switch", "message"),
    [
        (lambda model: model.set_attn_implementation("eager"), "got the attention implementation 'eager'"),
        (lambda model: model.set_attn_implementation("sdpa"), "got the attention implementation 'sdpa'"),
        (lambda model: model.model.set_attn_implementation("sdpa"), "got the attention implementation 'sdpa'"),
        (switched_in_one_layer, "1 of 2 layers called the attention function"),
        (lambda _: AttentionInterface.register(ATTENTION_NAME, sdpa_attention_forward), "0 of 2 layers called"),
    ],
)
@pytest.mark.parametrize("encoded", [False, True])
def test_an_attention_that_was_taken_away_is_refused_in_every_pass(switch, message, encoded):
    model = GIRCSE(tiny_model("llama"), tiny_tokenizer()).eval()
    ids = torch.randint(3, 131, (2, 7))
    expected = model.encode(["a text"])
    if not encoded:
        model._engine = None
    try:
        switch(model.base)
        with pytest.raises(ValueError, match=message):
            model.encode(["a text"])
        with pytest.raises(ValueError, match=message):
            model.rollout(ids, torch.ones_like(ids), 1)
    finally:
        AttentionInterface.register(ATTENTION_NAME, _attention_function)
    model.base.model.layers[0].self_attn.config = model.base.config
    model.base.set_attn_implementation(ATTENTION_NAME)
    assert np.array_equal(model.encode(["a text"]), expected)


@pytest.mark.parametrize(
    "switch",
    [
        lambda model: setattr(model.config, "use_cache", True),
        lambda model: setattr(model.config, "output_hidden_states", True),
        lambda model: setattr(model.config, "return_dict", False),
        lambda model: model.tie_weights(),
        lambda model: model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False}),
    ],
)
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_other_switches_change_no_embedding(switch):
    model = GIRCSE(tiny_model("llama"), tiny_tokenizer()).eval()
    expected = model.encode(["a text"])
    switch(model.base)
    assert np.array_equal(model.encode(["a text"]), expected)


ROTARY = {
    "default": {},
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "proportional": {"factor": 4.0, "partial_rotary_factor": 0.5},
    "dynamic": {"factor": 4.0},
    "longrope": {
        "short_factor": [1.0] * 4,
        "long_factor": [4.0, 6.0, 8.0, 9.0],
        "original_max_position_embeddings": 16,
    },
}


def rotary_model(kind):
    torch.manual_seed(0)
    parameters = {"rope_type": kind, "rope_theta": 1e4, **ROTARY[kind]}
    common = {**_COMMON, "max_position_embeddings": 32}
    if kind == "longrope":
        common["original_max_position_embeddings"] = 16
    config = AutoConfig.for_model("phi3" if kind == "longrope" else "llama", **common, rope_parameters=parameters)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def test_every_rotary_type_of_transformers_is_looked_at():
    assert set(ROPE_INIT_FUNCTIONS) <= set(ROTARY)


@torch.no_grad()
@pytest.mark.parametrize("kind", ROTARY)
def test_rows_do_not_change_each_other_through_rotary_frequencies(kind):
    """Up to the last position that is allowed, and after a longer call of somebody else's: the row alone, uncached."""
    if kind not in ROPE_INIT_FUNCTIONS and kind != "default":
        pytest.skip(f"this version of transformers has no {kind!r}")
    stock, model = rotary_model(kind), GIRCSE(rotary_model(kind), tiny_tokenizer()).eval()
    limit, steps = model.causal_lm.max_positions, 3
    assert limit == {"longrope": 16, "dynamic": 31}.get(kind, 32)
    model.base(torch.randint(3, 131, (1, 40)))
    ids = torch.randint(3, 131, (2, limit - steps))
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    got = model.rollout(ids, mask, steps)
    rows = [row[keep.bool()] for row, keep in zip(ids, mask, strict=True)]
    for states, row in zip(got, rows, strict=True):
        expected = plain_rollout(stock, row, steps)[1]
        assert (states - expected).norm() <= 1e-5 * expected.norm()
    with model.inference() as engine:
        torch.testing.assert_close(engine.states([row.tolist() for row in rows], steps), got, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=f"expected at most {limit} positions together"):
        model.rollout(torch.ones(1, limit, dtype=torch.long), torch.ones(1, limit, dtype=torch.long), steps)
    with pytest.warns(UserWarning, match=f"longer than max_length={limit - steps} tokens"):
        model.encode(["x" * 50], num_steps=steps)


def test_frequencies_that_follow_the_longest_row_are_refused_whatever_their_name(monkeypatch):
    monkeypatch.setattr("gircse.lm.causal_lm.position_limit", lambda config: config.max_position_embeddings)
    with pytest.raises(UnsupportedModelError, match="probe of a text beside a long one"):
        GIRCSE(rotary_model("longrope"), tiny_tokenizer())


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["q_proj", "lm_head", "embed_tokens"]])
def test_lora_put_on_head_or_table_after_wrapping_is_spoken_with(targets):
    """States, embeddings and gradients of the plain method; the soft tokens of before would be off by 10% and more."""
    model = GIRCSE(tiny_model("llama", dtype=torch.float64), tiny_tokenizer())
    model.base.get_input_embeddings().padding_idx = None  # the layer's own gradient leaves it out
    ids = torch.randint(3, 131, (1, 7))
    before = model.rollout(ids, torch.ones_like(ids), 3)
    torch.manual_seed(5)
    model.base.add_adapter(LoraConfig(r=4, lora_alpha=16, init_lora_weights=False, target_modules=targets))
    model.base.double()
    lora = [parameter for parameter in model.parameters() if parameter.requires_grad]
    got = model.rollout(ids, torch.ones_like(ids), 3)[0]

    head, table = model.base.get_output_embeddings(), model.base.get_input_embeddings()(torch.arange(131))
    model.base.set_attn_implementation("eager")
    sequence, states = table[ids], []
    for _ in range(4):
        states.append(model.base.model(inputs_embeds=sequence).last_hidden_state[:, -1])
        sequence = torch.cat([sequence, (head(states[-1]).softmax(-1) @ table)[:, None]], dim=1)
    expected = torch.cat(states[1:])
    model.base.set_attn_implementation(ATTENTION_NAME)

    assert (before[0] - expected).norm() > 0.05 * expected.norm()
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    upstream = torch.randn_like(got)
    gradients = [torch.autograd.grad(states, lora, upstream) for states in (got, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    with model.eval().inference() as engine:
        torch.testing.assert_close(engine.states(ids.tolist(), 3)[0], got, rtol=1e-6, atol=1e-6)


def test_the_forward_compiles_into_one_graph():
    torch._dynamo.reset()
    model = GIRCSE(tiny_model("gemma3", num_hidden_layers=1), tiny_tokenizer(), GircseConfig(num_steps=1)).eval()
    ids = torch.randint(3, 131, (2, 7))
    expected, embeddings = model(ids, torch.ones_like(ids)), model.encode(["a text"])
    model.compile(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(model(ids, torch.ones_like(ids)), expected)
    assert np.array_equal(model.encode(["a text"]), embeddings)


def test_the_text_model_of_a_model_of_text_and_images():
    """The same as that text model alone, windows and scales included."""
    text = {**_COMMON, "head_dim": 8, "sliding_window": 5, "layer_types": ["full_attention", "sliding_attention"]}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    torch.manual_seed(0)
    whole = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision)).eval()
    alone = AutoModelForCausalLM.from_config(whole.config.text_config).eval()
    alone.model.load_state_dict(whole.model.language_model.state_dict())
    ours, expected = (GIRCSE(model, tiny_tokenizer()).eval() for model in (whole, alone))
    assert np.array_equal(ours.encode(["a text", "b"]), expected.encode(["a text", "b"]))
    whole.model.language_model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="got the attention implementation 'sdpa'"):
        ours.encode("b")
