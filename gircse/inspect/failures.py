"""The three ways in which soft tokens fail, told from their numbers: thresholds, wording, what to do.

Every threshold of `gircse inspect` and `gircse analyze` is defined here, once (docs/inspecting.md says where each comes
from). They tell the clear cases: a text without a warning is not thereby good, measure it (`gircse analyze`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# A soft token is near-one-hot when its top token has this probability: the model then reads the embedding of that one
# word with a tenth of anything else mixed in, and K steps are greedy decoding (Wu et al. 2025, arXiv 2508.03440).
ONE_HOT_PROBABILITY = 0.9
# Movement is 1 - cos(z_k, z_{k-1}). Below this, twice in a row, `encode(num_steps="auto")` stops a text (its default
# tolerance; held by a test). Steps that all together move z_1 by less have gained nothing.
SETTLED = 1e-3
# A step is redundant when its hidden state is that of the step before: 1 - cos(g_k, g_{k-1}) below this. On the states
# and not on z, whose running mean settles whatever the steps say. Hidden states lie in a narrow cone, so it must be
# small: a briefly trained SmolLM2 still gained nDCG where it was 5e-3, and no more where it was below 1e-3.
SAME_STATE = 1e-3
# Share of a text's steps that must show a sign before it counts for the text (and of texts before it counts for data).
SHARE = 0.5


@dataclass(frozen=True)
class Finding:
    """A sign of failure.

    Attributes:
        signature: "near-one-hot", "no-gain" or "redundant".
        title, message: what it is, and the numbers that show it.
        advice: what to do.
    """

    signature: str
    title: str
    message: str
    advice: str


def diagnose(
    max_probability: Sequence[float], state_cosine: Sequence[float], cosine_to_first: Sequence[float]
) -> list[Finding]:
    """The signs of failure of one text.

    Args:
        max_probability: of each of the K soft tokens.
        state_cosine: between g_k and g_{k-1}, for each k; the first entry (to the prompt's state) is not looked at.
        cosine_to_first: between z_k and z_1, for each k.

    Raises:
        ValueError: no step, or sequences of different lengths.
    """
    steps = len(max_probability)
    if not steps or len(state_cosine) != steps or len(cosine_to_first) != steps:
        raise ValueError(
            f"max_probability, state_cosine, cosine_to_first: got {steps}, {len(state_cosine)} and "
            f"{len(cosine_to_first)} steps, expected the same number >= 1"
        )
    found = (
        _near_one_hot(max_probability),
        _no_gain(cosine_to_first),
        _redundant(state_cosine),
    )
    return [finding for finding in found if finding is not None]


def is_near_one_hot(max_probability: Any) -> Any:
    """Elementwise on a number or an array."""
    return max_probability >= ONE_HOT_PROBABILITY


def is_redundant(state_cosine: Any) -> Any:
    """Elementwise on a number or an array; the prompt's own state is no step."""
    return 1 - state_cosine < SAME_STATE


def _near_one_hot(max_probability: Sequence[float]) -> Finding | None:
    count, steps = sum(map(is_near_one_hot, max_probability)), len(max_probability)
    return near_one_hot(f"{count} of {steps} soft tokens are") if count >= SHARE * steps else None


def near_one_hot(which_are: str) -> Finding:
    """`which_are`: "3 of 5 soft tokens are"."""
    return Finding(
        "near-one-hot",
        "Near-one-hot soft tokens",
        f"{which_are} one word with probability {ONE_HOT_PROBABILITY} or more: hardly a mixture.",
        "Raise the logit temperature (`temperature` in gircse_config.json, `--temperature` in training), and lower the "
        "learning rate if they become so during training.",
    )


def _no_gain(cosine_to_first: Sequence[float]) -> Finding | None:
    steps, moved = len(cosine_to_first), 1 - cosine_to_first[-1]
    if steps < 2 or moved >= SETTLED:
        return None
    return no_gain(f"All {steps} steps together moved the embedding by {moved:.1e} from where step 1 had put it.")


def no_gain(message: str) -> Finding:
    return Finding(
        "no-gain",
        "No gain from more steps",
        message,
        "Encode with num_steps=1: the same for less. In training, keep the loss on every step (`stepwise`) and its "
        "penalty (`reg_weight` 1), and compare with an encoder-only model (`gircse analyze --baseline`).",
    )


def _redundant(state_cosine: Sequence[float]) -> Finding | None:
    later = state_cosine[1:]
    same = [k for k, cosine in enumerate(later, start=2) if is_redundant(cosine)]
    if len(same) < 2 or len(same) < SHARE * len(later):
        return None
    first = next((k for k in same if all(is_redundant(c) for c in state_cosine[k - 1 :])), None)
    since = f" From step {first} on all do." if first is not None else ""
    return redundant(f"{len(same)} of {len(later)} later steps repeat the state of the step before.{since}")


def redundant(message: str) -> Finding:
    return Finding(
        "redundant",
        "Redundant steps",
        message,
        'Use fewer steps, or num_steps="auto", which stops each text by itself. If quality should still grow with K, '
        "train with a larger K or another pooling.",
    )
