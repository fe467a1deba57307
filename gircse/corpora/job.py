"""What is to be encoded, by which model and how: plain values, which can be sent to another process or written down."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gircse.files.digest import sha256_of_folder

OUTPUT_DTYPES = ("float32", "float16", "int8")
ON_ERROR = ("raise", "null")
WINDOW = 2048  # rows that are encoded at once; more gain nothing, however unlike their lengths are
ROWS_PER_TASK = 4096
# Files of a model's folder that decide what it computes. Logs and notes may change.
_LOADED = (".json", ".safetensors", ".bin", ".model", ".txt", ".jinja", ".py")


@dataclass(frozen=True)
class EncodeJob:
    """Columns of texts that become columns of embeddings.

    Args:
        model: a folder or hub name, for `GIRCSE.from_pretrained`.
        adapter: a LoRA folder or hub name to put on it.
        columns: column of texts -> column of its embeddings.
        instruction: one for all columns, or column of texts -> instruction.
        num_steps: K, or "auto"; default: the model's own.
        return_steps: write the embeddings after 1, 2, .., K steps.
        load: further arguments of `GIRCSE.from_pretrained`, such as `dtype` and `device`.
        encode: further arguments of `GIRCSE.encode`, such as `max_length` and `truncate_dim`.
        output_dtype: "float32", "float16" or "int8". int8 adds a column `<output>_scale`, float32: an embedding is its
            integers times its scale (for each step one).
        on_error: "raise", or "null": a row that cannot be encoded has a null embedding and a reason in
            `<output>_error`.

    Raises:
        ValueError: an argument is none of these.
    """

    model: str
    adapter: str | None = None
    columns: Mapping[str, str] = field(default_factory=lambda: {"text": "embedding"})
    instruction: str | Mapping[str, str | None] | None = None
    num_steps: int | str | None = None
    return_steps: bool = False
    load: Mapping[str, Any] = field(default_factory=dict)
    encode: Mapping[str, Any] = field(default_factory=dict)
    output_dtype: str = "float32"
    on_error: str = "raise"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("output_dtype", self.output_dtype, OUTPUT_DTYPES),
            ("on_error", self.on_error, ON_ERROR),
        ):
            if value not in known:
                raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(known)}")
        if not self.columns:
            raise ValueError("columns: got none, expected at least one column of texts")
        if isinstance(self.instruction, Mapping) and (unknown := self.instruction.keys() - self.columns.keys()):
            raise ValueError(f"instruction: got one for {min(unknown)!r}, expected columns of {list(self.columns)}")
        outputs = [name for column in self.columns for name in self.outputs(column)]
        if doubled := {name for name in outputs if outputs.count(name) > 1}:
            raise ValueError(f"columns: got {min(doubled)!r} as a result twice, expected different names")

    def instruction_of(self, column: str) -> str | None:
        return self.instruction.get(column) if isinstance(self.instruction, Mapping) else self.instruction

    def outputs(self, column: str) -> tuple[str, ...]:
        """The columns that are made of a column of texts."""
        name = self.columns[column]
        scale = (f"{name}_scale",) if self.output_dtype == "int8" else ()
        return (name, *scale, *((f"{name}_error",) if self.on_error == "null" else ()))

    def check_columns(self, there: Sequence[str]) -> None:
        """
        Raises:
            ValueError: a column of texts is missing or there twice, or one of the results is there already.
        """
        for column in self.columns:
            if column not in there:
                raise ValueError(f"column: got {column!r}, expected one of {', '.join(there)}")
            if list(there).count(column) > 1:
                raise ValueError(f"column: got {column!r}, which is the name of several columns, expected one")
            for name in self.outputs(column):
                if name in there:
                    raise ValueError(f"column: the input has a column {name!r} already, expected another name for it")

    def settings(self) -> dict[str, Any]:
        """All that decides the result, as JSON values. A folder is named by its whole path, so that it is the same from
        wherever the command is started, and by a digest of its files, because its weights may be trained on."""
        values = asdict(self)
        for name in ("model", "adapter"):
            if values[name] and (folder := Path(values[name])).is_dir():
                values |= {name: str(folder.resolve()), f"{name}_sha256": sha256_of_folder(folder, _LOADED)}
        # what does not change the result
        values["load"] = {k: str(v) for k, v in sorted(self.load.items()) if k != "device" and v is not None}
        values["encode"] = {k: v for k, v in sorted(self.encode.items()) if k != "batch_size" and v is not None}
        return values


def output_columns(column: str | Sequence[str] | Mapping[str, str]) -> dict[str, str]:
    """One column gives "embedding", several give "<column>_embedding" each; a mapping names them."""
    if isinstance(column, Mapping):
        return dict(column)
    if isinstance(column, str):
        return {column: "embedding"}
    return {name: f"{name}_embedding" for name in column}


def path_of(model: str | os.PathLike[str]) -> str:
    """A model on a disk by its whole path: an actor works in another folder."""
    return str(Path(model).resolve()) if Path(model).is_dir() else os.fspath(model)
