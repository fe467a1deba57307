"""Liger-Kernel's layers: which ones are taken, that they compute the same, and that the model comes back untouched.

A stand-in with Liger's names and definitions in plain PyTorch shows the wiring on a CPU.
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from gircse.engine import Engine, EngineConfig
from gircse.engine.fused import FusedKernels
from gircse.lm.causal_lm import CausalLM
from tests.engine.test_engine import relative_error, rows_of
from tests.tiny_models import CONFIGS, tiny_model

CALLS: list[str] = []


def rms_norm(x, weight, eps, offset, casting, in_place):
    CALLS.append("norm")
    assert not in_place  # the residual stream is read again
    normal = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    if casting == "gemma":
        return (normal * (offset + weight.float())).to(x.dtype)
    return (offset + weight) * normal.to(x.dtype)


def silu_mul(a, b):
    CALLS.append("mlp")
    return torch.nn.functional.silu(a) * b


def gelu_mul(a, b):
    CALLS.append("mlp")
    return torch.nn.functional.gelu(a, approximate="tanh") * b


@pytest.fixture
def liger(monkeypatch):
    """A package `liger_kernel` whose kernels are plain PyTorch."""
    CALLS.clear()
    contents = {
        "liger_kernel": {},
        "liger_kernel.ops": {},
        "liger_kernel.transformers": {},
        "liger_kernel.ops.rms_norm": {"LigerRMSNormFunction": SimpleNamespace(apply=rms_norm)},
        "liger_kernel.ops.swiglu": {"LigerSiLUMulFunction": SimpleNamespace(apply=silu_mul)},
        "liger_kernel.ops.geglu": {"LigerGELUMulFunction": SimpleNamespace(apply=gelu_mul)},
        "liger_kernel.transformers.rope": {"liger_rotary_pos_emb": None},
    }
    for name, values in contents.items():
        module = ModuleType(name)
        module.__path__ = []
        for key, value in values.items():
            setattr(module, key, value)
        monkeypatch.setitem(sys.modules, name, module)
    yield
    for name, module in list(sys.modules.items()):  # the rotary function goes back as well
        if name.startswith("transformers.models."):
            own = getattr(vars(module).get("apply_rotary_pos_emb"), "gircse_own", None)
            if own is not None:
                module.apply_rotary_pos_emb = own


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "gpt2"])
def test_fused_layers_give_the_same_states(name, liger):
    lm = CausalLM.from_model(tiny_model(name))
    engine, rows = Engine(lm), rows_of((3, 9, 1))
    expected = engine.states(rows, 3)
    engine._fused = FusedKernels.of(lm)
    assert engine._fused is not None
    assert len(engine._fused) >= 2 * lm.config.num_hidden_layers + 1  # each layer's norms and MLP, the last norm
    CALLS.clear()
    assert relative_error(engine.states(rows, 3), expected) <= 1e-5
    assert {"norm", "mlp"} == set(CALLS)
    CALLS.clear()
    lm.body(input_ids=torch.tensor([rows[0]]))  # outside of the engine: the model's own
    assert not CALLS
    assert not any("forward" in module.__dict__ for module in lm.body.modules())


def test_a_layer_that_computes_something_else_is_not_taken(liger, monkeypatch):
    wrong = SimpleNamespace(apply=lambda a, b: silu_mul(a, b) * 1.1)
    monkeypatch.setattr(sys.modules["liger_kernel.ops.swiglu"], "LigerSiLUMulFunction", wrong)
    with pytest.warns(UserWarning, match="Liger-Kernel's layers change the states of LlamaForCausalLM"):
        assert FusedKernels.of(CausalLM.from_model(tiny_model("llama"))) is None


def test_an_architecture_without_such_layers_is_left_alone(liger):
    assert FusedKernels.of(CausalLM.from_model(tiny_model("gpt2"))) is None


def test_on_a_cpu_the_model_stays_as_it_is(liger):
    assert Engine(CausalLM.from_model(tiny_model("llama")), EngineConfig())._fused is None


def test_layers_come_back_after_an_error(liger):
    fused = FusedKernels.of(CausalLM.from_model(tiny_model("llama")))
    assert fused is not None

    def fail():
        with fused.active():
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        fail()
    assert not any("forward" in module.__dict__ for module, _ in fused._replacements)
