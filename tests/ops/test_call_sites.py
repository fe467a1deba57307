"""Call sites as other projects have them, by formula: the plain code, and the call that takes its place.

Each function returns both. Values and all gradients must be the same, and each rewrite must be short.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gircse.ops import soft_embed, soft_embed_logits, top_tokens
from gircse.ops.noise import gumbel
from tests.ops.test_row_options import packed

T, V, D, E = 5, 53, 8, 6
Pair = tuple[Tensor, Tensor]
SITES: list[Callable[..., Pair]] = []
site = SITES.append
SEEDS = torch.arange(T) * 3
SEEN = torch.arange(T * 4).reshape(T, 4) * 2
ALLOWED = torch.rand(T, V, generator=torch.Generator().manual_seed(5)) < 0.6


def draw(seeds: Tensor) -> Tensor:
    return gumbel(seeds.flatten(), 0, V).double().reshape(*seeds.shape, V)


def one_hot(probs: Tensor) -> Tensor:
    """The straight-through one-hot vector."""
    return F.one_hot(probs.argmax(-1), V) - probs.detach() + probs


# Latent reasoning


@site
def soft_thinking(h: Tensor, w: Tensor, e: Tensor) -> Pair:
    probs, ids = (h @ w.T / 0.6).softmax(-1).topk(30)
    share = probs / probs.sum(-1, keepdim=True)
    share = share.masked_fill(share.cumsum(-1) - share >= 0.95, 0.0)[:, :10]
    plain = ((share / share.sum(-1, keepdim=True))[..., None] * e[ids[:, :10]]).sum(1)
    return plain, soft_embed(h, w, e, temperature=0.6, top_k=30, top_p=0.95, top_n=10)


@site
def soft_thinking_with_gumbel_noise(h: Tensor, w: Tensor, e: Tensor) -> Pair:
    log_probs, ids = (h @ w.T / 0.6).log_softmax(-1).topk(12)
    noisy = (log_probs + draw(SEEDS).gather(1, ids)) / 0.5
    plain = (noisy.softmax(-1)[..., None] * e[ids]).sum(1)
    token = soft_embed(h, w, e, temperature=0.6, top_k=12, gumbel_seed=SEEDS, gumbel_temperature=0.5)
    return plain, token


@site
def switching_by_the_entropy_of_all(h: Tensor, w: Tensor, e: Tensor) -> Pair:
    probs = (h @ w.T).softmax(-1)
    certain = -(probs * probs.log()).sum(-1) < 2.0
    best, ids = probs.topk(8)
    soft = ((best / best.sum(-1, keepdim=True))[..., None] * e[ids]).sum(1)
    plain = torch.where(certain[:, None], e[ids[:, 0]], soft)
    token, stats = soft_embed(h, w, e, top_k=8, return_stats=True)
    return plain, torch.where(stats.full.entropy[:, None] < 2.0, e[stats.full.argmax], token)


@site
def mixture_of_inputs(h: Tensor, w: Tensor, e: Tensor) -> Pair:
    logits = h @ w.T
    probs, drawn = logits.softmax(-1), (logits + draw(SEEDS)).argmax(-1)
    weight = -(probs * probs.log()).sum(-1, keepdim=True) / 4
    plain = weight * (probs @ e) + (1 - weight) * e[drawn]
    soft, stats = soft_embed(h, w, e, return_stats=True)
    weight = stats.entropy[:, None] / 4
    drawn = soft_embed(h, w, e, gumbel_seed=SEEDS, return_stats=True)[1].argmax
    return plain, weight * soft + (1 - weight) * e[drawn]


@site
def a_batch_of_greedy_soft_and_sampled_requests(h: Tensor, w: Tensor, e: Tensor) -> Pair:
    warm, noisy, hard = torch.tensor([1.0, 0.6, 0.8, 1.2, 1.0]), SEEDS > 5, SEEDS == 0
    scores = (h @ w.T + noisy[:, None] * draw(SEEDS)) / warm.double()[:, None]
    probs = scores.softmax(-1)
    plain = torch.where(hard[:, None], one_hot(probs), probs) @ e
    token = soft_embed(h, w, e, temperature=warm, gumbel_seed=SEEDS, noise_scale=noisy.double(), hard=hard)
    return plain, token


# Text diffusion: logits of all positions, the first of which is thrown away


@site
def masks_that_are_softened(logits: Tensor, e: Tensor) -> Pair:
    best, ids = logits[:, 1:].softmax(-1).topk(3)
    soft = ((best / best.sum(-1, keepdim=True))[..., None] * e[ids]).sum(-2)
    confidence = best[..., :1].detach()
    plain = confidence * soft + (1 - confidence) * e[0]
    token, stats = soft_embed_logits(logits[:, 1:], e, top_k=3, return_stats=True)
    confidence = stats.full.max_prob[..., None]
    return plain, confidence * token + (1 - confidence) * e[0]


@site
def a_temperature_for_each_position(logits: Tensor, e: Tensor) -> Pair:
    warm = torch.linspace(0.3, 1.0, logits.shape[1]).double()
    plain = (logits / warm[:, None]).softmax(-1) @ e
    return plain, soft_embed_logits(logits, e, temperature=warm)


# Gumbel-softmax prompt attacks: logits [n, V] are what is learnt, several draws at a time


@site
def draws_of_an_adversarial_prompt(theta: Tensor, e: Tensor) -> Pair:
    seeds = torch.arange(3 * len(theta)).reshape(3, -1)
    plain = ((theta + draw(seeds)) / 0.7).softmax(-1) @ e
    return plain, soft_embed_logits(theta.expand(3, -1, -1), e, temperature=0.7, gumbel_seed=seeds)


@site
def straight_through_with_tokens_that_may_be_said(theta: Tensor, e: Tensor) -> Pair:
    theta = theta[:T]
    scores = (theta + draw(SEEDS)).masked_fill(~ALLOWED, -torch.inf)
    plain = one_hot((scores / 0.7).softmax(-1)) @ e
    mask = packed(ALLOWED)
    return plain, soft_embed_logits(theta, e, token_bitmask=mask, temperature=0.7, gumbel_seed=SEEDS, hard=True)


# Soft vector quantisation: a codebook [V, D] is both matrices


@site
def soft_codes(h: Tensor, w: Tensor) -> Pair:
    plain = (-torch.cdist(h, w).square() / 0.8).softmax(-1) @ w
    return plain, soft_embed(h, w, bias=-w.square().sum(1) / 2, logit_scale=2.0, temperature=0.8)


@site
def hard_codes_straight_through(h: Tensor, w: Tensor) -> Pair:
    probs = (-torch.cdist(h, w).square()).softmax(-1)
    plain = one_hot(probs) @ w
    return plain, soft_embed(h, w, bias=-w.square().sum(1) / 2, logit_scale=2.0, hard=True)


# Constrained decoding


@site
def a_grammar_that_allows_some_tokens(h: Tensor, w: Tensor, e: Tensor) -> Pair:
    scores = (h @ w.T / 0.7).masked_fill(~ALLOWED, -torch.inf)
    best, ids = scores.softmax(-1).topk(5)
    plain = ((best / best.sum(-1, keepdim=True))[..., None] * e[ids]).sum(1)
    return plain, soft_embed(h, w, e, token_bitmask=packed(ALLOWED), temperature=0.7, top_k=5)


@site
def a_repetition_penalty(h: Tensor, w: Tensor, e: Tensor) -> Pair:
    logits = h @ w.T
    seen = logits.gather(1, SEEN)
    plain = (logits.scatter(1, SEEN, torch.where(seen > 0, seen / 1.3, seen * 1.3)) / 0.7).softmax(-1) @ e
    seen = (w[SEEN] @ h[:, :, None])[..., 0]
    change = torch.where(seen > 0, seen / 1.3, seen * 1.3) - seen
    return plain, soft_embed(h, w, e, logit_bias=(SEEN, change), temperature=0.7)


# Sequence to sequence, with expected embeddings in the place of what the decoder has said


@site
def expected_embeddings_of_a_decoder(h: Tensor, w: Tensor, bias: Tensor) -> Pair:
    plain = D**0.5 * ((h @ w.T + bias).softmax(-1) @ w)
    return plain, soft_embed(h, w, bias=bias, embed_scale=torch.tensor(D**0.5, dtype=torch.float64))


@site
def scheduled_sampling(h: Tensor, w: Tensor, e: Tensor, bias: Tensor) -> Pair:
    teacher, forced = torch.arange(T), SEEDS % 2 == 0
    plain = torch.where(forced[:, None], e[teacher], ((h @ w.T + bias + draw(SEEDS)) / 0.5).softmax(-1) @ e)
    token = soft_embed(h, w, e, bias=bias, temperature=0.5, gumbel_seed=SEEDS.int())
    return plain, torch.where(forced[:, None], e[teacher], token)


# Memories: a query reads the values of the keys that match best


@site
def a_sparse_memory(h: Tensor, w: Tensor, e: Tensor, scale: Tensor) -> Pair:
    best, ids = (scale * (h @ w.T)).topk(6)
    plain = (best.softmax(-1)[..., None] * e[ids]).sum(1)
    return plain, soft_embed(h, w, e, logit_scale=scale, top_k=6)


@pytest.mark.parametrize("function", SITES, ids=lambda function: function.__name__)
def test_the_call_takes_the_place_of_the_plain_code(function: Callable[..., Pair]) -> None:
    generator = torch.Generator().manual_seed(3)
    shapes = {"h": (T, D), "w": (V, D), "e": (V, E), "bias": (V,), "logits": (2, 7, V), "theta": (7, V), "scale": ()}
    tensors = {
        name: torch.randn(shapes[name], dtype=torch.float64, generator=generator).requires_grad_()
        for name in inspect.signature(function).parameters
    }
    plain, ours = function(**tensors)
    torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-10)
    upstream = torch.randn(plain.shape, dtype=torch.float64, generator=generator)
    grads = [
        torch.autograd.grad(result, list(tensors.values()), upstream, retain_graph=True) for result in (ours, plain)
    ]
    torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-9)
    assert len(inspect.getsource(function).strip().splitlines()) <= 10


def test_a_stochastic_beam() -> None:
    """The n highest noisy log-probabilities are n draws without replacement."""
    h, w = torch.randn(T, D), torch.randn(V, D)
    plain = ((h @ w.T).log_softmax(-1) + draw(SEEDS).float()).topk(4).indices
    assert torch.equal(top_tokens(h, w, 4, gumbel_seed=SEEDS)[0], plain)
