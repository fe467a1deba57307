from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from examples import encode, train

ROOT = Path(__file__).resolve().parents[2]


def test_what_train_leaves_can_be_encoded_with(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train.main(str(base), str(tmp_path / "run"))
    assert (tmp_path / "run/model/adapter_config.json").is_file()
    losses = capsys.readouterr().out.splitlines()[0].split(": ")[1].split()
    assert len(losses) == 5
    encode.main(str(tmp_path / "run/model"))
    lines = capsys.readouterr().out.splitlines()
    assert [line[:5] for line in lines] == [f"K = {k}" for k in range(1, 6)]
    assert all(sum(line.count(passage) for passage in encode.PASSAGES) == len(encode.QUERIES) for line in lines)


def test_the_command_in_a_bare_checkout(base: Path, tmp_path: Path) -> None:
    """From another folder, with no PYTHONPATH, no GPU and no network."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "examples" / "encode.py"), str(base)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == 5


@pytest.mark.parametrize("name", ["encode", "train"])
def test_they_stay_under_thirty_lines(name: str) -> None:
    assert len((ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8").splitlines()) < 30
