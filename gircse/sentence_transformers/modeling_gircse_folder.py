"""The folder of a GIRCSE model: loading the causal LM with its adapter, naming its base, the model card and the code.

The file is saved beside `modeling_gircse.py`.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformerModelCardData
from transformers import AutoModelForCausalLM

CODE = ("modeling_gircse.py", "modeling_gircse_encode.py", "modeling_gircse_folder.py", "modeling_gircse_math.py")


class ModelCard(SentenceTransformerModelCardData):
    """The model card. Its usage example has the lines that load this model."""

    def generate_usage_snippet(self) -> str:
        snippet = super().generate_usage_snippet()
        stock = re.search(r"^model = SentenceTransformer\((.*)\)$", snippet, flags=re.MULTILINE)
        if stock is None:
            return snippet
        ours = (
            f"model = SentenceTransformer({stock[1]}, trust_remote_code=True)  # runs the repository's {CODE[0]}\n"
            f"# With the gircse package the same embeddings come faster, and no code of the repository is run:\n"
            f"# model = gircse.load({stock[1]})"
        )
        return snippet.replace(stock[0], ours)


def load_causal_lm(name: str, options: dict[str, Any]) -> Any:
    """
    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: the checkpoint lacks weights, which transformers would draw at random.
    """
    if (Path(name).is_absolute() or name.startswith(".")) and not Path(name).is_dir():
        raise FileNotFoundError(f"base model: {name} does not exist or is not a folder")
    loaded: Any = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **options)
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{name} lacks {len(missing)} weights of {type(model).__name__}, for example {missing[0]}")
    return model


def put_adapter_on(model: Any, folder: str) -> Any:
    """Loads the adapter as peft does, and returns the transformers model with its layers in it.

    Raises:
        ValueError: the adapter has no layers in the model, lacks weights, or has weights without a layer.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from peft.utils import load_peft_weights

    with warnings.catch_warnings():  # PEFT reads a name that transformers has replaced
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        wrapped = PeftModel.from_pretrained(model, folder)
    kind = wrapped.active_peft_config
    if kind.is_prompt_learning:
        raise ValueError(f"{folder}: got an adapter of type {kind.peft_type.value}, expected layers in the decoder")
    expected, stored = set(get_peft_model_state_dict(wrapped)), set(load_peft_weights(folder, device="cpu"))
    missing, unexpected = sorted(expected - stored), sorted(stored - expected)
    if missing or unexpected:
        raise ValueError(
            f"{folder}: the adapter does not fit {type(model).__name__}: {len(missing)} weights missing, "
            f"{len(unexpected)} unexpected, for example {(missing + unexpected)[0]}"
        )
    return without_wrapper(wrapped)


def without_wrapper(model: Any) -> Any:
    """The transformers model inside a `PeftModel`, in the state that its own `add_adapter` leaves, so that its adapter
    methods, state dict and checkpoints work as if it had added the adapter."""
    inner = model.get_base_model()
    inner.peft_config = model.peft_config
    inner._hf_peft_config_loaded = True
    return inner


def save_code(output_path: str) -> None:
    """Writes the modelling files beside the weights. Where these are one route of a `Router`, sentence-transformers
    looks for the code in the folder of the whole model, so it is written there too."""
    folder, whole = Path(output_path), "config_sentence_transformers.json"
    folders = [folder]
    if not (folder / whole).is_file() and (folder.resolve().parent / whole).is_file():
        folders.append(folder.resolve().parent)
    for name in CODE:
        code = Path(__file__).with_name(name).read_bytes()
        for target in folders:
            (target / name).write_bytes(code)


def name_base_model(lm: Any, output_path: str) -> None:
    """Makes sure that a saved adapter names its base model.

    Raises:
        ValueError: the base model was built in memory, or would be overwritten.
    """
    for config in getattr(lm, "peft_config", {}).values():
        name = config.base_model_name_or_path or lm.name_or_path
        if name and Path(name).is_dir():
            name = str(Path(name).resolve())  # the folder may be loaded from another working directory
        config.base_model_name_or_path = name
        if not name:
            raise ValueError(
                "base model: it was built in memory and has no name or path, so the saved adapter could not be loaded "
                "again. Save the base by itself before the adapter is added and load it from there, or set its "
                "name_or_path to a folder that holds it"
            )
        if Path(name) == Path(output_path).resolve():
            raise ValueError(
                f"path: {output_path} is the base model's own folder, expected another one for the adapter"
            )
