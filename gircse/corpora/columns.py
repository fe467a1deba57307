"""Arrow columns of texts to strings, and embeddings to Arrow columns."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

_ARROW_DTYPES = {"float32": pa.float32(), "float16": pa.float16(), "int8": pa.int8()}


def texts_of(name: str, column: pa.ChunkedArray) -> tuple[list[str | None], dict[int, str]]:
    """The texts, None where there is none, and the reason for each that is no UTF-8, by its row.

    Raises:
        TypeError: the column does not hold strings.
    """
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    strings = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    if not any(is_kind(kind) for is_kind in strings):
        raise TypeError(f"{name}: got a column of {column.type}, expected strings")
    if kind != column.type:
        column = column.cast(kind)
    try:
        return column.to_pylist(), {}
    except UnicodeDecodeError:  # Arrow and Parquet do not look at the bytes of a string
        texts = [_decoded(value) for value in column.cast(pa.large_binary()).to_pylist()]
        reasons = {row: f"not UTF-8, at byte {text}" for row, text in enumerate(texts) if isinstance(text, int)}
        return [None if isinstance(text, int) else text for text in texts], reasons


def _decoded(value: bytes | None) -> str | int | None:
    """The text, or the place of the first byte that is no UTF-8."""
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError as error:
        return error.start


def check_values(values: np.ndarray, dtype: str) -> None:
    """
    Raises:
        ValueError: values that `dtype`, one of `OUTPUT_DTYPES`, cannot hold.
    """
    if dtype == "float16" and (np.isfinite(values) & (np.abs(values) > np.finfo(np.float16).max)).any():
        raise ValueError(
            f"output_dtype: got float16 for values up to {np.nanmax(np.abs(values)):g}, expected float32 or int8"
        )
    if dtype == "int8" and not np.isfinite(values).all():
        raise ValueError("output_dtype: got int8 for values that are not finite, expected float32")


def embedding_column(values: np.ndarray, missing: np.ndarray, dtype: str) -> tuple[pa.Array, pa.Array | None]:
    """Embeddings as lists of fixed size, which every reader of Parquet understands, and for int8 their scales.

    Args:
        values: float32 [n, D] or [n, K, D], which `check_values` has seen.
        missing: bool [n]; these rows are null.
        dtype: one of `OUTPUT_DTYPES`.

    Returns:
        `fixed_size_list<dtype>[D]`, or `fixed_size_list<fixed_size_list<dtype>[D]>[K]`; and None, or the scales:
        float32, or `fixed_size_list<float>[K]`. Values are `integers * scale`, the largest becomes 127.
    """
    scales = None
    if dtype == "int8":
        factors = np.abs(values).max(axis=-1, initial=0).astype(np.float32) / np.float32(127)
        values = np.rint(values / np.where(factors > 0, factors, 1)[..., None])
        scales = _lists(factors, missing, pa.float32())
    return _lists(values, missing, _ARROW_DTYPES[dtype]), scales


def _lists(values: np.ndarray, missing: np.ndarray, dtype: pa.DataType) -> pa.Array:
    mask = pa.array(missing) if missing.any() else None
    flat = np.ascontiguousarray(values.reshape(-1), dtype=dtype.to_pandas_dtype())
    if values.ndim == 1:
        return pa.array(flat, dtype, mask=missing)
    array = pa.array(flat, dtype)
    for size in reversed(values.shape[2:]):
        array = pa.FixedSizeListArray.from_arrays(array, size)
    return pa.FixedSizeListArray.from_arrays(array, values.shape[1], mask=mask)
