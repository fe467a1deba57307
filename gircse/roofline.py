"""The least time a job can take on a machine: a model of its FLOPs and bytes, and the machine's two ceilings.

The job is GIRCSE's, whatever the engine: each row's n_i prompt tokens once, then K positions per row on cached keys and
values. A phase cannot be faster than its arithmetic at the machine's best matrix-product rate, nor than its traffic
at the machine's best memory rate; phases follow one another::

    floor = sum over phases of max(flops / peak, bytes / bandwidth)

With P the decoder's matrix parameters (without vocabulary matrices), L layers, H heads of size d (H_kv for keys and
values), V the vocabulary, D the hidden size, s bytes per element, S_k = sum_i (n_i + k) cached positions at step k:

    phase            FLOPs                                   bytes
    prompt           2 P sum n_i + 4 L H d sum pairs(n_i)    s (P + T D + 2 L H_kv d sum n_i)
    vocabulary, k    2 B V (D + E)                           s V D (tied) or s V (D + E)
    body, k          2 P B + 4 L H d S_k                     s (P + 2 L H_kv d S_k)
    backward         the prompt's and body's matrix products once more (frozen base: no weight gradients), attention
                     2.5 times, the vocabulary 2 B V (D + 2 E) (scores are recomputed: docs/method.md §11);
                     bytes as forward

`pairs(n) = n (n + 1) / 2` visible pairs, fewer under a sliding window. Activations, norms and launches are left out:
they are what an implementation may save. Bytes count what must come from memory at least once, so a model that
stays in the processor's cache can be faster than its floor.
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
    """FLOPs and bytes of one phase."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Ceilings:
    """What the machine reached in this run: FLOP/s of a large matrix product in that dtype, bytes/s of memory."""

    flops_per_s: float
    bytes_per_s: float

    def seconds(self, phases: Sequence[Work]) -> float:
        """The floor of consecutive phases."""
        return sum(max(work.flops / self.flops_per_s, work.bytes / self.bytes_per_s) for work in phases)

    def __str__(self) -> str:
        return f"{self.flops_per_s / 1e9:,.0f} GFLOP/s, {self.bytes_per_s / 1e9:,.1f} GB/s"


@dataclass(frozen=True)
class ModelFacts:
    """What the FLOPs and bytes of a model depend on.

    Attributes:
        parameters: all of the model's, tied ones once (no adapters).
        matrix: elements of the decoder's matrices, without the vocabulary ones and the position table.
        vocab, hidden, embed: V, D, E.
        tied: whether head and embedding table are one matrix.
        layers, heads, kv_heads, head_dim: attention.
        window: sliding window of every layer, or None.
        itemsize: bytes per element.
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
        """Read from a plain causal LM (it may be on the meta device)."""
        config, matrices = model.config, vocabulary_matrices(model)
        lookups = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
        outside = lookups | {id(matrix) for matrix in matrices}
        heads = config.num_attention_heads
        types = set(getattr(config, "layer_types", None) or [])
        sliding = not types or types == {"sliding_attention"}  # mixed layers: the model counts them as full
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
        """Keys that the query at `position` (counted from 1) sees."""
        return position if self.window is None else min(position, self.window)

    def _pairs(self, length: int) -> int:
        inside = self._visible(length)
        return inside * (inside + 1) // 2 + (length - inside) * inside

    def prompt(self, lengths: Sequence[int], shared_prefix: int = 0) -> Work:
        """Encoding prompts of those lengths, once; the `shared_prefix` tokens that all start with are one prompt's."""
        spared = len(lengths) - 1
        tokens = sum(lengths) - spared * shared_prefix
        pairs = sum(map(self._pairs, lengths)) - spared * self._pairs(shared_prefix)
        kept = 2 * self.layers * self.kv_heads * self.head_dim * tokens
        return Work(
            2 * self.matrix * tokens + 4 * self.layers * self.heads * self.head_dim * pairs,
            self.itemsize * (self.matrix + self.embed * tokens + kept),
        )

    def vocabulary(self, rows: int) -> Work:
        """One soft token for each row."""
        elements = self.vocab * (self.hidden if self.tied else self.hidden + self.embed)
        return Work(2 * rows * self.vocab * (self.hidden + self.embed), self.itemsize * elements)

    def body(self, lengths: Sequence[int], step: int) -> Work:
        """The decoder on the soft token of step 1.., each row on its own keys and values."""
        seen = sum(self._visible(length + step) for length in lengths)
        return Work(
            2 * self.matrix * len(lengths) + 4 * self.layers * self.heads * self.head_dim * seen,
            self.itemsize * (self.matrix + 2 * self.layers * self.kv_heads * self.head_dim * seen),
        )

    def inference(self, lengths: Sequence[int], num_steps: int, *, shared_prefix: int = 0) -> list[Work]:
        """Prompt, then (vocabulary, body) K times. A shared prefix is encoded once; in the steps every row reads it."""
        steps = [(self.vocabulary(len(lengths)), self.body(lengths, k)) for k in range(1, num_steps + 1)]
        return [self.prompt(lengths, shared_prefix), *(work for step in steps for work in step)]

    def training(self, lengths: Sequence[int], num_steps: int) -> list[Work]:
        """Forward and backward with a frozen base; the adapters themselves are not counted."""
        forward = self.inference(lengths, num_steps)
        tokens, rows = sum(lengths), len(lengths)
        again = [self._backward(forward[0], 2 * self.matrix * tokens)]
        for vocabulary, body in zip(forward[1::2], forward[2::2], strict=True):
            again += [
                Work(2 * rows * self.vocab * (self.hidden + 2 * self.embed), vocabulary.bytes),
                self._backward(body, 2 * self.matrix * rows),
            ]
        return forward + again

    @staticmethod
    def _backward(work: Work, linear: float) -> Work:
        return Work(linear + 2.5 * (work.flops - linear), work.bytes)


def vocabulary_matrices(model: PreTrainedModel) -> list[Tensor]:
    """Input embedding [V, E] and output head [V, D]; one entry where they are tied."""
    modules: tuple[Any, Any] = model.get_input_embeddings(), model.get_output_embeddings()
    table, head = (module.weight for module in modules)
    return [table] if head is table else [table, head]
