"""The floor of a job on a machine: the least time that it can take, by its FLOPs and bytes and the machine's ceilings.

The job is the method's, not that of an engine: each row's n_i prompt tokens once, then K positions for each row on
cached keys and values. A phase cannot be faster than its arithmetic at the machine's best rate of matrix products, nor
faster than its traffic at the machine's best rate of memory. Phases follow one another::

    floor = sum over phases of max(flops / peak, bytes / bandwidth)

With P the decoder's matrix parameters (without vocabulary matrices), L layers, H heads of size d (H_kv for keys and
values), V the vocabulary, D the hidden size, s bytes per element, S_k = sum_i (n_i + k) cached positions at step k:

    phase            FLOPs                                   bytes
    prompt           2 P sum n_i + 4 L H d sum pairs(n_i)    s (P + T D + 2 L H_kv d sum n_i)
    vocabulary, k    2 B V (D + E)                           s V D (tied) or s V (D + E)
    body, k          2 P B + 4 L H d S_k                     s (P + 2 L H_kv d S_k)
    block            2 P B K + 4 L H d sum_k S_k             s (P + 2 L H_kv d S_K)
    backward         the prompt's and body's matrix products once more (frozen base: no weight gradients), attention
                     2.5 times, the vocabulary 2 B V (D + 2 E) (scores are recomputed: docs/method.md §11);
                     bytes as forward

In a training by the block (`gircse.lm.rollout`) the soft tokens are drafted without the body of the last step, the
block follows, and backward goes through the block and the prompt alone.

`pairs(n) = n (n + 1) / 2` are the visible pairs; there are fewer under a sliding window. Activations, norms and
launches are not counted, because an implementation may save them. Bytes are those that must come from memory once, so
a model that stays in the processor's cache can be faster than its floor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Work(NamedTuple):
    """FLOPs and bytes of one phase; `decoder`: whether it reads the decoder's matrices."""

    flops: float
    bytes: float
    decoder: bool = True


@dataclass(frozen=True)
class Ceilings:
    """The rates that the machine reached: FLOP/s of a large matrix product in the dtype, bytes/s of memory."""

    flops_per_s: float
    bytes_per_s: float

    def seconds(self, phases: Sequence[Work]) -> float:
        """The floor of consecutive phases."""
        return sum(max(work.flops / self.flops_per_s, work.bytes / self.bytes_per_s) for work in phases)

    def __str__(self) -> str:
        return f"{self.flops_per_s / 1e9:,.0f} GFLOP/s, {self.bytes_per_s / 1e9:,.1f} GB/s"


@dataclass(frozen=True)
class ModelFacts:
    """The facts of a model on which its FLOPs and bytes depend.

    Attributes:
        parameters: number of all parameters, tied ones once, without adapters.
        matrix: elements of the decoder's matrices, without the vocabulary matrices and the position table.
        vocab, hidden, embed: V, D, E.
        tied: whether head and embedding table are one matrix.
        layers, heads, kv_heads, head_dim: the sizes of attention.
        window: the sliding window of every layer, or None.
        itemsize: bytes of an element.
    """

    parameters: int
    matrix: int
    vocab: int
    hidden: int
    embed: int
    tied: bool
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None
    itemsize: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> ModelFacts:
        """The facts of a plain causal LM, which may be on the meta device."""
        config, matrices = model.config, vocabulary_matrices(model)
        lookups = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
        outside = lookups | {id(matrix) for matrix in matrices}
        heads = config.num_attention_heads
        types = set(getattr(config, "layer_types", None) or [])
        sliding = not types or types == {"sliding_attention"}  # mixed layers count as full ones
        return cls(
            parameters=sum(p.numel() for p in model.parameters()),
            matrix=sum(p.numel() for p in model.parameters() if p.ndim == 2 and id(p) not in outside),
            vocab=matrices[-1].shape[0],
            hidden=matrices[-1].shape[1],
            embed=matrices[0].shape[1],
            tied=len(matrices) == 1,
            layers=config.num_hidden_layers,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            window=getattr(config, "sliding_window", None) if sliding else None,
            itemsize=matrices[0].dtype.itemsize,
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def _visible(self, position: int) -> int:
        """How many keys the query at `position` (from 1) sees."""
        return position if self.window is None else min(position, self.window)

    def _pairs(self, length: int) -> int:
        inside = self._visible(length)
        return inside * (inside + 1) // 2 + (length - inside) * inside

    def prompt(self, lengths: Sequence[int], shared_prefix: int = 0) -> Work:
        """Encoding prompts of the given lengths. The first `shared_prefix` tokens, equal in all, are encoded once."""
        others = len(lengths) - 1
        tokens = sum(lengths) - others * shared_prefix
        pairs = sum(map(self._pairs, lengths)) - others * self._pairs(shared_prefix)
        kept = 2 * self.layers * self.kv_heads * self.head_dim * tokens
        return Work(
            2 * self.matrix * tokens + 4 * self.layers * self.heads * self.head_dim * pairs,
            self.itemsize * (self.matrix + self.embed * tokens + kept),
        )

    def vocabulary(self, rows: int) -> Work:
        """One soft token for each row."""
        elements = self.vocab * (self.hidden if self.tied else self.hidden + self.embed)
        return Work(2 * rows * self.vocab * (self.hidden + self.embed), self.itemsize * elements, decoder=False)

    def body(self, lengths: Sequence[int], step: int) -> Work:
        """The decoder on the soft token of a step (from 1), each row on its own keys and values."""
        return self._steps(lengths, step, step)

    def block(self, lengths: Sequence[int], num_steps: int) -> Work:
        """The decoder on the soft tokens of all steps in one pass."""
        return self._steps(lengths, 1, num_steps)

    def _steps(self, lengths: Sequence[int], first: int, last: int) -> Work:
        seen = [sum(self._visible(length + step) for length in lengths) for step in range(first, last + 1)]
        return Work(
            2 * self.matrix * len(lengths) * len(seen) + 4 * self.layers * self.heads * self.head_dim * sum(seen),
            self.itemsize * (self.matrix + 2 * self.layers * self.kv_heads * self.head_dim * seen[-1]),
        )

    def inference(self, lengths: Sequence[int], num_steps: int, *, shared_prefix: int = 0) -> list[Work]:
        """The prompt, then (vocabulary, body) K times. A shared prefix is encoded once, and every row reads it in each
        step."""
        steps = [(self.vocabulary(len(lengths)), self.body(lengths, k)) for k in range(1, num_steps + 1)]
        return [self.prompt(lengths, shared_prefix), *(work for step in steps for work in step)]

    def training(self, lengths: Sequence[int], num_steps: int) -> list[Work]:
        """Forward and backward with a frozen base, one step after the other."""
        forward, backward = self.training_passes(lengths, num_steps)
        return forward + backward

    def training_passes(
        self, lengths: Sequence[int], num_steps: int, *, by_block: bool = False
    ) -> tuple[list[Work], list[Work]]:
        """Forward (the prompt, then the steps) and backward, with a frozen base. The adapters' own products are not
        counted."""
        forward = self.inference(lengths, num_steps)
        tokens, rows = sum(lengths), len(lengths)
        backward = [self._backward(forward[0], 2 * self.matrix * tokens)]
        if by_block and num_steps:
            forward[-1] = self.block(lengths, num_steps)
            return forward, [*backward, self._backward(forward[-1], 2 * self.matrix * rows * num_steps)]
        for vocabulary, body in zip(forward[1::2], forward[2::2], strict=True):
            backward += [
                vocabulary._replace(flops=2 * rows * self.vocab * (self.hidden + 2 * self.embed)),
                self._backward(body, 2 * self.matrix * rows),
            ]
        return forward, backward

    @staticmethod
    def _backward(work: Work, linear: float) -> Work:
        return Work(linear + 2.5 * (work.flops - linear), work.bytes)


def vocabulary_matrices(model: PreTrainedModel) -> list[Tensor]:
    """Input embedding [V, E] and output head [V, D], or only one of them if they are tied."""
    modules: tuple[Any, Any] = model.get_input_embeddings(), model.get_output_embeddings()
    table, head = (module.weight for module in modules)
    return [table] if head is table else [table, head]
