"""What soft_embed says of arguments that it cannot take."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gircse.ops import VocabShard, soft_embed


def quantised(library: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A weight as torchao and bitsandbytes make them: a subclass of their own."""
    kind = type("Packed", (torch.nn.Parameter,), {"__module__": f"{library}.nn"})
    return torch.ones(5, 4).to(dtype).as_subclass(kind)


def valid_arguments() -> dict[str, Any]:
    return {"hidden": torch.randn(3, 4), "head_weight": torch.randn(5, 4)}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": [1.0]}, TypeError, r"hidden: got list, expected a torch.Tensor"),
        ({"hidden": torch.tensor(1.0)}, ValueError, r"hidden: got a 0-dimensional tensor, expected \[..., D\]"),
        ({"hidden": torch.randn(3, 5)}, ValueError, r"hidden: got shape \(3, 5\), expected a last dimension of 4"),
        ({"hidden": torch.ones(3, 4, dtype=torch.int64)}, TypeError, r"hidden: got dtype torch.int64, expected one of"),
        ({"hidden": torch.randn(3, 4, device="meta")}, ValueError, r"head_weight: got device cpu, expected meta"),
        ({"head_weight": torch.randn(5)}, ValueError, r"head_weight: got shape \(5,\), expected \[V, D\]"),
        ({"head_weight": torch.randn(2, 5, 4)}, ValueError, r"head_weight: got shape \(2, 5, 4\), expected \[V, D\]"),
        (
            {"head_weight": torch.randn(0, 4)},
            ValueError,
            r"head_weight: got shape \(0, 4\), expected V and D of at least 1",
        ),
        (
            {"head_weight": torch.randn(5, 0), "hidden": torch.randn(3, 0)},
            ValueError,
            r"head_weight: got shape \(5, 0\), expected V and D of at least 1",
        ),
        ({"head_weight": torch.ones(5, 4, dtype=torch.int32)}, TypeError, r"head_weight: got dtype torch.int32"),
        (
            {"head_weight": torch.randn(5, 4).half()},
            TypeError,
            r"head_weight: got dtype torch.float16, expected torch.float32",
        ),
        (
            {"head_weight": quantised("torchao")},
            TypeError,
            r"head_weight: got a quantised Packed of torchao, expected a plain tensor: keep it out of the quantisation",
        ),
        (
            {"embed_weight": quantised("bitsandbytes", torch.uint8)},
            TypeError,
            r"got a quantised Packed of bitsandbytes",
        ),
        ({"embed_weight": torch.randn(6, 4)}, ValueError, r"embed_weight: got shape \(6, 4\), expected \[5, E\]"),
        ({"embed_weight": torch.randn(5, 0)}, ValueError, r"embed_weight: got shape \(5, 0\), expected \[5, E\]"),
        ({"embed_weight": torch.randn(5)}, ValueError, r"embed_weight: got shape \(5,\), expected \[5, E\]"),
        (
            {"embed_weight": torch.randn(5, 4).double()},
            TypeError,
            r"embed_weight: got dtype torch.float64, expected torch.f",
        ),
        (
            {"embed_weight": torch.randn(5, 4, device="meta")},
            ValueError,
            r"embed_weight: got device meta, expected cpu",
        ),
        ({"bias": torch.randn(4)}, ValueError, r"bias: got shape \(4,\), expected \(5,\)"),
        ({"bias": torch.randn(5).double()}, TypeError, r"bias: got dtype torch.float64, expected torch.float32"),
        ({"temperature": 0.0}, ValueError, r"temperature: got 0.0, expected a finite number above 0"),
        ({"temperature": -1}, ValueError, r"temperature: got -1, expected a finite number above 0"),
        ({"temperature": float("nan")}, ValueError, r"temperature: got nan, expected a finite number above 0"),
        ({"temperature": "1"}, TypeError, r"temperature: got str, expected a number"),
        (
            {"temperature": torch.ones(4)},
            ValueError,
            r"temperature: got shape \(4,\), expected one broadcastable to \(3,\)",
        ),
        (
            {"temperature": torch.ones(2, 3)},
            ValueError,
            r"temperature: got shape \(2, 3\), expected one broadcastable to \(3,",
        ),
        ({"temperature": torch.tensor([1.0, 0.0, 2.0])}, ValueError, r"temperature: got 0.0, expected values above 0"),
        ({"temperature": torch.ones(3, dtype=torch.int64)}, TypeError, r"temperature: got dtype torch.int64"),
        ({"temperature": torch.ones(3, device="meta")}, ValueError, r"temperature: got device meta, expected cpu"),
        ({"softcap": -3}, ValueError, r"softcap: got -3.0, expected a number above 0, or 0 or None for none"),
        ({"logit_scale": float("inf")}, ValueError, r"logit_scale: got inf, expected a finite number"),
        ({"embed_scale": True}, TypeError, r"embed_scale: got bool, expected a number"),
        ({"backend": "cuda"}, ValueError, r"backend: got 'cuda', expected None or one of 'torch', 'triton'"),
        ({"gumbel_seed": 1.5}, TypeError, r"gumbel_seed: got float, expected an int or an integer tensor"),
        ({"gumbel_seed": 2**63}, ValueError, r"gumbel_seed: got 9223372036854775808, expected a number of 64 bits"),
        ({"gumbel_seed": 2**64}, ValueError, r"gumbel_seed: got 18446744073709551616, expected a number of 64 bits"),
        ({"gumbel_seed": -(2**63) - 1}, ValueError, r"gumbel_seed: got -9223372036854775809, expected a number of 64"),
        (
            {"gumbel_seed": torch.ones(3)},
            TypeError,
            r"gumbel_seed: got dtype torch.float32, expected torch.int64 or torch.int32",
        ),
        (
            {"gumbel_seed": torch.ones(2, dtype=torch.int64)},
            ValueError,
            r"gumbel_seed: got shape \(2,\), expected one broadcastable to \(3,\)",
        ),
        (
            {"token_bitmask": torch.ones(3, 1)},
            TypeError,
            r"token_bitmask: got dtype torch.float32, expected torch.int32",
        ),
        (
            {"token_bitmask": torch.ones(3, 2, dtype=torch.int32)},
            ValueError,
            r"token_bitmask: got shape \(3, 2\), expected a last dimension of 1, one bit for each of 5 entries",
        ),
        (
            {"token_bitmask": torch.ones(2, 1, dtype=torch.int32)},
            ValueError,
            r"token_bitmask: got shape \(2, 1\), expected leading dimensions broadcastable to \(3,\)",
        ),
        ({"logit_bias": torch.ones(3)}, TypeError, r"logit_bias: got Tensor, expected a pair of ids"),
        (
            {"logit_bias": (torch.ones(3, 1), torch.ones(3, 1))},
            TypeError,
            r"logit_bias: got ids of dtype torch.float32",
        ),
        (
            {"logit_bias": (torch.full((3, 1), 5), torch.ones(3, 1))},
            ValueError,
            r"logit_bias: got ids from 5 to 5, expected 0 to 4, or -1 for none",
        ),
        (
            {"logit_bias": (torch.ones(3, 1, dtype=torch.int64), torch.ones(3, 2))},
            ValueError,
            r"logit_bias: got ids \(3, 1\) and values \(3, 2\), expected one shape",
        ),
        ({"embed_scale": torch.ones(2)}, ValueError, r"embed_scale: got shape \(2,\), expected one number"),
        ({"logit_scale": torch.ones(1, dtype=torch.int64)}, TypeError, r"logit_scale: got dtype torch.int64"),
        ({"out_dtype": torch.int8}, TypeError, r"out_dtype: got torch.int8, expected one of torch.float32"),
        ({"vocab_parallel": (0, 5)}, TypeError, r"vocab_parallel: got tuple, expected a VocabShard"),
        ({"vocab_parallel": VocabShard(0, 4)}, ValueError, r"head_weight: got 5 rows, expected 4, those of vocab_par"),
        ({"vocab_parallel": VocabShard(0, 5)}, RuntimeError, r"vocab_parallel: torch.distributed is not initialised"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        soft_embed(**{**valid_arguments(), **change})
