"""What a launcher left in the environment: believed where the processes are there, named at once where they are not."""

from __future__ import annotations

import json
import socket
import time

import pytest

from gircse.cli import main
from gircse.lm.environment import environment_integer, first_process
from gircse.train.ranks import RankLost, join_ranks

NAMES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def set_all(monkeypatch, **values: str) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


@pytest.mark.parametrize(
    "left", [{"RANK": "1"}, {"WORLD_SIZE": ""}, {"WORLD_SIZE": " ", "RANK": "1", "LOCAL_RANK": ""}]
)
def test_one_process_is_the_first_whatever_its_rank_says(monkeypatch, left):
    set_all(monkeypatch, **left)
    with join_ranks("cpu", timeout=1.0) as ranks:
        assert (ranks.rank, ranks.size) == (0, 1)
    assert first_process()


def test_of_several_the_first_speaks():
    assert first_process({"WORLD_SIZE": "2", "RANK": "0"})
    assert not first_process({"WORLD_SIZE": "2", "RANK": "1"})
    assert environment_integer("X", 7, {"X": "12 "}) == 12
    with pytest.raises(ValueError, match="WORLD_SIZE: got 'two', expected an integer"):
        environment_integer("WORLD_SIZE", 1, {"WORLD_SIZE": "two"})


def test_a_stray_rank_does_not_silence_training(base, monkeypatch, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "retrieve", "query": "q", "pos": ["p"]}) + "\n")
    monkeypatch.setenv("RANK", "1")
    arguments = ["train", "--model", str(base), "--data", str(rows), "--output", str(tmp_path / "run")]
    assert main([*arguments, "--batch-size", "1", "--num-steps", "1", "--no-progress"]) == 0
    assert "trained 1 steps, last loss 0.0000; model in" in capsys.readouterr().out


def test_processes_that_were_never_started_are_named_at_once(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(
            RankLost, match="WORLD_SIZE: got 2 in the environment without RANK, MASTER_ADDR, MASTER_PORT; start"
        ),
        join_ranks("cpu", timeout=1800.0),
    ):
        pass


@pytest.mark.parametrize("rank", ["0", "1"])
def test_processes_that_do_not_come_are_named_soon(monkeypatch, rank):
    monkeypatch.setattr("gircse.train.ranks._PATIENCE", 1.0)
    set_all(monkeypatch, WORLD_SIZE="2", RANK=rank, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    started = time.monotonic()
    with (
        pytest.raises(
            RankLost, match=r"WORLD_SIZE: got 2 .* did not all meet at 127.0.0.1:\d+ within 1 seconds; start all"
        ),
        join_ranks("cpu", timeout=1800.0),
    ):
        pass
    assert time.monotonic() - started < 60
