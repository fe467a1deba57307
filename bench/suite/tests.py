"""`tests/gpu` in many processes: compiling is most of it, and they share Triton's cache."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time

from bench.provenance import ROOT, checkout_environment
from bench.suite import attempts
from bench.suite.session import Session, say

FOLDER = ROOT / "tests" / "gpu"
TIMED_OUT = 124
_NO_TESTS = 5  # pytest's exit code where everything is skipped or nothing is there
_SECONDS = 150.0  # at most: figures are worth more than the last test
_MOST = 16  # processes: each has a CUDA context of half a gigabyte, and some tests take several


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(session: Session, processes: int) -> None:
    """A failure is a problem and costs no figure; a pass with the same sources and tests counts."""
    if session.had("tests", lambda record: record["passed"]):
        say("tests: passed before")
        return
    if not session.fits("tests", 1.0):
        return
    command = [sys.executable, "-m", "pytest", str(FOLDER), "-q", "-p", "no:cacheprovider"]
    processes = min(processes, _MOST)
    if importlib.util.find_spec("xdist") is not None and processes > 1:
        command += ["--numprocesses", str(processes), "--dist", "loadgroup"]
    say(f"tests: {' '.join(command[1:])}")
    started = time.perf_counter()
    code, output = run_command(command, min(_SECONDS, session.left()))
    path = session.write("tests.txt", output)
    lines = output.strip().splitlines() or [""]
    # without CUDA everything is skipped; with it, nothing collected means nothing checked
    passed = code == 0 or (code == _NO_TESTS and session.device.type != "cuda")
    found = {"passed": passed, "exit_code": code, "summary": lines[-1], "seconds": time.perf_counter() - started}
    session.save("tests", {"benchmark": "tests", **found, "processes": processes})
    say(f"tests: {lines[-1]} ({found['seconds']:.0f} s)")
    if not passed:
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        for line in failed[:20] or lines[-5:]:
            say(f"  {line[:200]}")
        session.problem(f"tests/gpu failed (exit code {code}): {lines[-1].strip('= ')}; all of it: {path}")


def run_command(command: list[str], seconds: float) -> tuple[int, str]:
    """-> exit code (124: it was stopped after `seconds`), output and errors together."""
    environment = checkout_environment(COLUMNS="200")  # pytest cuts its lines to that
    environment.pop(attempts.STATE, None)  # the suite that tests start, if any, is not this one
    environment.setdefault("OMP_NUM_THREADS", "1")  # or each of many processes has a thread for every core
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=max(seconds, 0.1))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the workers too: nothing else may run when the clocks start
        output, _ = process.communicate()
        return TIMED_OUT, f"{output}\nstopped after {seconds:.0f} s"
    except BaseException:  # Ctrl-C, which does not reach a session of its own
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    return process.returncode, output
