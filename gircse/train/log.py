"""The record of a run, written by its first process: a JSON line a step, a progress bar, TensorBoard and wandb.

`train_log.jsonl` (`distill_log.jsonl`) is always written, TensorBoard where it is installed, Weights & Biases where the
config or `WANDB_PROJECT` asks for it. A run never fails because of TensorBoard or wandb.
"""

from __future__ import annotations

import importlib
import json
import os
import secrets
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from gircse.files.atomic import new_file
from gircse.train.run_config import RunConfig


class RunLog:
    """Appends the entries of steps; see `open_log`. In all processes but the first it has no file and does nothing."""

    def __init__(self, file: Any = None, bar: Any = None, board: Any = None, wandb_run: Any = None) -> None:
        self._file, self._bar, self._board, self._wandb = file, bar, board, wandb_run

    def write(self, entry: dict[str, Any]) -> None:
        """Writes the entry of one step (docs/training.md lists its fields)."""
        if self._file is None:
            return
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()
        values = {name: value for name, value in _flat(entry).items() if name != "step"}
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, entry["step"])
        if self._wandb is not None:
            self._wandb.log(values, step=entry["step"])
        parts = [item for item in values.items() if item[0].startswith(("losses/", "cosine", "kl"))]
        shown = {"loss": values["loss"], **dict([parts[0], parts[-1]])}  # L_1 and L_K, or the two parts
        self._bar.set_postfix({name: f"{value:.3f}" for name, value in shown.items()})
        self._bar.update()

    def sync(self) -> None:
        """Makes sure that the lines are on the disk, before a checkpoint that counts on them is written."""
        if self._file is not None:
            os.fsync(self._file.fileno())


@contextmanager
def open_log(config: RunConfig, *, total: int, done: int, writes: bool = True) -> Iterator[RunLog]:
    """The log of a run whose folder exists, after `done` of `total` steps. The bar shows the time that is left.

    Args:
        writes: whether this process writes the log: only the first one does.

    Raises:
        ModuleNotFoundError: the config asks for wandb, which is not installed.
    """
    if not writes:
        yield RunLog()
        return
    run, options = Path(config.output), {"desc": config.command, "unit": "step", "dynamic_ncols": True}
    board = _tensorboard(run, done)
    wandb_run = _wandb(run, config)
    bar = tqdm(total=total, initial=done, disable=not config.progress, **options)
    try:
        with config.path("log.jsonl").open("a", encoding="utf-8") as file, bar:
            yield RunLog(file, bar, board, wandb_run)
    finally:
        if board is not None:
            board.close()
        if wandb_run is not None:
            wandb_run.finish()


def start_log(path: Path, *, up_to: int) -> list[dict[str, Any]]:
    """Keeps the entries of the first `up_to` steps, which a checkpoint includes, and returns them.

    The later entries are dropped: a resumed run writes them again.
    """
    entries = read_log(path, up_to=up_to) if up_to else []
    with new_file(path) as partial:
        partial.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return entries


def read_log(path: Path, up_to: int | None = None) -> list[dict[str, Any]]:
    """The entries of a log, up to a step. A last line that a kill cut short is passed over.

    Raises:
        ValueError: another line is no entry; names file and line.
    """
    entries = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
                raise ValueError('expected an object with an integer "step"')
        except (ValueError, RecursionError) as error:
            if number == len(lines):  # after the last newline stands nothing, or the beginning of a line
                break
            raise ValueError(f"{path}:{number}: {error}") from None
        if up_to is None or entry["step"] <= up_to:
            entries.append(entry)
    return entries


def _flat(value: Any, name: str = "") -> dict[str, float]:
    """The numbers of an entry by name: items of lists as "losses/1", of objects as "time/prompt"."""
    if isinstance(value, (int, float)):
        return {name: value}
    if isinstance(value, list):
        value = dict(enumerate(value, start=1))
    if not isinstance(value, dict):
        return {}
    return {k: v for key, item in value.items() for k, v in _flat(item, f"{name}/{key}" if name else key).items()}


def _tensorboard(run: Path, done: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(run / "tensorboard", purge_step=done + 1)


def _wandb(run: Path, config: RunConfig) -> Any:
    asked = config.wandb
    if not asked and not os.environ.get("WANDB_PROJECT"):
        return None
    if "wandb" not in sys.modules and find_spec("wandb") is None:
        if asked:
            raise ModuleNotFoundError("wandb: asked for, but it is not installed: pip install wandb")
        warnings.warn("WANDB_PROJECT is set, but wandb is not installed (pip install wandb): not logged", stacklevel=3)
        return None
    wandb: Any = importlib.import_module("wandb")
    name = run / "wandb_id"  # a resumed run goes on under the id of the run that it continues
    if not name.exists():
        name.write_text(secrets.token_hex(4), encoding="utf-8")
    try:
        return wandb.init(
            project=os.environ.get("WANDB_PROJECT", "gircse"),
            id=name.read_text(encoding="utf-8"),
            name=run.name,
            dir=str(run),
            config=asdict(config),
            resume="allow",
        )
    except Exception as error:  # wandb raises many kinds, for example without a key or a network
        warnings.warn(f"wandb does not start, the run goes on without it: {error}", stacklevel=3)
        return None
