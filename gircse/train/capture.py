"""Micro-batches as CUDA graphs: the host starts two graphs, forward and backward, in place of thousands of kernels.

A rollout of a small model is bound by the host, which starts each kernel of the forward and of the backward pass. Here
both passes of a micro-batch are captured once for each bucket (texts, padded length, K, factor of the soft tokens'
gradient) and replayed for every micro-batch that fits it. Gradient caching (`gircse.train.grad_cache`) keeps the loss
outside: the forward graph leaves the states in a buffer, and the backward graph reads their gradient from another.

    CapturedPasses.embed   pads to the bucket -> replay F -> states, with an autograd node -> backward: replay B, which
                           adds the gradients of the trained weights to buffers that are their `.grad`

Every micro-batch is padded to its bucket, captured or not, so dropout masks are the same on both paths: the states of a
text do not depend on the padding, but the masks depend on the shape. A replay takes its random numbers from PyTorch's
generator, as a pass of single kernels does. A bucket is captured when it comes for the second time. All graphs share
one pool of memory, so the activations of one micro-batch live at a time, and the largest bucket decides how large the
pool is. A draft (`gircse.lm.rollout`, "by the block") is part of the forward graph, and its repetition makes the same
tokens.

Where a capture fails, or memory does not hold graphs beside passes of single kernels, the run goes on without graphs,
with one warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gircse.embedder import pooled_states
from gircse.engine.watch import ModelWatch
from gircse.lm.rollout import Drafter, KeptDraft, RolloutObserver
from gircse.lm.token_ids import check_prompt
from gircse.model import GIRCSE
from gircse.train.run_config import RunConfig

MAX_GRAPHS = 64  # pairs; a capture costs as much as several passes, so none makes room for another
_STEPS_OF_AN_OCTAVE = 8  # buckets between n and 2n, so that at most an eighth of the positions is added
_LENGTH_STEP = 16

_NOT_CAPTURED = {
    "gradient_checkpointing": "gradient_checkpointing repeats layers with an earlier state of the generator, which a "
    "graph cannot set; smaller micro_batch_tokens save memory as well",
    "fsdp": "fsdp gathers layers by hooks",
    "quantization": "quantised matrices are multiplied by another library",
}

# Runs of a pass -> replays of it. Tests on a CPU replace `record` by the runs themselves.
Passes = tuple[Callable[[], None], Callable[[], None]]


class Bucket(NamedTuple):
    """What one pair of graphs is for. Shapes are static, and Python numbers of the capture stay in the graph."""

    rows: int
    length: int
    num_steps: int
    soft_token_gradient: float

    @classmethod
    def of(cls, shape: torch.Size, num_steps: int, soft_token_gradient: float, *, most_positions: int | None) -> Bucket:
        """The bucket of token ids [b, N], which has a few rows and tokens more."""
        rows, length = _rounded(shape[0]), _rounded(shape[1], _LENGTH_STEP)
        if most_positions is not None:
            length = max(shape[1], min(length, most_positions - num_steps))
        return cls(rows, length, num_steps, float(soft_token_gradient))

    @property
    def positions(self) -> int:
        return self.rows * (self.length + self.num_steps)

    def pad(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Adds tokens of id 0 that do not count, and rows of one such token that does."""
        room = (0, self.length - input_ids.shape[1], 0, self.rows - len(input_ids))
        ids, mask = F.pad(input_ids, room), F.pad(attention_mask, room)
        mask[len(input_ids) :, 0] = 1
        return ids, mask


def _rounded(count: int, least: int = 1) -> int:
    """`count` or a little more, a multiple of `least` and one of few numbers."""
    step = max(least, (1 << (count - 1).bit_length()) // (2 * _STEPS_OF_AN_OCTAVE))
    return -(-count // step) * step


class CapturedPasses:
    """The passes of one model, as graphs where they are captured.

    Args:
        model: in training mode, on a CUDA device.
        record: captures a pair of functions; it may run them before.

    Attributes:
        graph_bytes: memory of all graphs.
        refusal: why nothing is captured any more, None while graphs are made.
    """

    def __init__(self, model: GIRCSE, record: Callable[[CapturedPass], Passes] | None = None) -> None:
        self._model, self._watch = model, ModelWatch(model.base)
        self._record = record or self._capture
        self._passes: dict[Bucket, CapturedPass | None] = {}  # None: seen once
        self._sums: dict[nn.Parameter, Tensor] = {}
        self._leaf = torch.empty(0, device=model.device, requires_grad=True)
        self._pool: Any = None
        self.graph_bytes = 0
        self.refusal: str | None = None
        self._told: set[str] = set()
        self.live: object = None  # the forward replay whose activations are in the pool

    @classmethod
    def of(cls, model: GIRCSE, config: RunConfig) -> CapturedPasses | None:
        """The passes of a run; None where it makes no graphs: on a CPU, without `cuda_graphs`, and, with a warning,
        where something in its passes cannot be captured."""
        if model.device.type != "cuda" or not config.cuda_graphs:
            return None
        for name, reason in _NOT_CAPTURED.items():
            if getattr(config, name, None):
                _warn(reason)
                return None
        return cls(model)

    @property
    def buckets(self) -> list[Bucket]:
        """The captured ones."""
        return [bucket for bucket, captured in self._passes.items() if captured is not None]

    def __str__(self) -> str:
        return f"{len(self.buckets)} micro-batches as CUDA graphs, {self.graph_bytes / 2**30:.2f} GiB"

    def embed(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        num_steps: int,
        soft_token_gradient: float = 1.0,
        drafter: Drafter | None = None,
        own_drafter: Drafter | None = None,
        observer: RolloutObserver | None = None,
    ) -> Tensor:
        """`GIRCSE.rollout` of a micro-batch on the CPU. Backward must follow before the next micro-batch, at most once.

        Args:
            drafter: of a pass that is not captured.
            own_drafter: of a captured pass; it runs inside the graph. Default: `gircse.lm.rollout.draft`.
        """
        model, count = self._model, len(input_ids)
        bucket = Bucket.of(
            input_ids.shape, num_steps, soft_token_gradient, most_positions=model.causal_lm.max_positions
        )
        ids, mask = bucket.pad(input_ids, attention_mask)
        drafted = isinstance(drafter, KeptDraft) and drafter.made  # by the first pass over these texts
        captured = self._captured(bucket, own_drafter, may_begin=not drafted)
        if captured is None:
            watching = None if observer is None else _FirstRows(observer, count)
            states = model.rollout(
                ids, mask, num_steps, soft_token_gradient=soft_token_gradient, drafter=drafter, observer=watching
            )
            return states[:count]
        lm = model.causal_lm
        check_prompt(ids, mask, num_steps, positions=lm.max_positions, vocabulary=lm.vocabulary)
        if observer is not None:
            observer.enter("graph")
        states = _Replay.apply(self._leaf, self, captured, ids, mask, observer)[:count]
        if observer is not None and states.requires_grad:  # once for each text
            for step, entropy in enumerate(captured.entropies):
                observer.soft_token(step, entropy[:count].clone())
        return states

    def drop(self) -> None:
        """Frees all graphs. They are captured again when their buckets come."""
        self._passes = dict.fromkeys(self._passes)
        self._pool, self.graph_bytes, self.live = None, 0, None

    def sum_of(self, parameter: nn.Parameter) -> Tensor:
        """The buffer in which graphs add up the gradient of a weight."""
        if parameter not in self._sums:
            self._sums[parameter] = torch.zeros_like(parameter)
        return self._sums[parameter]

    def attach(self, parameters: list[nn.Parameter]) -> None:
        """Makes the buffers the weights' `.grad`, which the caller of a step may have cleared or replaced."""
        fresh = []
        for parameter in parameters:
            total = self._sums[parameter]
            if parameter.grad is None:
                fresh.append(total)
            elif parameter.grad is not total:
                total.copy_(parameter.grad)
            parameter.grad = total
        if fresh:
            torch._foreach_zero_(fresh)

    def _captured(self, bucket: Bucket, drafter: Drafter | None, *, may_begin: bool) -> CapturedPass | None:
        """The captured pass of a bucket, None where it runs as single kernels; a new one only if it `may_begin`."""
        if self._watch.changed():
            self.drop()
        if self.refusal is not None or not self._model.training:
            return None
        captured = self._passes.get(bucket)
        if captured is not None:
            return captured
        if bucket.soft_token_gradient not in (0, 1):
            self._tell("a soft_token_gradient between 0 and 1 changes from step to step")
        elif bucket not in self._passes:
            if torch.is_grad_enabled():  # gradient caching runs each micro-batch without autograd first
                self._passes[bucket] = None
            self._check_memory(bucket)
        elif not may_begin:
            pass
        elif len(self.buckets) >= MAX_GRAPHS:
            self._tell(f"there are {MAX_GRAPHS} of them already; other shapes run as single kernels")
        else:
            return self._new(bucket, drafter)
        return None

    def _new(self, bucket: Bucket, drafter: Drafter | None) -> CapturedPass | None:
        captured = CapturedPass(self, self._model, bucket, drafter)
        # what the runs before the capture draw is not drawn again by the first replay
        with torch.random.fork_rng([self._model.device] if self._model.device.type == "cuda" else []):
            try:
                captured.replays = self._record(captured)
            except Exception as error:  # a model's passes may do many things that a capture forbids
                self._refuse(f"{type(error).__name__}: {str(error).splitlines()[0]}")
                return None
        self._passes[bucket] = captured
        return captured

    def _check_memory(self, bucket: Bucket) -> None:
        """Gives the graphs up where a pass of single kernels would not find room beside them."""
        if not self.graph_bytes:
            return
        device, largest = self._model.device, max(one.positions for one in self.buckets)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device) - self.graph_bytes
        if self.graph_bytes * bucket.positions / largest > torch.cuda.mem_get_info(device)[0] + max(0, unused):
            self._refuse("memory does not hold them beside other passes; expected smaller micro_batch_tokens")

    def _refuse(self, reason: str) -> None:
        self.drop()
        self.refusal = reason
        if self._model.device.type == "cuda":
            # A capture that failed may leave the generator in a state in which it refuses to draw.
            generator = torch.cuda.default_generators[torch.cuda.current_device()]
            generator.graphsafe_set_state(generator.clone_state())
            torch.cuda.empty_cache()
        self._tell(reason)

    def _tell(self, reason: str) -> None:
        if reason not in self._told:
            self._told.add(reason)
            _warn(reason)

    def _capture(self, captured: CapturedPass) -> Passes:
        """Two graphs, after a run of both passes, which compiles kernels and allocates workspaces."""
        device = self._model.device
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        try:
            with torch.cuda.stream(stream):
                captured.warm_up()
        finally:
            torch.cuda.current_stream(device).wait_stream(stream)
        torch.cuda.empty_cache()
        reserved = torch.cuda.memory_reserved(device)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graphs = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        for graph, run in zip(graphs, (captured.forward, captured.backward), strict=True):
            # Other threads may use other devices at that time.
            with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                run()
        self.graph_bytes += max(0, torch.cuda.memory_reserved(device) - reserved)
        return graphs[0].replay, graphs[1].replay


def _warn(reason: str) -> None:
    warnings.warn(f"micro-batches are not captured as CUDA graphs, which is slower: {reason}", stacklevel=3)


class CapturedPass:
    """The passes of one bucket, on buffers that stay where they are.

    Attributes:
        entropies: of the soft tokens, [rows] for each step.
        replays: of `forward` and `backward`.
    """

    replays: Passes

    def __init__(self, owner: CapturedPasses, model: GIRCSE, bucket: Bucket, drafter: Drafter | None) -> None:
        self._owner, self._model, self._bucket, self._drafter = owner, model, bucket, drafter
        self.ids = torch.zeros(bucket.rows, bucket.length, dtype=torch.int64, device=model.device)
        self.mask = torch.ones_like(self.ids)
        self.entropies: list[Tensor] = []
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._reached: list[nn.Parameter] = []
        self._states: Tensor | None = None
        self._gradient: Tensor | None = None
        self._result: Tensor | None = None

    def forward(self) -> None:
        """`ids`, `mask` -> the states and entropies in their buffers, and a graph for `backward`."""
        seen = _Entropies()
        with torch.enable_grad():
            self._result = pooled_states(
                self._model.causal_lm,
                self._model.config,
                self.ids,
                self.mask,
                self._bucket.num_steps,
                soft_token_gradient=self._bucket.soft_token_gradient,
                drafter=self._drafter,
                observer=seen,
            )
        found = self._result.detach()
        if self._states is None:  # in the run before the capture, so that no graph's memory holds the buffers
            self._states, self._gradient = torch.empty_like(found), torch.zeros_like(found)
            self.entropies = [torch.empty_like(entropy) for entropy in seen.entropies]
        torch._foreach_copy_([self._states, *self.entropies], [found, *seen.entropies])

    def backward(self, into: Callable[[nn.Parameter], Tensor] | None = None) -> None:
        """Adds the gradients of the trained weights to their buffers."""
        assert self._result is not None
        found = torch.autograd.grad(self._result, self._parameters, self._gradient, allow_unused=True)
        self._result = None
        self._reached = [p for p, own in zip(self._parameters, found, strict=True) if own is not None]
        totals = [(into or self._owner.sum_of)(p) for p in self._reached]
        torch._foreach_add_(totals, [own for own in found if own is not None])

    def warm_up(self) -> None:
        """Both passes, with nothing added."""
        self.forward()
        self.backward(torch.zeros_like)
        for parameter in self._reached:
            self._owner.sum_of(parameter)

    def run(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, object]:
        """-> a copy of the states [rows, K, D], and a token that `send` asks for."""
        self.ids.copy_(ids, non_blocking=True)
        self.mask.copy_(mask, non_blocking=True)
        self.replays[0]()
        assert self._states is not None
        self._owner.live = token = object()
        return self._states.clone(), token

    def send(self, gradient: Tensor, token: object) -> None:
        """Backward from the gradient of the states [rows, K, D].

        Raises:
            RuntimeError: another micro-batch has run since, whose activations lie in the same memory.
        """
        if token is not self._owner.live:
            raise RuntimeError(
                "captured micro-batch: got a backward pass after another micro-batch, or a second one, expected one "
                "directly after its forward pass"
            )
        self._owner.live = None
        assert self._gradient is not None
        self._gradient.copy_(gradient)
        self._owner.attach(self._reached)
        self.replays[1]()


class _Replay(torch.autograd.Function):
    """Connects the two replays for autograd. `leaf` requires a gradient and gets none."""

    @staticmethod
    def forward(
        ctx: Any,
        leaf: Tensor,
        owner: CapturedPasses,
        captured: CapturedPass,
        ids: Tensor,
        mask: Tensor,
        observer: RolloutObserver | None,
    ) -> Tensor:
        states, ctx.token = captured.run(ids, mask)
        ctx.captured, ctx.observer = captured, observer
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        if ctx.observer is not None:
            ctx.observer.enter("graph")
        ctx.captured.send(gradients[0], ctx.token)
        return (None,) * 6


class _Entropies:
    """Keeps what a rollout tells its observer."""

    def __init__(self) -> None:
        self.entropies: list[Tensor] = []

    def enter(self, phase: str) -> None:
        pass

    def soft_token(self, step: int, entropy: Tensor) -> None:
        self.entropies.append(entropy)


class _FirstRows:
    """Hides the rows of a bucket that hold no text from an observer."""

    def __init__(self, observer: RolloutObserver, count: int) -> None:
        self._observer, self._count = observer, count

    def enter(self, phase: str) -> None:
        self._observer.enter(phase)

    def soft_token(self, step: int, entropy: Tensor) -> None:
        self._observer.soft_token(step, entropy[: self._count])
