"""A GIRCSE model to a folder from which `gircse.lm.load` makes the same one again."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from gircse.files.atomic import into_folder
from gircse.lm.base_fingerprint import BASE_NAME, write_base
from gircse.lm.config import CONFIG_NAME, GircseConfig
from gircse.lm.load import ADAPTER_CONFIG
from gircse.lm.merged_adapter import adapted_layers

_OF_AN_ADAPTER = (ADAPTER_CONFIG, "adapter_model.safetensors", "adapter_model.bin", BASE_NAME)


def save_pretrained(path: str | Path, *, base: Any, lm: Any, tokenizer: Any, config: GircseConfig) -> None:
    """See `GIRCSE.save_pretrained`.

    Args:
        base: the model as the user gave it, with PEFT's wrapper where there is one.
        lm: the transformers model below it.
    """
    name = active_adapter(lm)
    with into_folder(Path(path)) as folder:
        try:
            if name is None:
                _save_whole(lm, folder)
            else:
                _save_adapter(base, lm, name, folder)
                _name_base(folder, Path(path))
                write_base(lm, folder)
        except SafetensorError as error:  # its writer's own class, also for a disk that is full
            raise OSError(errno.EIO, f"{path} could not be written: {error}") from error
        tokenizer.save_pretrained(folder)
        (folder / CONFIG_NAME).write_text(config.to_json(), encoding="utf-8")
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card says nothing
    if name is None:  # an adapter that was saved there before would be loaded in its place
        for stale in _OF_AN_ADAPTER:
            (Path(path) / stale).unlink(missing_ok=True)


def active_adapter(lm: Any) -> str | None:
    """The name of the adapter that is at work in a transformers model; None where there is none any more.

    Raises:
        ValueError: several are at work, or there are some and none is.
    """
    configs, layers = getattr(lm, "peft_config", None), adapted_layers(lm)
    if not configs or not layers:
        return None
    active = sorted({name for layer in layers for name in layer.active_adapters if name in configs})
    if len(active) != 1:
        raise ValueError(
            f"base: got {len(active)} active adapters of {', '.join(map(repr, configs))}, expected one to save: "
            "set_adapter(name) of the PEFT model chooses it, add_weighted_adapter makes one of several"
        )
    return active[0]


def _save_adapter(base: Any, lm: Any, name: str, folder: Path) -> None:
    """The adapter `name` at the root of the folder, where every loader looks; loaded again it is called "default"."""
    if hasattr(base, "get_base_model"):
        base.save_pretrained(folder, selected_adapters=[name])
        if (folder / name).is_dir() and name != "default":
            for file in (folder / name).iterdir():
                shutil.move(file, folder / file.name)
            (folder / name).rmdir()
        return
    if base is not lm:
        raise ValueError(
            f"base: got a {type(base).__name__}, expected a PeftModel: PEFT has no files for mixed adapters; "
            "merge them first (merge_and_unload)"
        )
    loaded = lm._hf_peft_config_loaded
    lm._hf_peft_config_loaded = True  # as after add_adapter, whoever put the layers in
    try:
        lm.save_pretrained(folder)
    finally:
        lm._hf_peft_config_loaded = loaded


def _save_whole(lm: Any, folder: Path) -> None:
    """All weights, under the names they have without an adapter: the layers of deleted ones may still be there."""
    state = {
        key.replace(".base_layer.", ".").replace(".original_module.", "."): tensor
        for key, tensor in lm.state_dict().items()
    }
    loaded = lm._hf_peft_config_loaded
    lm._hf_peft_config_loaded = False
    try:
        lm.save_pretrained(folder, state_dict=state)
    finally:
        lm._hf_peft_config_loaded = loaded


def _name_base(folder: Path, path: Path) -> None:
    """Writes a base that is a folder here in a way that resolves from elsewhere: absolute, or, where it lies inside the
    saved folder and moves with it, relative to that."""
    file = folder / ADAPTER_CONFIG
    config = json.loads(file.read_text(encoding="utf-8"))
    base = config.get("base_model_name_or_path")
    if not base or not Path(base).is_dir():  # a hub's name, or a base that was built in memory
        return
    base, path = Path(base).resolve(), path.resolve()
    if base == path:
        raise ValueError(f"path: {path} is the base model's own folder, expected another one for the adapter")
    inside = path in base.parents
    config["base_model_name_or_path"] = f"./{base.relative_to(path).as_posix()}" if inside else str(base)
    file.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
