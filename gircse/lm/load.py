"""From a name or folder to a base model, tokenizer and config. The way back is `gircse.lm.save`.

A folder is a causal LM, a PEFT LoRA adapter (its config names the base), or one of these with our `gircse_config.json`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from gircse.lm.attention import ATTENTION_NAME
from gircse.lm.base_fingerprint import check_base
from gircse.lm.config import GircseConfig
from gircse.lm.device import to_device
from gircse.lm.quiet import quiet_peft

ADAPTER_CONFIG = "adapter_config.json"


def load_pretrained(
    name_or_path: str | Path,
    *,
    adapter: str | Path | None,
    dtype: str | torch.dtype,
    device: str | torch.device | None,
    attn_implementation: str | None,
    trust_remote_code: bool,
    quantization: str | None = None,
    is_trainable: bool = False,
) -> tuple[Any, PreTrainedTokenizerBase, GircseConfig]:
    """See `GIRCSE.from_pretrained`: -> base (with the adapter on it), tokenizer, config.

    quantization: see `gircse.lm.quantized_base`.
    """
    if attn_implementation not in (None, ATTENTION_NAME):
        raise ValueError(
            f"attn_implementation: got {attn_implementation!r}, expected None or {ATTENTION_NAME!r}: the rollout keeps "
            "its own keys and values and needs its own attention function (SDPA underneath)"
        )
    dtype = _dtype(dtype)
    device = to_device(device)
    base_name, adapter = _base_and_adapter(name_or_path, adapter)
    _check_exists("adapter", adapter)
    _check_exists("name_or_path", base_name)
    if Path(base_name).is_dir():
        base_name = Path(base_name).resolve()  # what is saved later names it, wherever that happens

    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code, "low_cpu_mem_usage": True}
    if quantization is not None:
        from gircse.lm.quantized_base import quantization_config

        compute = torch.bfloat16 if isinstance(dtype, str) else dtype
        # quantised weights are made on their device, and cannot be moved there
        options |= {"quantization_config": quantization_config(quantization, compute), "device_map": {"": device}}
    base = _load_base(base_name, options)
    if quantization is None:
        base = base.to(device)
    if adapter is not None:
        check_base(base, base_name, adapter)
        base = with_adapter(base, adapter, is_trainable=is_trainable)
    config = (adapter is not None and GircseConfig.load(adapter)) or GircseConfig.load(base_name) or GircseConfig()
    return base, load_tokenizer(base_name, adapter, trust_remote_code), config


def _load_base(name: str | Path, options: dict[str, Any]) -> Any:
    with _readable("name_or_path", name):
        loaded: Any = AutoModelForCausalLM.from_pretrained(str(name), output_loading_info=True, **options)
    base, found = loaded
    if missing := sorted(found["missing_keys"]):  # transformers draws them at random, and goes on
        raise ValueError(
            f"name_or_path: {name} lacks {len(missing)} weights of {type(base).__name__}, for example {missing[0]}"
        )
    return base


@contextmanager
def _readable(argument: str, name: str | Path) -> Iterator[None]:
    """Whatever damaged files provoke inside (JSON, headers, zip, unpickling, shapes) as one error that names them."""
    try:
        yield
    except (ImportError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if isinstance(error, (OSError, ValueError)) and str(name) in str(error):
            raise
        raise ValueError(f"{argument}: {name} cannot be loaded: {type(error).__name__}: {error}") from error


def load_tokenizer(
    base_name: str | Path, adapter: str | Path | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The adapter's tokenizer if its folder holds one, else the base's; padding is the end-of-sequence token if unset.

    Raises:
        ValueError: one that cannot be read, or that has neither a padding nor an end-of-sequence token.
    """
    own = adapter is not None and (Path(adapter) / "tokenizer_config.json").is_file()
    name = str(adapter if own else base_name)
    with _readable("adapter" if own else "name_or_path", name):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ValueError(f"the tokenizer of {name} has neither a padding nor an end-of-sequence token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _base_and_adapter(name_or_path: str | Path, adapter: str | Path | None) -> tuple[str | Path, str | Path | None]:
    """A folder (or hub repository) with an adapter_config.json is an adapter, and names its base."""
    if not _is_adapter(name_or_path):
        return name_or_path, adapter
    if adapter is not None:
        raise ValueError(
            f"name_or_path: {name_or_path} is an adapter itself, expected a base model beside adapter={adapter}"
        )
    from peft import PeftConfig

    with _readable("name_or_path", name_or_path):
        base = PeftConfig.from_pretrained(str(name_or_path)).base_model_name_or_path
    if not isinstance(base, str) or not base:
        raise ValueError(
            f"name_or_path: {name_or_path}/{ADAPTER_CONFIG} names no base model; "
            f"load it with from_pretrained(base, adapter={str(name_or_path)!r})"
        )
    if base.startswith(".") and (Path(name_or_path) / base).is_dir():  # it lies inside the adapter's folder
        base = str(Path(name_or_path) / base)
    if (Path(base).is_absolute() or base.startswith(".")) and not Path(base).is_dir():
        raise FileNotFoundError(
            f"name_or_path: the base model of {name_or_path} is {base}, which does not exist here; "
            f"load it with from_pretrained(base, adapter={str(name_or_path)!r})"
        )
    return base, name_or_path


def _is_adapter(name_or_path: str | Path) -> bool:
    if Path(name_or_path).is_dir():
        return (Path(name_or_path) / ADAPTER_CONFIG).is_file()
    if is_local(name_or_path):
        raise FileNotFoundError(f"name_or_path: {name_or_path} does not exist")
    from transformers.utils import cached_file

    found = cached_file(
        str(name_or_path),
        ADAPTER_CONFIG,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return found is not None


def is_local(name: str | Path) -> bool:
    """Whether a name can only mean a folder: a Path, or more or other than the hub's `owner/name`."""
    return isinstance(name, Path) or str(name).startswith((".", "/", "~")) or str(name).count("/") > 1


def _check_exists(argument: str, name: str | Path | None) -> None:
    if name is not None and is_local(name) and not Path(name).is_dir():
        raise FileNotFoundError(f"{argument}: {name} does not exist or is not a folder")


def with_adapter(base: Any, adapter: str | Path, *, is_trainable: bool) -> Any:
    """Puts the adapter on the base, frozen or to be trained, and refuses one whose weights do not all find their
    place."""
    from peft import PeftModel, get_peft_model_state_dict

    with _readable("adapter", adapter):
        stored = _stored_shapes(adapter)
        _resize(base, stored or {})
        try:
            with quiet_peft():
                model = PeftModel.from_pretrained(base, str(adapter), is_trainable=is_trainable)
        except (RuntimeError, ValueError, KeyError) as error:
            raise ValueError(f"adapter: {adapter} does not fit {type(base).__name__}: {error}") from error
    if stored is not None:
        expected = set(get_peft_model_state_dict(model))
        missing, unexpected = sorted(expected - set(stored)), sorted(set(stored) - expected)
        if missing or unexpected:
            raise ValueError(
                f"adapter: {adapter} does not fit {type(base).__name__}: {len(missing)} weights missing, "
                f"{len(unexpected)} unexpected, for example {(missing + unexpected)[0]}"
            )
    return model


def _resize(base: Any, stored: dict[str, list[int]]) -> None:
    """A table of another size, which PEFT saves with the adapter, was resized for the training."""
    table = base.get_input_embeddings().weight
    name = next((name for name, parameter in base.named_parameters() if parameter is table), None)
    shape = stored.get(f"base_model.model.{name}")
    if shape is not None and shape[0] != len(table):
        base.resize_token_embeddings(shape[0], mean_resizing=False)


def _stored_shapes(adapter: str | Path) -> dict[str, list[int]] | None:
    path = Path(adapter) / "adapter_model.safetensors"
    if not path.is_file():  # a hub name, or the older .bin layout, which PEFT reads by itself
        return None
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118


def _dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    found = getattr(torch, str(dtype).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype: got {dtype!r}, expected 'auto', 'float32', 'bfloat16' or 'float16'")
    return found
