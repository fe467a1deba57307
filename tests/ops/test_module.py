"""SoftEmbedding: every fact of every architecture, weights that stay the model's own."""

from __future__ import annotations

import copy
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import gircse.ops
from gircse.ops import SoftEmbedding, from_model
from tests.tiny_models import _COMMON, CONFIGS, definition, tiny_model

SCALED = {
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 3.0, "embedding_multiplier": 1.0},
}


def model_of(name: str, dtype: torch.dtype = torch.float32) -> Any:
    if name in CONFIGS:
        return tiny_model(name, dtype=dtype, attn=definition(name))
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **_COMMON, **SCALED[name])
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [*CONFIGS, *SCALED])
def test_soft_tokens_are_the_models_own(name: str, dtype: torch.dtype) -> None:
    """softmax of the model's own logits, times what its own embedding layer gives for every token."""
    model = model_of(name, dtype)
    soft = from_model(model)
    assert len(soft.state_dict()) == len(list(soft.parameters())) == len(list(soft.children())) == 0
    ids = torch.randint(3, 131, (2, 6))
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    logits = model(input_ids=ids, use_cache=False).logits
    table = model.get_input_embeddings()(torch.arange(131))
    expected = (logits.double() / 0.7).softmax(-1) @ table.double()
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    got = soft(hidden, temperature=0.7)
    assert isinstance(got, Tensor)
    assert (got.double() - expected).norm() <= tolerance * expected.norm()
    picked, _ = soft(hidden, hard=True, return_stats=True)
    ids, _ = soft.top_tokens(hidden, 1)
    torch.testing.assert_close(picked, table[ids[..., 0]], rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert f"tied={tied}" in repr(soft)


def test_gradients_arrive_at_the_model_and_tied_weights_stay_tied() -> None:
    model = tiny_model("llama-tied", dtype=torch.float64)
    weight, hidden = model.get_input_embeddings().weight, torch.randn(4, 32, dtype=torch.float64)
    soft = from_model(model)
    soft(hidden).square().sum().backward()
    (expected,) = torch.autograd.grad(((hidden @ weight.T).softmax(-1) @ weight).square().sum(), weight)
    torch.testing.assert_close(weight.grad, expected)
    assert model.get_output_embeddings().weight is weight
    model.to(torch.float32)  # it follows its model
    assert soft(hidden.float()).dtype == torch.float32
    twin = copy.deepcopy(torch.nn.ModuleList([model, soft]))
    facts = twin[1].facts
    assert facts.head_weight is facts.embed_weight is twin[0].get_input_embeddings().weight
    assert facts.head_weight is not model.get_input_embeddings().weight


def test_compiles_without_a_graph_break() -> None:
    torch._dynamo.reset()
    model = tiny_model("gemma2", attn="eager")
    soft, hidden = from_model(model), torch.randn(4, 32, requires_grad=True)
    compiled = torch.compile(soft, fullgraph=True, backend="aot_eager")
    for options in ({"temperature": 0.7}, {"top_p": 0.8, "gumbel_seed": 3, "hard": True}):
        results = [function(hidden, **options) for function in (soft, compiled)]
        assert torch.equal(*results)
        grads = [torch.autograd.grad(result.square().sum(), hidden)[0] for result in results]
        torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-6)


def test_a_wrong_fact_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("gemma2", attn="eager")
    model.config.final_logit_softcapping = 0.3
    soft = from_model(model)  # read from the same config, so it holds
    assert soft.facts.softcap == 0.3
    monkeypatch.setattr("gircse.ops.head_facts._logit_scale", lambda config: 2.0)
    with pytest.raises(ValueError, match=r"the probe of the head's weight, .* failed on Gemma2ForCausalLM"):
        from_model(model)
    assert isinstance(from_model(model, probe=False), SoftEmbedding)
    monkeypatch.setattr("gircse.ops.head_facts._embed_scale", lambda embedding, dtype: 1.0)
    with pytest.raises(ValueError, match=r"the probe of embed_scale failed on Gemma2"):
        from_model(model)


def test_models_without_a_head_are_refused() -> None:
    with pytest.raises(ValueError, match=r"LlamaModel has no language-model head with a weight"):
        from_model(tiny_model("llama").base_model)
    with pytest.raises(ValueError, match=r"Linear has no language-model head"):
        from_model(torch.nn.Linear(2, 2))


def test_facts_cannot_be_given_twice() -> None:
    soft = from_model(tiny_model("llama"))
    with pytest.raises(TypeError, match="softcap"):
        soft(torch.randn(2, 32), softcap=3.0)


def _imports(file: Path) -> list[str]:
    return re.findall(r"^\s*(?:from|import) ([\w.]+)", file.read_text(), re.MULTILINE)


def test_the_ops_know_nothing_above_them() -> None:
    """Of the package they take what counts as an integer, which itself takes nothing but the standard library."""
    package = Path(gircse.__file__).parent
    for file in (package / "ops").glob("*.py"):
        for name in _imports(file):
            above = name.split(".")[0] in ("transformers", "peft", "gircse", "triton")
            assert not above or name == "gircse.integers", (file.name, name)
    assert {name.split(".")[0] for name in _imports(package / "integers.py")} <= sys.stdlib_module_names
