"""Which base model an adapter was trained on: `gircse_base.json` beside a saved adapter.

A name does not say: the folder of that name may hold another model by now, or lie somewhere else. So a few numbers of
the base's own matrices are kept, and compared when the adapter is loaded. They are compared as bfloat16 is rounded:
the same model in another dtype is the same model, one that was fine-tuned is not.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gircse.lm.merged_adapter import adapted_layers

BASE_NAME = "gircse_base.json"
_MATRICES = 32
_NUMBERS = 8
_ROUNDING = 2.0**-7  # twice what rounding to bfloat16 on both sides explains
_SMALLEST = 1e-7  # float16 has nothing between it and 0


def write_base(model: nn.Module, folder: Path) -> None:
    """Writes what is needed to know `model`, the base with its adapter on it, again."""
    matrices = {name: matrix for name, matrix in _base_matrices(model).items() if not matrix.requires_grad}
    names = sorted(matrices)[:: max(1, len(matrices) // _MATRICES)]
    content = {
        "model_type": getattr(getattr(model, "config", None), "model_type", None),
        "matrices": {
            name: {"shape": list(matrices[name].shape), "numbers": _numbers(matrices[name])} for name in names
        },
    }
    (folder / BASE_NAME).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def check_base(base: nn.Module, name: str | Path, adapter: str | Path) -> None:
    """
    Raises:
        ValueError: `base`, which was loaded from `name`, is not what the folder `adapter` was saved from.
    """
    path = Path(adapter) / BASE_NAME
    if not path.is_file():  # an adapter that another program, or an older version, has saved
        return
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        matrices = _base_matrices(base)
        others = [key for key, known in saved["matrices"].items() if key in matrices and _other(matrices[key], known)]
        kinds = saved["model_type"], getattr(getattr(base, "config", None), "model_type", None)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"adapter: {path} cannot be read: {type(error).__name__}: {error}") from None
    if kinds[0] != kinds[1] or others:
        what = f"{others[0]} holds other numbers" if others else f"its model_type is {kinds[1]!r}, not {kinds[0]!r}"
        raise ValueError(
            f"adapter: {adapter} was trained on another model than the one that {name} is now: {what}; give the right "
            f"one, from_pretrained(base, adapter={str(adapter)!r}), or delete {BASE_NAME} there to go on with this one"
        )


def _base_matrices(model: nn.Module) -> dict[str, Tensor]:
    """The matrices of the base that no adapter is folded into, under the names they have without an adapter."""
    merged = {id(p) for layer in adapted_layers(model) if layer.merged for p in layer.get_base_layer().parameters()}
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        plain = type(parameter) is nn.Parameter and parameter.is_floating_point() and not parameter.is_meta
        if not plain or parameter.dim() < 2 or id(parameter) in merged:
            continue
        if any(part in name for part in (".lora_", ".modules_to_save.", ".token_adapter.")):
            continue
        found[name.replace(".base_layer.", ".").replace(".original_module.", ".")] = parameter
    return found


def _numbers(matrix: Tensor) -> list[float]:
    flat = matrix.detach().reshape(-1)
    # whole numbers: a device's float32 linspace would choose other places of a large matrix
    places = [i * (flat.numel() - 1) // (_NUMBERS - 1) for i in range(_NUMBERS)]
    return flat[torch.tensor(places, device=flat.device)].double().tolist()


def _other(matrix: Tensor, known: dict[str, Any]) -> bool:
    if list(matrix.shape) != known["shape"]:  # a table that was resized for the training
        return False
    pairs = zip(_numbers(matrix), known["numbers"], strict=True)
    return any(not abs(a - b) <= _ROUNDING * max(abs(a), abs(b)) + _SMALLEST for a, b in pairs)
