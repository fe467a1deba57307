"""The decode step, the Jacobi pass, and their CUDA graphs.

One step reads and writes static buffers only. It makes the soft token of `hidden`, runs the decoder body at `position`,
writes `hidden` and `states[:, step]`, and adds 1 to `position` and `step`. So one captured graph per (rows, slots)
serves every K and every prompt length, and the host waits for the device only at the end. A Jacobi pass has a graph for
each K and number of its tokens. On a CPU the same functions run eagerly.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gircse.engine.body.decoder import Decoder
from gircse.engine.decode import DecodePass
from gircse.engine.jacobi import JacobiPass, jacobi_pass
from gircse.engine.pool import KVPool
from gircse.engine.prefill_graphs import PrefillGraphs
from gircse.engine.state import DecodeState
from gircse.engine.step_cost import StepCost, step_cost
from gircse.lm.causal_lm import CausalLM
from gircse.ops.head_facts import HeadFacts

# So that memory stays bounded, a new graph replaces the one that was not used for the longest time.
MAX_GRAPHS = 48
MAX_PASSES = 128  # sizes of batches whose index tensors are kept; then all are dropped


def decode_step(
    lm: CausalLM,
    decoder: Decoder,
    kv: DecodePass,
    state: DecodeState,
    temperature: float,
    facts: HeadFacts | None = None,
) -> None:
    """One soft token for every row, in place. It can be captured: shapes are static and the host never waits."""
    token = lm.soft_embed(state.hidden, temperature=temperature, facts=facts)
    kv.begin()
    decoder.step(kv, token, state)


class StepRunner:
    """Binds the step to buffers, and captures it where that is possible.

    Args:
        lm: the model.
        capture: see `EngineConfig`.
        kernel: the attention kernel, see `DecodePass`.
        counted: count kernels and bytes of captured steps; false where a compiler makes kernels that nothing counts.
    """

    def __init__(self, lm: CausalLM, *, capture: str, kernel: str, counted: bool = True) -> None:
        self._lm, self._kernel, self._counted = lm, kernel, counted
        self._required = capture == "always"
        self.captures = capture == "always" or (capture == "auto" and lm.device.type == "cuda")
        self.refusal: str | None = None
        self.graph_bytes = 0
        self._graphs: dict[tuple, tuple[torch.cuda.CUDAGraph, Any]] = {}  # with the pass that it goes on reading
        self._costs: dict[tuple[bool, tuple[int, int, int]], StepCost] = {}
        self._passes: dict[tuple, Any] = {}
        self._memory: Any = None
        self._prefills = PrefillGraphs()
        if self._required and lm.device.type != "cuda":
            raise ValueError(f"capture: got 'always' with a model on {lm.device}, expected a CUDA device")

    @property
    def buckets(self) -> list[tuple[int, int]]:
        """(rows, slots) of the captured graphs."""
        return [(rows, slots) for (_, rows, slots), _ in self._graphs]

    @property
    def costs(self) -> list[StepCost]:
        """Of the captured steps and Jacobi passes, the latter last, and of each the largest batch."""
        return [self._costs[key] for key in sorted(self._costs)]

    def drop(self) -> None:
        """Drops graphs and passes, because the buffers that they point to are about to be freed."""
        self._graphs.clear()
        self._costs.clear()
        self._passes.clear()
        self._prefills.drop()
        self._memory, self.graph_bytes = None, 0

    def prefill(
        self, decoder: Decoder, pool: KVPool, rows: int, slots: int, start: int, texts: Sequence[Sequence[int]]
    ) -> Tensor | None:
        """See `PrefillGraphs.run`; None where nothing is captured."""
        if not self.captures:
            return None
        return self._prefills.run(self._capture, decoder, pool, rows, slots, start, texts, self._lm.device)

    def bind(
        self, decoder: Decoder, pool: KVPool, state: DecodeState, slots: int, temperature: float
    ) -> Callable[[], None]:
        """A function that takes one step of `state`'s rows each time it is called."""
        rows, restored = len(state.hidden), (state.hidden, state.position, state.step)

        def make() -> DecodePass:
            return DecodePass(pool, rows, slots, state.position, self._kernel)

        def step(kv: DecodePass, facts: HeadFacts | None) -> None:
            decode_step(self._lm, decoder, kv, state, temperature, facts)

        return self._bind((1, rows, slots), (temperature,), make, step, pool, state, restored)

    def bind_pass(
        self,
        decoder: Decoder,
        pool: KVPool,
        state: DecodeState,
        slots: int,
        temperature: float,
        *,
        pooling: str,
        before: int,
        first: int,
        stop: int,
    ) -> Callable[[], None]:
        """A function that makes one Jacobi pass of the tokens `first` to `stop` - 1 of `state`'s rows; see
        `jacobi_pass`."""
        rows, restored = len(state.hidden), (state.states, state.embedding)

        def make() -> JacobiPass:
            return JacobiPass(pool, rows, slots, state.position, first, stop)

        def run(kv: JacobiPass, facts: HeadFacts | None) -> None:
            jacobi_pass(self._lm, decoder, kv, state, temperature, pooling, before, facts)

        options = (temperature, first, pooling, before)
        return self._bind((stop - first, rows, slots), options, make, run, pool, state, restored)

    def _bind(
        self,
        size: tuple[int, int, int],
        options: tuple,
        make: Callable[[], Any],
        run: Callable[[Any, HeadFacts | None], None],
        pool: KVPool,
        state: DecodeState,
        restored: Sequence[Tensor],
    ) -> Callable[[], None]:
        """`run` with its pass, captured where that is possible.

        Args:
            size: tokens of a row, rows, slots.
            options: what else tells one graph from another.
            make: makes the pass.
            restored: tensors that `run` writes and reads.
        """
        key = (size, options)
        if key in self._graphs:
            self._graphs[key] = self._graphs.pop(key)  # the last one, because it is the one used last
            return self._graphs[key][0].replay
        kv = self._passes.get((size, options[1:]))
        if kv is None or kv.pool is not pool or kv.start.data_ptr() != state.position.data_ptr():
            if len(self._passes) >= MAX_PASSES:
                self._passes.clear()
            kv = self._passes[size, options[1:]] = make()

        facts = None if self.captures else self._lm.facts()  # a graph must read them in every step

        def step() -> None:
            run(kv, facts)

        def count() -> None:
            self._costs[isinstance(kv, JacobiPass), size] = step_cost(step, pool, state, size[2], size[0])

        if not self.captures:
            return step
        if len(self._graphs) >= MAX_GRAPHS:
            self._graphs.pop(next(iter(self._graphs)))
        try:
            graph = self._capture(step, restored, count if self._counted else None)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a model's forward may do many things that a capture forbids
            if self._required:
                raise
            self.captures, self.refusal = False, f"{type(error).__name__}: {str(error).splitlines()[0]}"
            warnings.warn(
                f"the generation step cannot be captured as a CUDA graph and runs eagerly, which is slower: "
                f"{self.refusal}",
                stacklevel=3,
            )
            return step
        self._graphs[key] = graph, kv
        return graph.replay

    def _capture(
        self, run: Callable[[], Any], restored: Sequence[Tensor] = (), counted: Callable[[], Any] | None = None
    ) -> torch.cuda.CUDAGraph:
        """A graph of `run`, which is run twice before; `counted` is the second time, in its place.

        Args:
            restored: tensors that have the same values afterwards.
        """
        device = self._lm.device
        saved = [(tensor, tensor.clone()) for tensor in restored]
        reserved = torch.cuda.memory_reserved(device)

        def restore() -> None:
            for tensor, value in saved:
                tensor.copy_(value)

        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        try:
            try:
                with torch.cuda.stream(stream):
                    for warm_up in (run, counted or run):  # compile kernels and allocate workspaces outside the graph
                        warm_up()
                        restore()
            finally:  # a run that raised may have written already what is restored below
                torch.cuda.current_stream(device).wait_stream(stream)
            # Graphs run one after the other and share their memory. PyTorch refuses a handle whose graphs are all gone.
            if not self._graphs and not self._prefills.captured:
                self._memory = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            # Other threads may run engines on other devices at that time, and wait for them.
            with torch.cuda.graph(graph, pool=self._memory, stream=stream, capture_error_mode="thread_local"):
                run()
        finally:
            restore()
        self.graph_bytes += max(0, torch.cuda.memory_reserved(device) - reserved)
        return graph
