"""Arguments that are to be arrays of numbers, checked."""

from __future__ import annotations

import numpy as np


def real_array(name: str, values: object) -> np.ndarray:
    """`values` as an array of real numbers (float16 and float32 stay, everything else becomes float64).

    Raises:
        TypeError: it is none; names the argument.
    """
    try:
        array = np.asarray(values)
    except (TypeError, ValueError, RuntimeError):  # ragged lists, tensors of another layout or without values
        raise TypeError(f"{name}: got {type(values).__name__}, expected an array of numbers") from None
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{name}: got {type(values).__name__} of dtype {array.dtype}, expected real numbers")
    return array if array.dtype in (np.float16, np.float32) else array.astype(np.float64)
