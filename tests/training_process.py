"""Training runs in processes of their own: cheap to start and to kill."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

from gircse import cli, train
from gircse.data.rows import Row
from gircse.train import checkpoint
from gircse.train.config import TrainConfig
from tests.forkserver import CONTEXT

WORDS = ["red", "blue", "fox", "dog", "tree", "sea"]
ROWS = [Row("echo", f"{a} {b}", (f"{b} {a}",)) for a in WORDS for b in WORDS if a != b]


def settings(base: Path, output: Path, **options: Any) -> TrainConfig:
    defaults: dict[str, Any] = {
        "model": str(base),
        "output": str(output),
        "batch_size": 4,
        "num_steps": 2,
        "max_steps": 12,
        "learning_rate": 3e-3,
        "save_every": 2,
        "progress": False,
        "micro_batch_tokens": 130,  # less than a batch: gradient caching, with dropout
        "device": "cpu",
    }
    return TrainConfig(**{**defaults, **options})


def command(argv: list[str], errors: Path, **environment: str) -> Any:
    """A process that runs `gircse` with these arguments; what it writes to stderr goes into a file."""
    process = CONTEXT.Process(target=_command, args=(argv, errors, environment))
    process.start()
    return process


def _command(argv: list[str], errors: Path, environment: dict[str, str]) -> None:
    torch.set_num_threads(1)
    os.environ |= environment
    _errors_to(errors)
    sys.exit(cli.main(argv))


def _errors_to(path: Path) -> None:
    log = open(path, "a")  # noqa: SIM115 - for as long as the process lives
    os.dup2(log.fileno(), 2)
    sys.stderr = log


def start(config: TrainConfig, *, die_at: str | None = None, pause: float = 0.0) -> Any:
    """A process that trains; `die_at` names the place in a save where it kills itself, `pause` are seconds a step."""
    process = CONTEXT.Process(target=_run, args=(config, die_at, pause))
    process.start()
    return process


def _run(config: TrainConfig, die_at: str | None, pause: float) -> None:
    torch.set_num_threads(1)
    _errors_to(Path(config.output).parent / "stderr.txt")
    if die_at is not None:
        _die_at(die_at)
    if pause:
        import time

        backward = train.contrastive_backward

        def slower(*args: Any, **kwargs: Any) -> Any:
            time.sleep(pause)
            return backward(*args, **kwargs)

        train.contrastive_backward = slower
    train.train(config, rows=ROWS)


def _die_at(place: str) -> None:
    """SIGKILL inside the second save: before the weights, in the middle of the state, before the rename, while an old
    checkpoint is deleted."""
    from gircse.files import atomic

    saves = {"count": 0}

    def kill() -> None:
        os.kill(os.getpid(), 9)

    write = checkpoint._write

    def counted(*args: Any, **kwargs: Any) -> None:
        saves["count"] += 1
        write(*args, **kwargs)

    checkpoint._write = counted
    if place == "weights":
        original = atomic.os.replace

        def replace(source: Any, target: Any) -> None:
            if saves["count"] == 2 and str(target).endswith("adapter_model.safetensors"):
                kill()
            original(source, target)

        atomic.os.replace = replace
    elif place == "state":
        save = torch.save

        def half_a_file(state: Any, path: Path) -> None:
            save(state, path)
            if saves["count"] == 2:
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
                kill()

        checkpoint.torch.save = half_a_file
    elif place == "rename":
        sync = atomic._sync_tree

        def synced(folder: Path) -> None:
            sync(folder)
            if saves["count"] == 2 and (folder / checkpoint.STATE_NAME).exists():
                kill()

        atomic._sync_tree = synced
    elif place == "deletion":
        remove = checkpoint.remove_folder

        def half(path: Any, **_: Any) -> None:
            next(Path(path).rglob("*.safetensors")).unlink()
            kill()

        def removing(path: Path) -> None:
            atomic.shutil.rmtree = half
            remove(path)

        checkpoint.remove_folder = removing
    else:
        raise ValueError(place)
