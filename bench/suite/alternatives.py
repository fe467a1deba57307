"""Another choice than the committed table's: entries of kernels and constants of the plan, for as long as a block runs.

An alternative is a JSON object: the name of a kernel in the table -> an entry (`blocks`, `num_warps`, `num_stages`,
`per_sm`), and under "plan" the module constants of `gircse_kernels.plan` to replace::

    {"one_pass": {"blocks": {"BLOCK_T": 16, "BLOCK_V": 64}, "num_warps": 8, "num_stages": 2}}
    {"plan": {"ONE_PASS_WIDTH": 0}}
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from gircse_kernels import plan
from gircse_kernels.plan import Config

Alternative = Mapping[str, Any]


def check(name: str, alternative: Alternative) -> None:
    """Raises ValueError for what the plan does not know."""
    if not isinstance(alternative, Mapping):
        raise ValueError(f"{name}: got {alternative!r}, expected an object: kernels and their entries, plan")
    for kernel, entry in alternative.items():
        if not isinstance(entry, Mapping) or not isinstance(entry.get("blocks", {}), Mapping):
            raise ValueError(f"{name}: got {entry!r} for {kernel}, expected an object")
        if kernel == "plan":
            unknown = [constant for constant in entry if not constant.isupper() or not hasattr(plan, constant)]
            if unknown:
                raise ValueError(f"{name}: got plan constant {unknown[0]!r}, expected one of gircse_kernels.plan")
            for constant, value in entry.items():
                now = getattr(plan, constant)
                if type(value) is not type(now):
                    raise ValueError(f"{name}: got {constant} {value!r}, expected one like {now!r}")
        elif kernel not in plan.SAFE:
            raise ValueError(f"{name}: got kernel {kernel!r}, expected plan or one of {', '.join(plan.SAFE)}")
        elif not {"blocks", "num_warps", "num_stages"} <= entry.keys() or entry["blocks"].keys() != _blocks(kernel):
            raise ValueError(
                f"{name}: got the entry {dict(entry)}, expected num_warps, num_stages and blocks with "
                f"{', '.join(sorted(_blocks(kernel)))}"
            )


def _blocks(kernel: str) -> set[str]:
    return set(plan.SAFE[kernel].blocks)


@contextmanager
def using(alternative: Alternative) -> Iterator[None]:
    """Inside, every plan is made with it; plans that were made before count again afterwards."""
    entries = {
        kernel: Config(entry["blocks"], entry["num_warps"], entry["num_stages"], entry.get("per_sm", 1))
        for kernel, entry in alternative.items()
        if kernel != "plan"
    }
    find = plan.find
    with ExitStack() as stack:
        stack.enter_context(patch.object(plan, "find", lambda name, *rest: entries.get(name) or find(name, *rest)))
        for constant, value in alternative.get("plan", {}).items():
            stack.enter_context(patch.object(plan, constant, value))
        stack.callback(_forget)
        _forget()
        yield


def _forget() -> None:
    """Empties the caches of all plans; the table itself stays."""
    for name, function in vars(plan).items():
        if name != "table" and hasattr(function, "cache_clear"):
            function.cache_clear()
