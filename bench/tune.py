#!/usr/bin/env python
"""Write the kernels' config table, `kernels/gircse_kernels/configs.json`: offline, never in a user's process.

    python bench/tune.py --static              # no GPU: by what the compiler reports
    python bench/tune.py --out configs.json    # on a GPU: by time, for its own architecture

Every candidate is compiled for the target first, in the variants in which it is launched (with and without statistics
and options, tied and untied, all gradients): it must fit the shared memory and spill nothing. Without a GPU the first
that passes, in the order below (deepest pipeline and largest tiles first), is taken; on a GPU the fastest, over the
plain variant. Entries of other architectures stay as they are.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from gircse_kernels import info_nce, plan, soft_embed
from gircse_kernels.plan import Config

from bench.static import compile_report
from bench.static.compile_report import SHARED_LIMIT
from bench.static.launches import DEVICES, Call, launches
from bench.suite.alternatives import Alternative, using
from bench.suite.candidates import race

VOCAB = 151_936
CANDIDATES, WIDE = 8192, 3584  # of the contrastive loss that is timed
MANY = plan.ROW_BLOCK
_SECONDS = 2.0  # of timing for each entry
FORWARD = ("one_pass", "score", "weigh")
CONTRASTIVE = (
    "score",
    "product",
    "vocab_grad",
)  # whose float32 tiles the contrastive loss runs with: similarity's, too


_VARIANTS: tuple[tuple[str, ...], ...] = ((), ("statistics",), ("statistics", "scores"))


class Slot(NamedTuple):
    """One entry of the table to fill."""

    kernel: str
    itemsize: int
    rows: int
    width: int  # 0: any

    @property
    def contrastive(self) -> bool:
        """`stepwise_info_nce`, always in float32, is the main use of this entry: it is timed, and must compile."""
        return self.itemsize == 4 and self.kernel in CONTRASTIVE

    @property
    def kernels(self) -> set[str]:
        """Names of the kernels that take the entry."""
        return {f"{self.kernel}_kernel"} | (
            {"similarity_kernel"} if self.contrastive and self.kernel == "score" else set()
        )

    def calls(self) -> list[Call]:
        """The variants in which an entry must compile."""
        dtype = "float32" if self.itemsize == 4 else "bfloat16"
        width = self.width or 1024
        call = Call("soft_embed", (self.rows, VOCAB, width, width), dtype, self.kernel == "one_pass")
        loss = Call("info_nce", (self.rows, CANDIDATES, 1, width), "float32", backward=True)
        losses = [loss] if self.contrastive else []
        if self.kernel in FORWARD:
            return [*losses, *(call._replace(variants=variants) for variants in _VARIANTS)]
        frozen = call._replace(tied=True, backward=True)
        trained = [
            frozen._replace(tied=tied, variants=("statistics", *scores, "matrices"))
            for scores in ((), ("scores",))
            for tied in (True, False)
        ]
        return [*losses, frozen, *trained]


def slots() -> Iterator[Slot]:
    for rows in (16, 32, 64):
        for width in (128, 256, 512, 768, 1024, 1536, 2048):
            if rows > 16 and width in (768, 1536):  # padded to the next: see plan.py
                continue
            yield Slot("one_pass", 2, rows, width)
    for kernel in ("score", "weigh", "score_grad", "product", "vocab_grad"):
        for itemsize in (2, 4):
            for rows in (16, 64, MANY):
                yield Slot(kernel, itemsize, rows, 0)


def candidates(slot: Slot) -> Iterator[Config]:
    """In order of preference where nothing can be measured."""
    if slot.kernel == "one_pass":
        # three stages are the least that load one tile while another is in use
        for tile, warps, stages in (
            (128, 4, 3), (128, 8, 3), (64, 8, 3), (64, 4, 3), (32, 8, 4), (32, 8, 3), (32, 16, 3), (16, 8, 4),
            (16, 8, 3), (16, 16, 3), (64, 8, 2), (32, 8, 2), (32, 16, 2), (16, 8, 2), (16, 16, 2),
        ):  # fmt: skip
            yield Config({"BLOCK_T": slot.rows, "BLOCK_V": tile}, warps, stages)
        return
    rows = min(slot.rows, 128)
    deep = 64 if slot.itemsize == 2 else 32  # of the summed dimension: 128 bytes of a row
    few = slot.rows < 128
    shapes: tuple[tuple[int, int, int, int], ...]  # rows, columns, warps, stages
    if few:
        shapes = tuple(
            (rows, cols, warps, stages) for cols, warps in ((128, 4), (128, 8), (64, 4)) for stages in (4, 3, 2)
        )
    else:
        shapes = (
            (128, 256, 8, 3), (128, 128, 8, 4), (128, 128, 8, 3), (128, 128, 8, 2), (128, 64, 8, 3), (64, 64, 4, 3),
        )  # fmt: skip
    for block_rows, cols, warps, stages in shapes:
        for depth in (deep, deep // 2):
            if slot.kernel in ("score", "score_grad"):
                blocks = {"BLOCK_T": block_rows, "BLOCK_V": cols, "BLOCK_K": depth}
            elif slot.kernel in ("weigh", "product"):
                blocks = {"BLOCK_T": block_rows, "BLOCK_E": cols, "BLOCK_V": depth}
            else:
                blocks = {"BLOCK_V": 128 if cols > 64 else 64, "BLOCK_E": min(cols, 128), "BLOCK_T": min(depth, rows)}
            yield Config({**blocks, "GROUP": 8}, warps, stages, 3 if few else 1)


def accept(slot: Slot, config: Config, arch: int) -> bool:
    """Whether every variant compiles within the limits."""
    if slot.kernel == "weigh":  # the score tile it walks
        with using({**alternative(slot, config), "score": _any_score(slot)._asdict()}):
            return _compiles(slot, arch)
    with using(alternative(slot, config)):
        return _compiles(slot, arch)


def _any_score(slot: Slot) -> Config:
    return Config({"BLOCK_T": min(slot.rows, 128), "BLOCK_V": 128, "BLOCK_K": 32, "GROUP": 8}, 8, 2)


def _compiles(slot: Slot, arch: int) -> bool:
    done: set[str] = set()
    for call in slot.calls():
        for launch in launches(call, DEVICES[arch]):
            name = compile_report.key(launch, arch)
            if launch.kernel.__name__ not in slot.kernels or name in done:
                continue
            done.add(name)
            try:
                with contextlib.redirect_stdout(io.StringIO()):  # where Triton prints a program that ptxas refuses
                    facts = compile_report.compile_launch(launch, arch)
            except Exception:  # the compiler itself gave up (out of registers, unsupported shape)
                return False
            if facts["stack"] or facts["shared"] > SHARED_LIMIT[arch] or not facts["instructions"]:
                return False
    return True


def alternative(slot: Slot, config: Config) -> Alternative:
    """`slot`'s kernel with this config, whatever the table says."""
    return {slot.kernel: config._asdict()}


def choose_static(job: tuple[Slot, int]) -> dict[str, Any] | None:
    slot, arch = job
    chosen = next((config for config in candidates(slot) if accept(slot, config, arch)), None)
    return None if chosen is None else entry(slot, chosen)


def choose_measured(job: tuple[Slot, int]) -> dict[str, Any] | None:
    slot, arch = job
    passing = [config for config in candidates(slot) if accept(slot, config, arch)]
    if not passing:
        return None
    alternatives = {str(index): alternative(slot, config) for index, config in enumerate(passing)}
    found = race(call(slot), alternatives, torch.device("cuda", torch.cuda.current_device()), _SECONDS)
    if not found.seconds:
        return None
    best = found.winner
    return {**entry(slot, passing[int(best)]), "ms": round(found.seconds[best] * 1e3, 4), "tried": len(passing)}


def call(slot: Slot) -> Callable[[], Any]:
    """The whole op of the slot's plain variant on the present GPU."""
    if slot.contrastive:
        return _contrastive_call(slot)
    plain = slot.calls()[0]
    problem, dtype = plain.problem, getattr(torch, plain.dtype)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda").to(dtype)

    inputs = soft_embed.Inputs(
        3 * normal(problem.rows, problem.width),
        normal(problem.vocab, problem.width) * problem.width**-0.5,
        None if problem.tied else normal(problem.vocab, problem.value_width),
    )
    options = soft_embed.Options()
    if slot.kernel in FORWARD:
        return lambda: soft_embed.forward(inputs, options)
    result = soft_embed.forward(inputs, options, exact=True)
    saved = soft_embed.Saved(result.exact if result.exact is not None else result.out, result.peak, result.total, None)
    grad = normal(problem.rows, problem.value_width)
    weights = slot.kernel == "vocab_grad"
    needs = soft_embed.Needs(True, weights, weights and not problem.tied, False, False)
    return lambda: soft_embed.backward(grad, None, None, inputs, saved, options, needs)


def _contrastive_call(slot: Slot) -> Callable[[], Any]:
    """One step of the loss: the sums, or the gradient that the slot's kernel makes."""
    rows, candidates = (
        torch.nn.functional.normalize(torch.randn(1, n, WIDE, device="cuda"), dim=-1) for n in (slot.rows, CANDIDATES)
    )
    target = torch.arange(slot.rows, device="cuda")
    found = info_nce.sums(rows, candidates, target, 0.02)
    if slot.kernel == "score":
        return lambda: info_nce.sums(rows, candidates, target, 0.02)
    grad_rows = torch.zeros_like(rows) if slot.kernel == "product" else None
    weight = torch.ones(1, device="cuda")
    return lambda: info_nce.gradients(
        rows, candidates, target, 0.02, found.peak, found.total, weight,
        grad_rows=grad_rows, need_candidates=slot.kernel == "vocab_grad",
    )  # fmt: skip


def entry(slot: Slot, config: Config) -> dict[str, Any]:
    found: dict[str, Any] = {"itemsize": slot.itemsize, "rows": slot.rows}
    if slot.width:
        found["width"] = slot.width
    return {
        **found,
        "blocks": config.blocks,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "per_sm": config.per_sm,
    }


def to_text(table: dict[str, dict[str, list[dict[str, Any]]]]) -> str:
    """JSON with one entry a line, so that a change of the table reads as one."""
    kernels = []
    for kernel, by_arch in table.items():
        archs = []
        for arch, entries in by_arch.items():
            lines = ",\n".join(f"      {json.dumps(e)}" for e in entries)
            archs.append(f'    "{arch}": [\n{lines}\n    ]')
        kernels.append(f'  "{kernel}": {{\n' + ",\n".join(archs) + "\n  }")
    return "{\n" + ",\n".join(kernels) + "\n}\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--static", action="store_true", help="no GPU: choose by what the compiler reports")
    parser.add_argument(
        "--arch", type=int, nargs="+", default=[80, 90], choices=sorted(SHARED_LIMIT), help="static only"
    )
    parser.add_argument("--kernel", nargs="+", help="fill these kernels' entries only")
    parser.add_argument("--jobs", type=int, default=2, help="static only: processes")
    parser.add_argument("--out", type=Path, default=plan.TABLE, help="where the table is written")
    options = parser.parse_args()
    if not options.static and not torch.cuda.is_available():
        parser.error("no GPU here: use --static")
    archs = options.arch if options.static else [soft_embed.device_of(torch.device("cuda", 0)).arch]
    wanted = [slot for slot in slots() if not options.kernel or slot.kernel in options.kernel]
    jobs = [(slot, arch) for slot in wanted for arch in archs]
    if options.static:
        with ProcessPoolExecutor(options.jobs) as pool:
            chosen = list(pool.map(choose_static, jobs))
    else:
        chosen = [choose_measured(job) for job in jobs]
    table = {kernel: dict(by_arch) for kernel, by_arch in plan.table().items()}
    for kernel in dict.fromkeys(slot.kernel for slot in wanted):
        for arch in archs:
            table.setdefault(kernel, {})[f"sm_{arch}"] = [
                found
                for (slot, slot_arch), found in zip(jobs, chosen, strict=True)
                if found and slot.kernel == kernel and slot_arch == arch
            ]
    options.out.write_text(to_text(table), encoding="utf-8")
    for (slot, arch), found in zip(jobs, chosen, strict=True):
        print(f"sm_{arch} {slot}: {found or 'none fits'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
