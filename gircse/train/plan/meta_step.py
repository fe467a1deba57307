"""The memory of a training step, counted on tensors that have no storage.

On the meta device PyTorch does everything but compute: shapes, dtypes and autograd's saved tensors are those of the
real step, for every architecture, and with activation checkpointing. A dispatch mode counts the bytes of each storage
while it lives; the largest sum is the peak. Attention, LoRA's dropout and `soft_embed` are single kernels on a real
device. A stand-in for each of them keeps and allocates what the kernel keeps and allocates.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gircse.lm.attention import ATTENTION_NAME, PromptPass, RolloutKV
from gircse.lm.causal_lm import CausalLM
from gircse.lm.lora import fused_lora
from gircse.lm.rollout import rollout
from gircse.ops.backends import TRITON_DTYPES, kernels
from gircse.ops.tiles_torch import ROW_TILE, VOCAB_CHUNK, WORKSPACE_BYTES, accumulation_dtype
from gircse.train.capture.checkpoints import checkpoints_without_generator

# Whose plans: an H100's compute capability and multiprocessors. Another GPU's hold as much within a few MiB.
_DEVICE = (90, 132)


class PromptShape(NamedTuple):
    """Prompts that are rolled out together: `rows` of `length` tokens each, padding included."""

    rows: int
    length: int


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a forward and backward beside parameters, their gradients and the optimizer.

    Attributes:
        keys_values: keys and values of the prompts, kept for the steps and for backward.
        prompt: everything else that the prompt passes leave alive, mostly what autograd saved.
        steps: what the generated steps add to that.
        moments: the peak of each part of the step: up to the first soft token, up to the second, .., up to the end of
            the rollout, and so on in backward.
    """

    keys_values: int
    prompt: int
    steps: int
    moments: tuple[int, ...]

    @property
    def peak(self) -> int:
        """The most bytes that are alive at once."""
        return max(self.moments)

    def extrapolated(self, other: StepMemory, times: float) -> StepMemory:
        """self + times (other - self), because every part is affine in the number of layers, and of rows."""

        def on(a: int, b: int) -> int:
            return round(a + times * (b - a))

        return StepMemory(
            on(self.keys_values, other.keys_values),
            on(self.prompt, other.prompt),
            on(self.steps, other.steps),
            tuple(map(on, self.moments, other.moments)),
        )

    def at_least(self, other: StepMemory) -> StepMemory:
        """The larger of both, part by part."""
        return StepMemory(
            max(self.keys_values, other.keys_values),
            max(self.prompt, other.prompt),
            max(self.steps, other.steps),
            tuple(map(max, self.moments, other.moments)),
        )

    @property
    def temporaries(self) -> int:
        """What the peak needs beyond what forward leaves: a layer's buffers in backward, workspaces, the loss."""
        return self.peak - self.keys_values - self.prompt - self.steps


def step_memory(
    base: Any,
    prompts: Sequence[PromptShape],
    num_steps: int,
    soft_token_gradient: float,
    *,
    cuda: bool,
    captured: bool = False,
    loss_bytes: int = 0,
    any_rows: bool = False,
) -> StepMemory:
    """The memory of one rollout after the other, then one backward through all of them.

    Args:
        base: a `PreTrainedModel` on the meta device in train mode, with its adapters and checkpointing; it is switched
            to the rollout's attention function.
        prompts: one micro-batch, or all rollouts that are kept at once where the batch is not divided.
        num_steps: K >= 0.
        soft_token_gradient: the factor; with 0 the steps go by the block.
        cuda: stand in for the GPU's kernels; otherwise for the CPU's.
        captured: the passes become CUDA graphs, whose checkpointed layers keep their dropout masks.
        loss_bytes: temporaries of the loss, between forward and backward.
        any_rows: count the workspace of `soft_embed` on a GPU at its bound, whatever the rows, so that the memory of
            one row and of two can be extrapolated to any number.

    Raises:
        ValueError: the model has storage. RandomOperatorError: its checkpointed layers cannot be captured.
    """
    if any(parameter.device.type != "meta" for parameter in base.parameters()):
        raise ValueError("base: got parameters with storage, expected a model on the meta device")
    base.set_attn_implementation(ATTENTION_NAME)
    live = LiveBytes([*base.parameters(), *base.buffers(), *lora_matrices(base)])
    checkpoints = checkpoints_without_generator(base, fused_lora(base), nullcontext) if captured else nullcontext()
    drafter = _draft if cuda else None
    lm = _StandIn(model=base, body=base.base_model, cuda=cuda, any_rows=any_rows, live=live)
    states: list[Tensor] = []
    prompt = steps = 0
    with _dropout_of_the_device(base, cuda), checkpoints, live:
        for rows, length in prompts:
            before = live.now
            ids = torch.zeros(rows, length, dtype=torch.long, device="meta")
            hidden = rollout(
                lm, ids, torch.ones_like(ids), num_steps, soft_token_gradient=soft_token_gradient, drafter=drafter
            )
            of_steps = live.now - lm.marks[-1]
            states.append(hidden.steps if num_steps else hidden.prompt)
            del hidden, ids  # by the block h_0 has no gradient: what autograd kept for it goes
            prompt += live.now - before - of_steps
            steps += of_steps
            live.cut()
        if loss_bytes:
            _scratch(loss_bytes)
        torch.autograd.backward(states, [torch.empty_like(state) for state in states])
        del states
    keys_values = sum(lm.kept)
    live.cut()
    return StepMemory(keys_values, prompt - keys_values, steps, tuple(live.moments))


def lora_matrices(base: Any) -> list[Tensor]:
    """The copies of LoRA's weights that the products read: they stay from step to step, as parameters do."""
    fused = fused_lora(base)
    products = [shared.products for shared in fused.inputs] if fused is not None else []
    return [matrix for found in products if found is not None for matrix in (found.a, *found.b)]


@torch.no_grad()
def _draft(lm: CausalLM, kv: RolloutKV, prompt: Tensor, num_steps: int, **options: Any) -> Tensor:
    """What the engine's drafter (`gircse.engine.draft`) holds: its own keys and values, and the tokens."""
    pool = [
        part.new_empty(*part.shape[:2], part.shape[2] + num_steps, part.shape[3])
        for pair in kv.prompt.values()
        for part in pair
    ]
    tokens = torch.stack([lm.soft_embed(prompt) for _ in range(num_steps)], dim=1)
    del pool
    return tokens


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operators make inside it, while they live.

    Args:
        known: tensors whose storages are not counted.

    Attributes:
        now: bytes that are alive.
        peak: the most bytes that were alive at once since the last cut.
        moments: the peak before each cut.
    """

    def __init__(self, known: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.moments: list[int] = []
        self._seen: dict[int, weakref.ref] = {}
        for tensor in known:
            self._see(tensor.untyped_storage(), counts=False)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf.untyped_storage())
        self.peak = max(self.peak, self.now)
        return result

    def cut(self) -> None:
        self.moments.append(self.peak)
        self.peak = self.now

    def _see(self, storage: torch.UntypedStorage, counts: bool = True) -> None:
        # PyTorch keeps the Python wrapper of a storage as long as the storage
        key, size = id(storage), storage.nbytes() if counts else 0
        known = self._seen.get(key)
        if known is not None and known() is storage:
            return
        self.now += size

        def gone(_: weakref.ref) -> None:
            self.now -= size
            self._seen.pop(key, None)

        self._seen[key] = weakref.ref(storage, gone)


@dataclass(frozen=True)
class _StandIn(CausalLM):
    """The model with stand-ins for its single kernels; notes the live bytes after each prompt pass."""

    cuda: bool = True
    any_rows: bool = False
    live: LiveBytes = field(default_factory=LiveBytes)
    marks: list[int] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)

    def run_prompt(self, kv: RolloutKV, input_ids: Tensor) -> Tensor:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        states = self.run_body(_FusedPrompt(kv, self.cuda), positions, input_ids=input_ids)
        for entry in (states, kv.prompt[max(kv.prompt)][0]):  # backward enters the pass here, or by the block there
            entry.register_hook(lambda _: self.live.cut())
        self.marks.append(self.live.now)
        self.kept.append(sum(t.nbytes for pair in kv.prompt.values() for t in pair))
        return states

    def soft_embed(self, hidden: Tensor, **options):
        return _SoftEmbed.apply(hidden, self)

    def workspace(self, hidden: Tensor) -> _Workspace:
        """What `soft_embed` holds for these hidden states."""
        rows = hidden.numel() // hidden.shape[-1]
        if not self.cuda:
            size = _cpu_workspace(rows, self, hidden.dtype)
            return _Workspace(size, size)
        plans = kernels("plan")
        if self.any_rows or hidden.dtype not in TRITON_DTYPES:
            return _Workspace(plans.SCRATCH_BYTES, plans.SCRATCH_BYTES, plans.KEPT_BYTES)
        return _kernel_workspace(rows, self, hidden.dtype)


class _Workspace(NamedTuple):
    """Bytes that a call of `soft_embed` holds beside its results: for a moment, and from forward to backward."""

    forward: int
    backward: int
    kept: int = 0  # probabilities


class _FusedPrompt(PromptPass):
    """Flash attention, which keeps its inputs, its result and one number for each query."""

    def __init__(self, kv: RolloutKV, cuda: bool) -> None:
        super().__init__(kv)
        self.cuda = cuda

    def attend(self, layer, query, key, value, *, scaling, dropout, window, softcap):
        if softcap is not None:  # a real device computes it with plain products, too
            return super().attend(
                layer, query, key, value, scaling=scaling, dropout=dropout, window=window, softcap=softcap
            )
        key, value = key.contiguous(), value.contiguous()
        self.kv.prompt.setdefault(layer, (key, value))
        if self.cuda and window is not None and window < key.shape[2]:  # with a mask the heads are repeated
            key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
        return _Attention.apply(query, key, value)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value):
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, grad):
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


class _SoftEmbed(torch.autograd.Function):
    """Keeps hidden, a copy of the result in the accumulation dtype and three numbers a row, and probabilities as far as
    the kernels' plan allows (`soft_embed_op`)."""

    @staticmethod
    def forward(ctx, hidden, lm):
        ctx.live, ctx.workspace = lm.live, lm.workspace(hidden)
        ctx.live.cut()
        wide = accumulation_dtype(hidden.dtype)
        exact = hidden.new_empty(*hidden.shape[:-1], lm.embed_weight.shape[1], dtype=wide)
        _scratch(ctx.workspace.forward)
        out = exact.to(hidden.dtype, copy=True)
        probs = hidden.new_empty(ctx.workspace.kept, dtype=torch.uint8)
        ctx.save_for_backward(hidden, exact, hidden.new_empty(3, *hidden.shape[:-1], dtype=wide), probs)
        return out

    @staticmethod
    def backward(ctx, grad):
        ctx.live.cut()
        _scratch(ctx.workspace.backward)
        return torch.empty_like(ctx.saved_tensors[0]), None


class _FusedDropout(nn.Dropout):
    """The GPU's dropout, which keeps one byte an element."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.native_dropout(input, self.p, True)[0] if self.training and self.p > 0 else input


@contextmanager
def _dropout_of_the_device(base: nn.Module, cuda: bool) -> Iterator[None]:
    """Swaps in the GPU's dropout. The CPU's is made of several operators, which the meta device runs by itself."""
    layers = [module for module in base.modules() if cuda and type(module) is nn.Dropout]
    for layer in layers:
        layer.__class__ = _FusedDropout
    try:
        yield
    finally:
        for layer in layers:
            layer.__class__ = nn.Dropout


def _cpu_workspace(rows: int, lm: CausalLM, dtype: torch.dtype) -> int:
    """Bytes of the temporaries of `soft_embed`: a row tile and a vocabulary chunk in backward."""
    (vocab, width), (_, value_width) = lm.head_weight.shape, lm.embed_weight.shape
    rows, chunk = min(rows, ROW_TILE), min(vocab, VOCAB_CHUNK)
    wide = accumulation_dtype(dtype)
    up_cast = 0 if wide == dtype else width + (0 if lm.embed_weight is lm.head_weight else value_width)
    return min(WORKSPACE_BYTES, wide.itemsize * (2 * rows * chunk + up_cast * chunk + value_width * rows))


def _kernel_workspace(rows: int, lm: CausalLM, dtype: torch.dtype) -> _Workspace:
    """What the launchers of the Triton kernels allocate, read off their own plans; the matrices are frozen."""
    plans = kernels("plan")
    (vocab, width), (_, value_width) = lm.head_weight.shape, lm.embed_weight.shape
    tied, device = lm.embed_weight is lm.head_weight, plans.Device(*_DEVICE)
    problem = plans.Problem(rows, vocab, width, value_width, tied, dtype.itemsize)
    forward, kept = plans.plan_forward(problem, device), 0
    if isinstance(forward, plans.TwoProducts):
        exact_scores = dtype == torch.float16
        forward = plans.plan_two_products(problem, device, exact_scores=exact_scores, kept=plans.KEPT_BYTES)
        kept = rows * plans.padded(vocab) * dtype.itemsize if forward.keep else 0
    backward = plans.plan_backward(problem, device, False, False, exact_scores=dtype == torch.float16)
    return _Workspace(forward.scratch(problem), backward.scratch(problem), kept)


def _scratch(size: int) -> None:
    """Allocates bytes that are freed at once."""
    torch.empty(size, dtype=torch.uint8, device="meta")
