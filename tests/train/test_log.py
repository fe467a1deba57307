"""The log of a run: lines, TensorBoard and wandb where they are, and a run that does without them."""

from __future__ import annotations

import json
import sys
import types

import pytest
import torch

from gircse.train.config import TrainConfig
from gircse.train.log import open_log, read_log, start_log
from gircse.train.step_monitor import PHASES, StepMonitor


def entry(step: int) -> dict:
    return {
        "step": step,
        "loss": 1.5,
        "losses": [2.0, 1.0],
        "entropy": [3.0, 2.5],
        "grad_norm": 0.5,
        "learning_rate": 1e-5,
        "tokens_per_second": 10.0,
        "seconds": 0.1,
        "time": {"data": 0.1, "prompt": 0.9},
        "peak_bytes": 7,
        "batch": "0f",
        "evaluation": {"2": {"ndcg@10": 0.25}},
    }


class FakeWandb(types.ModuleType):
    def __init__(self) -> None:
        super().__init__("wandb")
        self.started, self.logged, self.finished = [], [], 0

    def init(self, **options):
        self.started.append(options)
        return self

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


def settings(folder, **options) -> TrainConfig:
    return TrainConfig(output=str(folder), progress=False, **options)


@pytest.fixture(autouse=True)
def no_project(monkeypatch):
    monkeypatch.delenv("WANDB_PROJECT", raising=False)


def test_lines_and_what_a_resumed_run_keeps_of_them(tmp_path):
    assert start_log(tmp_path / "train_log.jsonl", up_to=0) == []
    with open_log(settings(tmp_path), total=4, done=0) as log:
        for step in (1, 2, 3):
            log.write(entry(step))
        log.sync()
    with (tmp_path / "train_log.jsonl").open("a") as file:
        file.write('{"step": 4, "los')
    assert [e["step"] for e in read_log(tmp_path / "train_log.jsonl")] == [1, 2, 3]
    assert start_log(tmp_path / "train_log.jsonl", up_to=2) == [entry(1), entry(2)]
    assert [json.loads(line) for line in (tmp_path / "train_log.jsonl").read_text().splitlines()] == [
        entry(1),
        entry(2),
    ]
    assert not list(tmp_path.glob("wandb*"))


def test_the_other_processes_write_nothing(tmp_path):
    with open_log(settings(tmp_path), total=4, done=0, writes=False) as log:
        log.write(entry(1))
        log.sync()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("how", ["config", "environment"])
def test_wandb_where_it_is_asked_for(tmp_path, monkeypatch, how):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    if how == "environment":
        monkeypatch.setenv("WANDB_PROJECT", "mine")
    for done in (0, 1):
        with open_log(settings(tmp_path, wandb=how == "config"), total=4, done=done) as log:
            log.write(entry(done + 1))
    first, second = wandb.started
    assert first["project"] == ("mine" if how == "environment" else "gircse")
    assert first["id"] == second["id"]  # one run there, too
    step, values = wandb.logged[1]
    assert step == 2
    assert values["losses/2"] == 1.0
    assert values["entropy/1"] == 3.0
    assert values["time/prompt"] == 0.9
    assert values["evaluation/2/ndcg@10"] == 0.25
    assert not {"step", "batch"} & set(values)
    assert wandb.finished == 2


def test_wandb_is_left_alone_otherwise_and_never_ends_a_run(tmp_path, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with open_log(settings(tmp_path), total=4, done=0):
        pass
    assert wandb.started == []

    def offline(**_):
        raise OSError("no network")

    monkeypatch.setattr(wandb, "init", offline)
    with (
        pytest.warns(UserWarning, match="goes on without it: no network"),
        open_log(settings(tmp_path, wandb=True), total=4, done=0) as log,
    ):
        log.write(entry(1))


def test_wandb_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr("gircse.train.log.find_spec", lambda name: None)
    with (
        pytest.raises(ModuleNotFoundError, match="pip install wandb"),
        open_log(settings(tmp_path, wandb=True), total=4, done=0),
    ):
        pass
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    with pytest.warns(UserWarning, match="pip install wandb"), open_log(settings(tmp_path), total=4, done=0):
        pass


def test_the_monitor_shares_out_the_time_and_averages_over_texts(monkeypatch):
    clock = iter([0.0, 0.0, 1.0, 3.0, 6.0, 7.0, 9.0, 10.0, 12.0])
    monkeypatch.setattr("gircse.train.step_monitor.time.perf_counter", lambda: next(clock))
    monitor = StepMonitor(torch.device("cpu"))
    monitor.start()
    for phase in ("prompt", "steps", "loss", "prompt", "update"):
        monitor.enter(phase)
    monitor.soft_token(0, torch.tensor([1.0, 2.0]))
    monitor.soft_token(1, torch.tensor([0.5, 0.5]))
    monitor.soft_token(0, torch.tensor([6.0]))
    assert monitor.seconds() == {"data": 1.0, "prompt": 4.0, "steps": 3.0, "loss": 1.0, "update": 1.0}
    assert monitor.host_seconds() == 12.0
    assert monitor.entropies() == [3.0, 0.5]
    assert monitor.peak_bytes() > 1 << 20
    assert set(PHASES) == {"data", "prompt", "steps", "loss", "update"}
