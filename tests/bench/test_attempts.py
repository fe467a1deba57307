"""A suite that hangs or dies is ended and started again without the case in which it did. A stand-in plays it."""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import suppress

import pytest
import torch

from bench.suite import attempts
from bench.suite import session as sessions
from bench.suite.session import Session

# what `bad` does; then what the suite does with it: three cases, each beginning written to the state file
_SUITE = """
import json, os, signal, sys, time
from pathlib import Path
from bench.suite import attempts

path = attempts.state_file()
state = attempts.read(path) or {"problems": [], "left_out": [], "deadline": time.time() + 60}
for case in ("good", "bad", "late"):
    if case in state["left_out"]:
        continue
    attempts.write(path, {**state, "case": case, "until": time.time() + 0.5, "started": time.time()})
    if case == "bad":
        %s
    print(case, flush=True)
if time.time() > state["deadline"]:
    print("no time")
print(json.dumps(state["problems"]))
sys.exit(1 if state["problems"] else 0)
"""


@pytest.mark.parametrize(
    ("does", "why"),
    [
        ("time.sleep(60)", "bad: it did not end in time and was stopped"),
        ("os._exit(70)", "bad: the device answers no more"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "bad: the process ended with signal 11"),
    ],
)
def test_one_case_is_lost_and_no_other(capfd, does, why):
    assert attempts.attend([sys.executable, "-c", _SUITE % does], poll=0.02) == 1
    printed = capfd.readouterr().out.splitlines()
    assert printed[:2] == ["good", f"PROBLEM: {why}; the suite goes on without it"]
    assert printed[2:-1] == ["good", "late"]
    assert json.loads(printed[-1]) == [why]


def test_a_suite_that_goes_on_has_time_to_begin(capfd):
    """Its predecessor's last word is old, and its time is up."""
    begin = "time.sleep(0.5 if path.exists() else 0)\nstate = attempts.read"
    suite = _SUITE.replace("state = attempts.read", begin).replace('"started": time.time()', '"started": 0')
    suite = suite.replace("time.time() + 60", "time.time() - 300")
    assert attempts.attend([sys.executable, "-c", suite % "time.sleep(60)"], poll=0.02) == 1
    printed = capfd.readouterr().out.splitlines()
    assert printed[2:-1] == ["good", "late"] or printed[2:-1] == ["good", "late", "no time"]


def test_an_exit_code_is_passed_on(capfd):
    for code in (0, 1, 2):
        assert attempts.attend([sys.executable, "-c", f"raise SystemExit({code})"], poll=0.02) == code


@pytest.fixture
def attended(tmp_path, monkeypatch):
    path = tmp_path / "state.json"
    monkeypatch.setenv(attempts.STATE, str(path))
    return path


def test_a_session_says_what_it_does_and_goes_on(tmp_path, attended):
    session = Session(tmp_path, torch.device("cpu"), 1.0, smoke=True)
    assert not session.goes_on
    assert session.fits("slow", 5)
    with session.surviving("section"), session.surviving("slow"):
        state = attempts.read(attended)
        assert state["case"] == "slow"
        assert 65 < state["until"] - time.time() <= 70
        with session.watched("within", 0):
            assert attempts.read(attended)["case"] == "within"
        assert attempts.read(attended)["case"] == "slow"
        raise ValueError("bad")
    state = attempts.read(attended)
    assert (state["case"], state["problems"], state["left_out"]) == (None, ["slow: ValueError: bad"], ["slow"])

    attempts.write(attended, {**state, "deadline": time.time() + 7})
    again = Session(tmp_path, torch.device("cpu"), 100.0, smoke=True)
    assert again.goes_on
    assert again.problems == ["slow: ValueError: bad"]
    assert 6 < again.left() <= 7
    assert not again.fits("slow", 0)
    assert again.skipped == []
    assert again.fits("fast", 1)


@pytest.mark.parametrize("caught", [False, True])
def test_a_lost_device_ends_the_process(tmp_path, attended, monkeypatch, caught):
    said = []

    def lost(_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def leave(code):
        said.append(attempts.read(attended)["case"])
        raise SystemExit(code)

    monkeypatch.setattr(sessions, "synchronize", lost)
    monkeypatch.setattr(os, "_exit", leave)
    session = Session(tmp_path, torch.device("cpu"), 1.0, smoke=True)
    assert session.fits("bad", 1)
    with pytest.raises(SystemExit) as exit, session.surviving("bad"), suppress(RuntimeError if caught else ()):
        lost(0)
    assert exit.value.code == attempts.DEVICE_LOST
    assert said == ["bad"]
