"""Whatever ends a run, the run goes on where it was: real processes, real kills."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import signal
import time
from collections import namedtuple
from functools import partial
from pathlib import Path

import pytest
import torch

from gircse import GIRCSE, ops
from gircse.train import train
from gircse.train.checkpoint import list_checkpoints
from gircse.train.signals import TrainingStopped, stop_on_signals
from tests.tiny_models import tiny_model, tiny_tokenizer
from tests.training_process import ROWS, settings, start

STEPS = 12


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def unbroken(base, tmp_path_factory) -> tuple[list, bytes]:
    """Losses and final weights of a run that nothing happened to."""
    return finished(settings(base, tmp_path_factory.mktemp("unbroken") / "run"))


def finished(config) -> tuple[list, bytes]:
    """Runs to the end in a process of its own."""
    process = start(config)
    process.join(60)
    assert process.exitcode == 0, (Path(config.output).parent / "stderr.txt").read_text()
    return outcome(Path(config.output))


def outcome(run: Path) -> tuple[list, bytes]:
    lines = [json.loads(line) for line in (run / "train_log.jsonl").read_text().splitlines()]
    kept = [{name: entry[name] for name in ("step", "loss", "losses", "grad_norm", "batch")} for entry in lines]
    return kept, (run / "model" / "adapter_model.safetensors").read_bytes()


def lines(run: Path) -> int:
    log = run / "train_log.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def has_lines(run: Path, count: int) -> bool:
    return lines(run) >= count


def wait_until(condition, process=None) -> None:
    deadline = time.monotonic() + 60
    while not condition() and (process is None or process.is_alive()):
        assert time.monotonic() < deadline
        time.sleep(0.002)


def going_on(base: Path, run: Path, **options):
    """The settings of the next attempt: to resume, once there is something to resume."""
    return settings(base, run, resume=(run / "train_config.json").exists(), **options)


def test_killed_ten_times_at_random_it_ends_bitwise_the_same(base, tmp_path, unbroken):
    run, draw = tmp_path / "run", random.Random(0)
    kills = 0
    while kills < 10:
        process = start(going_on(base, run), pause=0.02)
        # somewhere in the start, a step, or a save
        wait_until(partial(has_lines, run, max(lines(run) - 1, 1)), process)
        time.sleep(draw.uniform(0.0, 0.08))
        if not process.is_alive():  # it came to its end: what is left is to do it again
            shutil.rmtree(list_checkpoints(run)[-1])
            continue
        process.kill()
        process.join()
        kills += 1
    assert finished(going_on(base, run)) == unbroken
    assert not list(run.rglob("*.partial*"))


@pytest.mark.parametrize("place", ["weights", "state", "rename", "deletion"])
def test_killed_inside_a_save_the_last_checkpoint_is_whole(base, tmp_path, unbroken, place):
    run = tmp_path / "run"
    process = start(settings(base, run, keep_checkpoints=1), die_at=place)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    found = list_checkpoints(run)
    assert [path.name for path in found] == ["step-000004" if place == "deletion" else "step-000002"]
    assert list((run / "checkpoints").glob(".*"))  # what the kill left behind
    GIRCSE.from_pretrained(found[0])
    assert finished(settings(base, run, resume=True, keep_checkpoints=1)) == unbroken
    assert not list(run.rglob("*.partial*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_ends_well(base, tmp_path, unbroken, number):
    run = tmp_path / "run"
    process = start(settings(base, run, save_every=1000), pause=0.05)
    wait_until(lambda: lines(run) >= 3, process)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == 0
    done = lines(run)
    assert 3 <= done < STEPS
    assert [path.name for path in list_checkpoints(run)] == [f"step-{done:06d}"]
    said = (tmp_path / "stderr.txt").read_text()
    assert f"{signal.Signals(number).name}: stopping when this step is done" in said
    assert f"stopped after step {done}, saved in {list_checkpoints(run)[0]}; go on with the same command" in said
    assert finished(settings(base, run, resume=True, save_every=1000)) == unbroken


def test_a_run_killed_before_its_first_checkpoint_starts_again(base, tmp_path, unbroken):
    run = tmp_path / "run"
    process = start(settings(base, run, save_every=1000), pause=0.05)
    wait_until(lambda: lines(run) >= 2, process)
    process.kill()
    process.join()
    assert not list_checkpoints(run)
    assert finished(settings(base, run, resume=True, save_every=1000)) == unbroken


def test_signals_are_given_back_and_the_second_interrupt_is_at_once():
    before = signal.getsignal(signal.SIGINT)
    with stop_on_signals() as request:
        assert not request.requested
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert request.name == "SIGTERM"
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    assert TrainingStopped(3, Path("x")).code == 0


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_disk_without_room_is_an_error_before_anything_is_written(base, tmp_path, monkeypatch):
    run, calls, usage = tmp_path / "run", [], namedtuple("usage", "total used free")

    def full_at_the_second_save(path):
        calls.append(files_of(run / "checkpoints"))
        return usage(1, 1, 1000 if len(calls) == 2 else 2**40)

    monkeypatch.setattr("gircse.train.checkpoint.shutil.disk_usage", full_at_the_second_save)
    words = r"step-000004 could not be written: no space left: 16 MiB needed, 0 MiB free; .* whole: step-000002"
    with pytest.raises(OSError, match=words) as error:
        train(settings(base, run), rows=ROWS)
    assert error.value.errno == errno.ENOSPC
    assert files_of(run / "checkpoints") == calls[1]
    assert set(calls[1]) >= {"step-000002/adapter_model.safetensors", "step-000002/training_state.pt"}


def test_a_disk_that_fills_while_it_is_written_to_leaves_the_last_checkpoint(base, tmp_path, unbroken):
    """RLIMIT_FSIZE: the write itself fails, in the middle of a file."""
    run = tmp_path / "run"
    process = start(settings(base, run), die_at=None, pause=0.05)
    wait_until(lambda: bool(list_checkpoints(run)), process)
    largest = max(p.stat().st_size for p in list_checkpoints(run)[0].iterdir() if p.is_file())
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (largest // 2, largest // 2))
    process.join(60)
    assert process.exitcode not in (0, None)
    said = (tmp_path / "stderr.txt").read_text()
    assert "could not be written" in said
    assert "checkpoints that are whole: step-00000" in said
    assert not list(run.rglob("*.partial*"))
    assert finished(settings(base, run, resume=True)) == unbroken


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_nan_stops_with_the_state_beside_the_checkpoints(base, tmp_path, monkeypatch, what):
    objective, calls = ops.icr_objective, []

    def breaks_at_the_fourth(losses, **options):
        calls.append(1)
        found = objective(losses, **options)
        if len(calls) != 4:
            return found
        return found * float("nan") if what == "loss" else found + (0 * losses).sum().sqrt()  # 0 / 0 in backward

    monkeypatch.setattr(ops, "icr_objective", breaks_at_the_fourth)
    run = tmp_path / "run"
    with pytest.raises(FloatingPointError, match=r"step 4: the loss is .*its batch is rows:row \d+, .*; seed 0"):
        train(settings(base, run), rows=ROWS)
    assert [path.name for path in list_checkpoints(run)] == ["step-000002"]
    failed = run / "failed" / "step-000004"
    batch = json.loads((failed / "batch.json").read_text())
    assert batch["step"] == 4
    assert len(batch["rows"]) == 4
    assert torch.load(failed / "training_state.pt", weights_only=True)["step"] == 3
    weights = GIRCSE.from_pretrained(failed).state_dict()
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    assert lines(run) == 3
    # the next attempt, without the fault, takes the good checkpoint
    monkeypatch.setattr(ops, "icr_objective", objective)
    assert len(train(settings(base, run, resume=True), rows=ROWS).log) == STEPS
