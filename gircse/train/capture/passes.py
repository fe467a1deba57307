"""All captured passes of a model: which there are, when one is made, and what happens where none can be."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gircse.engine.watch import ModelWatch
from gircse.lm.rollout import Drafter, KeptDraft, RolloutObserver
from gircse.lm.token_ids import check_prompt
from gircse.model import GIRCSE
from gircse.train.capture.bucket import Bucket, bucket_shape
from gircse.train.capture.one_pass import CapturedPass, Passes, replay
from gircse.train.capture.shared import Shared
from gircse.train.run_config import RunConfig

MAX_GRAPHS = 64  # pairs; a capture costs as much as several passes, so none makes room for another
_NOT_CAPTURED = {
    "fsdp": "fsdp gathers layers by hooks",
    "quantization": "quantised matrices are multiplied by another library",
}


def refusal_of(config: RunConfig) -> str | None:
    """What in a run cannot be captured, None if everything can."""
    return next((reason for name, reason in _NOT_CAPTURED.items() if getattr(config, name, None)), None)


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
        self._shared = Shared()
        self._leaf = torch.empty(0, device=model.device, requires_grad=True)
        self._pool: Any = None
        self.graph_bytes = 0
        self.refusal: str | None = None
        self._told: set[str] = set()

    @classmethod
    def of(cls, model: GIRCSE, config: RunConfig) -> CapturedPasses | None:
        """The passes of a run; None where it makes no graphs: on a CPU, without `cuda_graphs`, and, with a warning,
        where something in its passes cannot be captured."""
        if model.device.type != "cuda" or not config.cuda_graphs:
            return None
        refusal = refusal_of(config)
        if refusal is not None:
            _warn(refusal)
            return None
        return cls(model)

    @property
    def buckets(self) -> list[Bucket]:
        """The captured ones."""
        return [bucket for bucket, captured in self._passes.items() if captured is not None]

    def __str__(self) -> str:
        return f"{len(self.buckets)} micro-batches as CUDA graphs, {self.graph_bytes / 2**30:.2f} GiB"

    def padded(self, rows: int, length: int, *, num_steps: int) -> tuple[int, int]:
        """Texts and tokens of the bucket of a micro-batch."""
        return bucket_shape(rows, length, num_steps=num_steps, most_positions=self._model.causal_lm.max_positions)

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
        states = replay(captured, ids, mask, self._leaf, observer)[:count]
        if observer is not None and states.requires_grad:  # once for each text
            for step, entropy in enumerate(captured.entropies):
                observer.soft_token(step, entropy[:count].clone())
        return states

    def drop(self) -> None:
        """Frees all graphs. They are captured again when their buckets come."""
        self._passes = dict.fromkeys(self._passes)
        self._pool, self.graph_bytes, self._shared.live = None, 0, None

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
        captured = CapturedPass(self._shared, self._model, bucket, drafter)
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


class _FirstRows:
    """Hides the rows of a bucket that hold no text from an observer."""

    def __init__(self, observer: RolloutObserver, count: int) -> None:
        self._observer, self._count = observer, count

    def enter(self, phase: str) -> None:
        self._observer.enter(phase)

    def soft_token(self, step: int, entropy: Tensor) -> None:
        self._observer.soft_token(step, entropy[: self._count])
