"""The threshold in every kernel: several tiles, splits and blocks of rows, whole tiles removed."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from bench.provenance import checkout_environment
from gircse.ops import soft_embed
from gircse.ops.soft_embed_reference import soft_embed_reference
from tests.kernels.small_plans import small_plans
from tests.ops.accuracy import random_inputs, run

ROWS = 19
FORMS = pytest.mark.parametrize(
    ("whole_rows", "dtype"), [(True, torch.bfloat16), (False, torch.bfloat16), (False, torch.float32)], ids=str
)
CASES: dict[str, dict[str, Any]] = {
    "few": {"top_k": 3},
    "many": {"top_p": 0.95, "min_p": 1e-4, "gumbel_seed": 7},
    "rows": {
        "top_k": torch.arange(1, ROWS + 1) ** 2,
        "temperature": 0.5,
        "softcap": 4.0,
        "gumbel_seed": torch.arange(ROWS),
        "gumbel_temperature": 0.4,
    },
}


@pytest.mark.usefixtures("interpreter")
@FORMS
@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_against_float64(whole_rows: bool, dtype: torch.dtype, options: dict[str, Any]) -> None:
    tensors = random_inputs((ROWS,), 107, 27, bias=True, dtype=dtype)
    with small_plans(whole_rows):
        ours = run(soft_embed, tensors, dtype, True, {**options, "backend": "triton"})
    truth = run(soft_embed_reference, tensors, torch.float64, True, options)
    for name, exact in truth.items():
        assert not ours[name].isnan().any(), name
        statistic = name in ("lse", "entropy", "max_prob", "argmax")
        tolerance = 5e-5 if dtype == torch.float32 or statistic else 0.03
        assert (ours[name].double() - exact).abs().max() <= tolerance * (exact.abs().max() + 1), name


SCRIPT = """
import json, sys
from bench.static.compile_report import Case, is_good, report
from bench.static.launches import Call
one, few, many = (1, 50304, 896, 896), (16, 50304, 896, 896), (64, 50304, 1024, 1024)
calls = [
    Call("soft_embed", one, "bfloat16", True, False, ("statistics", "noise", "threshold")),
    Call("soft_embed", few, "bfloat16", True, True, ("threshold",)),
    Call("soft_embed", many, "bfloat16", False, False, ("statistics", "threshold")),
]
entries = report(map(Case, calls), [80, 90], jobs=1)
print(json.dumps([{**e, "good": is_good(e)} for e in entries]))
"""


def test_kernels_with_a_threshold_compile_without_spills() -> None:
    """Some of the table's entries; `bench/compile_kernels.py` compiles all of them."""
    environment = checkout_environment(TRITON_INTERPRET="0")
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    entries = json.loads(done.stdout)
    kernels = {"one_row_kernel", "few_rows_kernel", "weights_kernel", "score_grad_kernel"}
    assert kernels <= {entry["kernel"] for entry in entries}
    assert [entry for entry in entries if not entry["good"]] == []
