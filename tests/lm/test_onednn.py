"""oneDNN's products during gircse's own passes; no layer of the model that was handed in is changed."""

from __future__ import annotations

import contextlib
import copy
import itertools
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from gircse import GIRCSE, GircseConfig
from gircse.lm import onednn as cpu_linear
from gircse.lm.onednn import _HERE, FEW_ROWS, onednn_linears
from tests.lm.test_rollout import with_lora
from tests.tiny_models import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.skipif(not _HERE, reason="oneDNN's linear is not in this build of PyTorch")

BIASES = list(itertools.product([True, False], itertools.product([True, False], repeat=2)))
ROWS = torch.empty(1, FEW_ROWS + 1)  # what `onednn_linears` is told of a pass


@pytest.fixture
def products(monkeypatch):
    """The number of products that oneDNN made, in a list of one."""
    made = [0]

    def counted(*args):
        made[0] += 1
        return product(*args)

    product = cpu_linear._product
    monkeypatch.setattr(cpu_linear, "_product", counted)
    return made


@pytest.mark.parametrize("shape", [(70, 33), (2, 50, 33), (7, 33), (0, 33)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("wanted", list(itertools.product([True, False], repeat=2)))
def test_values_and_gradients_are_those_of_linear(shape, bias, wanted, products):
    layer = nn.Linear(33, 19, bias=bias).requires_grad_(wanted[1])
    x = torch.randn(shape).requires_grad_(wanted[0])
    tensors = [t for t in (x, *layer.parameters()) if t.requires_grad]
    exact = F.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    plain = layer(x)
    with onednn_linears(layer, ROWS):
        ours = layer(x)
    assert products == [int(x.numel() > FEW_ROWS * 33)]
    error = [(out.double() - exact).norm() for out in (plain, ours)]
    assert error[1] <= 2 * error[0] + 1e-6
    assert ours.requires_grad == any(wanted)
    if any(wanted):
        upstream = torch.randn_like(ours)
        expected, got = (torch.autograd.grad(out, tensors, upstream) for out in (plain, ours))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_second_derivatives(bias):
    """A gradient penalty, and many gradients at once."""
    layer, x = nn.Linear(9, 5, bias=bias), torch.randn(FEW_ROWS + 6, 9, requires_grad=True)
    with onednn_linears(layer, ROWS):
        ours = layer(x)

    def penalty(out):
        grads = torch.autograd.grad(out.tanh().square().sum(), [x, layer.weight], create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), [x, *layer.parameters()])

    vectors = torch.randn(3, *ours.shape)
    torch.testing.assert_close(penalty(ours), penalty(layer(x)), rtol=1e-4, atol=1e-5)
    with onednn_linears(layer, ROWS):
        ours = layer(x)
    batched = [torch.autograd.grad(out, x, vectors, is_grads_batched=True) for out in (ours, layer(x))]
    torch.testing.assert_close(*batched, rtol=1e-5, atol=1e-5)


def test_transforms_are_left_to_pytorch(products):
    layer, x = nn.Linear(9, 5), torch.randn(4, FEW_ROWS + 6, 9)

    def loss(rows):
        return layer(rows).tanh().square().sum()

    with onednn_linears(layer, ROWS):
        each = torch.func.vmap(torch.func.grad(loss))(x)
        _, tangent = torch.func.jvp(layer, (x[0],), (x[1],))
    assert products == [0]
    torch.testing.assert_close(each, torch.stack([torch.func.grad(loss)(rows) for rows in x]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(tangent, F.linear(x[1], layer.weight), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("bias", "wanted"), BIASES)
def test_what_is_kept_for_backward_is_what_linear_keeps(bias, wanted):
    """So that checkpointing which somebody put around a layer recomputes it outside of our pass."""
    layer = nn.Linear(5, 4, bias=bias).requires_grad_(wanted[1])
    x = torch.randn(2, FEW_ROWS, 5, requires_grad=wanted[0])
    kept = []
    for context in (contextlib.nullcontext(), onednn_linears(layer, ROWS)):
        shapes = []
        with context, torch.autograd.graph.saved_tensors_hooks(lambda t, s=shapes: s.append(t.shape) or t, lambda t: t):
            layer(x)
        kept.append(shapes)
    assert kept[0] == kept[1]
    if any(wanted):
        with onednn_linears(layer, ROWS):
            out = checkpoint(layer, x, use_reentrant=False)
        got = torch.autograd.grad(out.square().sum(), [t for t in (x, *layer.parameters()) if t.requires_grad])
        expected = torch.autograd.grad(
            layer(x).square().sum(), [t for t in (x, *layer.parameters()) if t.requires_grad]
        )
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_and_autocast_are_left_to_pytorch(dtype, products):
    layer, x = nn.Linear(8, 8).to(dtype), torch.randn(FEW_ROWS + 1, 8, dtype=dtype)
    with onednn_linears(layer, ROWS):
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer.float()(x.float()).dtype == torch.bfloat16
    assert products == [0]


def long_batch():
    ids = torch.randint(3, 131, (9, 12))
    return ids, torch.ones_like(ids)


def test_the_model_behaves_as_it_came(products):
    """Outside of our passes, also in another thread during one, a model that was handed in is PyTorch's."""
    stock = tiny_model("llama", attn="sdpa")
    ours = tiny_model("llama")
    model = GIRCSE(ours, tiny_tokenizer())
    assert all(type(m) is nn.Linear for m in ours.modules() if isinstance(m, nn.Linear))
    model.rollout(*long_batch(), 1)
    made = products[0]
    assert made > 0
    ids, _ = long_batch()

    def gradient_penalty(lm):
        embeds = lm.get_input_embeddings()(ids).detach().requires_grad_()
        (grad,) = torch.autograd.grad(lm(inputs_embeds=embeds).logits.square().mean(), embeds, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), lm.model.layers[0].mlp.up_proj.weight)[0]

    with sdpa_kernel(SDPBackend.MATH):  # the other one on a CPU has no second derivative
        expected, got = gradient_penalty(stock), gradient_penalty(ours)
    assert expected.norm() > 0
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-9)
    mlp, x = ours.model.layers[0].mlp, torch.randn(3, FEW_ROWS + 1, 32)
    torch.testing.assert_close(torch.func.vmap(mlp)(x), mlp(x))
    with onednn_linears(ours, ROWS):
        thread = threading.Thread(target=ours, args=(ids,))
        thread.start()
        thread.join()
    assert products[0] == made
    quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(ours), {nn.Linear})
    assert not any(type(m) is nn.Linear for m in quantized.model.modules())


def test_checkpointed_layers_recompute_what_they_computed(products):
    """Bitwise the gradient without checkpointing: the recomputation in backward takes the same products."""
    gradients, batch = [], long_batch()
    for checkpointing in (False, True):
        model = GIRCSE(with_lora(tiny_model("llama")), tiny_tokenizer()).train()
        before = products[0]
        if checkpointing:
            model.gradient_checkpointing_enable()
        steps = model.rollout(*batch, 2)
        left = [m._gradient_checkpointing_func for m in model.causal_lm.body.layers if checkpointing]
        assert not any(isinstance(function, cpu_linear._RecomputedAlike) for function in left)
        forward = products[0] - before
        steps.square().sum().backward()
        assert forward > 0
        assert (products[0] - before > forward) == checkpointing
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_nothing_of_it_is_compiled(products):
    torch._dynamo.reset()
    model = GIRCSE(tiny_model("llama", num_hidden_layers=1), tiny_tokenizer(), GircseConfig(num_steps=0))
    batch = long_batch()
    expected = model(*batch)
    made = products[0]
    assert made > 0
    whole = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(whole(*batch), expected, rtol=1e-4, atol=1e-5)
    model.causal_lm.body.compile(backend="aot_eager")
    torch.testing.assert_close(model(*batch), expected, rtol=1e-4, atol=1e-5)
    assert products[0] == made


def test_short_passes_go_without_the_mode(monkeypatch):
    model = GIRCSE(tiny_model("llama"), tiny_tokenizer())
    monkeypatch.setattr(cpu_linear, "_mode", lambda: pytest.fail("a mode costs a little for every call of PyTorch"))
    ids = torch.randint(3, 131, (2, 9))
    model.rollout(ids, torch.ones_like(ids), 1)
