"""What a run folder remembers, so that what goes on in it is the same run: settings, data, base model.

Data and base are compared by what they hold. Where they lie, how their paths are written, and where the run folder is
now makes no difference.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from gircse.files.atomic import new_file
from gircse.model import GIRCSE
from gircse.train.batches import TrainingData
from gircse.train.config import TrainConfig
from gircse.train.log import LOG_NAME
from gircse.train.ranks import digest_of

CONFIG_NAME = "train_config.json"
DATA_NAME = "train_data.json"
MODEL_NAME = "train_model.json"


def check_settings(run: Path, config: TrainConfig) -> None:
    """Before anything is loaded.

    Raises:
        FileExistsError: the folder holds a run, and `config.resume` is off. FileNotFoundError: it holds none, and it is
            on. ValueError: other settings than the run's.
    """
    if config.resume:
        if not (run / CONFIG_NAME).is_file():
            raise FileNotFoundError(f"resume: {run} holds no run, and so no checkpoint to go on from")
        earlier = TrainConfig.from_json(run / CONFIG_NAME)
        by_content = {"data"} if (run / DATA_NAME).exists() else set()
        if not config.fsdp and _stored_start(run).get("base") is not None:
            by_content |= {"model"} if None in (earlier.adapter, config.adapter) else {"model", "adapter"}
        config.check_continues(earlier, free=by_content)
    elif (run / LOG_NAME).exists():
        raise FileExistsError(f"output: {run} holds a run already; resume it, or name another folder")


def check_data(run: Path, data: TrainingData, total_steps: int) -> None:
    """
    Raises:
        ValueError: other rows than the run's, or fewer steps than it was started with.
    """
    if (run / DATA_NAME).exists():
        data.check_continues(run / DATA_NAME)
    earlier = TrainConfig.from_json(run / CONFIG_NAME).max_steps or data.steps_per_epoch
    if total_steps < earlier:
        raise ValueError(f"max_steps: got {total_steps}, expected at least the {earlier} that the run was started with")


def check_model(run: Path, config: TrainConfig, start: dict[str, str | None]) -> None:
    """
    Raises:
        ValueError: another base or adapter (`start_of`) than the run was started with.
    """
    was = _stored_start(run)
    changed = [name for name, digest in start.items() if None not in (digest, was.get(name)) and digest != was[name]]
    if changed:
        where = config.adapter if changed == ["adapter"] else config.model or config.adapter
        raise ValueError(f"resume: the run was started with another model: {where} has another {', '.join(changed)}")


def start_of(model: GIRCSE, config: TrainConfig) -> dict[str, str | None]:
    """What a run starts from, as digests: of the frozen weights, of the tokenizer's vocabulary, and of a saved adapter
    that goes on training. Weights that are shared out over processes have none."""
    frozen = [p for p in model.parameters() if not p.requires_grad]
    trained = [p for p in model.parameters() if p.requires_grad]
    vocabulary = json.dumps(sorted(model.tokenizer.get_vocab().items())).encode()
    return {
        "base": None if config.fsdp else f"{digest_of(frozen):x}",
        "vocabulary": hashlib.sha256(vocabulary).hexdigest()[:16],
        "adapter": f"{digest_of(trained):x}" if config.adapter is not None else None,
    }


def _stored_start(run: Path) -> dict[str, str | None]:
    """What `write_start` kept of `start_of`; nothing in the folder of an older version."""
    path = run / MODEL_NAME
    if not path.exists():
        return {}
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(stored, dict):
            raise ValueError(f"got {type(stored).__name__}, expected an object")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
    return stored


def write_start(run: Path, config: TrainConfig, data: TrainingData, start: dict[str, str | None]) -> None:
    for name, text in (
        (DATA_NAME, data.to_json()),
        (MODEL_NAME, json.dumps(start, indent=2) + "\n"),
        (CONFIG_NAME, config.to_json()),  # the last one, because it makes the folder a run
    ):
        with new_file(run / name) as partial:
            partial.write_text(text, encoding="utf-8")
