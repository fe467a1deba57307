"""Every config of the table, compiled for GPUs that are not here: it fits, spills nothing and uses the tensor cores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from gircse_kernels import plan

from bench.provenance import checkout_environment
from bench.static.compile_report import PRODUCTS, is_good, programs

ROOT = Path(__file__).resolve().parents[2]


# Bytes that other compilers than the pinned one put on the stack, where that one puts none.
STACK = {"3.6": {(100, "decode_attention_kernel"): 8}}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """In a process of its own: here the kernels belong to the interpreter."""
    out = tmp_path_factory.mktemp("report") / "report.json"
    environment = checkout_environment(TRITON_INTERPRET="0")
    command = [sys.executable, str(ROOT / "bench" / "compile_kernels.py"), "--variants", "plain", "--out", str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=550, check=False)
    assert out.exists(), done.stderr[-3000:]
    return json.loads(out.read_text())["plain"]


def test_shared_memory_and_spills(report: list[dict]) -> None:
    allowed = STACK.get(version("triton").rsplit(".", 1)[0], {})
    for entry in report:
        stack = max(0, entry["stack"] - allowed.get((entry["arch"], entry["kernel"]), 0))
        assert is_good({**entry, "stack": stack}), entry
    assert all(0 < entry["registers"] <= 255 for entry in report)
    assert {entry["arch"] for entry in report} == {80, 90, 100}
    # what GPUs of little shared memory run, but for form 2, whose width they limit
    assert all(e["shared"] <= 99 * 1024 for e in report if e["arch"] == 80 and e["kernel"] != "few_rows_kernel")


def test_tensor_cores(report: list[dict]) -> None:
    """Hopper's instruction wherever the tile is tall enough for it, 64 rows; Ampere's elsewhere. Loads run ahead."""
    for entry in report:
        if entry["kernel"] in PRODUCTS:
            tall = entry["blocks"].get("BLOCK_T", entry["blocks"].get("BLOCK_M", 0)) >= 64
            if entry["arch"] == 90 and tall:
                assert "wgmma.mma_async" in entry["instructions"], entry
            assert entry["async_copies"] > 0, entry


def test_elementwise_kernels_move_16_bytes_at_a_time(report: list[dict]) -> None:
    """They do nothing but read and write, and need a compiler that knows how columns of a chunk are aligned."""
    least = dict.fromkeys(("weights_kernel", "settle_kernel", "score_grad_kernel"), 4)
    least |= {"add_rms_norm_kernel": 3, "gated_kernel": 3, "rotary_write_kernel": 6}  # every load and store of a row
    elementwise = [entry for entry in report if entry["kernel"] in least]
    assert {entry["kernel"] for entry in elementwise} == set(least)
    for entry in elementwise:
        two_columns = entry["blocks"].get("TILE") == 256  # of each thread
        assert entry["wide_accesses"] >= least[entry["kernel"]] or two_columns, entry


def test_dependent_launch_is_compiled_where_it_exists(report: list[dict]) -> None:
    assert {entry["arch"] for entry in report if entry["dependent"]} == {90, 100}


def test_programs_per_multiprocessor_are_those_that_the_plan_counts_on(report: list[dict]) -> None:
    """The splits of forms 1 and 2 fill the device only if so many programs fit one multiprocessor."""
    configs = {
        (f"{kernel}_kernel", int(arch[3:]), frozenset(e["blocks"].items()), e["num_warps"], e["num_stages"]): e
        for kernel in ("one_row", "few_rows")
        for arch, entries in plan.table()[kernel].items()
        for e in entries
    }
    for entry in report:
        blocks = frozenset(entry["blocks"].items())
        key = (entry["kernel"], entry["arch"], blocks, entry["num_warps"], entry["num_stages"])
        if key in configs:
            assert entry["programs"] >= configs[key]["per_sm"], entry


@pytest.mark.parametrize(
    ("warps", "registers", "shared", "arch", "expected"),
    [
        (4, 128, 0, 90, 4),
        (4, 32, 0, 90, 16),
        (8, 255, 0, 80, 1),
        (4, 100, 113 * 1024, 90, 2),
        (4, 24, 82 * 1024, 80, 1),
    ],
)
def test_programs(warps: int, registers: int, shared: int, arch: int, expected: int) -> None:
    assert programs(warps, registers, shared, arch) == expected


def test_every_entry_of_the_table_is_covered(report: list[dict]) -> None:
    names = {"matmul": "product", "kept_overflow": "overflow_matrix"}
    compiled = set()
    for e in report:
        kernel, blocks = e["kernel"].removesuffix("_kernel"), frozenset(e["blocks"].items())
        # `select_kernel` is the same for all inputs: the scores that it reads are float32
        for single in (False, True) if kernel == "select" else (e["dtype"] == "float32",):
            compiled.add((kernel, e["arch"], single, blocks, e["num_warps"], e["num_stages"]))
    for kernel, by_arch in plan.table().items():
        for arch, entries in by_arch.items():
            for e in entries if kernel != "many_rows" else ():
                blocks = frozenset(e["blocks"].items())
                name = names.get(kernel, kernel)
                case = (name, int(arch[3:]), e["itemsize"] == 4, blocks, e["num_warps"], e["num_stages"])
                assert case in compiled, case


def test_the_folder_kernels_is_no_package() -> None:
    """transformers looks for Hugging Face's distribution of that name and imports what it finds."""
    script = (
        "import importlib.util as u; spec = u.find_spec('kernels');"
        "assert spec is None or spec.origin is None or 'gircse' not in str(spec.origin), spec;"
        "from transformers import AutoModelForCausalLM; import gircse_kernels.plan; print('fine')"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "fine", done.stderr[-2000:]
    assert not list((ROOT / "kernels").glob("*.py"))


def test_kernels_know_nothing_above_them() -> None:
    for file in (ROOT / "kernels" / "gircse_kernels").rglob("*.py"):
        for line in file.read_text().splitlines():
            if line.startswith(("import ", "from ")):
                assert not any(word in line for word in ("gircse.", "import gircse", "transformers", "torch.nn")), line
