"""Saves a GIRCSE model to a folder from which `gircse.lm.load` makes the same model again."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from gircse.files.atomic import into_folder
from gircse.lm.adapter import active_adapter
from gircse.lm.base_fingerprint import BASE_NAME, write_base
from gircse.lm.config import CONFIG_NAME, GircseConfig
from gircse.lm.load import ADAPTER_CONFIG

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
        except SafetensorError as error:  # safetensors raises it for a full disk, too
            raise OSError(errno.EIO, f"{path} could not be written: {error}") from error
        tokenizer.save_pretrained(folder)
        (folder / CONFIG_NAME).write_text(config.to_json(), encoding="utf-8")
        (folder / "README.md").unlink(missing_ok=True)  # PEFT writes an empty model card
    if name is None:  # otherwise an adapter that was saved there before would be loaded instead
        for stale in _OF_AN_ADAPTER:
            (Path(path) / stale).unlink(missing_ok=True)


def _save_adapter(base: Any, lm: Any, name: str, folder: Path) -> None:
    """Saves the adapter `name` at the root of the folder, where every loader looks. Loaded again it is "default"."""
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
    lm._hf_peft_config_loaded = True  # as after add_adapter, also where PEFT put the layers in
    try:
        lm.save_pretrained(folder)
    finally:
        lm._hf_peft_config_loaded = loaded


def _save_whole(lm: Any, folder: Path) -> None:
    """Saves all weights under the names that they have without an adapter. The layers of a deleted one may remain."""
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
    """Makes the path of a base folder independent of the working directory: absolute, or relative to the saved folder
    where the base lies inside it and moves with it."""
    file = folder / ADAPTER_CONFIG
    config = json.loads(file.read_text(encoding="utf-8"))
    base = config.get("base_model_name_or_path")
    if not base or not Path(base).is_dir():  # a hub name, or a base that was built in memory
        return
    base, path = Path(base).resolve(), path.resolve()
    if base == path:
        raise ValueError(f"path: {path} is the base model's own folder, expected another one for the adapter")
    inside = path in base.parents
    config["base_model_name_or_path"] = f"./{base.relative_to(path).as_posix()}" if inside else str(base)
    file.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
