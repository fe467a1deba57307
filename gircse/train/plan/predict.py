"""What a training run will need, without loading a weight: memory of each rank, and the least time of a step.

    print(plan(TrainConfig(model="Qwen/Qwen2.5-7B", dtype="bfloat16"), gpu="h100", world_size=8))

Memory is counted, not estimated by a formula: the step runs on the meta device (`gircse.train.plan.meta_step`). The
time is the floor of `gircse.roofline` at the GPU's ceilings. Real steps are slower: docs/performance.md has measured
values of time / floor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gircse_kernels.pieces import piece_candidates

from gircse.integers import check_integer
from gircse.ops.info_nce_op import VECTOR_BYTES
from gircse.roofline import Ceilings, ModelFacts, Work
from gircse.show.tables import text_table
from gircse.train.capture import refusal_of
from gircse.train.config import TrainConfig
from gircse.train.plan.extrapolate import StepRows, TracedModel
from gircse.train.plan.gpus import GPUS, Gpu
from gircse.train.plan.meta_step import PromptShape, StepMemory

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
_GRAPHS = "CUDA graphs (activations once more)"


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
        largest_micro_batch_tokens: the most that fit with gradient caching; None where not even one row fits.
    """

    heading: tuple[str, ...]
    gpu: Gpu
    memory: dict[str, int]
    seconds: dict[str, float]
    network_seconds: float
    micro_batch_tokens: int | None
    largest_micro_batch_tokens: int | None

    @property
    def total_bytes(self) -> int:
        """Memory of a rank."""
        return sum(self.memory.values())

    @property
    def allocated_bytes(self) -> int:
        """All but the CUDA context and the graphs: what `torch.cuda.max_memory_allocated` should show, less cuBLAS'
        workspaces."""
        return self.total_bytes - self.memory["CUDA context"] - self.memory.get(_GRAPHS, 0)

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
        if self.largest_micro_batch_tokens is None:
            return f"{line}; not even a micro-batch of one row fits"
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
    steps = config.max_num_steps if num_steps is None else num_steps
    factor = config.max_soft_token_gradient
    by_block = factor == 0 and steps > 0
    model = TracedModel.of(config, model_config)
    base, facts = model.base, model.facts
    rows = math.ceil(config.batch_size / world_size)
    prompts = [
        PromptShape(rows, min(length or config.query_max_length, config.query_max_length)),
        PromptShape(rows * (1 + negatives), min(length or config.passage_max_length, config.passage_max_length)),
    ]
    parts = [
        one if config.micro_batch_tokens is None else divided(one, config.micro_batch_tokens, steps) for one in prompts
    ]
    fixed = _fixed(base, facts, config.quantization, world_size if config.fsdp else 1)
    loss = info_nce_bytes(rows, negatives, steps, facts.hidden, ranks=world_size)
    of_length = {
        tokens: StepRows.of(model, tokens, steps, factor) for tokens in sorted({one.length for one in prompts})
    }
    by_rows = [of_length[one.length] for one in prompts]
    states = _cache_bytes(prompts, steps, facts, by_block)
    largest = max(
        (of_rows.memory(part.rows) for of_rows, part in zip(by_rows, parts, strict=True)), key=lambda one: one.peak
    )
    if config.micro_batch_tokens is None:
        memory = fixed | _activations(model.memory(prompts, steps, factor, loss_bytes=loss))
    else:
        memory = fixed | {"gradient cache": states} | _activations(largest, at_least=loss)
    graphs = config.cuda_graphs and refusal_of(config) is None
    if graphs:
        memory |= {_GRAPHS: largest.peak}
    room = (USABLE * device.memory - sum(fixed.values()) - states - CONTEXT_BYTES) / (1 + graphs)
    # of the whole decoder: forward, then what goes backward, is computed again for gradient caching, and by checkpoints
    differentiable = 2 if by_block else 1 + steps
    passes = 1 + steps + differentiable * (1 if config.micro_batch_tokens is None else 2)
    passes += config.gradient_checkpointing * (1 + by_block)
    passes *= sum(math.ceil(whole.rows / part.rows) for whole, part in zip(prompts, parts, strict=True))
    gathered = fixed["frozen weights"] * (world_size - 1) * passes if config.fsdp else 0
    where = f"{world_size} x {device.name}" + (", FSDP" if config.fsdp else "")
    return Plan(
        heading=_heading(config, base, prompts, parts, f"{steps}{' by the block' if by_block else ''}", where),
        gpu=device,
        memory=memory | {"CUDA context": CONTEXT_BYTES},
        seconds=_seconds(config, prompts, parts, steps, facts, ceilings(device, base.dtype), by_block),
        network_seconds=gathered / device.link_bytes_per_s,
        micro_batch_tokens=config.micro_batch_tokens,
        largest_micro_batch_tokens=_largest_micro_batch(by_rows, prompts, room, steps) if room >= loss else None,
    )


def divided(prompts: PromptShape, micro_batch_tokens: int, num_steps: int) -> PromptShape:
    """A micro-batch of `prompts`: as many rows as its tokens, K steps included, allow; at least one."""
    rows = max(1, micro_batch_tokens // (prompts.length + num_steps))
    return PromptShape(min(prompts.rows, rows), prompts.length)


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


def _largest_micro_batch(
    by_rows: Sequence[StepRows], prompts: Sequence[PromptShape], room: float, num_steps: int
) -> int | None:
    """Tokens of the largest micro-batch that fits into `room` bytes, at most all; None if not even one row fits."""
    rows = [of_rows.largest(room) for of_rows in by_rows]
    if 0 in rows:
        return None
    limits = [most * (one.length + num_steps) for most, one in zip(rows, prompts, strict=True) if most < one.rows]
    return min([max(one.rows * (one.length + num_steps) for one in prompts), *limits])


def _fixed(base: Any, facts: ModelFacts, quantization: str | None, shards: int) -> dict[str, int]:
    """Bytes that do not depend on the batch; `shards` processes share the layers."""
    frozen = sum(p.nbytes for p in base.parameters() if not p.requires_grad) - int(_spared(facts, quantization))
    lora = sum(p.nbytes for p in base.parameters() if p.requires_grad) // shards
    parts = {
        "frozen weights": frozen // shards,
        "LoRA weights": lora,
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


def _cache_bytes(prompts: Sequence[PromptShape], num_steps: int, facts: ModelFacts, by_block: bool) -> int:
    """Gradient caching keeps the states [B, K, D] of the whole batch, the loss' gradient for them, and the drafted
    tokens."""
    return (2 + by_block) * sum(one.rows for one in prompts) * max(num_steps, 1) * facts.hidden * facts.itemsize


def _seconds(
    config: TrainConfig,
    prompts: Sequence[PromptShape],
    parts: Sequence[PromptShape],
    num_steps: int,
    facts: ModelFacts,
    rates: Ceilings,
    by_block: bool,
) -> dict[str, float]:
    """The floor of each phase, over all micro-batches. Adapters, norms and launches are not counted."""
    spared = _spared(facts, config.quantization)  # a pass need not read these bytes

    def floor(phases: Sequence[Work]) -> float:
        return rates.seconds([work._replace(bytes=work.bytes - spared * work.decoder) for work in phases])

    seconds = dict.fromkeys(("prompt, forward", "steps, forward", "backward"), 0.0)
    again = {"prompt": 0.0, "steps": 0.0}  # of forward, what gradient caching computes twice
    for whole, part in zip(prompts, parts, strict=True):
        full, rest = divmod(whole.rows, part.rows)
        for rows, count in ((part.rows, full), (rest, 1)):
            if not rows:
                continue
            (prompt, *steps), backward = facts.training_passes([whole.length] * rows, num_steps, by_block=by_block)
            seconds["prompt, forward"] += count * floor([prompt])
            seconds["steps, forward"] += count * floor(steps)
            seconds["backward"] += count * floor(backward)
            again["prompt"] += count * floor([prompt])
            again["steps"] += count * floor(steps[-1:] if by_block else steps)  # the draft is kept
    if config.micro_batch_tokens is not None:
        seconds["gradient caching, the extra forward"] = again["prompt"] + again["steps"]
    if config.gradient_checkpointing:
        seconds["checkpointing, the prompt again"] = again["prompt"]
        if by_block:
            seconds["checkpointing, the block again"] = again["steps"]
    return seconds


def _heading(
    config: TrainConfig,
    base: Any,
    prompts: Sequence[PromptShape],
    parts: Sequence[PromptShape],
    num_steps: str,
    where: str,
) -> tuple[str, ...]:
    adapter = sum(p.numel() for p in base.parameters() if p.requires_grad)
    name = config.model or type(base).__name__
    dtype = str(base.dtype).removeprefix("torch.")
    dtype += f", matrices in {config.quantization}" if config.quantization else ""
    queries, passages = prompts
    divided_into = "not divided"
    if config.micro_batch_tokens is not None:
        divided_into = f"in micro-batches of {parts[0].rows} queries or {parts[1].rows} passages"
    return (
        f"{name} ({dtype}) on {where}; LoRA of {adapter / 1e6:.1f}M parameters, K = {num_steps}"
        + (", gradient checkpointing" if config.gradient_checkpointing else ""),
        f"a rank has {queries.rows} queries of {queries.length} tokens and {passages.rows} passages of "
        f"{passages.length}, {divided_into}",
    )
