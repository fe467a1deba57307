"""Describes soft tokens: top tokens, entropy, how far each one moves the embedding, and signs of failure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from gircse.encode.tokens import check_text, check_texts, pad, tokenize
from gircse.engine.jacobi import Jacobi
from gircse.inspect.failures import Finding, diagnose
from gircse.integers import check_integer
from gircse.lm.rollout import rollout
from gircse.lm.token_ids import check_rows

if TYPE_CHECKING:
    from gircse.embedder import Embedder

TAIL_TOKENS = 256  # the tail is all but this many most probable tokens: what a top-k cut would lose
_ROWS = 16  # number of texts rolled out together


@dataclass(frozen=True)
class SoftToken:
    """One step of one text.

    Attributes:
        step: k, from 1.
        tokens: the n most probable tokens, decoded one by one, most probable first.
        token_ids: their ids.
        probabilities: their probabilities.
        entropy: of the whole distribution, in nats; log(vocabulary size) at most.
        max_probability: of the most probable token.
        tail_mass: probability of all but the `TAIL_TOKENS` most probable tokens.
        cosine_to_previous: between the embeddings after k and after k - 1 steps; for k = 1 to the prompt's own state.
        cosine_to_first: between the embeddings after k steps and after one.
        state_cosine: between the hidden states g_k and g_{k-1}; for k = 1 to the prompt's own state.
    """

    step: int
    tokens: list[str]
    token_ids: list[int]
    probabilities: list[float]
    entropy: float
    max_probability: float
    tail_mass: float
    cosine_to_previous: float
    cosine_to_first: float
    state_cosine: float


@dataclass(frozen=True)
class TextInspection:
    """One text, one soft token per step, and their signs of failure (see `gircse.inspect.failures`).

    Attributes:
        jacobi_moves: where the config's decoding is not sequential, by how much each pass but the first moves the
            embedding, 1 - cosine. Jacobi decoding takes one pass more than there are entries.
    """

    text: str
    steps: list[SoftToken]
    warnings: list[Finding] = field(default_factory=list)
    jacobi_moves: list[float] = field(default_factory=list)


def inspect(
    model: Embedder,
    texts: str | Sequence[str],
    *,
    instruction: str | None = None,
    num_steps: int | None = None,
    top_n: int = 8,
    max_length: int | None = None,
) -> list[TextInspection]:
    """See `GIRCSE.inspect`.

    Raises:
        TypeError, ValueError: bad texts, `top_n` or `num_steps` below 1.
    """
    texts = check_texts(texts)
    num_steps = model.config.with_steps(num_steps).num_steps
    if num_steps < 1:
        raise ValueError(f"num_steps: got {num_steps}, expected >= 1: without steps there is no soft token")
    top_n = check_integer("top_n", top_n, least=1)
    if instruction is not None:
        check_text("instruction", instruction, "str or None")
    length = model.config.max_length(instruction, max_length)
    ids = tokenize(model, texts, instruction=instruction, max_length=length, num_steps=num_steps)
    check_rows(ids, model.causal_lm.vocabulary, num_steps, positions=model.causal_lm.max_positions)
    inspections: list[TextInspection] = []
    jacobi = Jacobi.of(model.config)
    with model.inference() as engine:  # eval mode, no autocast, and other threads wait
        for start in range(0, len(ids), _ROWS):
            inspections += _inspect_batch(
                model, texts[start : start + _ROWS], ids[start : start + _ROWS], num_steps, top_n
            )
        if jacobi is not None:

            def watch(rows: Sequence[int], states: torch.Tensor, moved: Sequence[float] | None) -> None:
                for row, distance in zip(rows, moved or (), strict=False):
                    inspections[row].jacobi_moves.append(distance)

            watched = replace(jacobi, auto=False, watch=watch)
            options: dict[str, Any] = {"temperature": model.config.temperature, "jacobi": watched}
            engine.states(ids, num_steps, include_prompt=model.config.include_prompt_state, **options)
    return inspections


@torch.inference_mode()
def _inspect_batch(
    model: Embedder, texts: Sequence[str], ids: Sequence[Sequence[int]], num_steps: int, top_n: int
) -> list[TextInspection]:
    lm, temperature = model.causal_lm, model.config.temperature
    input_ids, mask = pad(ids, pad_id=model.tokenizer.pad_token_id)
    states = rollout(lm, input_ids.to(model.device), mask.to(model.device), num_steps, temperature=temperature)
    # Soft token k is made of the state before it: h_0, g_1, .., g_{K-1}.
    before_step = torch.cat([states.prompt[:, None], states.steps[:, :-1]], dim=1)
    facts, vocabulary = lm.facts(), lm.vocabulary
    token_ids, probabilities = facts.top_tokens(
        before_step, min(max(top_n, TAIL_TOKENS), vocabulary), temperature=temperature
    )
    tail = (1 - probabilities[..., :TAIL_TOKENS].sum(-1)).clamp_min(0) if vocabulary > TAIL_TOKENS else None
    _, stats = facts.soft_embed(before_step, temperature=temperature, return_stats=True)
    # The embedding after soft token k and the one before it. Without soft tokens it is the prompt's own state.
    if model.config.include_prompt_state:
        pooled = model.pool(states.with_prompt)
        embeddings, before = pooled[:, 1:], pooled[:, :-1]
    else:
        embeddings = model.pool(states.steps)
        before = torch.cat([states.prompt[:, None].to(embeddings.dtype), embeddings[:, :-1]], dim=1)
    columns = {
        "entropy": stats.entropy,
        "max_probability": stats.max_prob,
        "tail_mass": torch.zeros_like(stats.entropy) if tail is None else tail,
        "cosine_to_previous": F.cosine_similarity(embeddings, before, dim=-1),
        "cosine_to_first": F.cosine_similarity(embeddings, embeddings[:, :1], dim=-1),
        "state_cosine": F.cosine_similarity(states.steps.float(), before_step.float(), dim=-1),
    }
    numbers = {name: column.tolist() for name, column in columns.items()}
    ids, shares = token_ids[..., :top_n].tolist(), probabilities[..., :top_n].tolist()
    return [
        TextInspection(
            text,
            [
                SoftToken(
                    step=k + 1,
                    tokens=[str(model.tokenizer.decode([i])) for i in ids[row][k]],
                    token_ids=ids[row][k],
                    probabilities=shares[row][k],
                    **{name: values[row][k] for name, values in numbers.items()},
                )
                for k in range(num_steps)
            ],
            diagnose(*(numbers[name][row] for name in ("max_probability", "state_cosine", "cosine_to_first"))),
        )
        for row, text in enumerate(texts)
    ]
