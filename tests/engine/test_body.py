"""Our decoder body against the stock decoder: every family, both phases; and where the stock body runs instead."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from gircse.engine import Engine, EngineConfig
from gircse.engine.body import FusedDecoder, StockDecoder, decoder, plain, probe
from gircse.engine.body.facts import DecoderFacts, UnknownDecoderError
from gircse.lm.causal_lm import CausalLM
from tests.engine.test_engine import LENGTHS, engine_of, relative_error, rows_of
from tests.engine.test_engine import plain as stock_states
from tests.lm.test_rollout import with_lora
from tests.tiny_models import CONFIGS, MORE_CONFIGS, tiny_model

OURS = EngineConfig(fused_kernels="always", max_rows=4)
FAMILIES = [name for name in (*CONFIGS, *MORE_CONFIGS) if name != "gpt2"]
K = 3


def randomised(model):
    """Biases and norms are constant in a new model, so that a forgotten one would change nothing."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_equals_the_stock_decoder(name, no_downcast):
    """Rows of very different length, windows shorter than they are, a common prefix, several batches through the same
    buffers, prompts without steps."""
    model = randomised(tiny_model(name, dtype=torch.float64))
    stock, ours = (Engine(CausalLM.from_model(model), config) for config in (EngineConfig(fused_kernels="never"), OURS))
    for lengths, prefix, num_steps in ((LENGTHS, 9, K), ((50, 2, 130), 0, 0)):
        rows = rows_of(lengths, prefix=prefix)
        assert relative_error(ours.states(rows, num_steps), stock.states(rows, num_steps)) <= 1e-9
    assert isinstance(ours._decoder, FusedDecoder)


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3"])
def test_rounds_no_more_than_the_stock_decoder(name):
    rows = rows_of(LENGTHS[:4])
    exact = stock_states(name, rows, K)
    errors = [
        relative_error(engine_of(name, config, dtype=torch.bfloat16).states(rows, K).double(), exact)
        for config in (OURS, EngineConfig(fused_kernels="never"))
    ]
    assert errors[0] <= 2 * errors[1]


@pytest.mark.parametrize("name", ["gemma3", "phi3"])
def test_runs_on_the_kernels(name, monkeypatch):
    pytest.importorskip("triton")
    from gircse_kernels import decoder as kernels

    one_layer = {"num_hidden_layers": 1, "layer_types": ["sliding_attention"]}  # the interpreter is slow
    model, rows = randomised(tiny_model(name, **one_layer)), rows_of((7, 1))
    expected = Engine(CausalLM.from_model(model), EngineConfig(fused_kernels="never")).states(rows, 1)
    monkeypatch.setattr(decoder, "_ops", lambda weight: kernels)
    config = EngineConfig(fused_kernels="always", decode_attention="triton")
    assert relative_error(Engine(CausalLM.from_model(model), config).states(rows, 1), expected) <= 1e-5


def reason(lm):
    with pytest.raises(UnknownDecoderError) as caught:
        probe.fused_decoder(lm, "sdpa")
    return str(caught.value)


class OtherLinear(nn.Linear):
    """A quantised layer is of another class, too."""


def other_class(model):
    layer = model.model.layers[1].mlp
    layer.up_proj.__class__ = OtherLinear


def hooked(model):
    model.model.layers[0].register_forward_hook(lambda *_: None)


def replaced_forward(model):
    layer = model.model.layers[1].self_attn.o_proj
    layer.forward = layer.forward


def offloaded(model):
    model.model.layers[1].mlp.down_proj.bias = nn.Parameter(torch.empty(32, device="meta"))


def other_part(model):
    model.model.layers[1].mlp.router = nn.Linear(2, 2)


def other_norm(model):
    model.model.layers[0].input_layernorm.variance_epsilon = 0.5


def flat_parameters(model):
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(model.parameters()), model.parameters())


CHANGES = {
    "a weight is part of a larger tensor": flat_parameters,
    "a projection is a OtherLinear": other_class,
    r"layers.0 has a forward hook": hooked,
    r"the forward method of layers.1.self_attn.o_proj was replaced": replaced_forward,
    "on meta": offloaded,
    "its MLP .* has the parts .* router": other_part,
    "its norms differ": other_norm,
}


@pytest.mark.parametrize(("message", "change"), CHANGES.items())
def test_an_unknown_layer_is_named(message, change, monkeypatch):
    lm = CausalLM.from_model(tiny_model("llama"))
    change(lm.model)
    if change is offloaded:  # whose own forward pass needs the weight
        monkeypatch.setattr(CausalLM, "run_body", run_without_weights)
    with pytest.raises(UnknownDecoderError, match=message):
        DecoderFacts.of(lm, torch.tensor([[3, 4]]))


def run_without_weights(self, kv, positions, input_ids):
    for index in range(2):
        query, key = torch.zeros(1, 4, 2, 8), torch.zeros(1, 2, 2, 8)
        kv.attend(index, query, key, key, scaling=1.0, dropout=0.0, window=None, softcap=None)
    return torch.zeros(1, 2, 32)


def test_an_unknown_architecture_is_named():
    assert "model_type 'gpt2' is not among" in reason(CausalLM.from_model(tiny_model("gpt2")))


def test_a_relative_with_other_mathematics_is_not_taken():
    """Granite has Llama's parts and scales what a block adds to the residual stream."""
    config = AutoConfig.for_model(
        "granite", hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=50
    )
    lm = CausalLM.from_model(AutoModelForCausalLM.from_config(config).eval())
    assert "model_type 'granite'" in reason(lm)


def test_a_body_that_computes_something_else_is_not_taken(monkeypatch):
    gated = plain.gated
    monkeypatch.setattr(plain, "gated", lambda *args: 1.05 * gated(*args))
    assert "states differ by" in reason(CausalLM.from_model(tiny_model("llama")))


def test_a_body_that_fails_is_not_taken(monkeypatch):
    monkeypatch.setattr(plain, "gated", None)
    assert "the probe of the fused decoder raised TypeError" in reason(CausalLM.from_model(tiny_model("llama")))


def test_the_stock_body_runs_with_one_warning(monkeypatch):
    """`_wanted` is replaced, because "auto" wants the body on a GPU only."""
    monkeypatch.setattr(probe, "_wanted", lambda config, device: True)
    model, rows = with_lora(tiny_model("llama", dtype=torch.float64)), rows_of((3, 9, 1))
    engine = Engine(CausalLM.from_model(model.get_base_model()))
    with pytest.warns(UserWarning, match="runs the decoder layers of LlamaForCausalLM itself.*not merged") as caught:
        expected = engine.states(rows, K)
    assert len(caught) == 1
    assert "not merged" in engine.report().not_fused
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(engine.states(rows, K), expected)
        for change, fused in ((model.merge_adapter, True), (model.unmerge_adapter, False)):
            change()
            torch.testing.assert_close(engine.states(rows, K), expected, atol=1e-5, rtol=0)
            assert isinstance(engine._decoder, FusedDecoder if fused else StockDecoder)


def test_always_raises_where_it_cannot():
    with pytest.raises(ValueError, match="fused_kernels: got 'always', expected a decoder that can be fused: model_ty"):
        engine_of("gpt2", OURS).states([[3]], 1)


def test_a_choice_that_raised_is_made_again():
    """Otherwise the next call would run on what was read before the adapter was switched on."""
    model = with_lora(tiny_model("llama"))
    engine = Engine(CausalLM.from_model(model.get_base_model()), OURS)
    model.merge_adapter()
    engine.states(rows_of((4, 2)), 1)
    model.unmerge_adapter()
    for _ in range(2):
        with pytest.raises(ValueError, match="an adapter is active and not merged"):
            engine.states(rows_of((4, 2)), 1)


def test_never_and_a_cpu_run_the_stock_body():
    for config in (EngineConfig(), EngineConfig(fused_kernels="never")):
        engine = engine_of("llama", config)
        engine.states([[3]], 1)
        assert isinstance(engine._decoder, StockDecoder)
        assert engine.report().not_fused is None
