"""Checkpoints of a training run: a loadable GIRCSE folder plus what the loop needs to go on bitwise.

    RUN/checkpoints/step-000100/    adapter, tokenizer, gircse_config.json (GIRCSE.from_pretrained reads it)
                                    training_state.pt: step, optimizer, scheduler, random states

A checkpoint is written aside, synced, and renamed into place, so a folder named step-* is always whole.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gircse.atomic import new_folder

if TYPE_CHECKING:
    from gircse.model import GIRCSE

STATE_NAME = "training_state.pt"


def save_checkpoint(
    run: Path,
    step: int,
    model: GIRCSE,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    *,
    keep: int,
) -> Path:
    """Saves the state after `step` steps, then drops all but the newest `keep` checkpoints."""
    folder = checkpoint_folder(run) / f"step-{step:06d}"
    state = {
        "step": step,
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "rng": _random_states(),
    }
    if not folder.exists():
        with new_folder(folder) as partial:
            model.save_pretrained(partial)
            torch.save(state, partial / STATE_NAME)
    for old in list_checkpoints(run)[:-keep]:
        shutil.rmtree(old)
    return folder


def load_checkpoint(
    folder: Path,
    model: GIRCSE,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
) -> int:
    """Puts adapter, optimizer, scheduler and random states back; returns the number of steps done.

    Raises:
        ValueError: the checkpoint is damaged or belongs to another model.
    """
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    try:
        weights = load_file(folder / "adapter_model.safetensors")
        state = torch.load(folder / STATE_NAME, map_location="cpu", weights_only=True)
        result: Any = set_peft_model_state_dict(model.base, weights)
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        _restore_random_states(state["rng"])
        step = state["step"]
    except Exception as error:  # whatever a damaged file provokes: unpickling, zip, header and shape errors
        raise ValueError(f"checkpoint {folder} cannot be read: {type(error).__name__}: {error}") from error
    if result.unexpected_keys:
        raise ValueError(f"checkpoint {folder} does not fit the model: unexpected {result.unexpected_keys[0]}")
    return step


def checkpoint_folder(run: Path) -> Path:
    return run / "checkpoints"


def list_checkpoints(run: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(checkpoint_folder(run).glob("step-[0-9]*"), key=lambda path: int(path.name.removeprefix("step-")))


def _random_states() -> dict[str, Any]:
    version, numbers, gauss = random.getstate()
    states = {"torch": torch.get_rng_state(), "python": [version, list(numbers), gauss]}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def _restore_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])
