"""Whatever stands for an argument of an op: a result, or an error that names an argument."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gircse import ops
from tests.fuzz.profiles import fuzz
from tests.fuzz.tensors import garbage, normal


def _soft_embed() -> dict[str, Any]:
    return {"hidden": normal((3, 4), 0), "head_weight": normal((5, 4), 1)}


def _info_nce() -> dict[str, Any]:
    return {"query_steps": normal((3, 2, 4), 0), "doc_steps": normal((6, 2, 4), 1)}


CALLS: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]]]] = {
    "soft_embed": (ops.soft_embed, _soft_embed),
    "top_tokens": (ops.top_tokens, lambda: {**_soft_embed(), "n": 2}),
    "stepwise_info_nce": (ops.stepwise_info_nce, _info_nce),
    "icr_objective": (ops.icr_objective, lambda: {"losses": normal((3,), 0).abs()}),
    "pool_steps": (ops.pool_steps, lambda: {"steps": normal((3, 2, 4), 0)}),
    "l2_normalize": (ops.l2_normalize, lambda: {"vectors": normal((3, 4), 0)}),
    "VocabShard": (ops.VocabShard, lambda: {"start": 0, "stop": 5}),
}


@pytest.mark.parametrize("name", CALLS)
@fuzz(60)
@given(data=st.data())
def test_an_error_names_the_argument(name, data):
    call, arguments = CALLS[name]
    names = list(inspect.signature(call).parameters)
    values = arguments()
    for _ in range(data.draw(st.integers(1, 2))):
        values[data.draw(st.sampled_from(names))] = data.draw(garbage)
    try:
        call(**values)
    except (TypeError, ValueError) as refusal:
        said, expected = str(refusal), "|".join([*names, name])
    except RuntimeError as refusal:  # a backend or a process group that is not there
        said, expected = str(refusal), "backend|group|vocab_parallel"
    else:
        return
    assert re.match(expected, said)


@fuzz(20)
@given(value=garbage)
def test_from_model_takes_models_only(value):
    with pytest.raises((TypeError, ValueError), match="model"):
        ops.from_model(value)
