"""What all sections of the GPU suite share: records, the time that is left, and what went wrong."""

from __future__ import annotations

import json
import os
import re
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from bench.floors import measure_ceilings
from bench.provenance import device_name, measured_sources, provenance
from bench.records import save
from bench.sources import sources_hash
from bench.suite import attempts
from bench.timing import synchronize
from bench.verdict import first_line, is_good
from gircse.roofline import Ceilings

Record = dict[str, Any]
_ALLOWED = 60.0


class Session:
    """One run of the suite.

    Attributes:
        device: everything is measured on it.
        folder: of this device's records.
        smoke: tiny shapes on the CPU.
        origin: provenance of everything that this process measures.
        records: finished cases, in order: those of this run and those that were there.
        problems: lines on what went wrong; any makes the exit code 1.
        skipped: names of what there was no time for.
        left_out: names of cases that raised, or that an earlier attempt of the same call was lost in.
        goes_on: an earlier attempt of the same call was lost (`bench.suite.attempts`).
    """

    def __init__(self, out: Path, device: torch.device, minutes: float, *, smoke: bool = False) -> None:
        self.started = time.perf_counter()
        self.deadline = self.started + 60 * minutes
        self.device, self.smoke = device, smoke
        name = device_name(device) if device.type == "cuda" else "cpu"
        self.folder = out / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        self.origin = provenance(device, "op")  # `save` puts the hash of the record's own kind in its place
        self.records: list[Record] = []
        self.problems: list[str] = []
        self.skipped: list[str] = []
        self.left_out: list[str] = []
        self._ceilings: dict[str, Ceilings] = {}
        self._seconds: dict[str, float] = {}
        self._state = attempts.state_file()
        before = attempts.read(self._state) if self._state is not None else None
        self.goes_on = before is not None
        if before is not None:
            self.problems, self.left_out = before["problems"], before["left_out"]
            self.deadline = self.started + before["deadline"] - time.time()
        self._watching: tuple[str | None, float | None] = None, None
        self._tell()

    def _tell(self) -> None:
        """The process that attends to this one learns what it does, and until when (`time.time`)."""
        if self._state is not None:
            now, (case, until) = time.time(), self._watching
            state = {"case": case, "until": until, "started": now, "deadline": now + self.left()}
            attempts.write(self._state, {**state, "problems": self.problems, "left_out": self.left_out})

    def left(self) -> float:
        """Seconds until everything must be done."""
        return self.deadline - time.perf_counter()

    def fits(self, name: str, seconds: float) -> bool:
        """Whether there is time for a case that takes about `seconds`; the case is named where there is not."""
        left = max(self.left(), 0.0)
        if name in self.left_out:
            return False
        if seconds <= left:
            self._seconds[name] = seconds
            return True
        say(f"skipped: {name} takes about {seconds:.0f} s, {left:.0f} s are left")
        self.skipped.append(name)
        return False

    def ceilings(self, dtype: str) -> Ceilings:
        """Of this device for that dtype, measured when they are first asked for."""
        if dtype not in self._ceilings:
            seconds = 0.05 if self.smoke else 0.4
            self._ceilings[dtype] = measure_ceilings(self.device, getattr(torch, dtype), seconds=seconds)
            say(f"measured ceilings: {self._ceilings[dtype]} ({dtype})")
        return self._ceilings[dtype]

    def had(self, name: str, good: Callable[[Record], bool] = lambda _: True) -> bool:
        """Takes the record that is there, if it was measured with the present sources and its results were right."""
        try:
            record = json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
            same = record["provenance"]["sources"] == sources_hash(record["benchmark"])
            if not (same and is_good(record) and good(record)):
                return False
        except (OSError, ValueError, KeyError, TypeError):  # there is none, or not one of ours
            return False
        self.records.append(record)
        return True

    def measure(self, name: str, seconds: float, run: Callable[[], Record]) -> None:
        """One case from beginning to end: `run` gives its record, unless that is there or there is no time for it."""
        if self.had(name) or not self.fits(name, seconds):
            return
        with self.surviving(name):
            started = time.perf_counter()
            self.keep(name, run())
            say(f"measured: {name} ({time.perf_counter() - started:.1f} s)")

    def save(self, name: str, record: Record) -> Record:
        """Writes the record at once, with its provenance."""
        date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        origin = {**self.origin, "sources": measured_sources(record["benchmark"]), "date": date}
        record = {**record, "provenance": origin}
        save(record, self.folder / f"{name}.json")
        return record

    def write(self, name: str, text: str) -> Path:
        """Writes a text file beside the records."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / name
        path.write_text(text, encoding="utf-8")
        return path

    def keep(self, name: str, record: Record) -> None:
        """Saves a finished case; a result that is wrong or was not checked counts as a problem."""
        record = self.save(name, record)
        self.records.append(record)
        if not is_good(record):
            self.problem(f"{name}: {record['agreement']['verdict']}: {record['agreement']['why']}")

    def problem(self, line: str) -> None:
        self.problems.append(line)
        say(f"PROBLEM: {line}")

    @contextmanager
    def surviving(self, name: str) -> Iterator[None]:
        """What is raised inside becomes a problem and costs no other case its turn. A case that `fits` was asked for
        has a minute and twice its estimate, if another process attends to this one."""
        try:
            with self.watched(name, self._seconds[name]) if name in self._seconds else nullcontext():
                yield
        except Exception as error:
            self.problem(f"{name}: {first_line(error)}")
            self.left_out.append(name)
            self._tell()
            self.write(f"{name}-error.txt", traceback.format_exc())
            self._end_if_lost(name)

    @contextmanager
    def watched(self, name: str, seconds: float) -> Iterator[None]:
        """The process that attends to this one ends it, and leaves `name` out, if this takes far longer than
        `seconds`."""
        before, self._watching = self._watching, (name, time.time() + _ALLOWED + 2 * seconds)
        self._tell()
        try:
            yield
            self._end_if_lost(name)  # what went wrong may have been caught inside
        finally:
            self._watching = before
            self._tell()

    def _end_if_lost(self, name: str) -> None:
        """After an illegal access every later call on the device fails, whatever it computes."""
        if self._state is None:
            return
        try:
            synchronize(self.device)
        except RuntimeError:
            self._watching = name, None
            self._tell()
            os._exit(attempts.DEVICE_LOST)  # an orderly end would wait for the device


def say(line: str) -> None:
    print(line, flush=True)
