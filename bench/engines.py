"""The engines that are compared: each one function of the same signature.

    engine(lm, input_ids [B, N], attention_mask [B, N], num_steps) -> states [B, max(K, 1), D]

The states are g_1..g_K, or the prompt's last state h_0 alone where K = 0. Prompts come padded on the left. An engine
that has to keep something between calls (captured graphs, a compiled step) is an object whose `__call__` has this
signature: the runner calls every engine once, untimed, for each point before it times it.

`ENGINES` is the register: add an engine there and every table, check and plot has it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gircse.architecture import CausalLM
from gircse.cpu_linear import OneDNNLinear
from gircse.rollout import rollout

Run = Callable[[CausalLM, Tensor, Tensor, int], Tensor]


def single_pass(lm: CausalLM, input_ids: Tensor, attention_mask: Tensor, num_steps: int) -> Tensor:
    """Any embedding model of that size: one stock forward pass, last-token pooling."""
    if num_steps:
        raise ValueError(f"num_steps: got {num_steps}, expected 0: a single pass generates nothing")
    return _last_state(lm, lm.model.get_input_embeddings()(input_ids), attention_mask)[:, None]


def recompute(lm: CausalLM, input_ids: Tensor, attention_mask: Tensor, num_steps: int) -> Tensor:
    """The reference algorithm: the whole sequence again for each step, no cache, `softmax(logits) @ E`.

    What its implementation wastes beyond that is left out (see `recompute_official`), and it gets the position ids
    that it forgets.
    """
    sequence = lm.model.get_input_embeddings()(input_ids)
    states = [_last_state(lm, sequence, attention_mask)]
    for _ in range(num_steps):
        token = _soft_token(lm, lm.logits(states[-1]))
        sequence, attention_mask = _append(sequence, attention_mask, token)
        states.append(_last_state(lm, sequence, attention_mask))
    return torch.stack(states[1:] or states, dim=1)


def recompute_official(lm: CausalLM, input_ids: Tensor, attention_mask: Tensor, num_steps: int) -> Tensor:
    """`recompute` with the reference implementation's waste (SPEC 2): logits at every position, the hidden states of
    all layers stacked, and a soft token after the last step that nobody reads."""
    sequence = lm.model.get_input_embeddings()(input_ids)
    states = []
    for _ in range(num_steps + 1):
        out = lm.model(
            inputs_embeds=sequence,
            attention_mask=attention_mask,
            position_ids=_positions(attention_mask),
            output_hidden_states=True,
            use_cache=False,
        )
        states.append(torch.stack(out.hidden_states)[-1, :, -1])
        sequence, attention_mask = _append(sequence, attention_mask, _soft_token(lm, out.logits[:, -1]))
    return torch.stack(states[1:] or states, dim=1)


def cached(lm: CausalLM, input_ids: Tensor, attention_mask: Tensor, num_steps: int) -> Tensor:
    """Ours: the prompt once, then one position per step on kept keys and values (`gircse.rollout`)."""
    states = rollout(lm, input_ids, attention_mask, num_steps)
    return states.steps if num_steps else states.prompt[:, None]


@dataclass(frozen=True)
class Engine:
    """An engine and what the runner must know of it.

    Attributes:
        run: the function.
        summary: one line for `--help` and legends.
        stock: run on what PyTorch and transformers come with (SDPA, `nn.Linear`), not on what `CausalLM.from_model` put
            into the model.
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
        ours: list[nn.Module] = [module for module in lm.model.modules() if type(module) is OneDNNLinear]
        attention = lm.config._attn_implementation
        lm.model.set_attn_implementation("sdpa")
        for module in ours:
            module.__class__ = nn.Linear
        try:
            yield self.run
        finally:
            lm.model.set_attn_implementation(attention)
            for module in ours:
                module.__class__ = OneDNNLinear


REFERENCE = "recompute"
SINGLE_PASS = "single-pass"

ENGINES: dict[str, Engine] = {
    SINGLE_PASS: Engine(single_pass, "one stock forward pass, K = 0: any embedding model", steps=False, trains=False),
    REFERENCE: Engine(recompute, "the reference algorithm: the whole sequence every step, softmax @ E"),
    "recompute-official": Engine(recompute_official, "the same with the reference implementation's waste"),
    "recompute-ours": Engine(recompute, "recompute on our linear layers: what the cache alone gains", stock=False),
    "cached": Engine(cached, "ours: the prompt once, a differentiable cache, fused soft tokens", stock=False),
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
    return lm.embed_scale * (torch.softmax(logits, dim=-1) @ lm.embed_weight)


def _append(sequence: Tensor, attention_mask: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
    one = attention_mask.new_ones(attention_mask.shape[0], 1)
    return torch.cat([sequence, token[:, None]], dim=1), torch.cat([attention_mask, one], dim=1)


def _positions(attention_mask: Tensor) -> Tensor:
    return (attention_mask.cumsum(dim=1) - 1).clamp_min(0)
