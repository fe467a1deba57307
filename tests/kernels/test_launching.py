"""How a kernel is started: compiled kernels are kept, and each fits whatever it is started with."""

from __future__ import annotations

import importlib
import pkgutil
from inspect import signature
from itertools import combinations
from typing import Any

import gircse_kernels
import pytest
import torch
from gircse_kernels import launching
from gircse_kernels.plan import Config
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton._C.libtriton import native_specialize_impl
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.tools.tensor_descriptor import TensorDescriptor

from bench.static.launches import DEVICES, Call, recorded

BYTES = torch.zeros(256, dtype=torch.int8)
ALIGNED = next(BYTES[i:] for i in range(16) if BYTES[i:].data_ptr() % 16 == 0)
ARGUMENTS = [
    None, 0.5, 1.0, 0, 1, 2, 8, 16, 48, -1, -16, 2**31 - 1, 2**31, -(2**31), -(2**31) - 16, 2**62,
    *(ALIGNED[start : start + 64].view(dtype) for dtype in (torch.float32, torch.bfloat16) for start in (0, 4, 16)),
    torch.nn.Parameter(ALIGNED[:64].view(torch.float16)), ALIGNED[:64].view(torch.int64), ALIGNED[:64],
    *(TensorDescriptor.from_tensor(torch.zeros(16, 64).to(d), [w, 32])
      for d in (torch.float32, torch.bfloat16) for w in (8, 16)),
    TensorDescriptor.from_tensor(torch.zeros(16, 64), [16, 64]),
]  # fmt: skip


class Kernel:
    """Stands for a compiled `triton.jit` function: notes what Triton is asked and what the compiled kernel gets."""

    def __init__(self) -> None:
        self.fn = object()
        self.params = [type("P", (), {"name": n, "is_constexpr": n.isupper()}) for n in ("a", "n", "SWITCH", "BLOCK")]
        self.compiled: list[tuple[Any, ...]] = []
        self.started: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def through_triton(*arguments: Any, **constants: Any) -> dict[tuple[int, int, int], Any]:
            self.compiled.append((grid, *arguments, constants))
            return Compiled(self)  # type: ignore[return-value]

        return through_triton


class Compiled:
    """What Triton's launcher takes: three numbers of programs, the stream, the function, its metadata, hooks."""

    function, packed_metadata = "function", "metadata"

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def run(self, x: int, y: int, z: int, *rest: Any) -> None:
        assert rest[:6] == ("stream", "function", "metadata", None, None, None)
        self.kernel.started.append(((x, y, z), *rest[6:]))


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)  # the index of a CPU tensor's device
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: "stream", raising=False)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_triton_is_asked_once_for_each_specialisation() -> None:
    kernel, config = Kernel(), Config({"BLOCK": 64}, 4, 2)
    first, second = ALIGNED[:64], ALIGNED[16:64]

    def start(tensor: Tensor, number: int, config: Config = config, switch: bool = True) -> int:
        launching.launch(kernel, (3,), (tensor, number), config, SWITCH=switch)
        return len(kernel.compiled)

    assert start(first, 5) == 1
    assert kernel.compiled[0][-1] == {"SWITCH": True, "BLOCK": 64, "num_warps": 4, "num_stages": 2}
    assert start(second, 7) == 1
    assert kernel.started == [((3, 1, 1), second.data_ptr(), 7, True, 64)]
    for differs, count in [
        (lambda: start(ALIGNED[8:64], 5), 2),  # not aligned
        (lambda: start(first, 16), 3),
        (lambda: start(first, 1), 4),
        (lambda: start(first, 2**31 + 1), 5),
        (lambda: start(first.view(torch.int16), 5), 6),
        (lambda: start(first, 5, Config({"BLOCK": 32}, 4, 2)), 7),
        (lambda: start(first, 5, Config({"BLOCK": 64}, 8, 2)), 8),
        (lambda: start(first, 5, switch=False), 9),
        (lambda: start(first, 5, Config({"BLOCK": 64}, 4, 2)), 9),
    ]:
        assert differs() == count


@pytest.mark.parametrize("arch", [80, 90])
def test_arguments_that_share_a_kernel_are_alike_to_triton(arch: int) -> None:
    backend = make_backend(GPUTarget("cuda", arch, 32))

    def triton(argument: Any) -> Any:
        return native_specialize_impl(backend, argument, False, True, True)

    for one, other in combinations(ARGUMENTS, 2):
        if launching._compiled_for((one,))[0] == launching._compiled_for((other,))[0]:
            assert triton(one) == triton(other), (one, other)
    assert len(set(launching._compiled_for(tuple(ARGUMENTS))[0])) < len(ARGUMENTS)


def test_other_arguments_are_refused() -> None:
    with pytest.raises(AssertionError, match="a kernel's argument: True"):
        launching._compiled_for((True,))


def test_the_constants_of_every_kernel_come_last() -> None:
    """A compiled kernel takes them after the arguments."""
    kernels = {
        name: function
        for module in pkgutil.walk_packages(gircse_kernels.__path__, "gircse_kernels.")
        for name, function in vars(importlib.import_module(module.name)).items()
        if name.endswith("_kernel")
    }
    assert len(kernels) >= 8
    for name, kernel in kernels.items():
        constant = ["constexpr" in str(p.annotation) for p in signature(kernel.fn).parameters.values()]
        assert constant == sorted(constant), name
        assert not constant[0], name


class Made(TorchDispatchMode):
    """Keeps everything that operators return."""

    looks_on = True

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.tensors += [
            t for t in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(t, Tensor)
        ]
        return result


@pytest.mark.parametrize("rows", [1, 2, 32])
@pytest.mark.parametrize("variants", [(), ("statistics", "scores", "noise", "threshold")], ids=["plain", "all options"])
def test_a_decoding_step_is_three_launches_at_most_and_makes_what_it_needs(
    rows: int, variants: tuple[str, ...]
) -> None:
    """Every tensor that is made is returned or passed to a kernel."""
    with Made() as made, recorded(DEVICES[90]) as recording:
        run = Call("soft_embed", (rows, 50_304, 896, 896), "bfloat16", variants=variants).prepare().forward
        made.tensors.clear()
        results = run()
    used = [argument for launch in recording.launches for argument in launch.arguments] + list(results)
    places = {tensor.untyped_storage()._cdata for tensor in used if isinstance(tensor, Tensor)}
    assert {tensor.untyped_storage()._cdata for tensor in made.tensors} <= places
    assert 1 <= len(recording.launches) <= 3
    assert recording.products == []
