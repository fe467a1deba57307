"""What a training run will need, without loading a weight: memory of each rank, and the least time of a step.

    print(plan(TrainConfig(model="Qwen/Qwen2.5-7B", dtype="bfloat16"), gpu="h100", world_size=8))

Memory is counted, not estimated by a formula: the step runs on the meta device (`gircse.train.plan.meta_step`). The
time is the floor of `gircse.roofline` at the GPU's ceilings. Real steps are slower: docs/performance.md has measured
values of time / floor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from gircse_kernels.pieces import piece_candidates

from gircse.integers import check_integer
from gircse.ops.info_nce_op import VECTOR_BYTES
from gircse.roofline import Ceilings, ModelFacts, Work
from gircse.show.tables import text_table
from gircse.train.capture import refusal_of
from gircse.train.capture.checkpoints import RandomOperatorError
from gircse.train.config import TrainConfig
from gircse.train.plan.extrapolate import PartlyCheckpointed, StepRows, TracedModel, partly_checkpointed
from gircse.train.plan.gpus import GPUS, Gpu
from gircse.train.plan.meta_step import StepMemory, lora_matrices
from gircse.train.plan.parts import Parts, largest_bucket

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

# Bytes of an element of the decoder's matrices, scales included: bitsandbytes' NF4 has one float32 for 64 elements,
# LLM.int8 one for each row.
QUANTIZED_BYTES = {"nf4": 0.5 + 4 / 64, "int8": 1.0}
# An estimate of the CUDA context and loaded kernels, outside of PyTorch's allocator, and of cuBLAS' workspaces inside
# it: 8 MiB, on Hopper 32 MiB, for each of the two threads that multiply (forward, backward).
CONTEXT_BYTES = 640 << 20
# The share of the memory that a step may use. The rest is lost to fragmentation of PyTorch's allocator.
USABLE = 0.95
_GIB = 2**30
GRAPHS = "CUDA graphs (activations once more)"


@dataclass(frozen=True)
class Plan:
    """A predicted training step of one rank.

    Attributes:
        heading: the model, the GPUs and the batch, in words.
        gpu: the device.
        memory: {part: bytes}, which add up to the total; the CUDA context is the last.
        seconds: {phase: floor in seconds}, which add up to the floor of the step.
        network_seconds: the least time for what FSDP gathers, which may overlap with the phases; 0 without FSDP.
        micro_batch_tokens: those of the config; None where the batch is not divided.
        largest_micro_batch_tokens: the most that fit with gradient caching; None where not even one text fits.
        fewest_checkpointed_layers: that must be checkpointed so that the step fits; None where all are too few.
        layers: of the decoder.
    """

    heading: tuple[str, ...]
    gpu: Gpu
    memory: dict[str, int]
    seconds: dict[str, float]
    network_seconds: float
    micro_batch_tokens: int | None
    largest_micro_batch_tokens: int | None
    fewest_checkpointed_layers: int | None
    layers: int

    @property
    def total_bytes(self) -> int:
        """Memory of a rank."""
        return sum(self.memory.values())

    @property
    def allocated_bytes(self) -> int:
        """All but the CUDA context and the graphs: what `torch.cuda.max_memory_allocated` should show, less cuBLAS'
        workspaces."""
        return self.total_bytes - self.memory["CUDA context"] - self.memory.get(GRAPHS, 0)

    @property
    def step_seconds(self) -> float:
        """The floor of a step."""
        return max(sum(self.seconds.values()), self.network_seconds)

    @property
    def fits(self) -> bool:
        return self.total_bytes <= USABLE * self.gpu.memory

    def __str__(self) -> str:
        memory = [[name, f"{size / _GIB:.2f}"] for name, size in self.memory.items()]
        memory.append(["total", f"{self.total_bytes / _GIB:.2f}"])
        seconds = [[name, f"{1e3 * value:,.1f}"] for name, value in self.seconds.items()]
        if self.network_seconds:
            seconds.append(["(beside them) FSDP gathers", f"{1e3 * self.network_seconds:,.1f}"])
        seconds.append(["step", f"{1e3 * self.step_seconds:,.1f}"])
        tables = text_table(["memory of a rank", "GiB"], memory), text_table(["floor of a step", "ms"], seconds)
        return "\n".join([*self.heading, "", tables[0], "", tables[1], "", self.verdict()])

    def verdict(self) -> str:
        """Whether it fits, and what would."""
        room = f"{self.total_bytes / _GIB:.1f} of {USABLE * self.gpu.memory / _GIB:.1f} usable GiB"
        line = f"{'fits' if self.fits else 'does NOT fit'}: {room} ({self.gpu.name})"
        if self.fewest_checkpointed_layers is None:
            line += f"; nor with all {self.layers} layers checkpointed"
        elif self.fewest_checkpointed_layers:
            line += f"; fewest checkpointed layers that fit: {self.fewest_checkpointed_layers} of {self.layers}"
        if self.largest_micro_batch_tokens is None:
            return f"{line}; not even a micro-batch of one text fits"
        return f"{line}; largest micro_batch_tokens that fits: {self.largest_micro_batch_tokens:,}"


def plan(
    config: TrainConfig,
    *,
    gpu: str,
    world_size: int = 1,
    length: int | None = None,
    negatives: int | None = None,
    num_steps: int | None = None,
    model_config: PretrainedConfig | None = None,
) -> Plan:
    """Predicts a step of `config` on each of `world_size` GPUs.

    Args:
        config: the run; its `batch_size` is the contrastive batch of all ranks together. Without `micro_batch_tokens`
            the batch is planned undivided; a run would find a value by a probe.
        gpu: a name of `gircse.train.plan.gpus.GPUS`.
        length: tokens of every text, at most the config's limits; default: the limits, the worst case.
        negatives: hard negatives of a row; default: the config's `max_negatives`, else 1.
        num_steps: K; default: the config's, the largest of a range.
        model_config: of the base; default: read by `config.model`.

    Raises:
        ValueError: an argument out of range; OSError: the model's config cannot be found.
    """
    if gpu.lower() not in GPUS:
        raise ValueError(f"gpu: got {gpu!r}, expected one of {', '.join(GPUS)}")
    device = GPUS[gpu.lower()]
    check_integer("world_size", world_size, least=1)
    if length is not None:
        check_integer("length", length, least=1)
    if negatives is None:
        negatives = 1 if config.max_negatives is None else config.max_negatives
    if model_config is None:
        from transformers import AutoConfig

        model_config = AutoConfig.from_pretrained(config.model)
    steps = config.max_num_steps if num_steps is None else num_steps
    graphs = config.cuda_graphs and refusal_of(config) is None
    sides = (config.query_max_length, 1), (config.passage_max_length, 1 + negatives)
    rows = math.ceil(config.batch_size / world_size)
    lengths = [min(length or limit, limit) for limit, texts in sides for _ in range(rows * texts)]
    job = _Job(config, model_config, device, world_size, lengths, negatives, steps, graphs)
    try:
        return _plan(job)
    except RandomOperatorError:  # a run would not capture this model either
        return _plan(replace(job, graphs=False))


@dataclass(frozen=True)
class _Job:
    """What is planned.

    Attributes:
        lengths: tokens of each text of a rank.
        graphs: whether micro-batches become CUDA graphs.
    """

    config: TrainConfig
    model_config: PretrainedConfig
    gpu: Gpu
    world_size: int
    lengths: list[int]
    negatives: int
    num_steps: int
    graphs: bool

    @property
    def by_block(self) -> bool:
        return self.config.max_soft_token_gradient == 0 and self.num_steps > 0

    @property
    def checkpointed(self) -> int:
        """The number of checkpointed layers."""
        some, layers = self.config.checkpointed_layers, self.model_config.num_hidden_layers
        if some is None:
            return layers * self.config.gradient_checkpointing
        self.config.expect("checkpointed_layers", some <= layers, f"at most {layers}, all layers")
        return some

    def traced(self, checkpointed: int | None) -> TracedModel:
        """The model with a number of checkpointed layers, None for all."""
        some: dict[str, Any] = {
            "gradient_checkpointing": checkpointed != 0,
            "checkpointed_layers": checkpointed or None,
        }
        return TracedModel.of(replace(self.config, **some), self.model_config, captured=self.graphs)


class _Memory:
    """The memory of a job's steps with a number of checkpointed layers, None for all."""

    def __init__(self, job: _Job, traced: Callable[[int | None], TracedModel], checkpointed: int | None) -> None:
        self._sizes = job.num_steps, job.config.max_soft_token_gradient
        self._rows: dict[int, StepRows] = {}
        self.model = PartlyCheckpointed(traced, checkpointed)

    def of_texts(self, length: int) -> StepRows:
        """Of a micro-batch of texts of this length, by their number."""
        if length not in self._rows:
            self._rows[length] = StepRows.of(self.model, length, *self._sizes)
        return self._rows[length]

    def of_step(self, parts: Parts, loss_bytes: int) -> StepMemory:
        """At the fullest time of a step: of its largest micro-batch with gradient caching, otherwise of all of them."""
        if not parts.cached:
            return self.model.memory(parts.shapes, *self._sizes, loss_bytes=loss_bytes)
        return max((self.of_texts(length).memory(rows) for rows, length in parts.shapes), key=lambda one: one.peak)


def _plan(job: _Job) -> Plan:
    config, steps = job.config, job.num_steps
    parts = Parts.of(job.lengths, config.micro_batch_tokens, steps, graphs=job.graphs)
    traced = cache(job.traced)
    every_layer = job.checkpointed == job.model_config.num_hidden_layers
    memory = _Memory(job, traced, None if every_layer else job.checkpointed)
    base, facts = memory.model.base, memory.model.facts
    fixed = _fixed(base, facts, config.quantization, job.world_size if config.fsdp else 1)
    rows = len(job.lengths) // (2 + job.negatives)
    loss = info_nce_bytes(rows, job.negatives, steps, facts.hidden, ranks=job.world_size)
    states = _cache_bytes(len(job.lengths), steps, facts, job.by_block)
    step = memory.of_step(parts, loss)
    copies = 1 + job.graphs
    room = USABLE * job.gpu.memory - sum(fixed.values()) - CONTEXT_BYTES  # for activations and the cache
    found = Plan(
        heading=_heading(job, base, parts),
        gpu=job.gpu,
        memory={
            **fixed,
            **({"gradient cache": states} if parts.cached else {}),
            **_activations(step, at_least=loss),
            **({GRAPHS: step.peak} if job.graphs else {}),
            "CUDA context": CONTEXT_BYTES,
        },
        seconds=_seconds(job, parts, facts, ceilings(job.gpu, base.dtype)),
        network_seconds=_gathered_bytes(job, parts, fixed) / job.gpu.link_bytes_per_s,
        micro_batch_tokens=config.micro_batch_tokens,
        largest_micro_batch_tokens=_largest_micro_batch(job, memory, (room - states) / copies, loss),
        fewest_checkpointed_layers=0,
        layers=facts.layers,
    )
    if found.fits and not config.gradient_checkpointing:
        return found
    none, one, every = (_Memory(job, traced, count).of_step(parts, loss) for count in (0, 1, None))
    most = (room - states * parts.cached) / copies
    numbers = range(facts.layers + 1)
    peaks = (partly_checkpointed(none, one, every, layers=count).peak if count else none.peak for count in numbers)
    return replace(
        found,
        fewest_checkpointed_layers=next((n for n, peak in zip(numbers, peaks, strict=True) if peak <= most), None),
    )


def ceilings(gpu: Gpu, dtype: torch.dtype) -> Ceilings:
    """The rates of a GPU for a model in `dtype`."""
    return Ceilings(gpu.half_flops_per_s if dtype.itemsize == 2 else gpu.float_flops_per_s, gpu.bytes_per_s)


def info_nce_bytes(queries: int, negatives: int, num_steps: int, width: int, *, ranks: int = 1) -> int:
    """Temporaries of `stepwise_info_nce` by the kernels with `queries` rows on each rank and states of half precision:
    unit vectors of its rows and their gradient, for as many steps at a time as its budget holds; a piece of the
    candidates, with its similarities and their gradients; what later steps leave for earlier ones."""
    docs, row = queries * (1 + negatives), 4 * width
    group = min(max(1, VECTOR_BYTES // (row * ranks * (queries + docs))), max(num_steps, 1))
    piece = min(ranks * docs, piece_candidates(queries, width, 2, VECTOR_BYTES))
    carried = row * (queries + docs) if group < num_steps else 0
    return group * (2 * row * (queries + piece) + 8 * queries * piece) + carried


def _largest_micro_batch(job: _Job, memory: _Memory, room: float, loss_bytes: int) -> int | None:
    """Tokens of the largest micro-batch that fits into `room` bytes, at most all; None if not even one text fits."""
    if room < loss_bytes:
        return None
    shapes = Parts.of(job.lengths, None, job.num_steps, graphs=job.graphs).shapes
    limits = [max(shape.rows * (shape.length + job.num_steps) for shape in shapes)]
    for shape in shapes:
        most = memory.of_texts(shape.length).largest(room)
        if most == 0:
            return None
        if most < shape.rows:
            most = largest_bucket(most, shape.length, job.num_steps) if job.graphs else most
            limits.append(most * (shape.length + job.num_steps))
    return min(limits)


def _fixed(base: Any, facts: ModelFacts, quantization: str | None, shards: int) -> dict[str, int]:
    """Bytes that do not depend on the batch; `shards` processes share the frozen layers."""
    frozen = sum(p.nbytes for p in base.parameters() if not p.requires_grad) - int(_spared(facts, quantization))
    lora = sum(p.nbytes for p in base.parameters() if p.requires_grad)
    parts = {
        "frozen weights": frozen // shards,
        "LoRA weights": lora,
        "LoRA copies": sum(matrix.nbytes for matrix in lora_matrices(base)),
        "LoRA gradients": lora,
        "AdamW moments": 2 * lora,
    }
    if shards > 1:  # FSDP2 holds the layer that computes, the next one, and the root's weights, which stay
        vocabulary = facts.itemsize * facts.vocab * (facts.hidden if facts.tied else facts.hidden + facts.embed)
        parts["gathered layers"] = 2 * (frozen - vocabulary) // facts.layers + vocabulary
    if quantization is not None:
        matrices = (p for p in base.base_model.parameters() if p.ndim == 2 and p.shape[0] != facts.vocab)
        parts["dequantised matrix"] = facts.itemsize * max(p.numel() for p in matrices)
    return parts


def _spared(facts: ModelFacts, quantization: str | None) -> float:
    """Bytes of the decoder's matrices that quantisation saves."""
    return 0.0 if quantization is None else facts.matrix * (facts.itemsize - QUANTIZED_BYTES[quantization])


def _activations(step: StepMemory, at_least: int = 0) -> dict[str, int]:
    """`at_least`: bytes that the loss needs while no activations live."""
    return {
        "prompt keys and values": step.keys_values,
        "prompt activations": step.prompt,
        "generated steps": step.steps,
        "temporaries (backward, soft_embed, loss)": step.temporaries + max(0, at_least - step.peak),
    }


def _cache_bytes(texts: int, num_steps: int, facts: ModelFacts, by_block: bool) -> int:
    """Gradient caching keeps the states [B, K, D] of the whole batch, the loss' gradient for them, and the drafted
    tokens."""
    return (2 + by_block) * texts * max(num_steps, 1) * facts.hidden * facts.itemsize


def _gathered_bytes(job: _Job, parts: Parts, fixed: dict[str, int]) -> float:
    """What FSDP sends to each process in a step: the decoder for forward, for what goes backward, and for what gradient
    caching and checkpointing compute again."""
    if not job.config.fsdp:
        return 0.0
    share = job.checkpointed / job.model_config.num_hidden_layers
    differentiable = 2 if job.by_block else 1 + job.num_steps
    passes = 1 + job.num_steps + differentiable * (1 + parts.cached) + share * (1 + job.by_block)
    return fixed["frozen weights"] * (job.world_size - 1) * passes * parts.each.total()


def _seconds(job: _Job, parts: Parts, facts: ModelFacts, rates: Ceilings) -> dict[str, float]:
    """The floor of each phase, over all micro-batches. Adapters, norms and launches are not counted."""
    spared = _spared(facts, job.config.quantization)  # a pass need not read these bytes

    def floor(phases: Sequence[Work]) -> float:
        return rates.seconds([work._replace(bytes=work.bytes - spared * work.decoder) for work in phases])

    seconds = dict.fromkeys(("prompt, forward", "steps, forward", "backward"), 0.0)
    again = {"prompt": 0.0, "steps": 0.0}  # of forward, what gradient caching computes twice
    for part, count in parts.each.items():
        (prompt, *steps), backward = facts.training_passes(part.lengths, job.num_steps, by_block=job.by_block)
        seconds["prompt, forward"] += count * floor([prompt])
        seconds["steps, forward"] += count * floor(steps)
        seconds["backward"] += count * floor(backward)
        again["prompt"] += count * floor([prompt])
        again["steps"] += count * floor(steps[-1:] if job.by_block else steps)  # the draft is kept
    if parts.cached:
        seconds["gradient caching, the extra forward"] = again["prompt"] + again["steps"]
    if job.checkpointed:
        share = job.checkpointed / facts.layers
        seconds["checkpointing, the prompt again"] = share * again["prompt"]
        if job.by_block:
            seconds["checkpointing, the block again"] = share * again["steps"]
    return seconds


def _heading(job: _Job, base: Any, parts: Parts) -> tuple[str, ...]:
    config, adapter = job.config, sum(p.numel() for p in base.parameters() if p.requires_grad)
    dtype = str(base.dtype).removeprefix("torch.")
    dtype += f", matrices in {config.quantization}" if config.quantization else ""
    layers = "" if config.checkpointed_layers is None else f" of {config.checkpointed_layers} layers"
    rows, length = max(parts.shapes, key=lambda shape: shape.rows * (shape.length + job.num_steps))
    divided = f"in {parts.each.total()} micro-batches, the largest of {rows} texts of {length} tokens"
    return (
        f"{config.model or type(base).__name__} ({dtype}) on {job.world_size} x {job.gpu.name}"
        + (", FSDP" if config.fsdp else "")
        + f"; LoRA of {adapter / 1e6:.1f}M parameters, K = {job.num_steps}{' by the block' if job.by_block else ''}"
        + (f", gradient checkpointing{layers}" if config.gradient_checkpointing else ""),
        f"a rank has {len(job.lengths)} texts of up to {max(job.lengths)} tokens, "
        + (divided if parts.cached else "not divided"),
    )
