"""What a training run will need, without loading a weight: memory of each rank, and the least time of a step.

    print(plan(TrainConfig(model="Qwen/Qwen2.5-7B", dtype="bfloat16"), gpu="h100", world_size=8))

Memory is counted, not estimated by a formula: the step runs on the meta device (`gircse.train.plan.meta_step`). The
time is the floor of `gircse.roofline` at the GPU's ceilings; real steps are slower, by what the table of
docs/performance.md calls time / floor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gircse.integers import check_integer
from gircse.ops.info_nce_op import VECTOR_BYTES
from gircse.ops.tiles_torch import WORKSPACE_BYTES
from gircse.roofline import Ceilings, ModelFacts, Work
from gircse.show.tables import text_table
from gircse.train.config import TrainConfig
from gircse.train.plan.extrapolate import StepRows, TracedModel
from gircse.train.plan.gpus import Gpu, find_gpu
from gircse.train.plan.meta_step import Batch, StepMemory

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Bytes of an element of the decoder's matrices, scales included: bitsandbytes' NF4 has one float32 for 64 elements,
# LLM.int8 one for each row.
QUANTIZED_BYTES = {"nf4": 0.5 + 4 / 64, "int8": 1.0}
# CUDA context and loaded kernels, outside of PyTorch's allocator, and cuBLAS' workspaces, inside of it: 8 MiB, on
# Hopper 32 MiB, for each of the two threads that multiply (forward, backward). An estimate.
CONTEXT_BYTES = 640 << 20
# What may be used: the rest is lost to fragmentation of PyTorch's allocator.
USABLE = 0.95
_GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """A predicted training step of one rank.

    Attributes:
        heading: what was planned, in words.
        gpu: the device.
        memory: {part: bytes}, to be added up; the CUDA context is the last.
        seconds: {phase: floor in seconds}, to be added up.
        network_seconds: the least time for what FSDP gathers, which may be hidden behind the phases; 0 without.
        micro_batch_tokens: of the plan, None where the batch is not divided.
        largest_micro_batch_tokens: the largest that fits with gradient caching; None where not even one row does.
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
        """What `torch.cuda.max_memory_allocated` is to show beside cuBLAS' workspaces: all but the CUDA context."""
        return self.total_bytes - self.memory["CUDA context"]

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
    device = find_gpu(gpu)
    _check(world_size=world_size, length=length)
    micro_batch_tokens, quantization, fsdp = config.micro_batch_tokens, config.quantization, config.fsdp
    if negatives is None:
        negatives = 1 if config.max_negatives is None else config.max_negatives
    steps = config.max_num_steps if num_steps is None else num_steps
    model = TracedModel.of(config, model_config)
    base, facts = model.base, model.facts
    rows = math.ceil(config.batch_size / world_size)
    batches = [
        Batch(rows, min(length or config.query_max_length, config.query_max_length)),
        Batch(rows * (1 + negatives), min(length or config.passage_max_length, config.passage_max_length)),
    ]
    fixed = _fixed(base, facts, quantization, world_size if fsdp else 1)
    loss = info_nce_bytes(rows, negatives, steps, facts.hidden, ranks=world_size)
    of_length = {tokens: StepRows.of(model, tokens, steps) for tokens in sorted({batch.length for batch in batches})}
    by_rows = [of_length[batch.length] for batch in batches]
    states = _cache_bytes(batches, steps, facts)
    if micro_batch_tokens is None:
        memory = fixed | _activations(model.memory(batches, steps, loss_bytes=loss))
    else:
        micro = [divided(batch, micro_batch_tokens, steps).rows for batch in batches]
        most = max(map(StepRows.memory, by_rows, micro), key=lambda found: found.peak)
        memory = fixed | {"gradient cache": states} | _activations(most, at_least=loss)
    room = USABLE * device.memory - sum(fixed.values()) - states - CONTEXT_BYTES
    passes = (1 + steps) * (2 if micro_batch_tokens is None else 3) + config.gradient_checkpointing
    micro_batches = sum(1 if micro_batch_tokens is None else _parts(one, micro_batch_tokens, steps) for one in batches)
    gathered = fixed["frozen weights"] * (world_size - 1) * passes * micro_batches if fsdp else 0
    where = f"{world_size} x {device.name}" + (", FSDP" if fsdp else "")
    return Plan(
        heading=_heading(config, base, batches, steps, where, micro_batch_tokens, quantization),
        gpu=device,
        memory=memory | {"CUDA context": CONTEXT_BYTES},
        seconds=_seconds(batches, steps, facts, device.ceilings(base.dtype), config, micro_batch_tokens, quantization),
        network_seconds=gathered / device.link_bytes_per_s,
        micro_batch_tokens=micro_batch_tokens,
        largest_micro_batch_tokens=_largest_micro_batch(by_rows, batches, room, steps) if room >= loss else None,
    )


def divided(batch: Batch, micro_batch_tokens: int, num_steps: int) -> Batch:
    """A micro-batch of it: as many rows as its tokens, K steps included, allow; at least one."""
    return Batch(min(batch.rows, max(1, micro_batch_tokens // (batch.length + num_steps))), batch.length)


def _parts(batch: Batch, micro_batch_tokens: int, num_steps: int) -> int:
    return math.ceil(batch.rows / divided(batch, micro_batch_tokens, num_steps).rows)


def info_nce_bytes(queries: int, negatives: int, num_steps: int, width: int, *, ranks: int = 1) -> int:
    """Temporaries of `stepwise_info_nce` with `queries` rows on each rank: unit vectors of its rows and their gradient,
    the same of a piece of the candidates, for as many steps at a time as its budget holds; what later steps leave for
    earlier ones; a few tiles of similarities."""
    docs, row = queries * (1 + negatives), 4 * width
    group = min(max(1, VECTOR_BYTES // (row * ranks * (queries + docs))), max(num_steps, 1))
    piece = min(ranks * docs, max(1, VECTOR_BYTES // row))
    carried = row * (queries + docs) if group < num_steps else 0
    return 2 * group * row * (queries + piece) + carried + min(WORKSPACE_BYTES, 4 * 3 * queries * docs * ranks)


def _largest_micro_batch(
    by_rows: Sequence[StepRows], batches: Sequence[Batch], room: float, num_steps: int
) -> int | None:
    """Tokens of the largest micro-batch that fits, no more than the largest batch has; None if one row does not."""
    found = [(model.largest(room), batch) for model, batch in zip(by_rows, batches, strict=True)]
    if any(rows == 0 for rows, _ in found):
        return None
    limits = [rows * (batch.length + num_steps) for rows, batch in found if rows < batch.rows]
    return min([max(batch.rows * (batch.length + num_steps) for batch in batches), *limits])


def _fixed(base: Any, facts: ModelFacts, quantization: str | None, shards: int) -> dict[str, int]:
    frozen = sum(p.nbytes for p in base.parameters() if not p.requires_grad)
    if quantization is not None:
        frozen -= int(facts.matrix * (facts.itemsize - QUANTIZED_BYTES[quantization]))
    lora = sum(p.nbytes for p in base.parameters() if p.requires_grad) // shards
    found = {
        "frozen weights": frozen // shards,
        "LoRA weights": lora,
        "LoRA gradients": lora,
        "AdamW moments": 2 * lora,
    }
    if shards > 1:  # FSDP2: a layer at hand and the next one on its way, and the root's, which stay
        vocabulary = facts.itemsize * facts.vocab * (facts.hidden if facts.tied else facts.hidden + facts.embed)
        found["gathered layers"] = 2 * (frozen - vocabulary) // facts.layers + vocabulary
    if quantization is not None:
        matrices = (p for p in base.base_model.parameters() if p.ndim == 2 and p.shape[0] != facts.vocab)
        found["dequantised matrix"] = facts.itemsize * max(p.numel() for p in matrices)
    return found


def _activations(found: StepMemory, at_least: int = 0) -> dict[str, int]:
    return {
        "prompt keys and values": found.keys_values,
        "prompt activations": found.prompt,
        "generated steps": found.steps,
        "temporaries (backward, soft_embed, loss)": found.temporaries + max(0, at_least - found.peak),
    }


def _cache_bytes(batches: Sequence[Batch], num_steps: int, facts: ModelFacts) -> int:
    """Gradient caching keeps the states [B, K, D] of the whole batch, and the loss' gradient for them."""
    return 2 * sum(batch.rows for batch in batches) * max(num_steps, 1) * facts.hidden * facts.itemsize


def _seconds(
    batches: Sequence[Batch],
    num_steps: int,
    facts: ModelFacts,
    ceilings: Ceilings,
    config: TrainConfig,
    micro_batch_tokens: int | None,
    quantization: str | None,
) -> dict[str, float]:
    """The floor of each phase, over all micro-batches. Adapters, norms and launches are not counted."""
    spared = 0.0  # bytes of the matrices that a pass need not read
    if quantization is not None:
        spared = facts.matrix * (facts.itemsize - QUANTIZED_BYTES[quantization])

    def floor(phases: Sequence[Work], body: bool) -> float:
        return ceilings.seconds([Work(work.flops, work.bytes - spared * body) for work in phases])

    found = dict.fromkeys(("prompt, forward", "steps, forward", "backward"), 0.0)
    for batch in batches:
        size = batch.rows if micro_batch_tokens is None else divided(batch, micro_batch_tokens, num_steps).rows
        whole, rest = divmod(batch.rows, size)
        for rows, count in ((size, whole), (rest, 1 if rest else 0)):
            if not count:
                continue
            work = facts.training([batch.length] * rows, num_steps)
            half = len(work) // 2
            forward, backward = work[:half], work[half:]
            # phases: the prompt, then (vocabulary, body) of each step
            found["prompt, forward"] += count * floor(forward[:1], body=True)
            found["steps, forward"] += count * (floor(forward[1::2], body=False) + floor(forward[2::2], body=True))
            found["backward"] += count * (floor(backward[1::2], body=False) + floor(backward[::2], body=True))
    if micro_batch_tokens is not None:
        found["gradient caching, the extra forward"] = found["prompt, forward"] + found["steps, forward"]
    if config.gradient_checkpointing:
        found["checkpointing, the prompt again"] = found["prompt, forward"]
    return found


def _heading(
    config: TrainConfig,
    base: Any,
    batches: Sequence[Batch],
    num_steps: int,
    where: str,
    micro_batch_tokens: int | None,
    quantization: str | None,
) -> tuple[str, ...]:
    adapter = sum(p.numel() for p in base.parameters() if p.requires_grad)
    name = config.model or type(base).__name__
    dtype = str(base.dtype).removeprefix("torch.") + (f", matrices in {quantization}" if quantization else "")
    queries, passages = batches
    divided_into = "not divided"
    if micro_batch_tokens is not None:
        micro = [divided(batch, micro_batch_tokens, num_steps).rows for batch in batches]
        divided_into = f"in micro-batches of {micro[0]} queries or {micro[1]} passages"
    return (
        f"{name} ({dtype}) on {where}; LoRA of {adapter / 1e6:.1f}M parameters, K = {num_steps}"
        + (", gradient checkpointing" if config.gradient_checkpointing else ""),
        f"a rank has {queries.rows} queries of {queries.length} tokens and {passages.rows} passages of "
        f"{passages.length}, {divided_into}",
    )


def _check(**values: int | None) -> None:
    for name, value in values.items():
        if value is not None:
            check_integer(name, value, least=1)
