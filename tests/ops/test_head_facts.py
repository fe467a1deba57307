"""The facts behind soft tokens are those of the model as it is now: adapters, other tables, other kinds of model."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers
from peft import LoraConfig, TrainableTokensConfig, get_peft_model
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LongT5Config,
    LongT5ForConditionalGeneration,
    M2M100Config,
    M2M100ForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    MT5Config,
    MT5ForConditionalGeneration,
    MvpConfig,
    MvpForConditionalGeneration,
    PegasusConfig,
    PegasusForConditionalGeneration,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from gircse.ops import from_model
from gircse.ops.head_facts import HeadFacts
from tests.tiny_models import _COMMON, VOCAB, tiny_model

_T5 = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 1,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
_BART = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "scale_embedding": True,
    "init_std": 0.3,
}
_VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
_ENCODER_DECODERS = {
    "t5": lambda: T5ForConditionalGeneration(T5Config(**_T5)),
    "t5-untied": lambda: T5ForConditionalGeneration(T5Config(**_T5, tie_word_embeddings=False)),
    "mt5": lambda: MT5ForConditionalGeneration(MT5Config(**_T5, tie_word_embeddings=True)),
    "umt5": lambda: UMT5ForConditionalGeneration(UMT5Config(**_T5, tie_word_embeddings=True)),
    "longt5": lambda: LongT5ForConditionalGeneration(LongT5Config(**_T5)),
    "switch": lambda: SwitchTransformersForConditionalGeneration(SwitchTransformersConfig(**_T5, num_experts=2)),
    "marian": lambda: MarianMTModel(MarianConfig(**_BART)),
    "m2m100": lambda: M2M100ForConditionalGeneration(M2M100Config(**_BART)),
    "pegasus": lambda: PegasusForConditionalGeneration(PegasusConfig(**_BART)),
    "whisper": lambda: WhisperForConditionalGeneration(
        WhisperConfig(**_BART, max_target_positions=64, num_mel_bins=8, max_source_positions=16)
    ),
}


def adapted(model, **options):
    """A LoRA that changes something, put into the model that is handed in."""
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's advice about tied layers
        get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, **options))
    return model


def expected_token(model, hidden):
    """softmax of the model's own head, times what its own embedding layer gives for every token."""
    logits, table = model.get_output_embeddings()(hidden), model.get_input_embeddings()(torch.arange(VOCAB))
    return logits.softmax(-1) @ table


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma3"])
@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]])
def test_lora_put_on_head_or_table_later_counts_with_its_gradients(name, targets):
    model, hidden = tiny_model(name, dtype=torch.float64), torch.randn(5, 32, dtype=torch.float64)
    model.get_input_embeddings().padding_idx = None  # the layer's own gradient leaves it out
    soft = from_model(model)
    before = soft(hidden)
    adapted(model, target_modules=targets)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    got, expected = soft(hidden), expected_token(model, hidden)
    assert (before - expected).norm() > 0.05 * expected.norm()
    torch.testing.assert_close(got, expected)
    upstream = torch.randn_like(got)
    gradients = [torch.autograd.grad(result, trained, upstream) for result in (got, expected)]
    assert all(gradient.norm() > 0 for gradient in gradients[1])
    torch.testing.assert_close(*gradients)
    assert isinstance(from_model(model)(hidden), torch.Tensor)  # the probe holds as well


def test_switched_off_merged_and_taken_away_adapters_do_not_count():
    model, hidden = tiny_model("llama"), torch.randn(5, 32)
    soft, plain = from_model(model), expected_token(model, hidden)
    peft = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, target_modules=["lm_head", "embed_tokens"]))
    with_adapter = soft(hidden)
    with peft.disable_adapter():
        torch.testing.assert_close(soft(hidden), plain)
    peft.merge_adapter()
    torch.testing.assert_close(soft(hidden), with_adapter, rtol=1e-4, atol=1e-6)
    peft.unload()
    torch.testing.assert_close(soft(hidden), expected_token(model, hidden), rtol=1e-4, atol=1e-6)


def test_a_trained_copy_of_the_head_counts():
    model, hidden = tiny_model("llama"), torch.randn(5, 32)
    soft = from_model(model)
    adapted(model, target_modules=["q_proj"], modules_to_save=["lm_head"])
    copy = model.lm_head.modules_to_save["default"]
    with torch.no_grad():
        copy.weight.mul_(1.5)
    torch.testing.assert_close(soft(hidden), expected_token(model, hidden))
    assert soft.facts.head_weight is copy.weight


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
@pytest.mark.parametrize("targets", [None, ["q_proj"], ["lm_head"]], ids=["alone", "beside LoRA", "below LoRA"])
def test_trained_tokens_count_with_their_gradients(name, targets):
    model, hidden = tiny_model(name, dtype=torch.float64), torch.randn(5, 32, dtype=torch.float64)
    soft = from_model(model)
    before = soft(hidden)
    if targets is None:
        config = TrainableTokensConfig(token_indices=[3, 40])
    else:
        config = LoraConfig(r=4, init_lora_weights=False, target_modules=targets, trainable_token_indices=[3, 40])
    peft = get_peft_model(model, config)
    trained = [parameter for key, parameter in model.named_parameters() if "trainable_tokens_delta" in key]
    with torch.no_grad():
        trained[0].normal_()
    got, expected = soft(hidden), expected_token(model, hidden)
    assert (before - expected).norm() > 1e-3 * expected.norm()
    torch.testing.assert_close(got, expected)
    upstream = torch.randn_like(got)
    torch.testing.assert_close(*(torch.autograd.grad(result, trained[0], upstream) for result in (got, expected)))
    with peft.disable_adapter():
        torch.testing.assert_close(soft(hidden), before)


def test_what_no_weight_says_is_refused_at_the_next_call():
    model, hidden = tiny_model("llama"), torch.randn(5, 32)
    soft = from_model(model)
    adapted(model, target_modules=["lm_head"], use_dora=True)
    with pytest.raises(ValueError, match=r"model: an adapter changes the output head of .*DoraLinearVariant"):
        soft(hidden)


def test_a_quantised_head_is_refused_with_the_way_out():
    model = tiny_model("llama")
    kind = type("Packed", (torch.nn.Parameter,), {"__module__": "torchao.quantization"})
    model.lm_head.weight = kind(model.lm_head.weight.detach())
    with pytest.raises(ValueError, match=r"output head of .* is a quantised Packed of torchao, .*modules_to_not_conv"):
        from_model(model)


def test_another_table_and_another_size_count_from_the_next_call_on():
    model, hidden = tiny_model("llama"), torch.randn(5, 32)
    soft = from_model(model)
    model.set_input_embeddings(torch.nn.Embedding(VOCAB, 32))
    torch.testing.assert_close(soft(hidden), expected_token(model, hidden))
    model.resize_token_embeddings(VOCAB + 5, mean_resizing=False)
    assert soft.facts.head_weight.shape == soft.facts.embed_weight.shape == (VOCAB + 5, 32)
    soft(hidden)


def test_head_and_table_of_different_vocabularies_are_refused():
    model = tiny_model("llama")
    model.set_input_embeddings(torch.nn.Embedding(VOCAB + 1, 32))
    with pytest.raises(ValueError, match=f"output head of {VOCAB} rows and an input embedding of {VOCAB + 1}"):
        from_model(model)


def test_the_scale_is_that_of_the_dtype_it_is_used_in():
    """Gemma's buffer keeps the number it was rounded to: 5.65625 in bfloat16, also when the model is cast back."""
    model = tiny_model("gemma3")
    soft = from_model(model)
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        model.to(dtype)
        layer, weight = model.get_input_embeddings(), model.get_input_embeddings().weight
        expected = float(layer(torch.tensor([7]))[0, 0] / weight[7, 0])
        assert soft.facts.embed_scale == pytest.approx(expected, rel=1e-6 if dtype == torch.float32 else 1e-2)


@torch.no_grad()
@pytest.mark.parametrize("name", _ENCODER_DECODERS)
def test_the_decoder_of_an_encoder_decoder(name):
    """A tied T5 scales its hidden states by d^-1/2 (without: relative error 2.95), Marian adds a bias of its own."""
    torch.manual_seed(0)
    model = _ENCODER_DECODERS[name]().eval()
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_()
    soft = from_model(model)
    ids = torch.tensor([[5, 90, 17, 44]])
    inputs = {"encoder_outputs": (torch.randn(1, 3, 32),)} if name == "whisper" else {"input_ids": ids}
    output = model(**inputs, decoder_input_ids=ids, output_hidden_states=True)
    expected = output.logits.softmax(-1) @ model.get_input_embeddings()(torch.arange(VOCAB))
    got = soft(output.decoder_hidden_states[-1])
    assert (got - expected).norm() <= 1e-5 * expected.norm()


def test_encoder_decoders_that_cannot_be_told_are_refused():
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"the probe of embed_scale in the decoder failed on Mvp"):
        from_model(MvpForConditionalGeneration(MvpConfig(**_BART)).eval())
    untied = SwitchTransformersConfig(**_T5, num_experts=2, tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"the probe of embed_scale in the decoder failed on Switch"):
        from_model(SwitchTransformersForConditionalGeneration(untied).eval())  # its decoder has a table of its own


@torch.no_grad()
def test_the_text_model_of_a_model_of_text_and_images():
    torch.manual_seed(0)
    text = {**_COMMON, "head_dim": 8}
    if not hasattr(transformers, "Gemma4Config"):
        pytest.skip("this version of transformers has no Gemma 4")
    model = transformers.Gemma4ForConditionalGeneration(
        transformers.Gemma4Config(
            text_config={**text, "final_logit_softcapping": 2.0, "hidden_size_per_layer_input": 0},
            vision_config=_VISION,
        )
    ).eval()
    for probe in (True, False):
        soft = from_model(model, probe=probe)
        assert soft.facts.softcap == 2.0
        ids = torch.tensor([[5, 90, 17]])
        hidden = model.base_model(input_ids=ids).last_hidden_state
        table = model.get_input_embeddings()(torch.arange(VOCAB))
        torch.testing.assert_close(soft(hidden), model(input_ids=ids).logits.softmax(-1) @ table, rtol=1e-4, atol=1e-5)
    vision = {**_VISION, "image_size": 28, "patch_size": 14}
    model = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision)).eval()
    assert from_model(model).facts.embed_scale == pytest.approx(32**0.5)


def test_a_bias_is_added_to_the_models_own_and_bans_tokens():
    model, hidden = tiny_model("llama"), torch.randn(4, 32)
    head, table = model.get_output_embeddings(), model.get_input_embeddings().weight
    head.bias = torch.nn.Parameter(torch.randn(VOCAB))
    soft = from_model(model)
    bias = torch.randn(VOCAB)
    bias[: VOCAB // 2] = -torch.inf
    expected = (head(hidden) + bias).softmax(-1)
    assert (expected[:, : VOCAB // 2] == 0).all()
    torch.testing.assert_close(soft(hidden, bias=bias), expected @ table)
    del head.bias
    head.bias = None
    torch.testing.assert_close(soft(hidden, bias=bias), (head(hidden) + bias).softmax(-1) @ table)


def test_a_ban_that_a_soft_cap_would_lift_is_refused():
    soft, hidden = from_model(tiny_model("gemma2", attn="eager")), torch.randn(4, 32)
    bias = torch.zeros(VOCAB)
    torch.testing.assert_close(soft(hidden, bias=bias), soft(hidden))
    bias[3] = -torch.inf
    with pytest.raises(ValueError, match="bias: got -inf, which the model's soft-cap of 2.0 would lift"):
        soft(hidden, bias=bias)


@pytest.mark.parametrize("mixed", [False, True])
def test_a_peft_model(mixed):
    model, hidden = tiny_model("llama"), torch.randn(4, 32)
    expected = from_model(model)(hidden)
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]), mixed=mixed)
    assert torch.equal(from_model(peft)(hidden), expected)


def test_facts_are_read_without_the_model_class():
    facts = HeadFacts.of(tiny_model("llama-tied"))
    assert facts.tied_or_table is None
    assert facts.head_weight is facts.embed_weight is facts.embedding.weight
