#!/usr/bin/env python
"""One command on a GPU: correctness, ops, throughput, the engine, training and its plan; JSON records, ten minutes.

    PYTHONPATH=.:kernels python bench/gpu_suite.py --out bench/results

Nothing need be installed but torch, triton, transformers and pytest. Each finished case is a file of its own in
DIR/<device>/, written at once; the same command again goes on where this one stopped (the engine's cases may need
that), and measures again what was measured with other sources. `--smoke` is the same with tiny shapes on the CPU.
`python bench/report.py` renders the records.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from bench import engine_cases
from bench.cases import CASES, MODELS, SMOKE_CASES, Case
from bench.engine_cases import ENGINE_CASES, SMOKE_ENGINE_CASES
from bench.floors import measure_ceilings
from bench.memory import give_back
from bench.op_engines import WrongResultError, draw_matrices
from bench.op_measure import first_line, judge, measure
from bench.provenance import ROOT, device_name, engine_hash, provenance
from bench.records import save
from bench.tables import OPS, REPLAY, table
from bench.train_cases import SMOKE_TRAIN_CASES, TRAIN_CASES
from gircse.floors import Ceilings

Matrices = tuple[Tensor, Tensor | None]

TESTS = ROOT / "tests" / "gpu"
_NO_TESTS = 5  # pytest's exit code where everything is skipped or nothing is there

THROUGHPUT = ["--shape", "qwen2.5-0.5b", "--dtype", "bfloat16", "--batch", "64", "--steps", "0", "1", "5", "20"]
SMOKE_THROUGHPUT = ["--shape", "smollm2-135m", "--layers", "1", "--batch", "2", "--length", "8", "--steps", "0", "1"]
SMOKE_THROUGHPUT += ["--repeats", "1"]


class Suite:
    """Where records go, what is there already, and how much time is left.

    Attributes:
        folder: of this device's records.
        origin: provenance of everything that this process measures.
        problems: lines on what went wrong; any makes the exit code 1.
        skipped: names of what there was no time for.
    """

    def __init__(self, out: Path, device: torch.device, minutes: float) -> None:
        self.started = time.perf_counter()
        self.deadline = self.started + 60 * minutes
        self.device = device
        self.folder = out / _slug(device_name(device) if device.type == "cuda" else "cpu")
        self.origin = provenance(device)
        self.problems: list[str] = []
        self.skipped: list[str] = []

    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.perf_counter()

    def fits(self, name: str, estimate: float, kept: float = 0.0) -> bool:
        """Whether there is time for it (`kept` seconds belong to something else); says so where there is not."""
        left = max(self.left() - kept, 0.0)
        if estimate <= left:
            return True
        say(f"skipped: {name} takes about {estimate:.0f} s, {left:.0f} s are left")
        self.skipped.append(name)
        return False

    def finished(self, name: str) -> dict[str, Any] | None:
        """Its record, if it was measured with the present sources."""
        try:
            record = json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
            return record if record["provenance"]["sources"] == self.origin["sources"] else None
        except (OSError, ValueError, KeyError, TypeError):  # none, or none of ours
            return None

    def save(self, name: str, record: dict[str, Any]) -> dict[str, Any]:
        date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        record = {**record, "provenance": {**self.origin, "date": date}}
        save(record, self.folder / f"{name}.json")
        return record

    def problem(self, line: str) -> None:
        self.problems.append(line)
        say(f"PROBLEM: {line}")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0, 1 something is wrong (tests, a result, an engine), 2 bad options."""
    options = _parse(argv)
    device = torch.device(options.device)
    suite = Suite(options.out, device, options.minutes)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    origin = suite.origin
    say(f"{origin['device']}, driver {origin['driver']}; torch {origin['torch']}, triton {origin['triton']}")
    say(f"sources {origin['sources']}; records: {suite.folder}")
    if not correctness(suite):
        return 1
    # throughput is one of the promises: untargeted op cases must not take its time
    reserve = 0.15 * 60 * options.minutes
    records = op_benchmarks(suite, options, reserve)
    info_nce(suite, options)
    throughput(suite, options)
    training_plan(suite, options)
    summarise(suite, records, engine(suite, options))
    return 1 if suite.problems else 0


def correctness(suite: Suite) -> bool:
    """`tests/gpu` in a process of its own, its output kept; a pass with the same sources and tests counts."""
    digest = _digest(TESTS)
    before = suite.finished("tests")
    if before is not None and before["passed"] and before["tests"] == digest:
        say(f"tests: passed before, {before['summary']}")
        return True
    if not TESTS.is_dir() and suite.device.type != "cuda":
        say(f"tests: there is no {TESTS}, and no GPU to run them on")
        return True
    command = [sys.executable, "-m", "pytest", str(TESTS), "-x", "-q"]
    say(f"tests: {' '.join(command[1:])}")
    code, output = _run(command, suite.left())
    suite.folder.mkdir(parents=True, exist_ok=True)
    (suite.folder / "tests.txt").write_text(output, encoding="utf-8")
    lines = output.strip().splitlines() or [""]
    # without CUDA everything is skipped; with it, nothing collected means nothing checked
    passed = code == 0 or (code == _NO_TESTS and suite.device.type != "cuda")
    suite.save(
        "tests", {"benchmark": "tests", "passed": passed, "exit_code": code, "summary": lines[-1], "tests": digest}
    )
    say(f"tests: {lines[-1]}")
    if not passed:
        print("\n".join(lines[-40:]))
        suite.problem(
            f"tests/gpu failed (exit code {code}): nothing is measured; all of it: {suite.folder / 'tests.txt'}"
        )
    return passed


def op_benchmarks(suite: Suite, options: argparse.Namespace, reserve: float) -> list[dict[str, Any]]:
    """Records of all cases that are there at the end, in their order."""
    cases = [case for case in (SMOKE_CASES if options.smoke else CASES) if options.only in case.name]
    found = {case.name: suite.finished(case.name) for case in cases}
    todo = [case for case in cases if found[case.name] is None]
    if len(todo) < len(cases):
        say(f"ops: {len(cases) - len(todo)} of {len(cases)} cases are there already")
    if not todo:
        return _present(cases, found)
    seconds = 0.05 if options.smoke else 0.6
    ceilings = {
        name: measure_ceilings(suite.device, getattr(torch, name), seconds=seconds)
        for name in sorted({case.dtype for case in todo})
    }
    for name, ceiling in ceilings.items():
        say(f"ops: measured ceilings {ceiling} ({name})")
    drawn: tuple[str, str] | None = None
    matrices: Matrices | None = None
    for number, case in enumerate(todo, 1):
        floor = case.floor(ceilings[case.dtype])
        # compilation and checks; runs of three engines, each some times its floor
        estimate = (2.0 if options.smoke else 12.0) + 150 * floor
        if not suite.fits(case.name, estimate, kept=reserve):
            continue
        started = time.perf_counter()
        if matrices is None or drawn != (case.model, case.dtype):
            matrices = None  # the old ones go before the new ones come
            matrices = draw_matrices(MODELS[case.model], case.torch_dtype, suite.device)
            drawn = case.model, case.dtype
        record = _one(suite, case, matrices, ceilings[case.dtype], options)
        if record is not None:
            found[case.name] = suite.save(case.name, record)
            say(f"ops: {number}/{len(todo)} {_line(record)} ({time.perf_counter() - started:.0f} s)")
    return _present(cases, found)


def _one(
    suite: Suite, case: Case, matrices: Matrices, ceilings: Ceilings, options: argparse.Namespace
) -> dict[str, Any] | None:
    backend = "aot_eager" if options.smoke else "inductor"  # a dry run needs no C++ compiler
    head, embed = matrices
    try:
        found = measure(case, head, embed, ceilings, compile_backend=backend, budget=0.1 if options.smoke else 2.0)
    except WrongResultError as error:
        suite.problem(f"{case.name}: {error}")
    except Exception as error:  # one broken case must not cost the others their turn on the machine
        suite.problem(f"{case.name}: {first_line(error)}")
    else:
        return judge(found, case)
    finally:
        give_back(suite.device)
    return None


def throughput(suite: Suite, options: argparse.Namespace) -> None:
    """`bench/run.py` in a process of its own."""
    arguments = SMOKE_THROUGHPUT if options.smoke else THROUGHPUT
    _script(suite, options, f"throughput-{arguments[1]}", "run.py", arguments, 5.0 if options.smoke else 70.0)


def engine(suite: Suite, options: argparse.Namespace) -> list[dict[str, Any]]:
    """`bench/run.py` once for each case of the generation engine and of the training step, its figures held against
    their targets. -> records of all cases that are there at the end."""
    found = []
    smoke, full = [*SMOKE_ENGINE_CASES, *SMOKE_TRAIN_CASES], [*ENGINE_CASES, *TRAIN_CASES]
    for case in smoke if options.smoke else full:
        before = suite.finished(case.name)
        if before is not None and before["provenance"].get("engine_sources") != engine_hash():
            (suite.folder / f"{case.name}.json").unlink()  # measured with another engine
        _script(suite, options, case.name, "run.py", case.arguments, case.seconds)
        record = suite.finished(case.name)
        if record is None:
            continue
        record = engine_cases.judge(record, case)
        save(record, suite.folder / f"{case.name}.json")
        found.append(record)
        for line in record["target_lines"]:
            say(f"{case.name}: {line}")
    return found


def info_nce(suite: Suite, options: argparse.Namespace) -> None:
    """`bench/info_nce.py` in a process of its own."""
    arguments = ["--smoke"] if options.smoke else []
    _script(suite, options, "info_nce", "info_nce.py", arguments, 5.0 if options.smoke else 75.0)


def training_plan(suite: Suite, options: argparse.Namespace) -> None:
    """`bench/plan_check.py` in a process of its own; a prediction that is off is a problem, every time."""
    before = suite.finished("plan")
    if before is not None and not before["met"]:
        (suite.folder / "plan.json").unlink()
    arguments = ["--smoke"] if options.smoke else []
    _script(suite, options, "plan", "plan_check.py", arguments, 15.0 if options.smoke else 60.0)


def _script(
    suite: Suite, options: argparse.Namespace, name: str, script: str, arguments: Sequence[str], seconds: float
) -> None:
    """A benchmark that writes its own record; `seconds` is about what it takes."""
    if options.only not in name:
        return
    if suite.finished(name) is not None:
        say(f"{name}: is there already")
        return
    if not suite.fits(name, seconds):
        return
    out = suite.folder / f"{name}.json"
    command = [sys.executable, str(ROOT / "bench" / script), *arguments, "--device", str(suite.device)]
    say(f"{name}: {' '.join(command[1:])}")
    code, output = _run([*command, "--out", str(out)], suite.left())
    (suite.folder / f"{name}.txt").write_text(output, encoding="utf-8")
    if code != 0:
        last = (output.strip().splitlines() or ["no output"])[-1]
        suite.problem(f"bench/{script} ended with exit code {code}: {last}; all of it: {out.with_suffix('.txt')}")
        return
    print("\n".join(line for line in output.splitlines() if not line.startswith("{")))


def summarise(suite: Suite, records: list[dict[str, Any]], engines: list[dict[str, Any]]) -> None:
    print()
    if records:
        print(table(OPS, records))
    replayed = [record for record in records if record["replay"]]
    if replayed:
        print("\n" + table(REPLAY, replayed))
    for record in engines:
        for line in record["target_lines"]:
            print(f"{record['case']}: {line}")
    asked = [record for record in [*records, *engines] if record["met"] is not None]
    met = sum(record["met"] for record in asked)
    took = time.perf_counter() - suite.started
    summary = {
        "benchmark": "summary",
        "seconds": took,
        "met": met,
        "with_target": len(asked),
        "cases": records,
        "engine": {record["case"]: record["target_lines"] for record in engines},
        "skipped": suite.skipped,
        "problems": suite.problems,
    }
    suite.save("summary", summary)
    say(
        f"{met} of {len(asked)} targets met, {len(suite.skipped)} skipped, {len(suite.problems)} problems, {took:.0f} s"
    )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/gpu_suite.py", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="where the records go")
    add("--minutes", type=float, default=10.0, help="what no longer fits is skipped (default 10)")
    add("--device", help="default: cuda, with --smoke cpu")
    add("--smoke", action="store_true", help="everything with tiny shapes, 40 seconds on a CPU")
    add("--only", default="", metavar="TEXT", help="only the benchmarks whose names contain this")
    options = parser.parse_args(argv)
    options.device = options.device or ("cpu" if options.smoke else "cuda")
    if options.minutes <= 0:
        parser.error(f"--minutes: got {options.minutes:g}, expected more than 0")
    kind = options.device.split(":")[0]
    if kind == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device: got {options.device!r}, but PyTorch sees no GPU; --smoke is a dry run without one")
    if kind != "cuda" and not (kind == "cpu" and options.smoke):
        parser.error(f"--device: got {options.device!r}, expected cuda, or cpu with --smoke")
    return options


def say(line: str) -> None:
    print(line, flush=True)


def _line(record: dict[str, Any]) -> str:
    values = dict(zip((name for name, _ in OPS), (value(record) for _, value in OPS), strict=True))
    return f"{values['case']}: {values['ours ms']} ms, {values['time/floor']} of the floor, {values['x eager']} eager"


def _present(cases: list[Case], found: dict[str, dict[str, Any] | None]) -> list[dict[str, Any]]:
    return [record for case in cases if (record := found[case.name]) is not None]


def _run(command: list[str], seconds: float) -> tuple[int, str]:
    """-> exit code (124: out of time), stdout and stderr together."""
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, text=True, check=False, timeout=max(seconds, 1.0),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        output = error.stdout or b""
        text = output.decode(errors="replace") if isinstance(output, bytes) else output
        return 124, f"{text}\nstopped: no time left"
    return done.returncode, done.stdout


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(f"{file.relative_to(folder).as_posix()}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


if __name__ == "__main__":
    sys.exit(main())
