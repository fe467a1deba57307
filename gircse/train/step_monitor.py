"""Time, memory and soft-token entropy of a training step, for the log."""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import torch
from torch import Tensor

PHASES = ("data", "prompt", "steps", "loss", "update")


class StepMonitor:
    """Measures time by phase and entropy by soft token. On CUDA the times are events on the stream, which are read when
    the step is over, so that the host waits for nothing before.

    Phases: "data" (rows, tokens), "prompt" (the pass over the prompts, forward and backward), "steps" (the K soft
    tokens, likewise), "loss" (similarities, objective), "update" (exchange between processes, clipping, optimizer);
    "graph" (prompt and steps of a pass that is a CUDA graph, `gircse.train.capture`) only where there are such passes.

    Attributes:
        graph_bytes: memory of the CUDA graphs, which the allocator does not count.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._marks: list[tuple[str, Any]] = []
        self._entropies: dict[int, list[Tensor]] = {}
        self.graph_bytes = 0
        self._began = 0.0

    def start(self) -> None:
        self._marks.clear()
        self._entropies.clear()
        self._began = time.perf_counter()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.enter("data")

    def enter(self, phase: str) -> None:
        """Ends the current phase and begins another (a method of `gircse.lm.rollout.RolloutObserver`)."""
        self._marks.append((phase, self._now()))

    def soft_token(self, step: int, entropy: Tensor) -> None:
        self._entropies.setdefault(step, []).append(entropy)

    def seconds(self) -> dict[str, float]:
        """The time of each phase since `start`; ends the step."""
        self.enter("end")
        total = dict.fromkeys(PHASES, 0.0)
        for (phase, start), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            total[phase] = total.get(phase, 0.0) + self._between(start, end)
        return total

    def host_seconds(self) -> float:
        """The time since `start` by the host's own clock."""
        return time.perf_counter() - self._began

    def entropies(self) -> list[float]:
        """The mean entropy of each of the K soft tokens over all texts since `start`, in nats; empty with K = 0."""
        if not self._entropies:
            return []
        return torch.stack([torch.cat(parts).double().mean() for _, parts in sorted(self._entropies.items())]).tolist()

    def peak_bytes(self) -> int:
        """The peak of the memory: on CUDA what the allocator and the graphs held in this step, otherwise that of the
        whole process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) + self.graph_bytes
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start: Any, end: Any) -> float:
        if self.device.type != "cuda":
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1e3
