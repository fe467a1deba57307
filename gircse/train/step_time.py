"""What a step should take, said before a run, and what it took, said after it."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from gircse.train.plan.gpus import GPUS

if TYPE_CHECKING:
    from gircse.train.config import TrainConfig


def expected(config: TrainConfig, world_size: int = 1) -> str | None:
    """The plan's floor of a step with texts at the config's limits, in words. None: the run's device is in no table, so
    there is no floor."""
    gpu = None if config.device == "cpu" or not torch.cuda.is_available() else _gpu(torch.cuda.get_device_name())
    if gpu is None or config.model is None:
        return None
    from gircse.train.plan.predict import plan

    found = plan(config, gpu=gpu, world_size=world_size)
    parts = ", ".join(f"{name} {1e3 * seconds:,.0f}" for name, seconds in found.seconds.items())
    return f"a step of texts at their limits takes at least {1e3 * found.step_seconds:,.0f} ms on {gpu} ({parts})"


def taken(log: Sequence[dict[str, Any]]) -> str:
    """The median step of a run's log, in words: its time, the phases' shares, and on CUDA the host's.

    The host's share is the part of a step after which the host has started everything and waits for the device: near
    100% the device waits for the host.
    """
    phases = list(dict.fromkeys(name for entry in log for name in entry["time"]))
    shares = {name: median(entry["time"].get(name, 0.0) for entry in log) for name in phases}
    text = f"a step took {1e3 * median(entry['seconds'] for entry in log):,.0f} ms (median of {len(log)}): "
    text += ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
    hosts = [entry["host"] for entry in log if "host" in entry]
    return text + (f"; the host was busy for {median(hosts):.0%} of it" if hosts else "")


def _gpu(device_name: str) -> str | None:
    """The name in `GPUS` of the device that CUDA calls `device_name`."""
    plain = device_name.lower().replace(" ", "")
    return next((name for name in GPUS if all(part in plain for part in name.split("-"))), None)
