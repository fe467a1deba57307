"""`Engine`: rows of token ids in, states of K soft tokens out."""

from __future__ import annotations

import threading
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gircse.engine.body import Decoder, StockDecoder, choose_decoder
from gircse.engine.config import STEPS_BUCKET, EngineConfig, Limits, kv_bytes_per_token
from gircse.engine.decode import decode_kernel
from gircse.engine.jacobi import TOKENS_BUCKET, Jacobi, first_token, is_faster
from gircse.engine.pool import KVPool
from gircse.engine.prefill import PrefillPass
from gircse.engine.running_rows import RunningRows
from gircse.engine.schedule import DecodeBatch, by_length, common_prefix, next_batch
from gircse.engine.state import DecodeState
from gircse.engine.step import StepRunner
from gircse.engine.step_cost import StepCost
from gircse.engine.watch import ModelWatch
from gircse.lm.causal_lm import CausalLM
from gircse.lm.device import without_autocast
from gircse.lm.forking import compute_on_one_thread_in_child, is_lost, tell_after_fork
from gircse.lm.token_ids import check_rows

# Receives the rows of a finished batch (indices into the input), their states [n, max(K, 1), D] and the number of
# valid states of each row [n].
Sink = Callable[[list[int], Tensor, Tensor], None]
# states [n, k, D] of running rows after k steps -> bool [n], True where a row has settled
Settled = Callable[[Tensor], Tensor]


class _Job(NamedTuple):
    """The arguments of one `Engine.run`; the number of tokens that all rows start with, and their keys and values."""

    rows: Sequence[Sequence[int]]
    num_steps: int
    temperature: float
    settled: Settled | None
    include_prompt: bool
    jacobi: Jacobi | None
    shared: int
    prefix: dict[int, tuple[Tensor, Tensor]] | None = None


@dataclass(frozen=True)
class EngineReport:
    """The memory that the engine holds between calls, in bytes, and its limits.

    Attributes:
        kv_bytes: keys and values.
        state_bytes: the state of the step.
        graph_bytes: memory that captured graphs reserved.
        graphs: (rows, slots) of each captured graph.
        steps: kernels and bytes of each captured step and Jacobi pass, the passes last, and of each the largest batch.
        passes: {passes: texts}, how many texts took so many Jacobi passes since the model was read.
        not_captured: why the step runs eagerly although it was to be captured, or None.
        not_fused: why the model's own decoder body runs although ours was to, or None.
        limits: the limits of a decode batch, derived from the free memory.
    """

    kv_bytes: int
    state_bytes: int
    graph_bytes: int
    graphs: list[tuple[int, int]]
    steps: list[StepCost]
    passes: dict[int, int]
    not_captured: str | None
    not_fused: str | None
    limits: Limits


class Engine:
    """Generates soft tokens for many prompts.

    Args:
        lm: the model, taken apart by `CausalLM.from_model`. It must be in eval mode here and while the engine runs.
        config: how to run.

    Buffers and captured graphs are kept for the next call. Calls from several threads run one after the other.

    Raises:
        ValueError: the config asks for something that this device, dtype or installation does not support.
    """

    def __init__(self, lm: CausalLM, config: EngineConfig | None = None) -> None:
        self.lm, self.config = lm, config or EngineConfig()
        self._device, self._dtype = lm.device, lm.head_weight.dtype
        self._kernel = decode_kernel(self.config.decode_attention, self._device, self._dtype)
        self._runner = StepRunner(lm, capture=self.config.capture, kernel=self._kernel, counted=not self.config.compile)
        self._decoder: Decoder = StockDecoder(lm)
        self._watch = ModelWatch(lm.model)
        self._not_fused: str | None = None
        self._warned: set[str] = set()
        self._passes: Counter[tuple[int, float, int]] = Counter()  # texts by tokens, tolerance and passes
        self._size = 0
        self._pool: KVPool | None = None
        self._state: DecodeState | None = None
        self._lock = threading.RLock()
        with without_autocast(self._device):
            self._limits = Limits.of(self.config, self._device, kv_bytes_per_token(lm))
        tell_after_fork(self)

    def after_fork(self) -> None:
        """If another thread was computing at the fork, replaces its lock and drops its half-written buffers."""
        if is_lost(self._lock):
            self._lock = threading.RLock()
            self._pool = self._state = None
            self._runner.drop()

    def fits(self, lm: CausalLM, config: EngineConfig) -> bool:
        """Whether this engine can run the model, which must not have been moved or cast since, with that config."""
        here = (self._device, self._dtype) == (lm.device, lm.head_weight.dtype)
        return self.lm is lm and self.config == config and here

    def report(self) -> EngineReport:
        passes: Counter[int] = Counter()
        for (_, _, taken), texts in self._passes.items():
            passes[taken] += texts
        return EngineReport(
            kv_bytes=self._pool.bytes if self._pool is not None else 0,
            state_bytes=self._state.bytes if self._state is not None else 0,
            graph_bytes=self._runner.graph_bytes,
            graphs=self._runner.buckets,
            steps=self._runner.costs,
            passes={taken: texts for taken, texts in sorted(passes.items()) if texts},
            not_captured=self._runner.refusal,
            not_fused=self._not_fused,
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
        jacobi: Jacobi | None = None,
    ) -> Tensor:
        """Rolls out every row.

        Args:
            rows: token ids of each prompt, at least one each; no padding.
            num_steps: K >= 0.
            temperature: logit temperature of the soft tokens.
            include_prompt: the K states are h_0, g_1..g_{K-1}: the prompt's last state and K - 1 steps.
            jacobi: make all steps together, by Jacobi passes; None: one step after the other.

        Returns:
            [n, max(K, 1), D] in the model's dtype, on its device, in the order of `rows`: g_1..g_K, or with K = 0 the
            prompts' last states.

        Raises:
            ValueError: a row has no token or too many, or the model has no embedding for a token id.
        """
        shape = len(rows), max(num_steps, 1), self.lm.hidden_size
        result = torch.empty(shape, dtype=self._dtype, device=self._device)

        def keep(chosen: list[int], states: Tensor, counts: Tensor) -> None:
            result[torch.tensor(chosen, device=result.device)] = states

        self.run(rows, num_steps, keep, temperature=temperature, include_prompt=include_prompt, jacobi=jacobi)
        return result

    @torch.compiler.disable  # a compiled model around it would be compiled again for the shape of every batch
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
        jacobi: Jacobi | None = None,
    ) -> None:
        """`states`, which `sink` receives batch by batch.

        Args:
            rows, num_steps, temperature, include_prompt, jacobi: as for `states`.
            sink: called with (row indices, states [n, max(K, 1), D], counts [n] int64 on the host) of each finished
                batch. It may keep the states. Only the first `counts` states of a row are valid.
            settled: called after every step from the second on; a row for which it gives True leaves the batch. None:
                all rows run to K. With `jacobi` it is called when all K states are there.
            max_rows: the most rows of a batch, besides the engine's own limit.
        """
        check_rows(rows, self.lm.vocabulary, num_steps, positions=self.lm.max_positions)
        compute_on_one_thread_in_child()
        lengths = [len(row) for row in rows]
        order = by_length(lengths)
        shared = common_prefix(rows) if self.config.reuse_prefix else 0
        job = _Job(rows, num_steps, temperature, settled, include_prompt, jacobi, shared)
        with self._lock, without_autocast(self._device), torch.inference_mode():
            self._read_model()
            done = 0
            while done < len(order):
                batch: DecodeBatch | None = None
                try:
                    if shared and job.prefix is None:
                        job = job._replace(prefix=self._prefix(rows[0][:shared]))
                    limits = self._limits.at_most(max_rows)
                    if jacobi is not None and not jacobi.auto:  # a pass computes as many tokens as a prefill at most
                        limits = limits.at_most(max(1, limits.prefill_tokens // max(1, num_steps)))
                    batch = next_batch(order[done:], lengths, limits, num_steps, prefix=shared)
                    states, counts = self._run_batch(batch, job)
                except RuntimeError as error:
                    if not _out_of_memory(error) or self._limits.smallest:
                        raise
                    batch = None
                if batch is None:  # not within `except`, where the traceback keeps the tensors alive
                    job = job._replace(prefix=None)
                    self._shrink()
                    continue
                sink(batch.rows, states, counts)
                done += len(batch.rows)

    def _read_model(self) -> None:
        """Where modules, weights or adapters have changed since the last call, drops the graphs and chooses the decoder
        again."""
        if not self._watch.changed():
            return
        self._runner.drop()
        self._passes.clear()
        self._size = sum(parameter.numel() for parameter in self.lm.body.parameters())
        watch, self._watch = self._watch, ModelWatch(self.lm.model)  # if that raises, the next call chooses anew
        self._decoder, reason = choose_decoder(self.lm, self.config, self._kernel)
        self._watch = watch
        self._watch.changed()  # sees that weights were fused
        if reason and reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(
                f"the engine runs the decoder layers of {type(self.lm.model).__name__} itself instead of its own fused "
                f"kernels, which are faster: {reason}",
                stacklevel=4,
            )
        self._not_fused = reason

    def _run_batch(self, batch: DecodeBatch, job: _Job) -> tuple[Tensor, Tensor]:
        """The states [n, max(K, 1), D] of the batch's rows, and the number of valid ones of each [n]."""
        count = len(batch.rows)
        pool, state = self._buffers(batch, job.num_steps)
        for start, stop in batch.prefills:
            state.hidden[start:stop] = self._prefill(batch, pool, start, stop, job)
        if not job.num_steps:
            states, counts = state.hidden[:count, None].clone(), torch.ones(count, dtype=torch.long)
        else:
            lengths = [len(job.rows[row]) for row in batch.rows]
            state.hidden[count:] = 0
            state.position.zero_()
            state.position[:count] = torch.tensor(lengths, device=state.position.device)
            state.step.fill_(int(job.include_prompt))
            if job.include_prompt:
                state.states[:, 0] = state.hidden
            decode = self._decode_jacobi if self._is_jacobi(count, job) else self._decode
            states, counts = decode(batch, pool, state, job)
        # Checked once, just before the result is read, because the host waits for the device here.
        if not bool(states.isfinite().all()):
            pool.zero_()
        return states, counts

    def _prefill(self, batch: DecodeBatch, pool: KVPool, start: int, stop: int, job: _Job) -> Tensor:
        """The last states [n, D] of rows `start` to `stop`. Keys and values go to the same rows of the pool."""
        texts = [job.rows[row][job.shared :] for row in batch.rows[start:stop]]
        where = pool, batch.buffer_rows, batch.slots, start, texts
        states = self._runner.prefill(self._decoder, *where) if job.prefix is None else None
        return self._decoder.prefill(PrefillPass(*where, job.prefix, self._device)) if states is None else states

    def _decode(self, batch: DecodeBatch, pool: KVPool, state: DecodeState, job: _Job) -> tuple[Tensor, Tensor]:
        """Up to K states of each row, and how many it has. With `include_prompt` the first one is there already."""
        count, num_steps, first = len(batch.rows), job.num_steps, 1 + int(job.include_prompt)
        step = self._runner.bind(self._decoder, pool, state, batch.slots, job.temperature)
        if job.settled is None:
            for _ in range(first, num_steps + 1):
                step()
            return state.states[:count, :num_steps].clone(), torch.full((count,), num_steps)

        running = RunningRows(count, num_steps, pool, state, batch.slots, self._limits.buffer_rows)
        for taken in range(first, num_steps + 1):
            step()
            if taken == num_steps or taken < 2:
                continue
            rows = len(running.state.hidden)
            settled = job.settled(running.state.states[: len(running.texts), :taken]).tolist()
            if not running.leave([row for row, is_settled in enumerate(settled) if is_settled], taken):
                break
            if len(running.state.hidden) < rows:
                step = self._runner.bind(self._decoder, pool, running.state, batch.slots, job.temperature)
        return running.result()

    def _is_jacobi(self, count: int, job: _Job) -> bool:
        """Whether a batch of so many rows is decoded by Jacobi passes."""
        if job.jacobi is None or not job.jacobi.auto:
            return job.jacobi is not None
        tokens = job.num_steps - int(job.include_prompt)
        known = {key: texts for key, texts in self._passes.items() if key[:2] == (tokens, job.jacobi.tolerance)}
        passes = sum(key[2] * texts for key, texts in known.items()) / max(1, sum(known.values()))
        return is_faster(self._device.type, self._size, count, tokens, passes)

    def _decode_jacobi(self, batch: DecodeBatch, pool: KVPool, state: DecodeState, job: _Job) -> tuple[Tensor, Tensor]:
        """`_decode` by Jacobi passes."""
        assert job.jacobi is not None
        count, num_steps, before = len(batch.rows), job.num_steps, int(job.include_prompt)
        tolerance, watch = job.jacobi.tolerance, job.jacobi.watch
        tokens, multiple = num_steps - before, TOKENS_BUCKET if self._limits.row_buckets else 1
        running = RunningRows(count, num_steps, pool, state, batch.slots, self._limits.buffer_rows)
        for done in range(tokens):
            self._runner.bind_pass(
                self._decoder,
                pool,
                running.state,
                batch.slots,
                job.temperature,
                pooling=job.jacobi.pooling,
                before=before,
                first=first_token(done, tokens, multiple),
                stop=tokens,
            )()
            last, moved = done + 1 == tokens, None
            texts = {row: text for row, text in enumerate(running.texts) if text >= 0}
            if done and (watch or (tolerance and not last)):
                moved = running.state.moved.tolist()  # the host waits for the device
            if watch is not None:
                chosen, states = [batch.rows[text] for text in texts.values()], running.state.states[[*texts]]
                watch(chosen, states[:, :num_steps], None if moved is None else [moved[row] for row in texts])
            leaving = [row for row in texts if last or (moved is not None and moved[row] < tolerance)]
            self._passes[tokens, tolerance, done + 1] += len(leaving)
            if not running.leave(leaving, num_steps):
                break
        states, counts = running.result()
        if job.settled is not None:
            for taken in range(num_steps - 1, 1, -1):
                counts[job.settled(states[:, :taken]).cpu()] = taken
        return states, counts

    def _prefix(self, tokens: Sequence[int]) -> dict[int, tuple[Tensor, Tensor]]:
        """Keys and values of the tokens that all rows start with. Every `run` makes them again, because weights or
        adapters may have changed in between, and no cheap check sees every such change."""
        pool = KVPool(len(tokens))
        self._decoder.prefill(PrefillPass(pool, 1, len(tokens), 0, [tokens], None, self._device))
        return pool.prefix(len(tokens))

    def _buffers(self, batch: DecodeBatch, num_steps: int) -> tuple[KVPool, DecodeState]:
        """Pool and state for a batch. They are replaced by larger ones only where the batch needs that."""
        tokens, steps = batch.buffer_rows * batch.slots, max(num_steps, STEPS_BUCKET)
        if self._pool is None or self._pool.tokens < tokens:
            self._pool = None  # freed before the larger one is allocated
            self._runner.drop()
            self._pool = KVPool(max(tokens, min(1 << (tokens - 1).bit_length(), self._limits.kv_tokens)))
        state = self._state
        if state is None or len(state.hidden) < batch.buffer_rows or state.states.shape[1] < steps:
            rows = max(batch.buffer_rows, len(state.hidden) if state is not None else 0)
            self._state = None
            self._runner.drop()
            like = torch.empty(0, self.lm.hidden_size, dtype=self._dtype, device=self._device)
            state = self._state = DecodeState.allocate(rows, steps, like)
        return self._pool, state.first(batch.buffer_rows)

    def _shrink(self) -> None:
        """After an out-of-memory error, frees all buffers and halves the batches permanently."""
        self._pool = self._state = None
        self._runner.drop()
        first = self._limits.rows == Limits.of(self.config, self._device, 1).rows
        self._limits = self._limits.halved()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        if first:
            warnings.warn(
                f"out of memory: batches are halved, to {self._limits.rows} rows and {self._limits.prefill_tokens} "
                "prompt tokens (and further where that is not enough)",
                stacklevel=3,
            )


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
