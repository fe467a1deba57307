"""Memory counted on tensors without storage, against real steps on the CPU. Shapes of real models, few layers."""

from __future__ import annotations

import gc
from dataclasses import replace
from functools import cache

import pytest
import torch

from bench.memory import peak_extra_bytes
from bench.shapes import SHAPES, random_model
from gircse import GIRCSE
from gircse.lm.causal_lm import CausalLM
from gircse.lm.rollout import rollout
from gircse.train.config import TrainConfig
from gircse.train.lora import add_lora, trainable_model
from gircse.train.plan.extrapolate import PartlyCheckpointed, TracedModel
from gircse.train.plan.meta_step import LiveBytes, PromptShape, _kernel_workspace, step_memory
from tests.tiny_models import CONFIGS, tiny_model, tiny_tokenizer

WITHIN = 0.15
ROWS = 2


def shape_config(name, layers=2):
    """The widths of the published model, but a small vocabulary: it decides nothing here but the time."""
    config = SHAPES[name].config(layers)
    config.vocab_size = 4096
    return config


def with_lora(model, checkpointing):
    add_lora(model, TrainConfig()).train()
    if checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)({"use_reentrant": False})
    return model


@cache
def models(name, checkpointing, dtype):
    """Without storage, and with it."""
    config = shape_config(name)
    meta, real = (
        with_lora(random_model(config, dtype=dtype, device=device), checkpointing) for device in ("meta", "cpu")
    )
    lm = CausalLM.from_model(real)
    for parameter in lm.model.train().parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    return meta, lm


class Saved:
    """Bytes of the storages that autograd keeps for backward, parameters and buffers apart."""

    def __init__(self, model):
        self.bytes = 0
        self._known = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
        self._kept = []  # alive, or another tensor may come to lie there

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self._kept.append(storage)
            self.bytes += storage.nbytes()
        return tensor


@pytest.mark.parametrize(
    ("name", "dtype", "checkpointing", "factor"),
    [
        ("smollm2-135m", torch.float32, False, 1.0),
        ("smollm2-135m", torch.float32, True, 0.0),
        ("qwen2.5-0.5b", torch.bfloat16, False, 1.0),
    ],
)
def test_what_autograd_saves_and_the_peak(name, dtype, checkpointing, factor):
    (meta, lm), length, num_steps = models(name, checkpointing, dtype), 24, 3
    predicted = step_memory(meta, [PromptShape(ROWS, length)], num_steps, factor, cuda=False)
    ids = torch.randint(0, 4096, (ROWS, length))

    def step():
        states = rollout(lm, ids, torch.ones_like(ids), num_steps, soft_token_gradient=factor).steps
        states.backward(torch.ones_like(states))

    saved = Saved(lm.model)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        step()
    kept = predicted.keys_values + predicted.prompt + predicted.steps
    assert predicted.keys_values == 2 * ROWS * 2 * lm.model.config.num_key_value_heads * length * 64 * dtype.itemsize
    if not checkpointing:  # a checkpoint's inputs are not saved tensors, and what it saves in backward is
        assert kept == pytest.approx(saved.bytes, rel=WITHIN)
    del saved
    assert predicted.peak == pytest.approx(peak_extra_bytes(step, torch.device("cpu")), rel=WITHIN)


def test_the_peak_with_some_layers_checkpointed():
    config, kept = shape_config("smollm2-135m", 4), 2
    settings = TrainConfig(dtype="float32", gradient_checkpointing=True, checkpointed_layers=kept)
    models = {
        count: TracedModel.of(
            replace(settings, gradient_checkpointing=count != 0, checkpointed_layers=count or None), config
        )
        for count in (0, 1, None)
    }
    sizes = [PromptShape(ROWS, 24)], 3, 0.0
    none, some, every = (
        PartlyCheckpointed(models.__getitem__, count).memory(*sizes, cuda=False).peak for count in (0, kept, None)
    )
    model = trainable_model(settings, GIRCSE(random_model(config, dtype=torch.float32, device="cpu"), tiny_tokenizer()))
    on = [layer.gradient_checkpointing for layer in model.causal_lm.body.layers]
    assert on == [True, True, False, False]
    for parameter in model.train().parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    ids = torch.randint(0, 4096, (ROWS, 24))

    def step():
        states = rollout(model.causal_lm, ids, torch.ones_like(ids), 3, soft_token_gradient=0.0).steps
        states.backward(torch.ones_like(states))

    step()
    measured = peak_extra_bytes(step, torch.device("cpu"))
    assert some == pytest.approx(measured, rel=WITHIN)
    assert some < 0.7 * none
    assert every < none


@pytest.mark.parametrize(("name", "checkpointing", "factor"), [("smollm2-135m", False, 0.0), ("mistral-7b", True, 1.0)])
def test_depth_and_rows_are_extrapolated_exactly(name, checkpointing, factor):
    """What is counted at 2 and 3 layers, and at one row and two, is what 5 layers and 3 rows take."""
    config = TrainConfig(dtype="bfloat16", gradient_checkpointing=checkpointing)
    shape = shape_config(name, 5)
    model = TracedModel.of(config, shape)
    assert len(model.cut) == 2
    whole = step_memory(model.base, [PromptShape(3, 40)], 1, factor, cuda=True)
    assert model.memory([PromptShape(3, 40)], 1, factor) == whole
    one, two = (model.memory([PromptShape(rows, 40)], 1, factor) for rows in (1, 2))
    assert one.extrapolated(two, 2).peak == pytest.approx(whole.peak, rel=1e-3)


def test_layers_of_alternating_types():
    """Gemma 2 has windows in every second layer."""
    config = CONFIGS["gemma2"]()
    config.num_hidden_layers, config.layer_types = 8, config.layer_types * 4
    model = TracedModel.of(TrainConfig(), config)
    assert [base.config.num_hidden_layers for base in model.cut] == [4, 6]
    assert model.memory([PromptShape(2, 20)], 1, 0) == step_memory(model.base, [PromptShape(2, 20)], 1, 0, cuda=True)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "gemma", "gemma3", "gpt2"])
def test_every_architecture_can_be_counted(name):
    memory = TracedModel.of(TrainConfig(), CONFIGS[name]()).memory([PromptShape(2, 12)], 2, 0.0)
    assert min(memory.keys_values, memory.prompt, memory.steps) > 0
    assert memory.peak >= memory.keys_values + memory.prompt + memory.steps


def test_live_bytes_forget_what_dies_and_count_a_storage_once():
    known = torch.empty(100, device="meta")
    with LiveBytes([known]) as live:
        one = torch.empty(10, device="meta")
        view = one.view(2, 5)
        known.add_(1)
        assert live.now == 40
        two = one * 2
        assert (live.now, live.peak) == (80, 80)
        del one
        gc.collect()
        assert live.now == 80  # the view holds it
        del view
        assert (live.now, live.peak) == (40, 80)
        live.cut()
        assert (live.moments, live.peak) == ([80], 40)
    assert two.numel() == 10


def test_a_model_with_storage_is_refused():
    with pytest.raises(ValueError, match="base: got parameters with storage"):
        step_memory(tiny_model("llama"), [PromptShape(1, 4)], 1, 1.0, cuda=False)


@pytest.mark.parametrize(("rows", "name"), [(48, "smollm2-135m"), (3000, "mistral-7b")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_workspace_on_a_gpu_is_what_the_launcher_allocates(rows, name, dtype):
    """The launchers run on tensors without storage; what they allocate beside the results."""
    from gircse_kernels.plan import Device

    from bench.static.launches import Call, allocated_bytes

    model = random_model(shape_config(name, 1), dtype=dtype, device="meta")
    lm = CausalLM(model, model.base_model)
    width, tied = lm.hidden_size, lm.head_weight is lm.embed_weight
    vocab = lm.head_weight.shape[0]
    call = Call("soft_embed", (rows, vocab, width, width), str(dtype).removeprefix("torch."), tied, True)
    planned, allocated = _kernel_workspace(rows, lm, dtype), allocated_bytes(call, Device(90, 132))
    results = 2 * 4 * rows * width + 12 * rows  # in float32, and in the dtype; three numbers a row
    # sums over chunks have memory of their own only where no exact result is kept
    assert -4 * rows * width <= allocated.forward - planned.forward - planned.kept <= results
    # with P kept, hidden states and upstream gradients need not be stacked for one product
    stacked = 2 * rows * width * dtype.itemsize if planned.kept and tied else 0
    assert -stacked <= allocated.backward - planned.backward <= results
    assert bool(planned.kept) == (vocab * rows * dtype.itemsize <= 64 << 20 and (rows > 32 or dtype == torch.float32))


def test_a_tiny_step_is_not_charged_the_largest_workspace():
    config = TrainConfig(dtype="float32", gradient_checkpointing=True)
    few = TracedModel.of(config, SHAPES["smollm2-135m"].config(2))
    batches = [PromptShape(2, 16), PromptShape(4, 16)]
    assert few.memory(batches, 2, 1.0).peak < 10 << 20
    assert few.memory(batches, 2, 1.0, any_rows=True).peak > 64 << 20
