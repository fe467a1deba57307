#!/usr/bin/env python
"""One command on a GPU: correctness, ops, encoding, training, the loss and the plan; JSON records, eight minutes.

    PYTHONPATH=.:kernels python bench/gpu_suite.py --out bench/results

First, on all cores: every kernel that will be timed is compiled, and `tests/gpu` runs. Then, alone on the GPU, what is
worth most comes first. Each finished case is a file of its own in DIR/<device>/, written at once; the same command
again goes on where this one stopped, and measures again what was measured with other sources. A case that fails, or
whose result is wrong, costs no other case its figures: it is printed and marked, and makes the exit code 1. So does one
that never ends or takes the device down: the suite runs in a process that is then started again without that case.

`--profile` writes where the time of a decode step, a prefill and a training step goes. `--candidates FILE` times
alternatives of kernels against the committed table. `--compile-only` needs no GPU. `--smoke` is everything with tiny
shapes on the CPU. Nothing need be installed but torch, triton, transformers, peft and pytest; with pytest-xdist the
tests run in parallel. `python bench/report.py` renders the records.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.suite import attempts

if __name__ == "__main__" and attempts.state_file() is None:  # before anything heavy is imported
    sys.exit(attempts.attend([sys.executable, *sys.argv]))

import torch
from gircse_kernels.plan import Device

from bench.static.launches import DEVICES
from bench.suite import attention, candidates, models, ops, plan, precompile, summary, tests
from bench.suite.session import Session, say

SECTIONS = ("ops", "engine", "step", "train", "attention", "training", "loss", "plan", "tests")
_COMPILE_SECONDS = 60.0


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0, 1 something is wrong (a test, a result, a case), 2 bad options."""
    options = _parse(argv)
    if options.compile_only:
        return _compile_only(options)
    device = torch.device(options.device)
    attempts.die_with_parent()
    session = Session(options.out, device, options.minutes, smoke=options.smoke)
    origin = session.origin
    say(f"{origin['device']}, driver {origin['driver']}; torch {origin['torch']}, triton {origin['triton']}")
    say(f"commit {origin['commit']}; records: {session.folder}")
    if not session.goes_on:
        _compile(session, options)
    if options.candidates:
        return _finish(session, lambda: candidates.time_file(session, options.candidates), "summary-candidates")
    if "tests" in options.only and not session.goes_on:
        tests.run(session, 1 if options.smoke else options.jobs)
    if device.index is not None and device.type == "cuda":  # PyTorch refuses to set "cuda" without a number
        torch.cuda.set_device(device)  # only now: what runs before shares the GPU with other processes
    with precompile.compilations() as late:
        code = _finish(session, lambda: _sections(session, options))
    if late and device.type == "cuda":
        say(f"{len(late)} kernels were compiled while cases were timed: {', '.join(sorted(set(late)))}")
    return code


def _sections(session: Session, options: argparse.Namespace) -> None:
    runs: dict[tuple[str, ...], Callable[[], None]] = {
        ("ops",): lambda: ops.run(session),
        ("engine", "step", "train", "training"): lambda: models.run(session, options.only, profiled=options.profile),
        ("attention",): lambda: attention.run(session),
        ("loss",): lambda: ops.run_loss(session),
        ("plan",): lambda: plan.run(session),
    }
    for names, run in runs.items():
        if set(names) & set(options.only):
            with session.surviving("-and-".join(names)):
                run()


def _finish(session: Session, run: Callable[[], None], name: str = "summary") -> int:
    try:
        run()
    except KeyboardInterrupt:  # the table of what was finished
        session.problem("interrupted")
    summary.finish(session, time.perf_counter() - session.started, name)
    return 1 if session.problems else 0


def _compile(session: Session, options: argparse.Namespace) -> None:
    device = DEVICES[90]
    if session.device.type == "cuda":
        properties = torch.cuda.get_device_properties(session.device)
        device = Device(10 * properties.major + properties.minor, properties.multi_processor_count)
    counts = precompile.run(
        [] if options.candidates else options.only,
        device,
        processes=options.jobs,
        seconds=min(_COMPILE_SECONDS, max(session.left(), 1.0)),
        candidates=options.candidates,
        smoke=options.smoke,
    )
    if "kernels" in counts:
        late = f", {counts['unfinished']} not in time" if counts["unfinished"] else ""
        say(
            f"compiled for sm_{device.arch}: {counts['kernels']} kernels in {counts['seconds']:.0f} s, "
            f"{counts['compiled']} anew, {counts['cached']} were there{late}"
        )
    for line in counts["failed"]:
        session.problem(f"not compiled: {line}")


def _compile_only(options: argparse.Namespace) -> int:
    arguments = ["--sections", ",".join(options.only), "--jobs", str(options.jobs), "--arch", str(options.arch)]
    arguments += ["--candidates", str(options.candidates)] if options.candidates else []
    return precompile.main([*arguments, *(["--smoke"] if options.smoke else [])])


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/gpu_suite.py", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, metavar="DIR", help="where the records go")
    add("--minutes", type=float, default=8.0, help="what no longer fits is named and left out (default 8)")
    add("--only", default=",".join(SECTIONS), metavar="SECTIONS", help="comma-separated (default: all, %(default)s)")
    add("--jobs", type=int, default=tests.cores(), help="processes that compile and test (default: the cores)")
    add("--profile", action="store_true", help="write where the time of the model cases goes, as text files")
    add("--candidates", type=Path, metavar="FILE", help="time these alternatives of kernels, and nothing else")
    add("--compile-only", action="store_true", help="compile what would be timed, and stop; needs no GPU")
    add("--arch", type=int, default=90, help="with --compile-only: compute capability without the point (default 90)")
    add("--device", help="default: cuda, with --smoke cpu")
    add("--smoke", action="store_true", help="everything with tiny shapes, under a minute on a CPU")
    options = parser.parse_args(argv)
    options.only = [name for name in options.only.split(",") if name]
    unknown = [name for name in options.only if name not in SECTIONS]
    if unknown or not options.only:
        parser.error(f"--only: got {','.join(unknown)!r}, expected some of {', '.join(SECTIONS)}")
    for name in ("minutes", "jobs"):
        if getattr(options, name) <= 0:
            parser.error(f"--{name}: got {getattr(options, name):g}, expected more than 0")
    try:  # now, not when minutes have been spent
        if options.candidates:
            candidates.read(options.candidates)
        if not options.compile_only:
            if options.out is None:
                parser.error("the following arguments are required: --out")
            options.out.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=options.out).close()
    except ValueError as error:
        parser.error(f"--candidates: {error}")
    except OSError as error:
        parser.error(f"--out: {error}")
    options.device = options.device or ("cpu" if options.smoke else "cuda")
    kind = options.device.split(":")[0]
    if not options.compile_only:
        if kind == "cuda" and not torch.cuda.is_available():
            parser.error(f"--device: got {options.device!r}, but PyTorch sees no GPU; --smoke is a dry run without one")
        if kind != "cuda" and not (kind == "cpu" and options.smoke):
            parser.error(f"--device: got {options.device!r}, expected cuda, or cpu with --smoke")
    return options


if __name__ == "__main__":
    sys.exit(main())
