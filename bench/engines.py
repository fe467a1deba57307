"""The engines that are compared: each one function of the same signature.

    engine(lm, input_ids [B, N], attention_mask [B, N], num_steps) -> states [B, max(K, 1), D]

The states are g_1..g_K, or the prompt's last state h_0 alone where K = 0. Prompts are padded on the left. An engine
that keeps something between calls (captured graphs, a compiled step) is an object whose `__call__` has this signature
(`Generation`). `ENGINES` is the register: an engine that is added there appears in every table, check and plot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gircse.lm.causal_lm import CausalLM
from gircse.lm.lora import fuse_lora, fused_lora, unfuse_lora
from gircse.lm.rollout import rollout

if TYPE_CHECKING:
    from gircse.engine import Engine as GenerationEngine

Run = Callable[[CausalLM, Tensor, Tensor, int], Tensor]


def single_pass(lm: CausalLM, input_ids: Tensor, attention_mask: Tensor, num_steps: int) -> Tensor:
    """Any embedding model of that size: one stock forward pass, last-token pooling."""
    if num_steps:
        raise ValueError(f"num_steps: got {num_steps}, expected 0: a single pass generates nothing")
    return _last_state(lm, lm.model.get_input_embeddings()(input_ids), attention_mask)[:, None]


def recompute(lm: CausalLM, input_ids: Tensor, attention_mask: Tensor, num_steps: int) -> Tensor:
    """The reference algorithm: the whole sequence again for each step, no cache, `softmax(logits) @ E`.

    The waste of its implementation is left out (logits at every position, the hidden states of all layers, a soft token
    after the last step), and the position ids that it forgets are right.
    """
    sequence = lm.model.get_input_embeddings()(input_ids)
    states = [_last_state(lm, sequence, attention_mask)]
    for _ in range(num_steps):
        token = _soft_token(lm, lm.logits(states[-1]))
        sequence, attention_mask = _append(sequence, attention_mask, token)
        states.append(_last_state(lm, sequence, attention_mask))
    return torch.stack(states[1:] or states, dim=1)


def cached(lm: CausalLM, input_ids: Tensor, attention_mask: Tensor, num_steps: int) -> Tensor:
    """Ours: the prompt once, then one position per step on kept keys and values (`gircse.lm.rollout`)."""
    states = rollout(lm, input_ids, attention_mask, num_steps)
    return states.steps if num_steps else states.prompt[:, None]


def official_eval(lm: CausalLM, input_ids: Tensor, attention_mask: Tensor, num_steps: int) -> Tensor:
    """Evaluation as the reference implementation does it, without its waste: transformers' `DynamicCache`, prompts
    padded on the left, one soft token after the other through the stock body, `softmax(logits) @ E` in the model's
    dtype."""
    out = lm.body(
        inputs_embeds=lm.model.get_input_embeddings()(input_ids),
        attention_mask=attention_mask,
        position_ids=_positions(attention_mask),
        use_cache=True,
    )
    states = [out.last_hidden_state[:, -1]]
    for _ in range(num_steps):
        token = _soft_token(lm, lm.logits(states[-1]))
        attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(token), 1)], dim=1)
        out = lm.body(
            inputs_embeds=token[:, None],
            attention_mask=attention_mask,
            position_ids=_positions(attention_mask)[:, -1:],
            past_key_values=out.past_key_values,
            use_cache=True,
        )
        states.append(out.last_hidden_state[:, -1])
    return torch.stack(states[1:] or states, dim=1)


class Generation:
    """`gircse.engine` behind the signature of an engine; `settings` are those of `gircse.engine.EngineConfig`.

    Buffers and captured graphs are kept from call to call, but only for the model of the last call: the generation
    engine holds its model, so keeping one for every model would keep all models alive.
    """

    def __init__(self, **settings: Any) -> None:
        self._settings = settings
        self._kept: tuple[CausalLM, GenerationEngine] | None = None

    def __call__(self, lm: CausalLM, input_ids: Tensor, attention_mask: Tensor, num_steps: int) -> Tensor:
        return self.engine(lm).states(real_tokens(input_ids, attention_mask), num_steps)

    def engine(self, lm: CausalLM) -> GenerationEngine:
        from gircse.engine import Engine, EngineConfig

        if self._kept is None or self._kept[0] is not lm:
            self._kept = None  # its buffers go before new ones come
            self._kept = lm, Engine(lm, EngineConfig(**self._settings))
        return self._kept[1]

    def forget(self) -> None:
        """Gives buffers and graphs back; the next call makes them again."""
        self._kept = None

    def fresh(self) -> Generation:
        """The same settings with nothing kept: for another model, which is to go when the caller has done with it."""
        return Generation(**self._settings)

    def report(self, lm: CausalLM) -> dict[str, Any]:
        """What the generation engine keeps, and why its step is not captured where it should be."""
        return asdict(self.engine(lm).report())


def real_tokens(input_ids: Tensor, attention_mask: Tensor) -> list[list[int]]:
    """Left-padded [B, N] -> the token ids of each row, without padding."""
    lengths = attention_mask.sum(dim=1).tolist()
    return [row[len(row) - length :] for row, length in zip(input_ids.tolist(), lengths, strict=True)]


@dataclass(frozen=True)
class Engine:
    """An engine and what the runner must know of it.

    Attributes:
        run: the function.
        summary: one line for `--help` and legends.
        stock: run on what PyTorch, transformers and PEFT come with (SDPA, `nn.Linear`, LoRA layer by layer), not on
            what `CausalLM.from_model` and `fuse_lora` put into the model.
        steps: False for an engine that has the point K = 0 only.
        trains: whether autograd can go through it.
    """

    run: Run
    summary: str
    stock: bool = True
    steps: bool = True
    trains: bool = True

    @contextmanager
    def attached(self, lm: CausalLM) -> Iterator[Run]:
        """The function, with the model switched to what this engine runs on (not to be timed)."""
        if not self.stock:
            yield self.run
            return
        attention, fused = lm.config._attn_implementation, fused_lora(lm.model) is not None
        lm.model.set_attn_implementation("sdpa")
        unfuse_lora(lm.model)
        try:
            yield self.run
        finally:
            lm.model.set_attn_implementation(attention)
            if fused:
                fuse_lora(lm.model)


def fresh(name: str) -> Engine:
    """An engine of the register that keeps nothing of the model that it is called with when it goes."""
    engine = ENGINES[name]
    return replace(engine, run=engine.run.fresh()) if isinstance(engine.run, Generation) else engine


def forget(names: Iterable[str]) -> None:
    """Gives back what engines of the register keep between calls."""
    for name in names:
        run = ENGINES[name].run
        if isinstance(run, Generation):
            run.forget()


def _generation(summary: str, **settings: Any) -> Engine:
    return Engine(Generation(**settings), summary, stock=False, trains=False)


REFERENCE = "recompute"
SINGLE_PASS = "single-pass"
OFFICIAL_EVAL = "official-eval"
CACHED = "cached"
GRAPH, NO_REUSE = "graph", "graph-no-reuse"

ENGINES: dict[str, Engine] = {
    SINGLE_PASS: Engine(single_pass, "one stock forward pass, K = 0: any embedding model", steps=False, trains=False),
    REFERENCE: Engine(recompute, "the reference algorithm: the whole sequence every step, softmax @ E"),
    "recompute-ours": Engine(recompute, "recompute on our linear layers: what the cache alone gains", stock=False),
    OFFICIAL_EVAL: Engine(official_eval, "official-style evaluation: DynamicCache, eager soft tokens", trains=False),
    CACHED: Engine(cached, "ours: the prompt once, a differentiable cache, fused soft tokens", stock=False),
    GRAPH: _generation("ours: the generation engine, its step a CUDA graph on a GPU"),
    NO_REUSE: _generation("the same, a shared prefix encoded for every text", reuse_prefix=False),
    "compiled": _generation("graph with torch.compile on the step", compile=True),
}


def _last_state(lm: CausalLM, sequence: Tensor, attention_mask: Tensor) -> Tensor:
    """[B, n, D] embeddings, padded on the left -> the stock body's last hidden state at the last position, [B, D]."""
    out = lm.body(
        inputs_embeds=sequence,
        attention_mask=attention_mask,
        position_ids=_positions(attention_mask),
        use_cache=False,
    )
    return out.last_hidden_state[:, -1]


def _soft_token(lm: CausalLM, logits: Tensor) -> Tensor:
    """[B, V] -> [B, D], as eager PyTorch does it, in the model's dtype."""
    return lm.facts().embed_scale * (torch.softmax(logits, dim=-1) @ lm.embed_weight)


def _append(sequence: Tensor, attention_mask: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
    one = attention_mask.new_ones(attention_mask.shape[0], 1)
    return torch.cat([sequence, token[:, None]], dim=1), torch.cat([attention_mask, one], dim=1)


def _positions(attention_mask: Tensor) -> Tensor:
    return (attention_mask.cumsum(dim=1) - 1).clamp_min(0)
