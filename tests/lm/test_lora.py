"""LoRA layers that compute together: PEFT's results, from weights as they are now."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from gircse.lm.adapter import quiet_peft
from gircse.lm.causal_lm import CausalLM
from gircse.lm.lora import fuse_lora, fused_lora, refresh_lora, unfuse_lora
from gircse.lm.rollout import rollout
from tests.tiny_models import tiny_model

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


def adapted(
    name: str, *configs: dict, dtype: torch.dtype = torch.float64, checkpointing: bool = False, device: str = "cpu"
) -> tuple[nn.Module, Callable[[], tuple[Tensor, ...]]]:
    """A model with an adapter for each of `configs`, all of them active, and a run of it: states and gradients."""
    base = tiny_model(name, dtype=dtype).to(device)
    torch.manual_seed(1)
    adapters = [
        LoraConfig(**{"r": 4, "lora_alpha": 6, "fan_in_fan_out": name == "gpt2", "init_lora_weights": False} | config)
        for config in configs
    ]
    with quiet_peft():
        model = get_peft_model(base, adapters[0])
    for index, adapter in enumerate(adapters[1:]):
        model.add_adapter(f"more-{index}", adapter)
    model.base_model.set_adapter(list(model.peft_config))
    if checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    lm = CausalLM.from_model(base)
    model.train()
    ids = torch.randint(3, 100, (3, 7), generator=torch.Generator().manual_seed(2)).to(device)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0

    def run(num_steps: int = 2, factor: float = 1.0) -> tuple[Tensor, ...]:
        states = rollout(lm, ids, mask, num_steps, soft_token_gradient=factor).with_prompt
        weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
        upstream = torch.randn(states.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        return states.detach(), *torch.autograd.grad(states, weights, upstream.to(states))

    return model, run


def assert_equal(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10 * max(1.0, b.abs().max().item()))


CASES = {
    "seven projections, rsLoRA, checkpointed": (
        "qwen2", {"target_modules": ATTENTION + MLP, "use_rslora": True}, {"checkpointing": True}, (1, 1, 1, 1),
    ),
    "q and v, ranks of their own": (
        "llama",
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 3}},
        {}, (2,),
    ),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_fc", "c_proj"]}, {}, (1, 1, 1, 1)),
}  # fmt: skip


@pytest.mark.parametrize("factor", [0.0, 1.0])
@pytest.mark.parametrize("case", CASES)
def test_states_and_gradients_are_those_of_peft(case, factor):
    name, config, options, groups = CASES[case]
    model, run = adapted(name, config, **options)
    expected = run(factor=factor)
    fused = fuse_lora(model)
    assert fused is fuse_lora(model) is fused_lora(model)
    sizes = [len(shared.layers) for shared in fused.inputs]
    assert len(sizes) == 2 * len(groups)
    if "seven" in case:
        assert sorted(sizes) == [1, 1, 1, 1, 2, 2, 3, 3]
    if "q and v" in case:
        assert sizes == [2, 2]
    assert_equal(run(factor=factor), expected)
    assert_equal(run(factor=factor), expected)  # from copies that are there
    unfuse_lora(model)
    assert fused_lora(model) is None


def test_several_adapters_at_once_and_one_after_the_other():
    """Also one that is on some of the layers only, and one that is frozen."""
    model, run = adapted(
        "llama", {"target_modules": ATTENTION, "r": 2}, {"target_modules": ["k_proj", "up_proj"], "lora_alpha": 1}
    )
    one = ["default"]

    def each() -> list[tuple[Tensor, ...]]:
        results = []
        for names in (one, list(model.peft_config), ["more-0"]):
            model.base_model.set_adapter(names)
            results.append(run())
        model.base_model.set_adapter(list(model.peft_config))
        for name, parameter in model.named_parameters():
            if "default" in name:
                parameter.requires_grad_(False)
        return [*results, run()]

    expected = each()
    fused = fuse_lora(model)
    assert fused is not None
    matrices = fused.inputs[0].products.a
    for ours, theirs in zip(each(), expected, strict=True):
        assert_equal(ours, theirs)
    assert fused.inputs[0].products.a is matrices  # which captured graphs may read


def test_merged_and_disabled_adapters_are_pefts_and_leave_the_matrices_where_they_are():
    model, run = adapted("llama", {"target_modules": ATTENTION + MLP})
    fused = fuse_lora(model)
    expected, ids = run(), torch.tensor([[5, 6, 7]])

    def places() -> list[int]:
        return [matrix.data_ptr() for shared in fused.inputs for matrix in (shared.products.a, *shared.products.b)]

    before, logits = places(), model(ids).logits
    model.merge_adapter()
    torch.testing.assert_close(model(ids).logits, logits)
    assert fused.inputs[0].products is None
    model.unmerge_adapter()
    with model.disable_adapter():
        assert not torch.allclose(model(ids).logits, logits)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(ids).logits is not None
    assert_equal(run(), expected)
    assert places() == before


def test_the_matrices_follow_the_weights():
    """In place, by two operators for all layers. A backward through older ones is refused."""
    model, run = adapted("llama", {"target_modules": ATTENTION + MLP})
    fused = fuse_lora(model)
    first = run()
    a = fused.inputs[0].products.a
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ids = torch.tensor([[5, 6, 7]])
    late = model(ids).logits
    with torch.no_grad():
        torch._foreach_mul_(weights, 1.5)
    refresh_lora(model)
    assert fused.inputs[0].products.a is a
    torch.testing.assert_close(a[:4], fused.inputs[0].layers[0].lora_A["default"].weight)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        late.sum().backward()
    fused_result = run()
    assert not torch.allclose(fused_result[0], first[0])
    with torch.no_grad():
        weights[3].data = weights[3].data.clone().mul_(2)  # no version counts this
    fused_result = run()
    unfuse_lora(model)
    assert_equal(fused_result, run())


def errors_in_half_precision(device: str) -> list[Tensor]:
    """Of the states and of all gradients, relative to float64: ours, and those of PEFT with half-precision adapters."""
    config, errors = {"target_modules": ATTENTION + MLP, "lora_alpha": 4}, []
    exact = adapted("qwen2", config, device=device)[1]()
    for fuse in (True, False):
        model, run = adapted("qwen2", config, dtype=torch.bfloat16, device=device)
        if fuse:
            fuse_lora(model)
        else:
            for parameter in model.parameters():
                parameter.data = parameter.data.bfloat16()
        result = run()
        if fuse:
            assert {gradient.dtype for gradient in result[1:]} == {torch.float32}
        errors.append(torch.stack([(a.double() - b).norm() / b.norm() for a, b in zip(result, exact, strict=True)]))
    return errors


def test_half_precision_has_float32_weights_and_gradients():
    ours, theirs = errors_in_half_precision("cpu")
    assert ours[0] <= 2 * theirs[0]
    assert ours[1:].norm() <= 2 * theirs[1:].norm()


def test_layers_that_share_an_input_share_its_dropout():
    model, _ = adapted("llama", {"target_modules": ATTENTION + MLP, "r": 32, "lora_alpha": 32, "lora_dropout": 0.5})
    fused = fuse_lora(model)
    gate, up = next(shared for shared in fused.inputs if len(shared.layers) == 2).layers
    with torch.no_grad():
        for layer in (gate, up):
            layer.get_base_layer().weight.zero_()
            layer.lora_A["default"].weight.copy_(torch.eye(32))
            layer.lora_B["default"].weight.copy_(torch.eye(48, 32))
    x = torch.ones(40, 32, dtype=torch.float64, requires_grad=True)
    one, other = gate(x)[:, :32], up(x)[:, :32]
    assert torch.equal(one, other)
    assert set(one.unique().tolist()) == {0.0, 2.0}
    assert 0.4 < one.mean() / 2 < 0.6
    assert torch.equal(torch.autograd.grad(one.sum(), x)[0], one)
    assert not torch.equal(gate(x)[:, :32], one)
    model.eval()
    assert torch.equal(gate(x)[:, :32], x)


@pytest.mark.filterwarnings("ignore:Mixing:UserWarning")
def test_other_layers_keep_pefts_forward_with_one_warning():
    model, run = adapted("llama", {"target_modules": ["q_proj", "k_proj"], "use_dora": True})
    expected = run()
    with pytest.warns(UserWarning, match="4 of 4 adapted layers train by PEFT's own, slower products"):
        assert fuse_lora(model) is None
    assert_equal(run(), expected)

    model, run = adapted("llama", {"target_modules": ["q_proj", "k_proj", "embed_tokens"]})
    expected = run()
    with pytest.warns(UserWarning, match="1 of 5 adapted layers"):
        assert len(fuse_lora(model).inputs) == 2
    assert_equal(run(), expected)
