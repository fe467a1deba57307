"""The float32 copy of a model that half precision is held against."""

from __future__ import annotations

import copy

import torch

from bench.agreement import HALF
from gircse.lm.causal_lm import CausalLM


def is_half(lm: CausalLM) -> bool:
    """Whether its results are judged against such a copy."""
    return lm.head_weight.dtype in HALF


def twin(lm: CausalLM) -> CausalLM:
    """Every layer, so that the error of the whole depth is seen: of a 7B model it takes 29 GB beside the model's 14.5.

    The caller drops it when the comparison is over.
    """
    model = copy.deepcopy(lm.model).to(torch.float32)
    model.zero_grad(set_to_none=True)
    return CausalLM.from_model(model)
