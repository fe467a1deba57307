"""The cached rollout against the plain uncached method: states, losses and every LoRA gradient, in float64."""

from __future__ import annotations

import copy
import functools
from typing import NamedTuple

import pytest
import torch
from peft import LoraConfig, get_peft_model

from gircse import GIRCSE, GircseConfig, ops
from gircse.lm.attention import StepPass
from gircse.lm.rollout import draft
from tests.plain import plain_losses, plain_objective, plain_rollout
from tests.tiny_models import CONFIGS, VOCAB, definition, tiny_model, tiny_tokenizer

K = 5
POSITIVES = torch.tensor([0, 2])
LENGTHS = {"queries": [9, 1], "docs": [12, 3, 8, 2]}
TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
}


def with_lora(model, *, seed=1, dropout=0.0):
    targets = TARGETS["gpt2" if model.config.model_type == "gpt2" else "llama"]
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=targets, init_lora_weights=False)
    torch.manual_seed(seed)
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def left_padded(lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]).long()
    return ids * mask, mask


def lora_gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def assert_equal_to_plain(name, expected, tolerance, *, checkpointing=False, training=False, factor=1.0, **overrides):
    ours = GIRCSE(with_lora(tiny_model(name, dtype=torch.float64, **overrides)), tiny_tokenizer())
    if checkpointing:
        ours.gradient_checkpointing_enable()
    ours.train(training)
    got = {kind: ours.rollout(*batch, K, soft_token_gradient=factor) for kind, batch in batches().items()}
    losses = ops.stepwise_info_nce(got["queries"], got["docs"], POSITIVES)
    ops.icr_objective(losses).backward()

    for kind, states in got.items():
        assert relative_error(states, expected.states[kind]) <= tolerance, kind
    assert relative_error(losses, expected.losses) <= tolerance
    mine = lora_gradients(ours.base)
    assert expected.gradients.keys() == mine.keys()
    assert len(mine) > 0
    for key, gradient in expected.gradients.items():
        assert gradient.norm() > 0, key
        assert relative_error(mine[key], gradient) <= tolerance, key


class Expected(NamedTuple):
    """What the plain method gives on `batches`: states of each kind, losses and LoRA gradients."""

    states: dict[str, torch.Tensor]
    losses: torch.Tensor
    gradients: dict[str, torch.Tensor]


def batches():
    return {kind: left_padded(lengths, seed) for seed, (kind, lengths) in enumerate(LENGTHS.items())}


def plain_results(name, attn, factor=1.0, **overrides):
    model = with_lora(tiny_model(name, dtype=torch.float64, attn=attn, **overrides))
    stock = model.get_base_model()
    states = {
        kind: torch.stack(
            [plain_rollout(stock, row[keep.bool()], K, 1.0, factor)[1] for row, keep in zip(*batch, strict=True)]
        )
        for kind, batch in batches().items()
    }
    losses = plain_losses(states["queries"], states["docs"], POSITIVES)
    plain_objective(losses).backward()
    return Expected({kind: s.detach() for kind, s in states.items()}, losses.detach(), lora_gradients(model))


@functools.cache
def without_casts(name, factor=1.0, **overrides):
    """Once for the tests below that use `no_downcast`, which is when to call it."""
    return plain_results(name, "eager", factor, **overrides)


def relative_error(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


# The others have the same casts as Llama.
@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "gpt2"])
def test_loss_and_lora_gradients_as_the_models_come(name):
    assert_equal_to_plain(name, plain_results(name, definition(name)), 1e-6)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.usefixtures("no_downcast")
def test_loss_and_lora_gradients_without_the_stock_float32_casts(name):
    assert_equal_to_plain(name, without_casts(name), 1e-10)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
@pytest.mark.usefixtures("no_downcast")
def test_activation_checkpointing_gives_the_same_gradients(name):
    assert_equal_to_plain(name, without_casts(name), 1e-10, checkpointing=True, training=True)


BY_THE_BLOCK = [("llama", {}), ("qwen2", {}), ("mistral", {"sliding_window": 9}), ("mistral", {"sliding_window": 3})]


@pytest.mark.parametrize(("name", "overrides"), [*BY_THE_BLOCK, ("gemma2", {})])
@pytest.mark.usefixtures("no_downcast")
def test_the_block_is_the_rollout_with_detached_tokens(name, overrides):
    """A window of 3 hides some of the generated steps, too."""
    expected = without_casts(name, 0.0, **overrides)
    assert_equal_to_plain(name, expected, 1e-10, factor=0.0, **overrides)
    if name in ("llama", "gemma2"):
        assert_equal_to_plain(name, expected, 1e-10, factor=0.0, checkpointing=True, training=True, **overrides)


@pytest.mark.usefixtures("no_downcast")
def test_a_damped_gradient_at_the_soft_tokens():
    assert_equal_to_plain("llama", without_casts("llama", 0.3), 1e-10, factor=0.3)
    with pytest.raises(AssertionError):  # the factor matters
        assert_equal_to_plain("llama", without_casts("llama"), 1e-3, factor=0.3)


@pytest.mark.parametrize("wrong", ["sees later steps", "sees padding"])
@pytest.mark.usefixtures("no_downcast")
def test_a_wrong_mask_of_the_block_is_found(monkeypatch, wrong):
    right = StepPass._mask

    def mask(self, queries, slots, window):
        hidden = right(self, queries, slots, window).clone()
        hidden[..., slots:] &= wrong == "sees padding"
        hidden[..., :slots] &= wrong == "sees later steps"
        return hidden

    monkeypatch.setattr(StepPass, "_mask", mask)
    with pytest.raises(AssertionError):
        assert_equal_to_plain("llama", without_casts("llama", 0.0), 1e-3, factor=0.0)


def test_the_draft_is_made_without_dropout_and_the_block_with_it():
    model = GIRCSE(with_lora(tiny_model("llama"), dropout=0.3), tiny_tokenizer()).train()
    layer, seen = model.causal_lm.body.layers[0].self_attn.q_proj.lora_dropout["default"], []
    layer.register_forward_hook(lambda module, inputs, _: seen.append((inputs[0].shape[1], module.training)))

    def drafted(lm, kv, prompt, num_steps, **options):
        random = torch.get_rng_state()
        tokens = draft(lm, kv, prompt, num_steps, **options)
        assert torch.equal(torch.get_rng_state(), random)
        assert not tokens.requires_grad
        return tokens

    states = model.rollout(*left_padded([4, 2], 0), 3, soft_token_gradient=0, drafter=drafted)
    assert seen == [(4, True), (1, False), (1, False), (3, True)]
    assert states.requires_grad
    assert all(module.training for module in model.modules())
    few = lambda *rollout, **options: draft(*rollout, **options)[:, :1]  # noqa: E731
    with pytest.raises(ValueError, match=r"drafter: got tokens of shape \(2, 1, 32\), expected 3 for each of 2 texts"):
        model.rollout(*left_padded([4, 2], 0), 3, soft_token_gradient=0, drafter=few)


@pytest.mark.parametrize(("factor", "entered"), [(1.0, ["prompt", "prompt"]), (0.0, ["prompt"])])
def test_what_an_observer_is_told(factor, entered):
    """In backward a rollout by the block enters the prompt pass by its keys alone."""
    model = GIRCSE(with_lora(tiny_model("llama")), tiny_tokenizer())

    class Observer:
        phases, entropies = [], []

        def enter(self, phase):
            self.phases.append(phase)

        def soft_token(self, step, entropy):
            self.entropies.append((step, entropy.shape, entropy.requires_grad))

    observer = Observer()
    model.rollout(*left_padded([4, 2], 0), 2, soft_token_gradient=factor, observer=observer).sum().backward()
    assert observer.phases == ["prompt", "steps", "steps", *entered]
    assert observer.entropies == [(0, (2,), False), (1, (2,), False)]


@pytest.mark.parametrize("factor", [-0.1, 1.5, float("nan")])
def test_a_factor_out_of_range_is_named(factor):
    with pytest.raises(ValueError, match=r"soft_token_gradient: got .*, expected a (finite )?number"):
        GIRCSE(tiny_model("llama"), tiny_tokenizer()).rollout(*left_padded([4], 0), 1, soft_token_gradient=factor)


def test_checkpointing_covers_the_prompt_and_the_block_and_no_single_step(monkeypatch):
    model = GIRCSE(with_lora(tiny_model("llama")), tiny_tokenizer())
    model.gradient_checkpointing_enable()
    model.train()
    calls = []
    layer = model.causal_lm.body.layers[0].self_attn
    forward = layer.forward
    monkeypatch.setattr(layer, "forward", lambda *a, **k: calls.append(k["kv"]) or forward(*a, **k))
    ids, mask = left_padded([4, 2], 0)
    out = model.rollout(ids, mask, 2)
    assert [type(c).__name__ for c in calls] == ["PromptPass", "StepPass", "StepPass"]
    out.sum().backward()
    assert [type(c).__name__ for c in calls[3:]] == ["PromptPass"]
    calls.clear()
    model.rollout(ids, mask, 2, soft_token_gradient=0).sum().backward()
    assert [type(c).__name__ for c in calls] == ["PromptPass", "StepPass", "StepPass", "StepPass", "PromptPass"]
    assert calls[2] is calls[3]  # the block; the draft before it is not recomputed


def test_reentrant_checkpointing_is_refused():
    model = GIRCSE(with_lora(tiny_model("llama")), tiny_tokenizer())
    model.base.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.train()
    with pytest.raises(RuntimeError, match="use_reentrant"):
        model.rollout(*left_padded([4, 2], 0), 2)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.usefixtures("no_downcast")
def test_rows_do_not_depend_on_their_batch_or_on_the_padding_side(name):
    model = GIRCSE(tiny_model(name, dtype=torch.float64), tiny_tokenizer())
    ids, mask = left_padded([9, 1, 14], 3)
    with torch.no_grad():
        together = model.rollout(ids, mask, 3)
        lengths = mask.sum(1)
        for row, length in enumerate(lengths.tolist()):
            alone_ids = ids[row : row + 1, -length:]
            alone = model.rollout(alone_ids, torch.ones_like(alone_ids), 3)
            torch.testing.assert_close(alone[0], together[row], rtol=1e-10, atol=1e-10)
        right = torch.zeros_like(ids)
        for row, length in enumerate(lengths.tolist()):
            right[row, :length] = ids[row, -length:]
        right_mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        assert torch.equal(model.rollout(right, right_mask, 3), together)


def test_a_padded_prompt_may_have_its_padding_in_the_middle():
    model = GIRCSE(tiny_model("llama", dtype=torch.float64), tiny_tokenizer())
    ids = torch.tensor([[5, 0, 6, 7, 0]])
    with_hole = model.rollout(ids, torch.tensor([[1, 0, 1, 1, 0]]), 2)
    torch.testing.assert_close(with_hole, model.rollout(torch.tensor([[5, 6, 7]]), torch.ones(1, 3).long(), 2))


def test_temperature_reaches_the_soft_tokens():
    stock = tiny_model("llama", dtype=torch.float64, attn="eager")
    model = GIRCSE(copy.deepcopy(stock), tiny_tokenizer(), GircseConfig(num_steps=3, temperature=0.5))
    ids, mask = left_padded([6], 0)
    _, expected = plain_rollout(stock, ids[0], 3, temperature=0.5)
    torch.testing.assert_close(model.rollout(ids, mask)[0], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("ids", "mask", "steps", "error", "message"),
    [
        (torch.ones(2, 3), torch.ones(2, 3).long(), 1, TypeError, "input_ids: got torch.float32"),
        (torch.ones(3).long(), torch.ones(3).long(), 1, ValueError, r"input_ids: got shape \(3,\)"),
        (torch.ones(2, 3).long(), torch.ones(2, 4).long(), 1, ValueError, r"attention_mask: got shape \(2, 4\)"),
        (torch.ones(2, 3).long(), torch.tensor([[1, 1, 1], [0, 0, 0]]), 1, ValueError, r"rows \[1\] have no token"),
        (torch.ones(2, 3).long(), torch.ones(2, 3).long(), -1, ValueError, "num_steps: got -1"),
        (torch.ones(2, 3).long(), torch.ones(2, 3).long(), 254, ValueError, "at most 256"),
    ],
)
def test_bad_input_is_named(ids, mask, steps, error, message):
    model = GIRCSE(tiny_model("llama"), tiny_tokenizer())
    with pytest.raises(error, match=message):
        model.rollout(ids, mask, steps)
