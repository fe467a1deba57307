"""Checkpoints of a run: a loadable GIRCSE folder, and what the loop needs to go on bitwise.

    RUN/checkpoints/step-000100/    adapter, tokenizer, gircse_config.json (GIRCSE.from_pretrained reads it)
                                    training_state.pt: step, optimizer
                                    checksums.json: SHA-256 of that file and of the adapter's
    RUN/failed/step-000123/         the same of the state before a step that went wrong, and batch.json

A checkpoint is written aside, synced, and renamed into place, and renamed away before it is deleted, so a folder named
step-* is always whole. It holds no state of a schedule or a random generator: batch and learning rate are functions of
the step, and every step seeds its own random numbers (`gircse.train.ranks.step_seed`).
"""

from __future__ import annotations

import errno
import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gircse.files.atomic import new_folder, remove_folder
from gircse.files.digest import sha256_of_file

if TYPE_CHECKING:
    from gircse.model import GIRCSE

STATE_NAME = "training_state.pt"
WEIGHTS_NAME = "adapter_model.safetensors"
SUMS_NAME = "checksums.json"
_SUMMED = (WEIGHTS_NAME, STATE_NAME)
_SPARE_BYTES = 16 << 20  # for the tokenizer, the configs and what the file system needs itself


def save_checkpoint(run: Path, step: int, model: GIRCSE, optimizer: torch.optim.Optimizer, *, keep: int) -> Path:
    """Saves the state after `step` steps, then drops all but the newest `keep` checkpoints.

    Raises:
        OSError: the checkpoint could not be written (no space left, ..); the earlier ones are untouched.
    """
    folder = checkpoint_folder(run) / f"step-{step:06d}"
    if not folder.exists():
        _write(folder, step, model, optimizer)
    for old in list_checkpoints(run)[:-keep]:
        remove_folder(old)
    return folder


def save_failure(run: Path, step: int, model: GIRCSE, optimizer: torch.optim.Optimizer, batch: dict[str, Any]) -> Path:
    """Saves the state before the failed step `step` (from 1) and `batch`, as JSON, beside the checkpoints."""
    folder = run / "failed" / f"step-{step:06d}"
    if not folder.exists():
        _write(folder, step - 1, model, optimizer, batch)
    return folder


def load_checkpoint(folder: Path, model: GIRCSE, optimizer: torch.optim.Optimizer) -> int:
    """Restores adapter and optimizer; returns the number of steps that were done.

    Raises:
        ValueError: the checkpoint is damaged or belongs to another model.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    try:
        _check_sums(folder)
        weights = load_file(folder / WEIGHTS_NAME)
        state = torch.load(folder / STATE_NAME, map_location="cpu", weights_only=True)
        if odd := sorted(set(weights) ^ set(get_peft_model_state_dict(model.base))):
            raise ValueError(f"its adapter is another one: {len(odd)} weights differ by name, for example {odd[0]}")
        step = state["step"]
        if not isinstance(step, int) or folder.name != f"step-{step:06d}":
            raise ValueError(f"it holds step {step!r}")
        set_peft_model_state_dict(model.base, weights)
        for kept, own in zip(state["optimizer"]["param_groups"], optimizer.param_groups, strict=True):
            kept["fused"] = own["fused"]  # how it is computed is this version's choice, not the checkpoint's
        optimizer.load_state_dict(state["optimizer"])
        _check_shapes(optimizer)
    except Exception as error:  # a damaged file raises errors of many kinds: unpickling, zip, header, shapes
        raise ValueError(f"checkpoint {folder} cannot be read: {type(error).__name__}: {error}") from error
    return step


def _check_sums(folder: Path) -> None:
    """Finds a flipped bit among the numbers, which no reader of the files would. Older checkpoints have no sums."""
    path = folder / SUMS_NAME
    if not path.exists():
        return
    for name, expected in json.loads(path.read_text(encoding="utf-8")).items():
        if name in _SUMMED and sha256_of_file(folder / name) != expected:
            raise ValueError(f"{name} is not as it was written")


def _check_shapes(optimizer: torch.optim.Optimizer) -> None:
    for parameter, kept in optimizer.state.items():
        for name, value in kept.items():
            if isinstance(value, torch.Tensor) and value.dim() and value.shape != parameter.shape:
                raise ValueError(f"{name} of the optimizer has shape {list(value.shape)}, not {list(parameter.shape)}")


def checkpoint_folder(run: Path) -> Path:
    return run / "checkpoints"


def list_checkpoints(run: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    folders = [path for path in checkpoint_folder(run).glob("step-*") if re.fullmatch("step-[0-9]+", path.name)]
    return sorted(folders, key=lambda path: int(path.name.removeprefix("step-")))


def _write(
    folder: Path, step: int, model: GIRCSE, optimizer: torch.optim.Optimizer, batch: dict[str, Any] | None = None
) -> None:
    state = {"step": step, "optimizer": optimizer.state_dict()}
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _check_space(folder.parent, model, optimizer)
        with new_folder(folder) as partial:
            model.save_pretrained(partial)
            torch.save(state, partial / STATE_NAME)
            sums = {name: sha256_of_file(partial / name) for name in _SUMMED}
            (partial / SUMS_NAME).write_text(json.dumps(sums, indent=2) + "\n", encoding="utf-8")
            if batch is not None:
                (partial / "batch.json").write_text(json.dumps(batch, indent=2) + "\n", encoding="utf-8")
    except Exception as error:  # an OSError, or what the writers of PyTorch and safetensors raise in its place
        number = error.errno if isinstance(error, OSError) else None
        kept = ", ".join(path.name for path in list_checkpoints(folder.parents[1])) or "none yet"
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        text = f"{folder} could not be written: {reason}; checkpoints that are whole: {kept}"
        raise OSError(number or errno.EIO, text) from error


def _check_space(folder: Path, model: GIRCSE, optimizer: torch.optim.Optimizer) -> None:
    """Raises OSError, before anything is written, where adapter and optimizer state would not fit."""
    tensors: list[torch.Tensor] = [p for p in model.parameters() if p.requires_grad]
    tensors += [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    needed = sum(t.numel() * t.element_size() for t in tensors) + _SPARE_BYTES
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"no space left: {needed / 2**20:,.0f} MiB needed, {free / 2**20:,.0f} MiB free")
