"""Another choice than the committed table's: entries of kernels and constants of the plan, for as long as a block runs.

An alternative is a JSON object: the name of a kernel in the table -> an entry (`blocks`, `num_warps`, `num_stages`,
`per_sm`), under "many_rows" fields of `plan.Choice`, and under "plan" the module constants of `gircse_kernels.plan`
to replace::

    {"few_rows": {"blocks": {"BLOCK_T": 16, "BLOCK_V": 32, "PIECE": 128, "GROUPS": 1}, "num_warps": 4, "num_stages": 2}}
    {"many_rows": {"epilogue": true, "chunk_mib": 32}}
    {"plan": {"FEW_ROWS": 0}}
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from gircse_kernels import plan
from gircse_kernels.plan import Choice, Config

Alternative = Mapping[str, Any]

CHOICE, PLAN = "many_rows", "plan"  # what is no kernel


def check(name: str, alternative: Alternative) -> None:
    """Raises ValueError for what the plan does not know."""
    if not isinstance(alternative, Mapping):
        raise ValueError(f"{name}: got {alternative!r}, expected an object: kernels and their entries, plan")
    for section, entry in alternative.items():
        if not isinstance(entry, Mapping) or not isinstance(entry.get("blocks", {}), Mapping):
            raise ValueError(f"{name}: got {entry!r} for {section}, expected an object")
        if section == PLAN:
            _check_values(name, "plan constant", entry, {n: v for n, v in vars(plan).items() if n.isupper()})
        elif section == CHOICE:
            _check_values(name, "choice", entry, Choice(False, False, 0, 0)._asdict())
        elif section not in _blocks():
            raise ValueError(f"{name}: got kernel {section!r}, expected plan or one of {', '.join(plan.table())}")
        elif not {"blocks", "num_warps", "num_stages"} <= entry.keys() or set(entry["blocks"]) != _blocks()[section]:
            raise ValueError(
                f"{name}: got the entry {dict(entry)}, expected num_warps, num_stages and blocks with "
                f"{', '.join(sorted(_blocks()[section]))}"
            )


def _check_values(name: str, what: str, given: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    for key, value in given.items():
        if key not in known:
            raise ValueError(f"{name}: got {what} {key!r}, expected one of gircse_kernels.plan")
        if type(value) is not type(known[key]):
            raise ValueError(f"{name}: got {key} {value!r}, expected one like {known[key]!r}")


def _blocks() -> dict[str, set[str]]:
    """The block constants of every kernel of the table."""
    return {
        kernel: set(entries[0]["blocks"])
        for kernel, by_arch in plan.table().items()
        for entries in by_arch.values()
        if "blocks" in entries[0]
    }


@contextmanager
def using(alternative: Alternative) -> Iterator[None]:
    """Inside, every plan is made with it; plans that were made before count again afterwards."""
    entries = {
        kernel: Config(entry["blocks"], entry["num_warps"], entry["num_stages"], entry.get("per_sm", 1))
        for kernel, entry in alternative.items()
        if kernel not in (CHOICE, PLAN)
    }
    find, choose, choice = plan.find, plan.choose, alternative.get(CHOICE, {})
    with ExitStack() as stack:

        def replace(name: str, value: Any) -> None:
            stack.enter_context(patch.object(plan, name, value))

        replace("find", lambda kernel, *rest: entries.get(kernel) or find(kernel, *rest))
        replace("choose", lambda *problem: choose(*problem)._replace(**choice))
        for constant, value in alternative.get(PLAN, {}).items():
            replace(constant, value)
        stack.callback(_forget)
        _forget()
        yield


def _forget() -> None:
    """Empties the caches of all plans; the table itself stays."""
    for name, function in vars(plan).items():
        if name != "table" and hasattr(function, "cache_clear"):
            function.cache_clear()
