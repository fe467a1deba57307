"""Prefills of few tokens as CUDA graphs.

The host starts nine kernels a layer for a prefill, whatever its tokens. For few tokens, or thousands of a small model,
it takes longer to start them than the device to run them, and a graph starts them at once. One graph serves all
batches of a bucket of (texts, tokens) in buffers of the same shape.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gircse.engine.body.decoder import Decoder, FusedDecoder
from gircse.engine.pool import KVPool
from gircse.engine.prefill import MOST_SPARE, PrefillPass

# Of one layer's products. With more the device is busy for longer than the host, which took half a millisecond to
# start a layer beside an H200, and the activations in a graph take memory.
MOST_FLOPS = 5e11
MAX_GRAPHS = 48  # a capture costs as much as many prefills, so none makes room for another


class _Captured(NamedTuple):
    kv: PrefillPass
    states: Tensor
    graph: Any


class PrefillGraphs:
    """The captured prefills of one engine."""

    def __init__(self) -> None:
        self._graphs: dict[tuple[int, ...], _Captured | None] = {}  # None: seen once
        self._possible = True

    @property
    def captured(self) -> int:
        """The number of graphs."""
        return sum(graph is not None for graph in self._graphs.values())

    def drop(self) -> None:
        self._graphs.clear()

    def run(
        self,
        capture: Callable[[Callable[[], Any]], Any],
        decoder: Decoder,
        pool: KVPool,
        rows: int,
        slots: int,
        start: int,
        texts: Sequence[Sequence[int]],
        device: torch.device,
    ) -> Tensor | None:
        """`Decoder.prefill` of the texts in rows `start` and following, [n, D]; None where it is not captured: in the
        first batch of its bucket, which may be the last, for many tokens, or where attention has to pad.

        The next replay of a graph overwrites the result.

        Args:
            capture: makes a graph of a function, which it may call before.
            pool, rows, slots, start, texts, device: as for `PrefillPass`.
        """
        tokens = sum(map(len, texts))
        # The stock body may have no position for the tokens that fill a bucket.
        if not self._possible or not isinstance(decoder, FusedDecoder):
            return None
        if 2 * decoder.layer_parameters * tokens > MOST_FLOPS:
            return None
        room = (1 << len(texts).bit_length(), _bucket(tokens))
        key = (rows, slots, *room)
        if key not in self._graphs:
            self._graphs[key] = None
            return None
        captured = self._graphs[key]
        if captured is None and self.captured >= MAX_GRAPHS:
            return None
        if captured is None or captured.kv.pool is not pool:
            kv = PrefillPass(pool, rows, slots, start, texts, None, device, room=room)
            states: list[Tensor] = []

            def prefill() -> None:
                found = decoder.prefill(kv)
                if not states:  # in a run before the capture, so that no other graph writes here
                    states.append(torch.empty_like(found))
                states[0].copy_(found)

            try:
                graph = capture(prefill)
            except torch.OutOfMemoryError:
                raise
            except NotImplementedError:  # attention pads
                self._possible = False
                return None
            except Exception as error:
                self._possible = False
                reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
                warnings.warn(f"short prefills are not captured as CUDA graphs: {reason}", stacklevel=2)
                return None
            captured = self._graphs[key] = _Captured(kv, states[0], graph)
        else:
            captured.kv.refill(start, texts)
        captured.graph.replay()
        return captured.states[: len(texts)]


def _bucket(tokens: int) -> int:
    """A power of two from 16 on, above 128 a multiple of 128, above 2,048 of 256, above 4,096 of `MOST_SPARE`."""
    power = 1 << (tokens - 1).bit_length()
    if power <= 128:
        return max(16, power)
    multiple = min(max(128, power // 16), MOST_SPARE)
    return -(-tokens // multiple) * multiple
