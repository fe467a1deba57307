"""The suite in a process that may be lost: a kernel that never ends, or that takes the device down, costs one case.

The parent imports nothing heavy and holds no GPU. It starts the suite, and reads from a file which case is running and
until when; a suite that hangs or dies is ended and started again without that case, for the time that is left.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

STATE = "GIRCSE_SUITE_STATE"  # names the file, for the suite that is attended
DEVICE_LOST = 70  # exit code: after an error the device answers no more
_AFTER_THE_END = 120.0  # the last case may end so long after the time is up
_MOST = 6  # a suite that dies without end is given up


def attend(command: Sequence[str], *, poll: float = 0.25) -> int:
    """Runs the suite until it has come to its end. -> its exit code."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.json"
        for _ in range(_MOST):
            process = subprocess.Popen(command, env={**os.environ, STATE: str(path)})
            try:
                why = _watched(process, path, poll)
            except KeyboardInterrupt:  # it reaches both
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10)
                process.kill()
                return 130
            if why is None:
                return process.returncode
            state = read(path)
            if state is None:  # it did not even begin
                return process.returncode or 1
            case = state.pop("case", None)
            line = f"{case or 'between two cases'}: {why}"
            print(f"PROBLEM: {line}; the suite goes on without it", flush=True)
            state["problems"].append(line)
            if case is None or time.time() > state["deadline"]:
                state["deadline"] = 0.0  # no more cases, but the table of what was finished
            if case is not None:
                state["left_out"].append(case)
            write(path, {**state, "until": None, "started": time.time()})
        return 1


def _watched(process: subprocess.Popen[Any], path: Path, poll: float) -> str | None:
    """Waits. -> None, or why the suite did not come to its end."""
    while process.poll() is None:
        time.sleep(poll)
        state = read(path)
        if state is None:
            continue
        until = state.get("until") or max(state["deadline"], state["started"]) + _AFTER_THE_END
        if time.time() > until:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            return "it did not end in time and was stopped"
    if process.returncode == DEVICE_LOST:
        return "the device answers no more"
    return f"the process ended with signal {-process.returncode}" if process.returncode < 0 else None


def read(path: Path) -> dict[str, Any] | None:
    """None where there is no file yet."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write(path: Path, state: dict[str, Any]) -> None:
    """Whole or not at all."""
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(state), encoding="utf-8")
    temporary.replace(path)


def state_file() -> Path | None:
    """Of the parent that attends to this process; None where there is none."""
    name = os.environ.get(STATE)
    return Path(name) if name else None


def die_with_parent() -> None:
    """Linux: nothing goes on using the GPU when the parent was killed."""
    if state_file() is not None and sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
