"""What soft tokens say: their top tokens, entropy, and how far each one moves the embedding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from gircse import ops
from gircse.encode import check_texts, pad, tokenize
from gircse.rollout import rollout

if TYPE_CHECKING:
    from gircse.model import GIRCSE

_ROWS = 16  # texts rolled out together


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
        cosine_to_previous: between the embeddings after k and after k - 1 steps; for k = 1 to the prompt's own state.
    """

    step: int
    tokens: list[str]
    token_ids: list[int]
    probabilities: list[float]
    entropy: float
    max_probability: float
    cosine_to_previous: float


@dataclass(frozen=True)
class TextInspection:
    """One text and its soft tokens, one entry a step."""

    text: str
    steps: list[SoftToken]


def inspect(
    model: GIRCSE,
    texts: str | Sequence[str],
    *,
    instruction: str | None = None,
    num_steps: int | None = None,
    top_n: int = 8,
    max_length: int = 512,
) -> list[TextInspection]:
    """See `GIRCSE.inspect`.

    Raises:
        TypeError, ValueError: bad texts, `top_n` or `num_steps` below 1.
    """
    texts = check_texts(texts)
    num_steps = model.config.with_steps(num_steps).num_steps
    if num_steps < 1:
        raise ValueError(f"num_steps: got {num_steps}, expected >= 1: there is no soft token to look at")
    if isinstance(top_n, bool) or not isinstance(top_n, int) or top_n < 1:
        raise ValueError(f"top_n: got {top_n!r}, expected an integer >= 1")
    ids = tokenize(model, texts, instruction=instruction, max_length=max_length, num_steps=num_steps)
    inspections: list[TextInspection] = []
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(ids), _ROWS):
            inspections += _inspect_batch(
                model, texts[start : start + _ROWS], ids[start : start + _ROWS], num_steps, top_n
            )
    finally:
        model.train(was_training)
    return inspections


@torch.inference_mode()
def _inspect_batch(
    model: GIRCSE, texts: Sequence[str], ids: Sequence[Sequence[int]], num_steps: int, top_n: int
) -> list[TextInspection]:
    lm, temperature = model.causal_lm, model.config.temperature
    input_ids, mask = pad(ids, pad_id=model.tokenizer.pad_token_id)
    states = rollout(lm, input_ids.to(model.device), mask.to(model.device), num_steps, temperature=temperature)
    # soft token k is spoken by the state before it: h_0, g_1, .., g_{K-1}
    speakers = torch.cat([states.prompt[:, None], states.steps[:, :-1]], dim=1)
    token_ids, probabilities = ops.top_tokens(
        speakers, lm.head_weight, min(top_n, lm.head_weight.shape[0]), **lm.head_options(temperature)
    )
    _, stats = lm.soft_embed(speakers, temperature=temperature, return_stats=True)
    embeddings = model.pool(states.steps)
    before = torch.cat([states.prompt[:, None].to(embeddings.dtype), embeddings[:, :-1]], dim=1)
    cosine = F.cosine_similarity(embeddings, before, dim=-1)
    return [
        TextInspection(
            text,
            [
                SoftToken(
                    step=k + 1,
                    tokens=[str(model.tokenizer.decode([i])) for i in token_ids[row, k].tolist()],
                    token_ids=token_ids[row, k].tolist(),
                    probabilities=probabilities[row, k].tolist(),
                    entropy=stats.entropy[row, k].item(),
                    max_probability=stats.max_prob[row, k].item(),
                    cosine_to_previous=cosine[row, k].item(),
                )
                for k in range(num_steps)
            ],
        )
        for row, text in enumerate(texts)
    ]
