"""The record of a run, written by its first process: a JSON line a step, a progress bar, TensorBoard and wandb.

`train_log.jsonl` is always written; TensorBoard where it is installed; Weights & Biases where the config or
`WANDB_PROJECT` asks for it. A run never fails because of the latter two.
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
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from gircse.files.atomic import new_file

LOG_NAME = "train_log.jsonl"
_SCALARS = ("loss", "grad_norm", "learning_rate", "tokens_per_second", "seconds", "peak_bytes")


class RunLog:
    """Appends entries of steps. Use `open_log`. Without a file (all processes but the first) it does nothing."""

    def __init__(self, file: Any = None, bar: Any = None, board: Any = None, wandb_run: Any = None) -> None:
        self._file, self._bar, self._board, self._wandb = file, bar, board, wandb_run

    def write(self, entry: dict[str, Any]) -> None:
        """One step: see docs/training.md for the fields."""
        if self._file is None:
            return
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()
        values = _flat(entry)
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, entry["step"])
        if self._wandb is not None:
            self._wandb.log(values, step=entry["step"])
        losses = entry["losses"]
        self._bar.set_postfix(loss=f"{entry['loss']:.3f}", L1=f"{losses[0]:.3f}", LK=f"{losses[-1]:.3f}")
        self._bar.update()

    def sync(self) -> None:
        """The lines reach the disk: before a checkpoint that counts on them."""
        if self._file is not None:
            os.fsync(self._file.fileno())


@contextmanager
def open_log(run: Path | None, config: dict[str, Any], *, total: int, done: int) -> Iterator[RunLog]:
    """The log of `run`, a folder that exists, after `done` of `total` steps; the bar shows the time that is left.

    Args:
        run: None for a process that writes nothing.
        config: the run's settings, of which "progress" shows the bar and "wandb" asks for Weights & Biases.

    Raises:
        ModuleNotFoundError: wandb is asked for and not installed.
    """
    if run is None:
        yield RunLog()
        return
    board = _tensorboard(run, done)
    wandb_run = _wandb(run, config)
    bar = tqdm(total=total, initial=done, desc="train", unit="step", disable=not config["progress"], dynamic_ncols=True)
    try:
        with (run / LOG_NAME).open("a", encoding="utf-8") as file, bar:
            yield RunLog(file, bar, board, wandb_run)
    finally:
        if board is not None:
            board.close()
        if wandb_run is not None:
            wandb_run.finish()


def start_log(run: Path, *, up_to: int) -> list[dict[str, Any]]:
    """Keeps the entries of the first `up_to` steps, which a checkpoint includes, and drops the rest: a resumed run
    writes those again. -> the entries kept."""
    entries = read_log(run, up_to=up_to) if up_to else []
    with new_file(run / LOG_NAME) as partial:
        partial.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return entries


def read_log(run: Path, up_to: int | None = None) -> list[dict[str, Any]]:
    """The entries of a run, up to a step; a last line that a kill cut short is passed over.

    Raises:
        ValueError: another line is no entry; names file and line.
    """
    entries = []
    lines = (run / LOG_NAME).read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
                raise ValueError('expected an object with an integer "step"')
        except (ValueError, RecursionError) as error:
            if number == len(lines):  # what follows the last line's end: nothing, or the beginning of a line
                break
            raise ValueError(f"{run / LOG_NAME}:{number}: {error}") from None
        if up_to is None or entry["step"] <= up_to:
            entries.append(entry)
    return entries


def _flat(entry: dict[str, Any]) -> dict[str, float]:
    """An entry as named numbers."""
    values = {name: entry[name] for name in _SCALARS}
    for field in ("losses", "entropy"):
        values |= {f"{field}/{k}": value for k, value in enumerate(entry[field], start=1)}
    return values | {f"time/{phase}": share for phase, share in entry["time"].items()}


def _tensorboard(run: Path, done: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(run / "tensorboard", purge_step=done + 1)


def _wandb(run: Path, config: dict[str, Any]) -> Any:
    asked = config["wandb"]
    if not asked and not os.environ.get("WANDB_PROJECT"):
        return None
    if "wandb" not in sys.modules and find_spec("wandb") is None:
        if asked:
            raise ModuleNotFoundError("wandb: asked for, but it is not installed: pip install wandb")
        warnings.warn("WANDB_PROJECT is set, but wandb is not installed (pip install wandb): not logged", stacklevel=3)
        return None
    wandb: Any = importlib.import_module("wandb")
    name = run / "wandb_id"  # one for a run and what resumes it
    if not name.exists():
        name.write_text(secrets.token_hex(4), encoding="utf-8")
    try:
        return wandb.init(
            project=os.environ.get("WANDB_PROJECT", "gircse"),
            id=name.read_text(encoding="utf-8"),
            name=run.name,
            dir=str(run),
            config=config,
            resume="allow",
        )
    except Exception as error:  # no key, no network: its business, not the run's
        warnings.warn(f"wandb does not start, the run goes on without it: {error}", stacklevel=3)
        return None
