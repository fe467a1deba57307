"""`soft_embed` against its rows T and its vocabulary V, forward alone and with backward, eager PyTorch beside it.

Predicted time: the floor of the kernels' traffic model at the measured ceilings. Predicted memory: what is held for
each row, O(T D), plus the temporaries of one vocabulary chunk, which are bounded whatever T and V are; never T V. On
CUDA every allocation of the launchers' plan is counted (`bench.static.launches`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from gircse_kernels.launching import device_of
from gircse_kernels.plan import Problem as Sizes

from bench.cases import BOTH, FORWARD, PASSES, Matrices
from bench.memory import give_back, peak_extra_bytes
from bench.op_engines import Problem, check, draw_matrices, eager, ours
from bench.op_measure import is_out_of_memory
from bench.scaling_curves import Curve, Scale
from bench.static import traffic
from bench.static.launches import Call, allocated_bytes
from bench.timing import interleaved
from gircse.ops.tiles_torch import tiling
from gircse.roofline import Ceilings, Work


def measure(curve: Curve, scale: Scale, device: torch.device, ceilings: Ceilings) -> dict[str, Any]:
    """-> the curve's series, forward and forward+backward, and how well all points agree with float64.

    Raises:
        WrongResultError: before any clock has been read.
    """
    dtype = getattr(torch, scale.dtype)
    head, _ = draw_matrices(Matrices(curve.largest["V"], curve.largest["D"], True), dtype, device)
    worst = 0.0
    for size in curve.sizes:
        at = curve.at(size)
        worst = max(worst, check(Problem.draw(at["T"], BOTH, head[: at["V"]], None))["worst_ratio"])
        give_back(device)  # float64 copies
    series = [{"pass": what, "points": list(_points(curve, what, head, ceilings, scale.repeats))} for what in PASSES]
    agreement = {
        "against": "float64, beside eager PyTorch",
        "worst": {"error over eager's": worst},
        "checks": len(curve.sizes),
    }
    return {"series": series, "agreement": agreement, "left_out": []}


def _points(curve: Curve, what: str, head: torch.Tensor, ceilings: Ceilings, repeats: int) -> Iterator[dict[str, Any]]:
    """All sizes and both implementations in turn; eager PyTorch is left out where its [T, V] does not fit."""
    device, runs, peaks = head.device, {}, {}
    for size in curve.sizes:
        at = curve.at(size)
        problem = Problem.draw(at["T"], what, head[: at["V"]], None)
        for name, op in (("ours", ours), ("eager", eager)):
            run = problem.call(op)
            try:
                run()
                peaks[size, name] = peak_extra_bytes(run, device)
            except (RuntimeError, MemoryError) as error:
                if name == "ours" or not is_out_of_memory(error):
                    raise
                give_back(device)
            else:
                runs[f"{name} {size}"] = run
    timings = interleaved(runs, device, repeats)
    for size in curve.sizes:
        sizes = Sizes(*(curve.at(size)[name] for name in "TVDD"), True, head.itemsize)
        timing, other = timings[f"ours {size}"], timings.get(f"eager {size}")
        yield {
            "size": size,
            **timing._asdict(),
            "floor_seconds": ceilings.seconds(floor(sizes, what)),
            "peak_extra_bytes": peaks[size, "ours"],
            "predicted_bytes": held_bytes(sizes, what, head.dtype, device),
            "eager": None if other is None else {"seconds": other.seconds, "peak_extra_bytes": peaks[size, "eager"]},
        }


def floor(sizes: Sizes, what: str) -> list[Work]:
    """Phases: forward, and backward with frozen matrices where there is one."""
    phases = [traffic.forward_floor(sizes), *([] if what == FORWARD else [traffic.backward_floor(sizes)])]
    return [Work(phase.flops, phase.bytes) for phase in phases]


def held_bytes(sizes: Sizes, what: str, dtype: torch.dtype, device: torch.device) -> int:
    """Results and temporaries at the peak."""
    backward = what != FORWARD
    if device.type == "cuda":
        name = str(dtype).removeprefix("torch.")
        found = allocated_bytes(Call("soft_embed", sizes[:4], name, sizes.tied, backward), device_of(device))
        # of the forward: its result, and before rounding
        kept = sizes.rows * sizes.value_width * (4 + sizes.itemsize) if backward else 0
        return max(found.forward, found.backward + kept)
    # the torch backend: tiles of scores [R, C], one more than are in use because the last one goes when the next is
    # there, and a product [R, D]
    used = 2 if backward else 1
    rows, chunk = tiling(sizes.rows, sizes.vocab, tiles=used, per_vocab=0, per_row=sizes.width, itemsize=sizes.itemsize)
    tiles = used + 1
    # forward: the result. Backward: that, the upstream gradient over the row's sum, the gradient
    per_row = (3 if backward else 1) * sizes.width
    return sizes.itemsize * (tiles * rows * chunk + rows * sizes.width + sizes.rows * per_row)
