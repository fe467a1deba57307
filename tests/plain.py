"""GIRCSE in plain PyTorch (docs/method.md §3-6): one row at a time, no padding or cache, the whole sequence each step.

This is what the rollout, the loss and their gradients are held against. It shares no code with the package.
"""

from __future__ import annotations

import torch
from torch import Tensor


def plain_rollout(
    model, ids: Tensor, num_steps: int, temperature: float = 1.0, soft_token_gradient: float = 1.0
) -> tuple[Tensor, Tensor]:
    """ids [N] of one row -> h_0 [D], g_1..g_K [K, D]."""
    transformer = model.base_model
    embed, head, config = model.get_input_embeddings(), model.get_output_embeddings(), model.config
    # Gemma: sqrt(D), as the embedding layer itself rounds it
    scale = float(embed.embed_scale) if config.model_type.startswith("gemma") else 1.0
    softcap = getattr(config, "final_logit_softcapping", None)
    sequence = embed(ids[None])
    states = [transformer(inputs_embeds=sequence, use_cache=False).last_hidden_state[0, -1]]
    for _ in range(num_steps):
        logits = head(states[-1])
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        token = scale * torch.softmax(logits / temperature, -1) @ embed.weight
        if soft_token_gradient != 1:
            token = soft_token_gradient * token + (1 - soft_token_gradient) * token.detach()
        sequence = torch.cat([sequence, token[None, None]], dim=1)
        states.append(transformer(inputs_embeds=sequence, use_cache=False).last_hidden_state[0, -1])
    return states[0], torch.stack(states[1:]) if num_steps else states[0].new_empty(0, states[0].shape[0])


def plain_losses(queries: Tensor, docs: Tensor, target: Tensor, tau: float = 0.02) -> Tensor:
    """[B, K, D], [M, K, D], [B] -> L_1..L_K by docs/method.md §4-5."""
    losses = []
    for k in range(1, queries.shape[1] + 1):
        q = torch.nn.functional.normalize(queries[:, :k].mean(1), dim=-1)
        d = torch.nn.functional.normalize(docs[:, :k].mean(1), dim=-1)
        losses.append(torch.nn.functional.cross_entropy(q @ d.T / tau, target))
    return torch.stack(losses)


def plain_objective(losses: Tensor) -> Tensor:
    """docs/method.md §6, reduction "mean", lambda = 1."""
    penalty = torch.relu((losses[1:] + 1e-8).log() - (losses[:-1] + 1e-8).log())
    return losses.mean() + (penalty.mean() if len(penalty) else 0.0)
