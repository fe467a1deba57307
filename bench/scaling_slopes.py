"""Predicted and measured slopes of a curve, and whether they agree.

A prediction is a curve, not only a slope: the floor of the job at every size (seconds), or a count of what must be
held at once (bytes). It is never fitted to the measurements. Both curves get one number, the slope of a straight line
through (log size, log value) by least squares; a constant factor between them, such as how far an implementation is
from its floor, does not change it, while a factor that grows with the size does. "1" is proportional to the size, "0"
does not depend on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

# How far the measured slope may be from the predicted one. Over a range of 16 times the size, 0.15 is a factor of 1.5
# between the ends; bytes are counted, not timed, so they are held to less.
TOLERANCES = {"time": 0.15, "memory": 0.10}
_KEYS = {"time": ("floor_seconds", "seconds"), "memory": ("predicted_bytes", "peak_extra_bytes")}


def log_slope(sizes: Sequence[float], values: Sequence[float]) -> float | None:
    """d log(value) / d log(size) by least squares; None where a value is not positive or there is one size only."""
    if len(set(sizes)) < 2 or min(values) <= 0:
        return None
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def judge(what: str, points: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The verdict on the "time" or the "memory" of a curve's points.

    Returns:
        predicted_slope, measured_slope, tolerance; ok: whether they are within it (what has no slope is not ok);
        over_prediction: least and largest measured value over the predicted one.
    """
    predicted, measured = ([point[key] for point in points] for key in _KEYS[what])
    sizes = [point["size"] for point in points]
    slopes = log_slope(sizes, predicted), log_slope(sizes, measured)
    ratios = [m / p for m, p in zip(measured, predicted, strict=True)] if min(predicted, default=0) > 0 else []
    tolerance = TOLERANCES[what]
    return {
        "predicted_slope": slopes[0],
        "measured_slope": slopes[1],
        "tolerance": tolerance,
        "ok": slopes[0] is not None and slopes[1] is not None and abs(slopes[0] - slopes[1]) <= tolerance,
        "over_prediction": [min(ratios), max(ratios)] if ratios else None,
    }
