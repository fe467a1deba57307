"""What a captured graph and a decoder body of our own contain of a model is seen to change, and nothing else is."""

from __future__ import annotations

import copy

import pytest
import torch

from gircse.engine.watch import ModelWatch
from tests.lm.test_rollout import with_lora
from tests.tiny_models import tiny_model


def _layer(model):
    return model.get_base_model().model.layers[1]


def _scaled(model):
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] *= 2


def _replaced_weight(model):
    norm = _layer(model).input_layernorm
    norm.weight = torch.nn.Parameter(norm.weight.detach().clone())


def _moved_buffer(model):
    rotary = model.get_base_model().model.rotary_emb
    rotary.inv_freq = rotary.inv_freq.clone()


CHANGES = {
    "merged": lambda model: model.merge_adapter(),
    "switched off": lambda model: model.base_model.disable_adapter_layers(),
    "scaled": _scaled,
    "another table": lambda model: model.get_base_model().set_input_embeddings(torch.nn.Embedding(131, 32)),
    "another layer": lambda model: setattr(_layer(model), "mlp", copy.deepcopy(_layer(model).mlp)),
    "a layer less": lambda model: model.get_base_model().model.layers.pop(1),
    "another weight": _replaced_weight,
    "another buffer": _moved_buffer,
    "cast": lambda model: model.double(),
    "a hook": lambda model: _layer(model).register_forward_hook(lambda *_: None),
    "a pre-hook": lambda model: _layer(model).mlp.register_forward_pre_hook(lambda *_: None),
    "another forward": lambda model: setattr(_layer(model), "forward", lambda *_: None),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_change_is_seen_once(change):
    model = with_lora(tiny_model("llama"))
    watch = ModelWatch(model.get_base_model())
    assert watch.changed()
    assert not watch.changed()
    change(model)
    assert watch.changed()
    assert not watch.changed()


def test_new_values_in_the_old_place_and_calls_are_no_change():
    """Weights are read where they lie."""
    model = with_lora(tiny_model("llama"))
    watch = ModelWatch(model.get_base_model())
    watch.changed()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
        model(torch.tensor([[3, 4, 5]]))
    model.train().eval()
    assert not watch.changed()
