"""Which decoder the engine runs. Ours must give the states of the stock body on a few tokens, in both phases."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gircse.engine.body.decoder import Decoder, FusedDecoder, StockDecoder
from gircse.engine.body.facts import DecoderFacts, UnknownDecoderError
from gircse.engine.body.weights import fuse
from gircse.engine.decode import DecodePass
from gircse.engine.pool import KVPool
from gircse.engine.prefill import PrefillPass
from gircse.engine.state import DecodeState
from gircse.lm.causal_lm import CausalLM
from gircse.lm.forking import rewriting_weights
from gircse.lm.lora import FusedLora
from gircse.ops.probe import probe_tokens, relative_error, tolerance_of

if TYPE_CHECKING:
    from gircse.engine.config import EngineConfig

_SLOTS = 16
_STEPS = 2


def choose_decoder(lm: CausalLM, config: EngineConfig, kernel: str) -> tuple[Decoder, str | None]:
    """The decoder for a model as it is now, and why it is not ours although ours was wanted.

    Raises:
        ValueError: `fused_kernels` is "always", and ours cannot run.
    """
    if not _wanted(config, lm.device):
        return StockDecoder(lm, compile=config.compile), None
    try:
        return fused_decoder(lm, kernel), None
    except UnknownDecoderError as error:
        if config.fused_kernels == "always":
            raise ValueError(f"fused_kernels: got 'always', expected a decoder that can be fused: {error}") from error
        return StockDecoder(lm), str(error)


def _wanted(config: EngineConfig, device: torch.device) -> bool:
    chosen = config.fused_kernels == "always" or (config.fused_kernels == "auto" and device.type == "cuda")
    return chosen and not config.compile


def fused_decoder(lm: CausalLM, kernel: str, adapters: FusedLora | None = None) -> FusedDecoder:
    """Our decoder body for `lm`, whose projections are fused.

    Args:
        adapters: that work without being merged, all there are.

    Raises:
        UnknownDecoderError: its layers are of another kind, or the states differ by more than rounding explains.
    """
    try:
        ids = probe_tokens(lm.model, lm.facts())
        facts, expected = DecoderFacts.of(lm, ids, adapters)
        with rewriting_weights():
            moved = [fuse(layers) for layer in facts.layers for layers in (layer.qkv, layer.gate_up)]
        if any(moved) and lm.device.type == "cuda":
            torch.cuda.empty_cache()  # a freed weight is too small for the next buffer, and would stay reserved
        decoder = FusedDecoder(lm, facts, adapters)
        states, expected = _states(decoder, lm, ids[0], kernel, expected[0])
    except (UnknownDecoderError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a kernel that does not compile, a layer that takes other arguments
        raise UnknownDecoderError(f"the probe of the fused decoder raised {type(error).__name__}: {error}") from error
    difference, tolerance = relative_error(states, expected), tolerance_of(expected.dtype)
    if not difference <= tolerance:
        raise UnknownDecoderError(
            f"the fused decoder's states differ by {difference:.1e} from the model's own, expected <= {tolerance:.0e}"
        )
    return decoder


@torch.no_grad()
def _states(decoder: FusedDecoder, lm: CausalLM, ids: Tensor, kernel: str, stock: Tensor) -> tuple[Tensor, Tensor]:
    """States of prompts that end at different tokens of `ids` [N], and of steps behind them; and those among the
    `stock` states [N, D] that they must equal."""
    texts = [ids[:length].tolist() for length in range(len(ids) - _STEPS, 0, -1)]
    pool = KVPool(len(texts) * _SLOTS)
    hidden = decoder.prefill(PrefillPass(pool, len(texts), _SLOTS, 0, texts, None, lm.device))
    length = torch.tensor([len(text) for text in texts], device=ids.device)
    state = DecodeState.allocate(len(texts), _STEPS, hidden)
    state.position.copy_(length)
    kv = DecodePass(pool, len(texts), _SLOTS, state.position, kernel)
    embeddings = lm.model.get_input_embeddings()(ids)
    for _ in range(_STEPS):
        kv.begin()
        decoder.step(kv, embeddings[state.position], state)
    got = torch.cat([hidden[:, None], state.states], dim=1)
    return got, stock[length[:, None] + torch.arange(-1, _STEPS, device=ids.device)]
