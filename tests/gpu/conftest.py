from __future__ import annotations

from pathlib import Path

import pytest
import torch


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder needs a GPU that the kernels run on. With `--dist loadgroup` tests that differ in
    their rows alone run in one process, or several would compile the same kernels at the same time."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents and isinstance(item, pytest.Function) and hasattr(item, "callspec"):
            shared = [f"{name}={value}" for name, value in item.callspec.params.items() if name != "rows"]
            item.add_marker(pytest.mark.xdist_group("-".join([item.function.__name__, *shared])))
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0):
        return
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU of compute capability 8.0 or newer"))


@pytest.fixture(autouse=True)
def no_tf32() -> None:
    """Eager float32, which we are compared with, in full precision."""
    torch.backends.cuda.matmul.allow_tf32 = False
