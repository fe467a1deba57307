"""The three jobs that `bench/sweep.py` varies the sizes of: `soft_embed`, encoding, and a training step.

A job says what runs at given sizes, what it must cost, and what it must hold at once. Neither prediction is fitted to
anything measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from bench import encode_check, train_check
from bench.agreement import Difference
from bench.batches import FIXED, Batch, random_batch
from bench.cases import BOTH, FORWARD, PASSES, Matrices
from bench.engines import CACHED, ENGINES, GRAPH, real_tokens
from bench.memory import give_back, peak_extra_bytes
from bench.op_engines import Problem, check, draw_matrices, eager, ours
from bench.points import Point
from bench.shapes import meta_model, random_model
from bench.throughput import Measured, embed, generation_reports
from bench.training import TrainJob, step, trainable
from gircse.engine import Engine, EngineConfig
from gircse.engine.config import STEPS_BUCKET
from gircse.engine.schedule import next_batch
from gircse.lm.causal_lm import CausalLM
from gircse.ops.tiles_torch import tiling
from gircse.roofline import ModelFacts, Work
from gircse.train.config import TrainConfig
from gircse.train.plan.extrapolate import TracedModel
from gircse.train.plan.meta_step import PromptShape
from gircse.train.plan.predict import info_nce_bytes

Sizes = dict[str, int]  # by name: T, V, D or K, N, B
Run = Callable[[], Any]

# In half precision the rounding of twenty steps leads to another path, so longer rollouts are compared this far.
_CHECKED_STEPS, _CHECKED_LENGTH = 20, 48
# The reference algorithm of training keeps the whole prompt for each step, so the compared step is a small one.
_CHECKED_TRAIN_STEPS, _CHECKED_TRAIN_LENGTH = 3, 16
_NEGATIVES = 1  # of each query


class Job:
    """What a sweep needs to know about the job that it measures.

    Attributes:
        passes: the series of a curve; each has a measured and a predicted value for every size.
    """

    passes: tuple[str, ...]

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def check(self, points: Sequence[Sizes]) -> list[Difference]:
        """Compares the results at these sizes with the reference."""
        raise NotImplementedError

    def runs(self, what: str, at: Sizes) -> dict[str, Run]:
        """`ours`, and `eager` where a baseline is measured beside it."""
        raise NotImplementedError

    def floor(self, what: str, at: Sizes) -> list[Work]:
        """The work that any implementation must do."""
        raise NotImplementedError

    def held(self, what: str, at: Sizes) -> int:
        """The bytes that must be held at once."""
        raise NotImplementedError

    def peak(self, run: Run, at: Sizes) -> int:
        """The bytes that a run allocates at its peak."""
        return peak_extra_bytes(run, self.device)

    def not_captured(self) -> str | None:
        """Why the runs of a GPU were not the CUDA graphs that they should be."""
        return None


class SoftEmbed(Job):
    """`soft_embed` on a tied matrix, forward alone and with backward, with eager PyTorch beside it.

    It must hold O(T D) for its rows and the temporaries of one chunk of the vocabulary, but never T V.
    """

    passes = PASSES

    def __init__(self, largest: Sizes, dtype: torch.dtype, device: torch.device, room: float = math.inf) -> None:
        super().__init__(device)
        self._room = room
        self._head, _ = draw_matrices(Matrices(largest["V"], largest["D"], True), dtype, device)

    def _problem(self, what: str, at: Sizes) -> Problem:
        return Problem.draw(at["T"], what, self._head[: at["V"]], None)

    def check(self, points: Sequence[Sizes]) -> list[Difference]:
        differences = []
        for at in points:
            ratio = check(self._problem(BOTH, at))["worst_ratio"]  # raises where it is too large
            differences.append(Difference.of("ours", f"{at}", {"error over eager's": (ratio, math.inf)}))
            give_back(self.device)  # copies in float64
        return differences

    def runs(self, what: str, at: Sizes) -> dict[str, Run]:
        problem = self._problem(what, at)
        runs = {"ours": problem.call(ours)}
        if 4 * at["T"] * at["V"] * self._head.itemsize < self._room:  # it holds two to three matrices [T, V]
            runs["eager"] = problem.call(eager)
        return runs

    def floor(self, what: str, at: Sizes) -> list[Work]:
        matrix, product = at["V"] * at["D"] * self._head.itemsize, 2 * at["T"] * at["V"] * at["D"]
        forward = Work(2 * product, matrix)
        return [forward] if what == FORWARD else [forward, Work(3 * product, matrix)]

    def held(self, what: str, at: Sizes) -> int:
        return soft_embed_held(at, what, self._head.dtype, self.device)


def soft_embed_held(at: Sizes, what: str, dtype: torch.dtype, device: torch.device) -> int:
    """Results and temporaries of `soft_embed` on a tied matrix at the peak. On CUDA the allocations of the launchers'
    plan are added up."""
    rows, vocab, width, backward = at["T"], at["V"], at["D"], what != FORWARD
    if device.type == "cuda":
        from gircse_kernels.launching import device_of

        from bench.static.launches import Call, allocated_bytes

        call = Call("soft_embed", (rows, vocab, width, width), str(dtype).removeprefix("torch."), True, backward)
        held = allocated_bytes(call, device_of(device))
        # the forward leaves its result, and the same before it was rounded
        return max(held.forward, held.backward + (rows * width * (4 + dtype.itemsize) if backward else 0))
    # The torch backend holds tiles of scores [R, C], one more than are in use because the last one is freed when the
    # next one is there, and a product [R, D].
    used = 2 if backward else 1
    tile_rows, chunk = tiling(rows, vocab, tiles=used, per_vocab=0, per_row=width, itemsize=dtype.itemsize)
    # forward: the result; backward: that, the upstream gradient over the row's sum, and the gradient
    per_row = (3 if backward else 1) * width
    return dtype.itemsize * ((used + 1) * tile_rows * chunk + tile_rows * width + rows * per_row)


class Encode(Job):
    """Encoding by the generation engine."""

    passes = ("encode",)

    def __init__(self, config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(device)
        model = random_model(config, dtype=dtype, device=device)
        self._facts, self._lm = ModelFacts.of(model), CausalLM.from_model(model)
        self._limits = Engine(self._lm, EngineConfig()).report().limits

    def _batch(self, at: Sizes) -> Batch:
        return random_batch(self._facts.vocab, [at["N"]] * at["B"], seed=0, device=self.device)

    def check(self, points: Sequence[Sizes]) -> list[Difference]:
        timed = []
        for at in reversed(points):  # the largest first: its buffers serve all others
            batch, steps = self._batch(at), min(at["K"], _CHECKED_STEPS)
            ours = Measured(Point(GRAPH, steps), {}, embed(ENGINES[GRAPH].run, self._lm, batch, steps).cpu())
            timed.append(encode_check.Timed(f"the timed batch, B = {at['B']}, N = {at['N']}", batch, [ours]))
        steps, length = (max(at[name] for at in points) for name in "KN")
        return encode_check.check(
            self._lm, [GRAPH], min(steps, _CHECKED_STEPS), min(length, _CHECKED_LENGTH), seed=0, timed=timed
        )

    def runs(self, what: str, at: Sizes) -> dict[str, Run]:
        batch = self._batch(at)
        return {"ours": lambda: embed(ENGINES[GRAPH].run, self._lm, batch, at["K"])}

    def not_captured(self) -> str | None:
        return generation_reports(self._lm, [GRAPH])[GRAPH]["not_captured"]

    def peak(self, run: Run, at: Sizes) -> int:
        """Of the first call of a new engine, so that its buffers count."""
        rows, engines = real_tokens(*self._batch(at)), list[Engine]()

        def first() -> Tensor:
            engines.append(Engine(self._lm, EngineConfig()))
            return engines[0].states(rows, at["K"])

        peak = peak_extra_bytes(first, self.device)
        # on a CPU NumPy allocates the keys and values, which PyTorch's profiler does not see
        return peak + (engines[0].report().kv_bytes if self.device.type == "cpu" else 0)

    def floor(self, what: str, at: Sizes) -> list[Work]:
        return self._facts.inference([at["N"]] * at["B"], at["K"])

    def held(self, what: str, at: Sizes) -> int:
        """Keys and values, states and results of the largest decode batch, and the activations of a prefill or of a
        step.

        A prefill holds most in the gated MLP: the residual and its norm [T, D]; gate, up and product [T, I]. A step
        holds most in its soft token.
        """
        facts, limits = self._facts, self._limits
        batch = next_batch(range(at["B"]), [at["N"]] * at["B"], limits, at["K"])
        tokens = batch.buffer_rows * batch.slots
        pool = max(tokens, min(1 << (tokens - 1).bit_length(), limits.kv_tokens))
        cached = pool * 2 * facts.layers * facts.kv_heads * facts.head_dim
        states = batch.buffer_rows * (1 + max(at["K"], STEPS_BUCKET)) * facts.hidden
        results = at["B"] * at["K"] * facts.hidden
        start, stop = batch.prefills[0]
        prefill = (stop - start) * at["N"] * (2 * facts.hidden + 3 * self._lm.config.intermediate_size)
        token = {"T": batch.buffer_rows, "V": facts.vocab, "D": facts.embed}
        widest = soft_embed_held(token, FORWARD, self._lm.head_weight.dtype, self.device)
        return facts.itemsize * (cached + states + results) + max(facts.itemsize * prefill, widest)


class Train(Job):
    """Rollouts, the stepwise contrastive loss, the ICR objective, and backward into LoRA matrices, whose gradients
    exist before the step. The optimizer's own step is left out.

    `gircse train --plan` counts what it must hold on the meta device.
    """

    passes = ("training step",)

    def __init__(self, config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(device)
        self._facts, self._dtype = ModelFacts.of(meta_model(config, dtype)), str(dtype).removeprefix("torch.")
        self._lm = trainable(self._job({"B": 1, "N": 1, "K": 1}), random_model(config, dtype=dtype, device=device))
        self._traced = TracedModel.of(TrainConfig(dtype=self._dtype, lora_dropout=0.0), config)
        for base in self._traced.cut:
            _make_gradients(base)

    def _job(self, at: Sizes) -> TrainJob:
        return TrainJob(
            queries=at["B"],
            negatives=_NEGATIVES,
            length=at["N"],
            distribution=FIXED,
            num_steps=at["K"],
            dtype=self._dtype,
            device=str(self.device),
            seed=0,
        )

    def check(self, points: Sequence[Sizes]) -> list[Difference]:
        length, steps = (max(at[name] for at in points) for name in "NK")
        small = {"B": 1, "N": min(length, _CHECKED_TRAIN_LENGTH), "K": min(steps, _CHECKED_TRAIN_STEPS)}
        jobs = [self._job(at) for at in points]
        differences = train_check.check(self._job(small), [CACHED], self._lm, states_of=jobs)
        _make_gradients(self._lm.model)
        return differences

    def runs(self, what: str, at: Sizes) -> dict[str, Run]:
        queries, passages = self._job(at).batches(self._facts.vocab)
        return {"ours": lambda: step(self._lm, CACHED, queries, passages, at["K"])}

    def floor(self, what: str, at: Sizes) -> list[Work]:
        return self._facts.training(self._job(at).lengths(), at["K"])

    def held(self, what: str, at: Sizes) -> int:
        """Of forward and backward: queries and passages are rolled out one after the other."""
        batches = [PromptShape(at["B"], at["N"]), PromptShape(at["B"] * (1 + _NEGATIVES), at["N"])]
        loss = info_nce_bytes(at["B"], _NEGATIVES, at["K"], self._traced.facts.hidden)
        return self._traced.memory(batches, at["K"], 1.0, cuda=self.device.type == "cuda", loss_bytes=loss).peak


def _make_gradients(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
