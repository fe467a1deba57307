"""`Engine`: rows of token ids in, states of K soft tokens out."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from gircse.engine.config import STEPS_BUCKET, EngineConfig, Limits, kv_bytes_per_token
from gircse.engine.fused import FusedKernels, has_liger
from gircse.engine.kv import KVPool, PrefillPass, Prefix, decode_kernel
from gircse.engine.schedule import Batch, by_length, common_prefix, next_batch
from gircse.engine.step import DecodeState, StepRunner
from gircse.lm.attention import RolloutKV
from gircse.lm.causal_lm import CausalLM
from gircse.lm.device import without_autocast
from gircse.lm.forking import compute_on_one_thread_in_child, is_lost, tell_after_fork
from gircse.lm.token_ids import check_rows

# rows of a finished batch (indices into the input), their states [n, max(K, 1), D] and how many of them count [n]
Sink = Callable[[list[int], Tensor, Tensor], None]
# states [n, k, D] of running rows after k steps -> bool [n], True where a row has settled
Settled = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class EngineReport:
    """Memory that the engine holds between calls, in bytes, and what it runs on.

    Attributes:
        kv_bytes: keys and values.
        state_bytes: the state of the step.
        graph_bytes: what captured graphs reserved.
        graphs: (rows, slots) of each captured graph.
        not_captured: why the step runs eagerly although it was to be captured, or None.
        limits: of a decode batch, derived from the free memory.
    """

    kv_bytes: int
    state_bytes: int
    graph_bytes: int
    graphs: list[tuple[int, int]]
    not_captured: str | None
    limits: Limits


class Engine:
    """Generates soft tokens for many prompts.

    Args:
        lm: the model, taken apart by `CausalLM.from_model`; in eval mode here and while the engine runs.
        config: how to run.

    Buffers and captured graphs are kept for the next call. Calls from several threads run one after the other.

    Raises:
        ValueError: the config asks for what this device, dtype or installation cannot do.
    """

    def __init__(self, lm: CausalLM, config: EngineConfig | None = None) -> None:
        self.lm, self.config = lm, config or EngineConfig()
        kernel = decode_kernel(self.config.decode_attention, lm.device, lm.head_weight.dtype)
        self._runner = StepRunner(lm, capture=self.config.capture, compile=self.config.compile, kernel=kernel)
        self._pool: KVPool | None = None
        self._state: DecodeState | None = None
        self._where = (lm.device, lm.head_weight.dtype)
        self._lock = threading.RLock()
        wanted = self.config.fused_kernels == "auto" and not self.config.compile
        with without_autocast(lm.device):
            self._limits = Limits.of(self.config, lm.device, kv_bytes_per_token(lm))
            self._fused = FusedKernels.of(lm) if wanted and lm.device.type == "cuda" and has_liger() else None
        tell_after_fork(self)

    def after_fork(self) -> None:
        """Another thread was at work when this process was forked: its lock is replaced, its buffers hold anything."""
        if is_lost(self._lock):
            self._lock = threading.RLock()
            self._pool = self._state = None
            self._runner.drop()

    def fits(self, lm: CausalLM, config: EngineConfig) -> bool:
        """Whether this engine can run that model as it is now (it was not moved or cast since)."""
        return self.lm is lm and self.config == config and self._where == (lm.device, lm.head_weight.dtype)

    def report(self) -> EngineReport:
        return EngineReport(
            kv_bytes=self._pool.bytes if self._pool is not None else 0,
            state_bytes=self._state.bytes if self._state is not None else 0,
            graph_bytes=self._runner.graph_bytes,
            graphs=self._runner.buckets,
            not_captured=self._runner.refusal,
            limits=self._limits,
        )

    @torch.compiler.disable
    def states(
        self,
        rows: Sequence[Sequence[int]],
        num_steps: int,
        *,
        temperature: float = 1.0,
        include_prompt: bool = False,
    ) -> Tensor:
        """Rolls out every row.

        Args:
            rows: token ids of each prompt, at least one each; no padding.
            num_steps: K >= 0.
            temperature: logit temperature of the soft tokens.
            include_prompt: the K states are h_0, g_1..g_{K-1}: the prompt's last one first, and a step less.

        Returns:
            [n, max(K, 1), D] in the model's dtype, on its device, in the order of `rows`: g_1..g_K, or with K = 0 the
            prompts' last states.
        """
        lm = self.lm
        found = torch.empty(len(rows), max(num_steps, 1), lm.hidden_size, dtype=lm.head_weight.dtype, device=lm.device)

        def keep(chosen: list[int], states: Tensor, counts: Tensor) -> None:
            found[torch.tensor(chosen, device=found.device)] = states

        self.run(rows, num_steps, keep, temperature=temperature, include_prompt=include_prompt)
        return found

    @torch.compiler.disable  # a compiled model around it would compile every batch's shape anew
    def run(
        self,
        rows: Sequence[Sequence[int]],
        num_steps: int,
        sink: Sink,
        *,
        temperature: float = 1.0,
        settled: Settled | None = None,
        max_rows: int | None = None,
        include_prompt: bool = False,
    ) -> None:
        """`states`, handed over batch by batch as they are done.

        Args:
            include_prompt: the K states are h_0, g_1..g_{K-1}: the prompt's last one first, and a step less.
            sink: gets (row indices, states [n, max(K, 1), D], counts [n] int64 on the host) of each finished batch; the
                states are its own. Only the first `counts` of a row's states mean something.
            settled: asked after every step from the second on; rows it is True for leave the batch. None: all run to K.
            max_rows: rows of a batch at most, besides the engine's own limit.
        """
        check_rows(rows, self.lm.vocabulary, num_steps, positions=self.lm.max_positions)
        compute_on_one_thread_in_child()
        # sorted where the prefix does not count: it is the same for all
        order, lengths = by_length([len(row) for row in rows]), [len(row) for row in rows]
        shared = common_prefix(rows) if self.config.reuse_prefix else 0
        fused = self._fused.active() if self._fused is not None else nullcontext()
        with self._lock, fused, without_autocast(self.lm.device), torch.inference_mode():
            self._runner.check_weights()
            prefix: Prefix | None = None
            done = 0
            while done < len(order):
                batch: Batch | None = None
                try:
                    if shared and prefix is None:
                        prefix = self._encoded(rows[0][:shared])
                    limits = self._limits.at_most(max_rows)
                    before = len(prefix) if prefix is not None else 0
                    batch = next_batch(order[done:], lengths, limits, num_steps, prefix=before)
                    states, counts = self._run_batch(
                        batch, rows, num_steps, temperature, prefix, settled, include_prompt
                    )
                except RuntimeError as error:
                    if not _out_of_memory(error) or self._limits.smallest:
                        raise
                    batch = None
                if batch is None:  # outside `except`: the traceback would keep the tensors alive
                    prefix = None
                    self._shrink()
                    continue
                sink(batch.rows, states, counts)
                done += len(batch.rows)

    def _run_batch(
        self,
        batch: Batch,
        rows: Sequence[Sequence[int]],
        num_steps: int,
        temperature: float,
        prefix: Prefix | None,
        settled: Settled | None,
        include_prompt: bool,
    ) -> tuple[Tensor, Tensor]:
        count = len(batch.rows)
        pool, state = self._buffers(batch, num_steps)
        for start, stop in batch.prefills:
            state.hidden[start:stop] = self._prefill(
                batch, pool, start, [rows[r] for r in batch.rows[start:stop]], prefix
            )
        if not num_steps:
            states, counts = state.hidden[:count, None].clone(), torch.ones(count, dtype=torch.long)
        else:
            state.hidden[count:] = 0
            state.position.zero_()
            state.position[:count] = torch.tensor([len(rows[r]) for r in batch.rows], device=state.position.device)
            state.step.fill_(int(include_prompt))
            if include_prompt:
                state.states[:, 0] = state.hidden
            states, counts = self._decode(batch, pool, state, num_steps, temperature, settled, int(include_prompt))
        # asked once, where the result is about to be read anyway
        if not bool(states.isfinite().all()):
            pool.zero_()
        return states, counts

    def _prefill(
        self, batch: Batch, pool: KVPool, start: int, texts: list[Sequence[int]], prefix: Prefix | None
    ) -> Tensor:
        """The last state [n, D] of each text; its keys and values go into rows `start`.. of the pool."""
        before = len(prefix) if prefix is not None else 0
        lengths = [len(text) - before for text in texts]
        kv = PrefillPass(pool, batch.buffer_rows, batch.slots, start, lengths, prefix, self.lm.device)
        ids = torch.tensor([token for text in texts for token in text[before:]])[None].to(self.lm.device)
        return self.lm.run_body(kv, kv.positions, input_ids=ids)[0, kv.last]

    def _decode(
        self,
        batch: Batch,
        pool: KVPool,
        state: DecodeState,
        num_steps: int,
        temperature: float,
        settled: Settled | None,
        done: int,
    ) -> tuple[Tensor, Tensor]:
        """Up to `num_steps` states of each row, of which `done` are there already, and how many it has."""
        count = len(batch.rows)
        step = self._runner.bind(pool, state, batch.slots, temperature)
        if settled is None:
            for _ in range(num_steps - done):
                step()
            return state.states[:count, :num_steps].clone(), torch.full((count,), num_steps)

        states = state.states.new_zeros(count, num_steps, state.states.shape[-1])
        counts = torch.full((count,), num_steps)
        alive = list(range(count))  # which text each row of the buffers holds; settled ones are -1
        for taken in range(done + 1, num_steps + 1):
            step()
            if taken == num_steps or taken < 2:
                continue
            leaving = settled(state.states[: len(alive), :taken]).tolist()
            for row, text in enumerate(alive):
                if leaving[row] and text >= 0:
                    states[text, :taken], counts[text], alive[row] = state.states[row, :taken], taken, -1
            left = sum(text >= 0 for text in alive)
            if not left:
                return states, counts
            smaller = self._limits.buffer_rows(left)
            if smaller < len(state.hidden):
                alive = _compact(alive, left, pool, state, batch.slots)
                state = state.first(smaller)
                state.position[left:] = 0  # spare rows must not run out of their slots
                step = self._runner.bind(pool, state, batch.slots, temperature)
        for row, text in enumerate(alive):
            if text >= 0:
                states[text] = state.states[row, :num_steps]
        return states, counts

    def _encoded(self, tokens: Sequence[int]) -> Prefix:
        """What all rows start with. It is kept for one `run` alone: a later one could meet keys and values of weights
        or of an adapter that were changed since, and no check that is cheap would see every such change."""
        kv = RolloutKV(torch.tensor([len(tokens)], device=self.lm.device))
        self.lm.run_prompt(kv, torch.tensor([list(tokens)], device=self.lm.device))
        return Prefix(len(tokens), kv)

    def _buffers(self, batch: Batch, num_steps: int) -> tuple[KVPool, DecodeState]:
        """Pool and state for a batch; larger ones than before only where they are needed."""
        tokens, steps = batch.buffer_rows * batch.slots, max(num_steps, STEPS_BUCKET)
        if self._pool is None or self._pool.tokens < tokens:
            self._pool = None  # freed before the larger one is taken
            self._runner.drop()
            self._pool = KVPool(max(tokens, min(1 << (tokens - 1).bit_length(), self._limits.kv_tokens)))
        state = self._state
        if state is None or len(state.hidden) < batch.buffer_rows or state.states.shape[1] < steps:
            rows = max(batch.buffer_rows, len(state.hidden) if state is not None else 0)
            self._state = None
            self._runner.drop()
            like = torch.empty(0, self.lm.hidden_size, dtype=self.lm.head_weight.dtype, device=self.lm.device)
            state = self._state = DecodeState.allocate(rows, steps, like)
        return self._pool, state.first(batch.buffer_rows)

    def _shrink(self) -> None:
        """After out-of-memory: everything is given back and batches become half as large, for good."""
        self._pool = self._state = None
        self._runner.drop()
        first = self._limits.rows == Limits.of(self.config, self.lm.device, 1).rows
        self._limits = self._limits.halved()
        if self.lm.device.type == "cuda":
            torch.cuda.empty_cache()
        if first:
            warnings.warn(
                f"out of memory: batches are halved, to {self._limits.rows} rows and {self._limits.prefill_tokens} "
                "prompt tokens (and further where that is not enough)",
                stacklevel=3,
            )


def _compact(alive: list[int], left: int, pool: KVPool, state: DecodeState, slots: int) -> list[int]:
    """Moves running rows from the tail into the rows of settled ones: -> `alive` of the first `left` rows."""
    holes = [row for row in range(left) if alive[row] < 0]
    tail = [row for row in range(left, len(alive)) if alive[row] >= 0]
    if holes:
        device = state.hidden.device
        source, target = torch.tensor(tail, device=device), torch.tensor(holes, device=device)
        pool.move_rows(source, target, len(state.hidden), slots)
        state.move_rows(source, target)
    alive = list(alive)
    for row, other in zip(holes, tail, strict=True):
        alive[row] = alive[other]
    return alive[:left]


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
