"""What a run folder remembers, so that what goes on in it is the same run: settings, data, base model.

Data and models are compared by what they hold: they and the run folder may have moved.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from gircse.files.atomic import new_file
from gircse.model import GIRCSE
from gircse.train.batches import TrainingData
from gircse.train.ranks import digest_of
from gircse.train.run_config import RunConfig

Digests = Mapping[str, str | None]


def check_settings(config: RunConfig) -> None:
    """Checks the run folder before anything is loaded.

    Raises:
        FileExistsError: the folder holds a run of any command, and `config.resume` is off.
        FileNotFoundError: the folder holds no run, and `config.resume` is on.
        ValueError: the run was started with other settings.
    """
    if config.resume:
        if not config.path("config.json").is_file():
            raise FileNotFoundError(f"resume: {config.output} holds no run, and so no checkpoint to go on from")
        config.check_continues(earlier_config(config))
    elif any(Path(config.output).glob("*_log.jsonl")):  # a run of another command has its checkpoints there, too
        raise FileExistsError(f"output: {config.output} holds a run already; resume it, or name another folder")


def earlier_config(config: RunConfig) -> RunConfig:
    """The settings that the run in `config.output` was last started with."""
    return type(config).from_json(config.path("config.json"))


def check_data(config: RunConfig, data: TrainingData, total_steps: int) -> None:
    """Checks that a resumed run has the rows of the run that it continues, and at least as many steps.

    Raises:
        ValueError: other rows, or fewer steps.
    """
    data.check_continues(config.path("data.json"))
    earlier = earlier_config(config).max_steps or data.steps_per_epoch
    if total_steps < earlier:
        raise ValueError(f"max_steps: got {total_steps}, expected at least the {earlier} that the run was started with")


def check_model(config: RunConfig, digests: Digests, places: Mapping[str, str | None]) -> None:
    """Checks that a resumed run starts from the models of the run that it continues.

    Args:
        digests: what the run starts from now: {"base", "vocabulary", ..: digest, or None where there is none}.
        places: the folder or hub name that each of them was read from, for the message.

    Raises:
        ValueError: another model than the run was started with, or a damaged file.
    """
    path = config.path("model.json")
    try:
        then = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name, digest in digests.items() if digest != then[name]]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read: {error!r}") from None
    if changed:
        raise ValueError(
            f"resume: the run was started with another model: {places[changed[0]]} has another {', '.join(changed)}"
        )


def digest_of_vocabulary(model: GIRCSE) -> str:
    vocabulary = json.dumps(sorted(model.tokenizer.get_vocab().items())).encode()
    return hashlib.sha256(vocabulary).hexdigest()[:16]


def digest_of_weights(weights: Iterable[Tensor]) -> str:
    """`digest_of` in hexadecimal, as JSON holds it."""
    return f"{digest_of(weights):x}"


def write_start(config: RunConfig, data: TrainingData, digests: Digests) -> None:
    for name, text in (
        ("data.json", data.to_json()),
        ("model.json", json.dumps(digests, indent=2) + "\n"),
        ("config.json", config.to_json()),  # the last one, because it makes the folder a run
    ):
        with new_file(config.path(name)) as partial:
            partial.write_text(text, encoding="utf-8")
