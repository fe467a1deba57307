"""Engines that are wrong in one way each, for tests of the checks that must find them."""

from __future__ import annotations

from contextlib import contextmanager

import torch

from bench.engines import cached
from gircse.lm.causal_lm import CausalLM


def without_mask(lm, ids, mask, steps):
    return cached(lm, ids, torch.ones_like(mask), steps)


def one_step_short(lm, ids, mask, steps):
    states = cached(lm, ids, mask, steps)
    return torch.cat([states[:, :-1], states[:, -2:-1]], dim=1) if steps > 1 else states


def warmer(lm, ids, mask, steps):
    from gircse.lm.rollout import rollout

    return rollout(lm, ids, mask, steps, temperature=1.1).steps if steps else cached(lm, ids, mask, 0)


@contextmanager
def method(owner, name, replacement):
    before = getattr(owner, name)
    setattr(owner, name, replacement)
    try:
        yield
    finally:
        setattr(owner, name, before)


def wrong_position(lm, ids, mask, steps):
    """Every soft token stands where the last prompt token stood."""
    run_body = CausalLM.run_body

    def late(self, kv_pass, position_ids, **inputs):
        return run_body(self, kv_pass, position_ids - int("inputs_embeds" in inputs), **inputs)

    with method(CausalLM, "run_body", late):
        return cached(lm, ids, mask, steps)


def without_a_norm(lm, ids, mask, steps):
    with method(lm.body.layers[0].post_attention_layernorm, "forward", lambda hidden: hidden):
        return cached(lm, ids, mask, steps)


def wrong_in_large_batches(lm, ids, mask, steps):
    states = cached(lm, ids, mask, steps)
    return states.flip(0) if len(ids) > 4 else states


def nan(lm, ids, mask, steps):
    return cached(lm, ids, mask, steps) * float("nan")


def another_shape(lm, ids, mask, steps):
    return cached(lm, ids, mask, steps)[..., :-1]


def raises_in_float32_when_padded(lm, ids, mask, steps):
    if lm.head_weight.dtype == torch.float32 and not mask.all():
        raise RuntimeError("no such kernel")
    return cached(lm, ids, mask, steps)


def in_half_only(wrong):
    """A mistake that the float32 copy of the model does not make."""

    def run(lm, ids, mask, steps):
        return (wrong if lm.head_weight.dtype == torch.bfloat16 else cached)(lm, ids, mask, steps)

    return run


def cut_gradient(lm, ids, mask, steps):
    states = cached(lm, ids, mask, steps)
    return states * 0.5 + states.detach() * 0.5


EVERY = [
    without_mask,
    one_step_short,
    warmer,
    wrong_position,
    without_a_norm,
    wrong_in_large_batches,
    nan,
    another_shape,
]
GROSS = [without_mask, one_step_short, without_a_norm, wrong_in_large_batches, nan]  # which half precision shows
