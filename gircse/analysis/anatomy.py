"""What soft tokens are made of, step by step: entropy, tail, movement of state and embedding, over many texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gircse.inspect.failures import ONE_HOT_PROBABILITY, SAME_STATE, is_near_one_hot, is_redundant
from gircse.inspect.soft_tokens import TAIL_TOKENS, TextInspection

if TYPE_CHECKING:
    from gircse.model import GIRCSE

QUANTILES = (0.1, 0.5, 0.9)
_COLUMNS = ("entropy", "max_probability", "tail_mass", "state_cosine")


def anatomy(
    model: GIRCSE, groups: Sequence[tuple[Sequence[str], str | None]], num_steps: int, *, max_length: int | None = None
) -> dict[str, Any]:
    """Statistics over texts for each of `num_steps` soft tokens.

    Args:
        groups: (texts, their instruction).
        num_steps: K >= 1.

    Returns:
        {"texts", "tail_tokens", "entropy", "max_probability", "tail_mass", "state_cosine": each {"mean": [K],
        "quantiles": {"0.1": [K], ..}}, "near_one_hot_share": of all soft tokens, "redundant_share": of all steps
        from the second on, None for K = 1, and their thresholds}.
    """
    inspections: list[TextInspection] = []
    for texts, instruction in groups:
        if texts:
            inspections += model.inspect(
                list(texts), instruction=instruction, num_steps=num_steps, top_n=1, max_length=max_length
            )
    table = {
        name: np.array([[getattr(step, name) for step in inspection.steps] for inspection in inspections])
        for name in _COLUMNS
    }
    later = table["state_cosine"][:, 1:]
    return {
        "texts": len(inspections),
        "tail_tokens": TAIL_TOKENS,
        "one_hot_probability": ONE_HOT_PROBABILITY,
        "same_state": SAME_STATE,
        **{
            name: {
                "mean": values.mean(0).tolist(),
                "quantiles": {str(q): np.quantile(values, q, axis=0).tolist() for q in QUANTILES},
            }
            for name, values in table.items()
        },
        "near_one_hot_share": float(is_near_one_hot(table["max_probability"]).mean()),
        "redundant_share": float(is_redundant(later).mean()) if later.size else None,
    }
