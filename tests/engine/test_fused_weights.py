"""Projections are fused without a second copy: after the engine has run, the model is the one that it was."""

from __future__ import annotations

import copy
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_model

from gircse import GIRCSE
from gircse.engine import Engine, EngineConfig
from gircse.engine.body import FusedDecoder
from gircse.engine.body.weights import _BUFFERS, Projection, fuse, joined
from gircse.lm.causal_lm import CausalLM
from tests.engine.test_engine import rows_of
from tests.lm.test_rollout import with_lora
from tests.tiny_models import tiny_model, tiny_tokenizer

OURS, STOCK = EngineConfig(fused_kernels="always"), EngineConfig(fused_kernels="never")
ROWS = rows_of((5, 12, 1))
IDS = torch.tensor([[3, 7, 5, 9]])


def after_a_run(name="qwen2", **options):
    """A model whose weights the engine has fused, and one that it has not seen."""
    model = tiny_model(name, **options)
    engine = Engine(CausalLM.from_model(model), OURS)
    engine.states(ROWS, 2)
    assert isinstance(engine._decoder, FusedDecoder)
    return model, engine, tiny_model(name, attn="gircse", **options)


def memory(model):
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.parameters()}.values())


def states_by(model, config):
    return Engine(CausalLM.from_model(model), config).states(ROWS, 3)


def test_a_projection_is_one_product():
    layers = [torch.nn.Linear(6, width) for width in (4, 2, 2)]
    parameters = [p for layer in layers for p in layer.parameters()]
    x, before = torch.randn(3, 6), [layer.weight.clone() for layer in layers]
    expected = torch.cat([layer(x) for layer in layers], dim=-1)
    assert joined(parameters[::2]) is None
    with torch.inference_mode():
        fuse(layers)
        addresses = [p.data_ptr() for p in parameters]
        fuse(layers)  # changes nothing more
    assert [p.data_ptr() for p in parameters] == addresses
    assert joined(parameters[::2]).data_ptr() == addresses[0]
    torch.testing.assert_close(Projection(layers)(x), expected)
    assert [p for layer in layers for p in layer.parameters()] == parameters  # the same objects
    assert all(torch.equal(layer.weight, old) for layer, old in zip(layers, before, strict=True))
    layers[1].weight.data.mul_(2)  # through a view
    torch.testing.assert_close(Projection(layers)(x)[:, 4:6], layers[1](x))
    layers[1].weight.data = layers[1].weight.data.clone()
    assert joined(parameters[::2]) is None
    buffers = [_BUFFERS[address] for address in addresses[:2]]
    assert not any(buffer.expired() for buffer in buffers)  # the other two weights are in it
    for layer in layers:
        layer.double().float()
    assert all(buffer.expired() for buffer in buffers)
    torch.testing.assert_close(Projection(layers)(x), torch.cat([layer(x) for layer in layers], dim=-1))


def test_stock_forward_state_and_memory_are_the_same():
    model, _, untouched = after_a_run()
    assert memory(model) == memory(untouched)
    for (name, weight), (other, expected) in zip(
        model.state_dict().items(), untouched.state_dict().items(), strict=True
    ):
        assert name == other
        assert torch.equal(weight, expected)
    assert torch.equal(model(IDS).logits, untouched(IDS).logits)
    compiled = [torch.compile(m, backend="eager")(IDS).logits for m in (model, untouched)]
    assert torch.equal(*compiled)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(IDS).logits, untouched(IDS).logits)


def test_training_goes_on():
    model, engine, untouched = after_a_run()
    results = []
    for m in (model, untouched):
        optimizer = torch.optim.AdamW(m.train().parameters(), lr=1e-2)
        for _ in range(2):
            optimizer.zero_grad()
            m(IDS, labels=IDS).loss.backward()
            optimizer.step()
        m.eval()
        results.append({name: p.detach().clone() for name, p in m.named_parameters()})
    assert all(torch.equal(results[0][name], expected) for name, expected in results[1].items())
    torch.testing.assert_close(engine.states(ROWS, 3), states_by(untouched, STOCK), atol=1e-5, rtol=0)


def test_save_and_load(tmp_path: Path):
    model, _, untouched = after_a_run()
    for name, m in (("fused", model), ("stock", untouched)):
        m.save_pretrained(tmp_path / name)
    fused, stock = (load_file(tmp_path / name / "model.safetensors") for name in ("fused", "stock"))
    assert fused.keys() == stock.keys()
    assert all(torch.equal(fused[name], expected) for name, expected in stock.items())
    # Where tensors share a storage, this refuses, and accelerate saves only the first of them.
    save_model(model, str(tmp_path / "model.safetensors"))
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in model.parameters())
    torch.save(model.state_dict(), tmp_path / "state.pt")
    untouched.load_state_dict(torch.load(tmp_path / "state.pt"))
    model.load_state_dict({name: 0.5 * weight for name, weight in untouched.state_dict().items()})  # into the views
    assert torch.equal(
        model.model.layers[0].self_attn.k_proj.weight, 0.5 * stock["model.layers.0.self_attn.k_proj.weight"]
    )


@pytest.mark.parametrize(
    "change", [copy.deepcopy, lambda model: model.to(torch.float64), lambda model: model.half().float()]
)
def test_copies_and_casts(change):
    model, _, untouched = after_a_run()
    model, untouched = change(model), change(untouched)
    assert memory(model) == memory(untouched)
    model.get_parameter("model.layers.0.self_attn.q_proj.weight").data.mul_(0.5)
    untouched.get_parameter("model.layers.0.self_attn.q_proj.weight").data.mul_(0.5)
    torch.testing.assert_close(states_by(model, OURS), states_by(untouched, STOCK), atol=1e-5, rtol=0)


def test_weights_that_moved_are_found():
    """A cast and back, and a parameter with new memory, under the same engine."""
    model, engine, untouched = after_a_run()
    for m in (model, untouched):
        m.double().float()
        m.model.layers[0].mlp.up_proj.weight.data = 2 * m.model.layers[0].mlp.up_proj.weight.data
        m.model.layers[1].self_attn.v_proj = torch.nn.Linear(32, 16).requires_grad_(False)
        m.model.layers[1].self_attn.v_proj.weight.fill_(0.1)
        m.model.layers[1].self_attn.v_proj.bias.fill_(0.2)
    torch.testing.assert_close(engine.states(ROWS, 3), states_by(untouched, STOCK), atol=1e-5, rtol=0)


def gircse(config):
    base = with_lora(tiny_model("llama"))
    base.add_adapter("other", base.peft_config["default"])
    torch.manual_seed(2)
    for name, parameter in base.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model = GIRCSE(base, tiny_tokenizer()).eval()
    model.engine_config = config
    return model


def test_merging_switching_and_unmerging_adapters(tmp_path: Path):
    ours, stock = gircse(OURS), gircse(STOCK)
    texts = ["a", "soft tokens"]
    before = {name: p.detach().clone() for name, p in ours.named_parameters()}
    for model in (ours, stock):
        model.merge_adapter()
    size = memory(stock)
    for adapter in ("default", "other", "default"):
        for model in (ours, stock):
            model.base.set_adapter(adapter)
        torch.testing.assert_close(ours.encode(texts), stock.encode(texts), atol=1e-5, rtol=0)
    assert memory(ours) == size
    for name, model in (("ours", ours), ("stock", stock)):
        model.save_pretrained(tmp_path / name)
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "stock")]
    assert all(torch.equal(files[0][name], weight) for name, weight in files[1].items())
    ours.unmerge_adapter()
    assert all(torch.equal(parameter, before[name]) for name, parameter in ours.named_parameters())
    with pytest.raises(ValueError, match="not merged"):
        ours.encode(texts)


def test_threads_and_autocast_see_one_model():
    model = GIRCSE(tiny_model("llama"), tiny_tokenizer()).eval()
    expected = model.encode(["red", "a blue one"])
    model.engine_config = OURS
    found = []
    threads = [threading.Thread(target=lambda: found.append(model.encode(["red", "a blue one"]))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with torch.autocast("cpu", torch.bfloat16):
        found.append(model.encode(["red", "a blue one"]))
    assert len(found) == 4
    for embeddings in found:
        torch.testing.assert_close(embeddings, expected, atol=1e-5, rtol=0)
