from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

from gircse.cpu_linear import _HERE, FEW_ROWS, OneDNNLinear, use_onednn

pytestmark = pytest.mark.skipif(not _HERE, reason="oneDNN's linear is not in this build of PyTorch")


@pytest.mark.parametrize("shape", [(70, 33), (2, 50, 33), (7, 33), (0, 33)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("wanted", list(itertools.product([True, False], repeat=2)))
def test_values_and_gradients_are_those_of_linear(shape, bias, wanted):
    plain = nn.Linear(33, 19, bias=bias).requires_grad_(wanted[1])
    ours = copy.deepcopy(plain)
    use_onednn(ours)
    assert type(ours) is OneDNNLinear
    inputs = [torch.randn(shape).requires_grad_(wanted[0])]
    inputs.append(inputs[0].detach().clone().requires_grad_(wanted[0]))
    exact = nn.functional.linear(inputs[0].double(), plain.weight.double(), plain.bias.double() if bias else None)
    outputs = [layer(x) for layer, x in zip((plain, ours), inputs, strict=True)]
    error = [(out.double() - exact).norm() for out in outputs]
    assert error[1] <= 2 * error[0] + 1e-6
    assert outputs[1].requires_grad == any(wanted)
    if any(wanted):
        upstream = torch.randn_like(outputs[0])
        for out in outputs:
            out.backward(upstream)
        pairs = [(inputs[0].grad, inputs[1].grad), (plain.weight.grad, ours.weight.grad)]
        pairs += [(plain.bias.grad, ours.bias.grad)] if bias else []
        for theirs, mine in pairs:
            assert (theirs is None) == (mine is None)
            if theirs is not None:
                torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_a_frozen_layer_does_not_keep_its_input():
    layer = nn.Linear(4, 4).requires_grad_(False)
    use_onednn(layer)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        layer(torch.randn(FEW_ROWS + 1, 4, requires_grad=True))
    assert kept == [(4, 4)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_left_to_pytorch(dtype):
    layer = nn.Linear(8, 8).to(dtype)
    plain = copy.deepcopy(layer)
    use_onednn(layer)
    x = torch.randn(3, 8, dtype=dtype)
    assert torch.equal(layer(x), plain(x))


def test_autocast_and_subclasses_are_left_alone():
    class Mine(nn.Linear):
        pass

    model = nn.Sequential(Mine(4, 4), nn.Linear(4, 4))
    use_onednn(model)
    assert [type(m) for m in model] == [Mine, OneDNNLinear]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(torch.randn(2, 4)).dtype == torch.bfloat16
    assert isinstance(model[1], nn.Linear)
    assert list(model.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias"]
