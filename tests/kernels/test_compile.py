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
from bench.static.compile_report import NO_PRODUCT

ROOT = Path(__file__).resolve().parents[2]

# bytes that compilers other than the pinned one put on the stack, where that one puts none
STACK = {
    "3.6": {(80, "one_pass_kernel"): 16, (90, "score_kernel"): 8},
    # 152 is of one launch, D = 512 in one pass
    "3.9": {(80, "one_pass_kernel"): 8, (90, "one_pass_kernel"): 152, (90, "vocab_grad_kernel"): 8},
}


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
    assert [e for e in report if e["shared"] > e["shared_limit"]] == []
    allowed = STACK.get(version("triton").rsplit(".", 1)[0], {})
    assert [e for e in report if e["stack"] > allowed.get((e["arch"], e["kernel"]), 0)] == []
    assert all(0 < e["registers"] <= 255 for e in report)


def test_tensor_cores(report: list[dict]) -> None:
    """Hopper's own instruction wherever the tile is tall enough for it, 64 rows; Ampere's elsewhere."""
    for entry in report:
        if entry["kernel"] in NO_PRODUCT:
            continue
        assert entry["instructions"], entry
        tall = entry["blocks"].get("BLOCK_T", 0) >= 64 or entry["kernel"] == "vocab_grad_kernel"
        if entry["arch"] == 90 and tall:
            assert "wgmma.mma_async" in entry["instructions"], entry
        assert entry["async_copies"] > 0, entry


def test_every_entry_of_the_table_is_covered(report: list[dict]) -> None:
    compiled = set()
    for e in report:
        kernel, blocks = e["kernel"].removesuffix("_kernel"), frozenset(e["blocks"].items())
        compiled.add((kernel, e["arch"], e["dtype"] == "float32", blocks, e["num_warps"], e["num_stages"]))
    for kernel, by_arch in plan.table().items():
        for arch, entries in by_arch.items():
            if arch not in ("sm_80", "sm_90"):
                continue
            for e in entries:
                blocks = frozenset(e["blocks"].items())
                case = (kernel, int(arch[3:]), e["itemsize"] == 4, blocks, e["num_warps"], e["num_stages"])
                assert case in compiled, case


def test_the_table_has_an_entry_for_every_case() -> None:
    """The safe default is for architectures that nobody has tuned; here it is never needed."""
    for arch in (80, 90):
        for kernel in ("score", "weigh", "score_grad", "product", "vocab_grad"):
            for itemsize in (2, 4):
                for rows in (1, 16, 17, 64, 65, 4096, 10**6):
                    assert plan.find(kernel, arch, itemsize, rows) is not None
        for width in (64, 576, 896, 1024, 2048):
            assert plan.find("one_pass", arch, 2, 16, sum(plan.pieces(width))) is not None


def test_lookup_takes_the_nearest_entry_and_the_safe_default() -> None:
    found = plan.find("score", 90, 2, 40)
    assert found is not None
    assert found.blocks["BLOCK_T"] == 64  # the smallest that holds 40 rows
    assert plan.find("score", 90, 2, 10**6) == plan.find("score", 90, 2, 4096)
    assert plan.find("score", 86, 2, 16) == plan.find("score", 80, 2, 16)  # the newest architecture known before it
    assert plan.find("score", 75, 2, 16) is None
    assert plan.lookup("score", 75, 2, 16) == plan.SAFE["score"]


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        (1, (16, 0)),
        (16, (16, 0)),
        (20, (16, 16)),
        (64, (64, 0)),
        (576, (512, 64)),
        (896, (1024, 0)),
        (1536, (1024, 512)),
    ],
)
def test_pieces(width: int, expected: tuple[int, int]) -> None:
    assert sum(plan.pieces(width)) >= width
    assert plan.pieces(width) in (expected, (32, 0))


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
    for file in (ROOT / "kernels" / "gircse_kernels").glob("*.py"):
        for line in file.read_text().splitlines():
            if line.startswith(("import ", "from ")):
                assert not any(word in line for word in ("gircse.", "import gircse", "transformers", "torch.nn")), line
