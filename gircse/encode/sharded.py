"""A file of texts encoded by many processes, on one machine or several, that may be killed at any time.

The input is cut into shards of `shard_size` texts; shard s belongs to rank s mod world size:

    FOLDER/manifest.json        the settings that decide the result, how many texts and shards, whether complete
    FOLDER/shard-000123.npy     float32 embeddings of texts 123 * shard_size .., in the order of the input
    FOLDER/shard-000123.lock    while a process encodes that shard
    FOLDER/rank-000001.done     while rank 1 waits for rank 0 to join the shards (where a file was asked for)

The folder is all the ranks share: no process group, nothing to time out in a collective. A shard is written aside and
renamed into place, so what is there is finished, whoever made it and with however many ranks; starting again encodes
what is missing and nothing else. Locks only save work: without them (a file system that has none) the result is the
same.
"""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from gircse.encode.files import read_texts
from gircse.encode.shard_folder import MANIFEST, Shards, begin, complete_folder, join_shards, named, remove_folder
from gircse.integers import check_integer
from gircse.lm.environment import environment_integer

SHARD_SIZE = 4096
TIMEOUT = 1800.0  # seconds

_HEAD_BYTES = 64 * 2**10
_FILES = (".npy", ".jsonl")

Model = TypeVar("Model")


@dataclass(frozen=True)
class ShardReport:
    """What there is, and how much of it this process did."""

    folder: Path
    texts: int
    shards: int
    encoded_shards: int
    encoded_texts: int


@dataclass(frozen=True)
class Rank:
    """One of `world_size` processes, and its place on its machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int | None = None

    def __post_init__(self) -> None:
        check_integer("WORLD_SIZE", self.world_size, least=1)
        check_integer("RANK", self.rank, least=0)
        if self.rank >= self.world_size:
            raise ValueError(f"RANK: got {self.rank}, expected less than WORLD_SIZE={self.world_size}")

    @classmethod
    def of_environment(cls, environment: Mapping[str, str] = os.environ) -> Rank:
        """From RANK, WORLD_SIZE and LOCAL_RANK, as torchrun sets them; without them, the only process.

        Raises:
            ValueError: one is no integer or out of range, or WORLD_SIZE > 1 comes without RANK.
        """
        world_size = environment_integer("WORLD_SIZE", 1, environment)
        if world_size > 1 and not environment.get("RANK", "").strip():
            raise ValueError(f"RANK: not set, expected 0..{world_size - 1} beside WORLD_SIZE={world_size}")
        local_rank = environment_integer("LOCAL_RANK", 0, environment) if environment.get("LOCAL_RANK") else None
        return cls(environment_integer("RANK", 0, environment) if world_size > 1 else 0, world_size, local_rank)


def shard_folder(output: str, world_size: int = 1) -> Path | None:
    """Where the shards of `output` go; None where one process writes the file directly.

    A name without suffix, one that ends in a slash, or an existing folder is the folder itself. A .npy or .jsonl file
    has `<output>.shards` beside it when there are several processes, or when an earlier start left shards there.

    Raises:
        ValueError: a name that is neither.
    """
    path = Path(output)
    if path.suffix in _FILES:
        folder = path.with_name(path.name + ".shards")
        return folder if world_size > 1 or folder.is_dir() else None
    if path.is_file() or (path.suffix and not output.endswith("/") and not path.is_dir()):
        raise ValueError(
            f"output: got {output!r}, expected a name that ends in .npy or .jsonl, or a folder (no suffix, or /)"
        )
    return path


def encode_sharded(
    load_model: Callable[[], Model],
    encode: Callable[[Model, list[str]], np.ndarray],
    input: str,
    output: str,
    *,
    settings: Mapping[str, Any],
    field: str = "text",
    shard_size: int = SHARD_SIZE,
    rank: Rank | None = None,
    timeout: float = TIMEOUT,
    log: Callable[[str], None] | None = None,
) -> ShardReport:
    """Encodes this rank's shards of a file of texts; rank 0 then waits for the others and completes the output.

    Every rank reads the input (once to count and check it, once for its own texts) and holds one shard at most.

    Args:
        load_model: called at most once, and only if this rank has something to encode.
        encode: model, n texts -> embeddings [n, ..], the same trailing axes for every call.
        input: a text file or .jsonl, see `gircse.encode.files.read_texts`; a regular file, seen by every rank.
        output: a folder, which keeps the shards; or a .npy or .jsonl file, into which rank 0 joins them.
        settings: what else decides the result, JSON values; goes into the manifest.
        field: field of a .jsonl line that holds the text.
        shard_size: texts of a shard.
        rank: which process this is; default: the only one.
        timeout: seconds to wait for other processes while none of them finishes a shard.
        log: is given a line for every shard.

    Returns:
        Counts of the whole and of this process. For a file, a rank other than 0 returns when the file is there.

    Raises:
        ValueError: a bad argument; other settings than the folder was begun with; a bad line of the input, found before
            anything is encoded.
        TimeoutError: other processes did not finish their shards; those missing are named.
    """
    rank = rank or Rank()
    shard_size = check_integer("shard_size", shard_size, least=1)
    if not timeout > 0:
        raise ValueError(f"timeout: got {timeout!r}, expected seconds > 0")
    folder = shard_folder(output, rank.world_size) or Path(output + ".shards")
    everything = {**settings, **_identity(input), "field": field, "shard_size": shard_size}
    shards = begin(folder, everything, lambda: sum(map(len, read_texts(input, field=field))))
    joins = Path(output).suffix in _FILES
    if joins and rank.rank == 0:
        for mark in folder.glob("rank-*.done"):  # of an earlier start; a rank that is here makes its own again
            mark.unlink(missing_ok=True)

    work = _Work(shards, load_model, encode, _Texts(input, field, shards), timeout, log or (lambda line: None))
    try:
        done = work.encode(range(rank.rank, shards.count, rank.world_size))
        if rank.rank == 0:
            _await_shards(shards, rank, timeout)
            complete_folder(shards)
            if joins:
                _await_ranks(shards, rank, timeout)
                # joined inside the folder: what a killed process leaves goes with it
                joined = folder / Path(output).name
                join_shards(folder, str(joined), on_shard=lambda: os.utime(folder / MANIFEST))
                joined.replace(output)
                remove_folder(folder)
        elif joins:
            _await_join(shards, rank, timeout)
    except (OSError, ValueError):
        # whatever is missed where another job on the same folder was first to join and remove it
        if not joins or folder.is_dir() or not Path(output).is_file():
            raise
        done = work.encoded
    return ShardReport(folder, shards.texts, shards.count, len(done), sum(map(shards.size, done)))


def _identity(input: str) -> dict[str, Any]:
    """Which file it is: its path, size, and the hash of its beginning (the whole may be terabytes).

    Raises:
        ValueError: not a regular file. OSError: no such file.
    """
    if input == "-":
        raise ValueError(
            "input: got - (standard input), expected a file: every rank reads it, and again when started again"
        )
    status = os.stat(input)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"input: {input} is no regular file, as every rank needs that reads it again")
    with open(input, "rb") as file:
        head = hashlib.sha256(file.read(_HEAD_BYTES)).hexdigest()
    return {"input": str(Path(input).resolve()), "input_bytes": status.st_size, "input_sha256_of_64KiB": head}


# ---------------------------------------------------------------- encoding


class _Texts:
    """The texts of a shard. Reads on from where it stands, and from the beginning only to go back."""

    def __init__(self, input: str, field: str, shards: Shards) -> None:
        self.input, self.field, self.shards = input, field, shards
        self._rewind()

    def _rewind(self) -> None:
        self._next = 0
        self._stream: Iterator[str] = chain.from_iterable(read_texts(self.input, field=self.field))

    def of_shard(self, s: int) -> list[str]:
        if s < self._next:
            self._rewind()
        skipped = (s - self._next) * self.shards.shard_size
        texts = list(islice(self._stream, skipped, skipped + self.shards.size(s)))
        self._next = s + 1
        if len(texts) < self.shards.size(s):
            raise ValueError(
                f"input: {self.input} has become shorter, expected {self.shards.texts} texts as at the start"
            )
        return texts


class _Work:
    """Encodes shards that are missing."""

    def __init__(
        self,
        shards: Shards,
        load_model: Callable[[], Model],
        encode: Callable[[Model, list[str]], np.ndarray],
        texts: _Texts,
        timeout: float,
        log: Callable[[str], None],
    ) -> None:
        self.shards, self.texts, self.timeout, self.log = shards, texts, timeout, log
        self.encoded: list[int] = []
        self._load_model, self._encode = load_model, encode
        self._model: Any = None

    def encode(self, mine: Sequence[int]) -> list[int]:
        """Encodes those of `mine` that are missing, and waits for those another process is at; returns its own."""
        pending = [s for s in mine if not self.shards.is_whole(s)]
        patience = _Patience(self.timeout)
        while pending:
            held = [s for s in pending if not self._encode_unless_held(s)]
            if held:
                patience.wait(len(held), f"{self.shards.folder}: another process holds {named(held)}")
            pending = held
        return self.encoded

    def _encode_unless_held(self, s: int) -> bool:
        """Whether the shard is there now."""
        with self.shards.lock(s) as mine:
            if mine and not self.shards.is_whole(s):
                texts = self.texts.of_shard(s)
                if self._model is None:
                    self._model = self._load_model()
                self.shards.write(s, self._encode(self._model, texts))
                self.encoded.append(s)
                self.log(f"shard {s} of {self.shards.count}: {len(texts)} texts")
            return mine


# ---------------------------------------------------------------- waiting


class _Patience:
    """Sleeps between looks, and gives up when nothing changed for `timeout` seconds."""

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._state: object = None
        self._since = time.monotonic()
        self._pause = 0.05

    def wait(self, state: object, what: str) -> None:
        """`state` is anything that differs when there was progress; `what` is missing."""
        now = time.monotonic()
        if state != self._state:
            self._state, self._since, self._pause = state, now, 0.05
        elif now - self._since > self.timeout:
            raise TimeoutError(f"{what}, and nothing was finished for {self.timeout:g} s; start again to go on")
        time.sleep(min(self._pause, self.timeout / 4))
        self._pause = min(2.0, 1.5 * self._pause)


def _await_shards(shards: Shards, rank: Rank, timeout: float) -> None:
    """Until all shards are there."""
    patience = _Patience(timeout)
    missing = list(range(shards.count))
    while missing := [s for s in missing if not shards.is_whole(s)]:
        _check_folder(shards)
        owners = named(sorted({s % rank.world_size for s in missing}), "rank")
        patience.wait(len(missing), f"{shards.folder} misses {named(missing)} of {shards.count}, left to {owners}")


def _await_ranks(shards: Shards, rank: Rank, timeout: float) -> None:
    """Until every other rank has seen that its shards are there: one that came later would begin the folder again."""
    patience = _Patience(timeout)
    missing = list(range(1, rank.world_size))
    while missing := [r for r in missing if not _mark(shards, r).exists()]:
        _check_folder(shards)
        patience.wait(len(missing), f"{shards.folder}: no sign of {named(missing, 'rank')}")


def _await_join(shards: Shards, rank: Rank, timeout: float) -> None:
    """Until rank 0 has removed the folder. The mark is renewed: rank 0 removes those that it finds when it starts."""
    patience = _Patience(timeout)
    while shards.folder.is_dir():
        try:
            _mark(shards, rank.rank).touch()
            # changes with a new shard, and with every shard that rank 0 has joined
            state = (len(os.listdir(shards.folder)), (shards.folder / MANIFEST).stat().st_mtime_ns)
        except FileNotFoundError:
            continue
        patience.wait(state, f"{shards.folder}: rank 0 has not joined the shards")


def _mark(shards: Shards, rank: int) -> Path:
    return shards.folder / f"rank-{rank:06d}.done"


def _check_folder(shards: Shards) -> None:
    if not shards.folder.is_dir():
        raise FileNotFoundError(f"{shards.folder} has been removed")


# ---------------------------------------------------------------- arguments
