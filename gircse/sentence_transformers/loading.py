"""`gircse.load`: any folder that `GIRCSE.from_pretrained` reads, as a `SentenceTransformer`."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router
from sentence_transformers.util import import_module_class, load_file_path

from gircse.lm.device import to_device
from gircse.model import GIRCSE
from gircse.sentence_transformers.modeling_gircse import LENGTH_CONFIG
from gircse.sentence_transformers.module import GIRCSEModule


def load(
    name_or_path: str | Path,
    *,
    adapter: str | Path | None = None,
    num_steps: int | None = None,
    instruction: str | None = None,
    prompts: dict[str, str] | None = None,
    default_prompt_name: str | None = None,
    similarity_fn_name: str | None = None,
    truncate_dim: int | None = None,
    max_seq_length: int | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
    merge_adapter: bool = False,
    is_trainable: bool = False,
) -> SentenceTransformer:
    """Loads a causal LM, a LoRA folder, or a folder that `GIRCSE` or a `SentenceTransformer` of ours has saved, as a
    `SentenceTransformer` on the generation engine. The folder's own modelling file is not run.

    Args:
        name_or_path: a folder or a hub name.
        adapter, num_steps, dtype, device, trust_remote_code, merge_adapter: as for `GIRCSE.from_pretrained`.
        is_trainable: the adapter goes on training; otherwise it is frozen, and our losses refuse to train it. Without
            an adapter all weights can be trained either way.
        instruction: what queries are for: the model's "query" prompt, so that `encode_query(texts)` is
            `GIRCSE.encode(texts, instruction=instruction)`. Documents stay bare.
        prompts: sentence-transformers prompts (prefixes) by name; they go before the saved ones. See
            `GIRCSEModule.format_prompt`.
        default_prompt_name, similarity_fn_name, truncate_dim: as for `SentenceTransformer`; default: the saved ones.
        max_seq_length: tokens of a text, its prompt included; default: the saved limit, else the two that the model was
            trained with, for texts with and without a prompt, else 512.

    Raises:
        FileNotFoundError: a folder or a base named by an adapter does not exist.
        ValueError: bad arguments, or a sentence-transformers folder of another kind of model.
        gircse.UnsupportedModelError: the architecture fails a probe.
    """
    if is_trainable and merge_adapter:
        raise ValueError(
            "is_trainable: got True with merge_adapter=True, expected one of them: training needs it apart"
        )
    name = str(name_or_path)
    entries = _modules(name)
    kind = entries[0]["type"].rsplit(".", 1)[-1] if entries else "GIRCSEModule"
    if kind == "GIRCSEModule":
        model = GIRCSE.from_pretrained(
            name_or_path,
            adapter=adapter,
            num_steps=num_steps,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            is_trainable=is_trainable,
        )
        first: Any = GIRCSEModule(model, **(_saved(name, LENGTH_CONFIG) or {}))
    elif kind == "Router" and adapter is None:
        first = _router(name, entries[0]["path"], dtype, trust_remote_code, is_trainable).to(to_device(device))
    else:
        raise ValueError(
            f"name_or_path: {name} is a sentence-transformers model that starts with {entries[0]['type']}, expected a "
            "GIRCSEModule; load it with SentenceTransformer, or name its causal LM"
        )
    ours = [module for module in first.modules() if isinstance(module, GIRCSEModule)]
    for module in ours:
        if num_steps is not None:
            module.num_steps = num_steps
        if merge_adapter:
            module.model.merge_adapter()
    if max_seq_length is not None:
        first.max_seq_length = max_seq_length
    if instruction is not None:
        prompts = {"query": ours[0].format_prompt(instruction), **(prompts or {})}
    config = _saved(name, "config_sentence_transformers.json") or {}
    settings: dict[str, Any] = {
        "prompts": {**config.get("prompts", {}), **(prompts or {})},
        "default_prompt_name": default_prompt_name or config.get("default_prompt_name"),
        "similarity_fn_name": similarity_fn_name or config.get("similarity_fn_name"),
        "truncate_dim": truncate_dim or config.get("truncate_dim"),
    }
    modules = [first, *(_module(entry, name, trust_remote_code) for entry in entries[1:])]
    return SentenceTransformer(modules=modules, device=str(ours[0].model.device), **settings)


def _router(name: str, subfolder: str, dtype: str | torch.dtype, trust_remote_code: bool, is_trainable: bool) -> Any:
    """A `Router` with our modules on its routes, where there are modules of the saved modelling file.

    Raises:
        ValueError: there are none.
    """
    types = (_saved(name, (Path(subfolder) / Router.config_file_name).as_posix()) or {}).get("types", {})
    loader: Any = SimpleNamespace(load=partial(GIRCSEModule.load, is_trainable=is_trainable))
    ours = {kind: loader for kind in types.values() if kind.rsplit(".", 1)[-1] == "GIRCSEModule"}
    if not ours:
        raise ValueError(f"name_or_path: {name} starts with a Router, expected a GIRCSEModule on one of its routes")
    return Router.load(
        name,
        subfolder=subfolder,
        module_classes=ours,
        trust_remote_code=trust_remote_code,
        model_kwargs={"dtype": dtype},
    )


def _saved(name: str, filename: str) -> Any:
    """What a JSON file of the folder or repository holds, an object, or None where there is none."""
    return _json(name, filename, dict)


def _json(name: str, filename: str, kind: type) -> Any:
    found = load_file_path(name, filename)
    if found is None:
        return None
    try:
        value = json.loads(Path(found).read_text(encoding="utf-8"))
        if not isinstance(value, kind):
            raise ValueError(f"got {type(value).__name__}, expected {kind.__name__}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"name_or_path: {name}/{filename} cannot be read: {error}") from None
    return value


def _modules(name: str) -> list[dict[str, str]]:
    """The entries of modules.json, whose paths stay inside the folder."""
    entries = _json(name, "modules.json", list) or []
    for entry in entries:
        whole = isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in ("type", "path"))
        if not whole or Path(entry["path"]).is_absolute() or ".." in Path(entry["path"]).parts:
            raise ValueError(f"name_or_path: {name}/modules.json: got {entry!r}, expected a type and a path inside")
    return entries


def _module(entry: dict[str, str], name: str, trust_remote_code: bool) -> Any:
    """A module that follows the first one."""
    found: Any = import_module_class(entry["type"], model_name_or_path=name, trust_remote_code=trust_remote_code)
    return found.load(name, subfolder=entry["path"])
