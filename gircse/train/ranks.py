"""The processes of one training job: how they find each other, what they exchange, and how the job ends when one fails.

`torchrun` starts the processes and says in the environment which rank each one is. Without it there is one process,
which exchanges nothing. Every process holds the whole model (or its share of it, `gircse.train.fsdp`) and a contiguous
share of every batch. In each step the processes exchange the embeddings, the LoRA gradients in one flat buffer, and a
few numbers that show whether all of them still do the same.

A job ends with one message. The process that fails first adds to a counter in the key-value store that torchrun keeps;
it alone raises its error, and the others exit with a nonzero code and print nothing.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from gircse.lm.device import to_device
from gircse.lm.environment import environment_integer

_PATIENCE = 60.0  # seconds within which the processes of a job without torchrun must have met
_GRACE = 4.0  # seconds within which the processes that lost another one report that they are alive


class RanksDisagree(ValueError):
    """Processes that should do the same step do not see the same data, or do not hold the same weights."""


class RankLost(ConnectionError):
    """Another process of the job died or no longer answers."""


@dataclass(frozen=True)
class Ranks:
    """This process and its job.

    Attributes:
        device: the device that this process computes on.
        rank, size: the number of this process, from 0, and how many there are.
        group: the process group of all; None where there is one process.
        store: the key-value store of the job, through which the processes agree how it ends.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    group: Any = None
    store: Any = None

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, rows: int) -> slice:
        """This process's part of `rows` rows: contiguous, in the order of the ranks, sizes as equal as can be.

        Raises:
            ValueError: fewer rows than processes.
        """
        if rows < self.size:
            raise ValueError(f"batch_size: got {rows} rows for {self.size} processes, expected at least one for each")
        return slice(self.rank * rows // self.size, (self.rank + 1) * rows // self.size)

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """The numbers of every process (float64), in the order of the ranks."""
        return self._gather(torch.tensor(list(values), dtype=torch.float64))

    def most(self, value: float) -> float:
        """The largest `value` of all processes."""
        return max(value for (value,) in self.gather([value]))

    def join(self, own: Tensor, share: slice, total: int) -> Tensor:
        """The rows of all processes, [total, ...], of which `own` are the rows `share`. Only `own` has a gradient.

        A loss of all rows has in every process the gradient for the rows of that process, so the gradients of the
        parameters add up to the whole over the processes (`sum_gradients`).
        """
        if self.size == 1:
            return own
        rows = own.new_zeros(total, *own.shape[1:])
        rows[share] = own.detach()
        dist.all_reduce(rows, group=self.group)  # exact: every row is added to zeros
        return torch.cat([rows[: share.start], own, rows[share.stop :]])

    def same(self, step: int, *, rows: int, weights: int, stop: bool) -> bool:
        """Compares step, data and weights of all processes. Returns whether any of them wants to stop.

        Args:
            step: from 1.
            rows: `digest_of_rows` of the step's whole batch.
            weights: `digest_of` the parameters, or of the gradients that changed them last.
            stop: whether this process wants to stop.

        Raises:
            RanksDisagree: the processes differ; every one of them raises it.
        """
        if self.size == 1:
            return stop
        reports: list[list[int]] = self._gather(torch.tensor([step, rows, weights, int(stop)]))
        names = ("be at another step", "read other rows", "hold other weights")
        for what, name in enumerate(names):
            others = [rank for rank, values in enumerate(reports) if values[what] != reports[0][what]]
            if others:
                ranks = ", ".join(map(str, others))
                raise RanksDisagree(
                    f"step {step}: rank {ranks} of {self.size} turned out to {name} than rank 0; every process must "
                    "see the same files, settings and versions. No further step was made"
                )
        return any(values[3] for values in reports)

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> int:
        """Replaces every gradient by its sum over the processes, in one exchange. Returns a digest of the sums."""
        if self.size == 1:
            return 0
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in parameters])
        dist.all_reduce(flat, group=self.group)
        for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter)
        return digest_of([flat])

    def wait(self) -> None:
        """Returns when all processes have called it."""
        self.gather([0.0])

    def _gather(self, own: Tensor) -> list[list[Any]]:
        if self.size == 1:
            return [own.tolist()]
        own = own.to(self.device)
        rows = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(rows, own, group=self.group)
        return torch.stack(rows).tolist()


def digest_of(tensors: Iterable[Tensor]) -> int:
    """A 64-bit number that almost surely differs where a bit differs; one pass over each tensor, on its device."""
    total = torch.zeros((), dtype=torch.int64)
    for place, tensor in enumerate(tensors, start=1):
        bits = tensor.detach().contiguous().view(-1).view(torch.uint8)
        words = bits[: bits.numel() // 4 * 4].view(torch.int32)
        total = (
            total + place * words.sum(dtype=torch.int64).cpu() + bits[words.numel() * 4 :].sum(dtype=torch.int64).cpu()
        )
    return int(total)


def digest_of_rows(ids: Sequence[str]) -> int:
    """63 bits that depend on every row's name and on their order."""
    return int.from_bytes(hashlib.sha256("\0".join(ids).encode()).digest()[:8], "big") >> 1


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of the random numbers of one step in one process.

    A resumed run needs no saved state of a generator, and what was drawn before a step does not matter.
    """
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()[:8], "big") >> 1


@contextmanager
def join_ranks(device: str | None, *, timeout: float) -> Iterator[Ranks]:
    """Joins the processes that torchrun started, or takes a process group that exists already. Otherwise there is one.

    gloo on the CPU, NCCL on CUDA, where each process takes the device of its LOCAL_RANK.

    Args:
        device: of the model; default: CUDA if there is one.
        timeout: seconds until a process that does not answer counts as lost.

    Raises:
        RankLost: the processes do not meet. Where one is lost inside the block, one of those that are left raises this
            error and the others raise SystemExit(1).
    """
    own = to_device(device)
    if dist.is_available() and dist.is_initialized():
        yield Ranks(own, dist.get_rank(), dist.get_world_size(), dist.group.WORLD)
        return
    if environment_integer("WORLD_SIZE", 1) <= 1:
        # Gradient caching repeats the dropout masks of the current device.
        named = own.type == "cuda" and own.index is not None
        with torch.cuda.device(own) if named else nullcontext():
            yield Ranks(own)
        return
    store, rank, size = _meet(timeout)
    if own.type == "cuda":
        own = torch.device("cuda", environment_integer("LOCAL_RANK", rank))
        torch.cuda.set_device(own)
    wait = timedelta(seconds=timeout)
    dist.init_process_group(
        "nccl" if own.type == "cuda" else "gloo",
        store=dist.PrefixStore("group", store),
        rank=rank,
        world_size=size,
        timeout=wait,
        device_id=own if own.type == "cuda" else None,
    )
    ranks = Ranks(own, rank, size, dist.group.WORLD, dist.PrefixStore("gircse", store))
    try:
        yield ranks
        dist.destroy_process_group()
    except Exception as error:
        _end(ranks, error)


def _meet(timeout: float) -> tuple[Any, int, int]:
    """The store that all processes of the job share, the rank of this process, and the number of processes.

    torchrun keeps the store itself, and every process that it starts finds it. Otherwise rank 0 keeps the store and
    waits for the others, which either come soon or were never started.

    Raises:
        RankLost: WORLD_SIZE says that there are other processes, and they do not come.
    """
    size = os.environ["WORLD_SIZE"]
    unset = "start all processes by torchrun, or unset WORLD_SIZE to train in this one alone"
    names = ("RANK", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in names if not os.environ.get(name, "").strip()]:
        raise RankLost(f"WORLD_SIZE: got {size} in the environment without {', '.join(missing)}; {unset}")
    patience = timeout if os.environ.get("TORCHELASTIC_RUN_ID") else min(timeout, _PATIENCE)
    try:
        store, rank, number = next(dist.rendezvous("env://", timeout=timedelta(seconds=patience)))
    except (dist.DistError, RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise RankLost(
            f"WORLD_SIZE: got {size} in the environment, but the processes did not all meet at {where} within "
            f"{patience:g} seconds; {unset} ({str(error).splitlines()[0]})"
        ) from error
    store.set_timeout(timedelta(seconds=timeout))
    return store, rank, number


def _end(ranks: Ranks, error: Exception) -> NoReturn:
    """Raises the error in the process that reports it, and SystemExit(1) in the others."""
    lost = _is_lost_connection(error)
    missing = _missing(ranks) if lost else []
    try:
        reports = ranks.store.add("reported", 1) == 1
    except RuntimeError:  # the store ended with rank 0, which kept it
        reports, missing = ranks.rank == 1, [0]
    else:
        _leave(ranks)
    if not reports:
        raise SystemExit(1) from error
    if not lost:
        raise error
    who = f"rank {', '.join(map(str, missing))}" if missing else "another process"
    raise RankLost(
        f"{who} of {ranks.size} processes died or no longer answers, so rank {ranks.rank} ends the job; the last "
        "checkpoint is whole: start again with --resume"
    ) from error


def _leave(ranks: Ranks) -> None:
    """Without torchrun, rank 0 hosts the store. It waits up to the grace so that the others can read who reports the
    error: a process that waits for rank 0 in an exchange can look only after rank 0 has gone."""
    with suppress(RuntimeError):
        ranks.store.add("left", 1)
        if ranks.rank or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return
        deadline = time.monotonic() + _GRACE
        while ranks.store.add("left", 0) < ranks.size and time.monotonic() < deadline:
            time.sleep(0.05)


def _is_lost_connection(error: Exception) -> bool:
    """gloo raises plain RuntimeErrors, which only their text tells apart."""
    words = ("gloo", "connection closed by peer", "connection reset", "timed out waiting", "broken pipe")
    text = str(error).lower()
    return isinstance(error, dist.DistError) or (type(error) is RuntimeError and any(word in text for word in words))


def _missing(ranks: Ranks) -> list[int]:
    """The processes that do not report within the grace; none once another process has reported an error."""
    names = {rank: f"alive/{rank}" for rank in range(ranks.size)}
    try:
        ranks.store.set(names[ranks.rank], "")
        deadline = time.monotonic() + _GRACE
        while True:
            missing = [rank for rank, name in names.items() if not ranks.store.check([name])]
            if not missing or time.monotonic() > deadline or ranks.store.check(["reported"]):
                return missing
            time.sleep(0.05)
    except RuntimeError:
        return [0]
