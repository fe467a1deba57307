"""What the ops launch and allocate on a GPU, without one: they run on meta tensors, and each start is written down.

`launching.launch` and `launching.product` are the only places where work for a GPU begins, so both are replaced here.
Everything before them, the choice of the plan and the size of every buffer, is the code that a GPU would run.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from gircse_kernels import decoder as decoder_kernels
from gircse_kernels import info_nce as info_nce_kernels
from gircse_kernels import launching
from gircse_kernels.contract import Inputs, Options, Truncation
from gircse_kernels.plan import Config, Device, Problem
from torch.utils._python_dispatch import TorchDispatchMode

from gircse.ops import info_nce_op, soft_embed_op, soft_embed_triton, stepwise_info_nce

# The largest chip of each architecture that the compile report knows.
DEVICES = {arch: Device(arch, num_sms) for arch, num_sms in ((80, 108), (90, 132), (100, 148))}
VARIANTS = ("statistics", "scores", "noise", "threshold", "top_k", "top_p", "hard", "matrices")


class Launch(NamedTuple):
    """One start of a Triton kernel, with the arguments of `launching.launch`."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    config: Config
    constants: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.__name__


class Product(NamedTuple):
    """One matrix product that cuBLAS makes: [rows, depth] times [depth, columns]."""

    rows: int
    columns: int
    depth: int
    itemsize: int
    add: bool  # to what is there


class Recording(NamedTuple):
    """Everything that a call started, in order."""

    launches: list[Launch]
    products: list[Product]


class Call(NamedTuple):
    """A call of an op whose launches are wanted.

    Attributes:
        op: "soft_embed", "info_nce", "product" (our own of float32 matrices), "decode_attention" or "decoder" (each
            step of a layer once, and a step's end).
        sizes: T, V, D, E (D = 0: logits are given); or B, M, K, D; or M, K, N; or T, S, D, E, H, H_kv (rows, slots,
            widths of a key and of a value, heads); or T, D, H, H_kv, d, r / 2, I (rows, width, heads, columns of a head
            and half of those that are rotated, columns of the MLP).
        dtype: a name of torch's.
        tied: the embedding table is the head.
        backward: the gradients of the hidden states, or of both sides of the loss, too.
        variants: of `VARIANTS`, in this order: return_stats; bias, soft-cap and a temperature for each row (the loss:
            a mask, `include_queries` and `symmetric`; the attention: a window and a soft-cap; the decoder: Gemma
            3's norms and activation); a seed for each row; a lowest score for each row; a selection first, with
            top_k = 30 and top_p = 0.95, or top_p alone; hard rows; gradients of the matrices, too.
    """

    op: str
    sizes: tuple[int, ...]
    dtype: str
    tied: bool = True
    backward: bool = False
    variants: tuple[str, ...] = ()

    @property
    def problem(self) -> Problem:
        """The numbers that the plan of `soft_embed` depends on."""
        return Problem(*self.sizes, self.tied, getattr(torch, self.dtype).itemsize)  # type: ignore[arg-type, call-arg]

    @property
    def name(self) -> str:
        """For people: the op, its sizes and what else the call has."""
        given = self.op == "soft_embed" and self.problem.width == 0
        words = [self.op, "x".join(map(str, self.sizes)), self.dtype, *(["logits"] if given else [])]
        words += ["tied"] if self.tied and self.op == "soft_embed" else []
        return " ".join([*words, *(["backward"] if self.backward else []), *self.variants])

    def prepare(self) -> Prepared:
        """The call, with its inputs made."""
        empty = functools.partial(torch.empty, dtype=getattr(torch, self.dtype), device="meta")
        ops = {"soft_embed": _soft_embed, "info_nce": _info_nce, "decode_attention": _decode_attention}
        return {**ops, "decoder": _decoder, "product": _product}[self.op](self, empty)


class Prepared(NamedTuple):
    """`forward()` gives the results, and `backward(results)` the gradients where they are wanted."""

    forward: Callable[[], Any]
    backward: Callable[[Any], Any] | None = None


class Bytes(NamedTuple):
    """The most that is held at once beyond what was there before, results included."""

    forward: int
    backward: int  # 0: there was none


def _soft_embed(call: Call, empty: Callable[..., torch.Tensor]) -> Prepared:
    rows, vocab, width, value_width = call.sizes
    train = call.backward and "matrices" in call.variants
    scores, statistics = "scores" in call.variants, "statistics" in call.variants
    float32 = functools.partial(empty, rows, dtype=torch.float32)
    inputs = Inputs(
        empty(rows, width or vocab, requires_grad=call.backward),
        empty(vocab, width, requires_grad=train) if width else None,
        None if call.tied else empty(vocab, value_width, requires_grad=train),
        empty(vocab, requires_grad=train) if scores else None,
        float32(requires_grad=train) if scores else None,
        seeds=empty(rows, dtype=torch.int64) if "noise" in call.variants else None,
        threshold=float32() if "threshold" in call.variants else None,
        hard=empty(rows, dtype=torch.bool) if "hard" in call.variants else None,
    )
    options = Options(softcap=30.0 if scores else None)
    grad, vector = empty(rows, value_width), float32()
    leaves = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]

    def backward(results: soft_embed_op.Results) -> Any:
        upstream = (results.out, results.lse, results.entropy) if statistics else (results.out,)
        return torch.autograd.grad(upstream, leaves, (grad, vector, vector)[: len(upstream)])  # type: ignore[arg-type]

    op_call = soft_embed_op.Call(options, stats=statistics, exact=call.backward)
    top_p = float32() if "top_k" in call.variants or "top_p" in call.variants else None
    rules = Truncation(empty(rows, dtype=torch.int64) if "top_k" in call.variants else None, top_p)

    def forward() -> Any:
        kept = inputs
        if top_p is not None:
            plain = inputs._replace(seeds=None)
            found = soft_embed_triton.select(plain, options, rules, 0 if rules.top_k is None else 32)
            lists = dict(zip(("ids", "scores", "num_kept"), found[5:], strict=True))
            kept = inputs._replace(threshold=found.threshold, **lists)
        return soft_embed_op.run(kept, op_call)

    return Prepared(forward, backward if call.backward else None)


def _info_nce(call: Call, empty: Callable[..., torch.Tensor]) -> Prepared:
    rows, candidates, steps, width = call.sizes
    inputs = [empty(n, steps, width, requires_grad=call.backward) for n in (rows, candidates)]
    mask = empty(rows, candidates, dtype=torch.bool) if "scores" in call.variants else None
    both = mask is not None
    return Prepared(
        lambda: stepwise_info_nce(*inputs, mask=mask, include_queries=both, symmetric=both),
        (lambda loss: torch.autograd.grad(loss, inputs, torch.empty_like(loss))) if call.backward else None,
    )


def _product(call: Call, empty: Callable[..., torch.Tensor]) -> Prepared:
    rows, inner, columns = call.sizes
    a, b, out = empty(rows, inner), empty(inner, columns), empty(rows, columns)
    return Prepared(lambda: launching.tf32x3_product(a, b, out, add=False))


def _decode_attention(call: Call, empty: Callable[..., torch.Tensor]) -> Prepared:
    rows, slots, width, value_width, heads, kv_heads = call.sizes
    query, key = empty((rows, heads, width)), empty((rows, kv_heads, slots, width))
    value, position = empty((rows, kv_heads, slots, value_width)), empty(rows, dtype=torch.int64)
    options = {"window": slots // 2, "softcap": 50.0} if "scores" in call.variants else {}
    options["arrivals"] = empty(rows * heads, dtype=torch.int32)
    op = decoder_kernels.decode_attention
    return Prepared(functools.partial(op, query, key, value, position, scale=width**-0.5, **options))


def _decoder(call: Call, empty: Callable[..., torch.Tensor]) -> Prepared:
    rows, width, heads, kv_heads, size, half, inner = call.sizes
    gemma = "scores" in call.variants
    x, delta, weight, head_weight = empty(rows, width), empty(rows, width), empty(width), empty(size) if gemma else None
    qkv, keys, values = empty(rows, (heads + 2 * kv_heads) * size), *empty(2, rows, kv_heads, 64, size)
    cos, sin = empty(2, 64, half, dtype=torch.float32)
    position, row, step = empty(3, rows, dtype=torch.int64)
    norm: dict[str, Any] = {"eps": 1e-6, "offset": float(gemma)}
    post = {**norm, "delta_weight": weight if gemma else None}

    def forward() -> None:
        ops = decoder_kernels
        ops.add_rms_norm(x, None, weight, **norm)
        ops.rotary_write(qkv, cos, sin, position, row, keys, values, q_norm=head_weight, k_norm=head_weight, **norm)
        ops.add_rms_norm(x, delta, weight, **post)
        ops.gated(empty(rows, 2 * inner), "gelu_tanh" if gemma else "silu")
        ops.finish_step(x, delta, weight, empty(rows, 32, width), position, step, **post)

    return Prepared(forward)


def launches(call: Call, device: Device) -> list[Launch]:
    """The Triton kernels that the device would be asked to run."""
    return record(call, device).launches


def record(call: Call, device: Device) -> Recording:
    """Everything that the call starts on that device."""
    with recorded(device) as recording:
        forward, backward = call.prepare()
        results = forward()
        if backward is not None:
            backward(results)
    return recording


def allocated_bytes(call: Call, device: Device) -> Bytes:
    """What the call allocates on that device; backward beyond what forward left."""
    with Allocations() as allocations, recorded(device):
        launching.launch = lambda *_, **__: None  # a recording would keep every buffer
        forward, backward = call.prepare()
        before = allocations.restart()
        results = forward()
        first = allocations.peak - before
        if backward is None:
            return Bytes(first, 0)
        before = allocations.restart()
        gradients = backward(results)
        del gradients  # until here they count
        return Bytes(first, allocations.peak - before)


@contextmanager
def recorded(device: Device) -> Iterator[Recording]:
    """Inside, ops take meta tensors for those of a GPU like `device`, and their kernels are noted and not started."""
    recording = Recording([], [])

    def launch(kernel: Any, grid: Any, arguments: Any, config: Any, **constants: Any) -> None:
        recording.launches.append(Launch(kernel, grid, arguments, config, constants))

    def product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, *, add: bool = False) -> None:
        recording.products.append(Product(a.shape[0], b.shape[1], a.shape[1], a.itemsize, add))

    def batched_product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, *, add: bool = False) -> None:
        recording.products.append(Product(a.shape[1], b.shape[2], a.shape[0] * a.shape[2], a.itemsize, add))

    with ExitStack() as stack:

        def replace(owner: Any, name: str, value: Callable[..., Any]) -> None:
            stack.enter_context(patch.object(owner, name, value))

        replace(launching, "launch", launch)
        if hasattr(launching, "product"):
            replace(launching, "product", product)
        if hasattr(launching, "batched_product"):
            replace(launching, "batched_product", batched_product)
        for name, module in list(sys.modules.items()):
            if name.startswith("gircse_kernels.") and hasattr(module, "device_of"):
                replace(module, "device_of", lambda *_: device)
        replace(soft_embed_op, "_module", lambda *_: soft_embed_triton)
        replace(info_nce_op, "_module", lambda *_: info_nce_kernels)
        replace(torch, "is_autocast_enabled", lambda *_: False)  # PyTorch has no autocast for meta tensors
        replace(torch, "autocast", lambda *_, **__: nullcontext())
        yield recording


class Allocations(TorchDispatchMode):
    """The most bytes of fresh tensors that are alive at once."""

    looks_on = True

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self.seen: set[int] = set()

    def restart(self) -> int:
        """Forgets the peak. Returns the bytes that are alive now."""
        self.peak = self.alive
        return self.alive

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.seen:
                    self.seen.add(storage._cdata)
                    self.alive += storage.nbytes()
                    self.peak = max(self.peak, self.alive)
                    weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        return result

    def _free(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.alive -= size
