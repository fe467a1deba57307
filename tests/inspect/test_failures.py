"""Each sign of failure fires on numbers made to show it, and on no healthy ones."""

from __future__ import annotations

import inspect

import numpy as np
import pytest

from gircse import GIRCSE
from gircse.inspect.failures import ONE_HOT_PROBABILITY, SAME_STATE, SETTLED, diagnose

# SmolLM2-135M-Instruct on a sentence, K = 5: spread distributions, states that differ, an embedding that moves
HEALTHY = {
    "max_probability": [0.73, 0.27, 0.12, 0.66, 0.11],
    "state_cosine": [0.73, 0.73, 0.93, 0.80, 0.90],
    "cosine_to_first": [1.0, 0.93, 0.91, 0.89, 0.88],
}


def signs(**changed):
    return [finding.signature for finding in diagnose(**{**HEALTHY, **changed})]


def test_healthy_numbers_give_no_warning():
    assert signs() == []


@pytest.mark.parametrize(
    ("changed", "sign"),
    [
        ({"max_probability": [0.99, 0.97, 0.95, 0.2, 0.1]}, "near-one-hot"),
        ({"cosine_to_first": [1.0, 0.9999, 0.9998, 0.9997, 0.9995]}, "no-gain"),
        ({"state_cosine": [0.7, 0.8, 0.9995, 0.9999, 0.99999]}, "redundant"),
    ],
)
def test_each_sign_fires_alone_and_says_what_to_do(changed, sign):
    assert signs(**changed) == [sign]
    (finding,) = diagnose(**{**HEALTHY, **changed})
    assert finding.title
    assert finding.message
    assert len(finding.advice) > 40


@pytest.mark.parametrize(
    "changed",
    [
        {"max_probability": [0.99, 0.97, 0.5, 0.5, 0.5]},  # two of five are fewer than half
        {"max_probability": [ONE_HOT_PROBABILITY - 1e-6] * 5},
        {"cosine_to_first": [1.0, 1.0, 1.0, 1.0, 1 - 1.01 * SETTLED]},
        {
            "state_cosine": [0.9999, 0.8, 0.9, 0.9, 0.9999]
        },  # one step that repeats is chance; the first entry is no step
        {"state_cosine": [0.7] + [1 - 1.01 * SAME_STATE] * 4},
    ],
)
def test_numbers_just_short_of_a_sign_are_healthy(changed):
    assert signs(**changed) == []


def test_a_redundant_tail_is_named_by_its_first_step():
    (finding,) = diagnose(**{**HEALTHY, "state_cosine": [0.7, 0.9999, 0.8, 0.9999, 0.9999]})
    assert "3 of 4" in finding.message
    assert "From step 4 on" in finding.message


def test_steps_that_still_gain_quality_are_healthy():
    """The means of a briefly trained SmolLM2-135M-Instruct at K = 5, where nDCG@10 grew from 0.50 to 0.59 (docs)."""
    states = [0.94, 0.9932, 0.9909, 0.9951, 0.9974]
    assert signs(state_cosine=states, cosine_to_first=[1.0, 0.998, 0.996, 0.994, 0.992]) == []


def test_one_step_has_nothing_to_gain_and_nothing_to_repeat():
    assert diagnose([0.3], [0.9999], [1.0]) == []
    assert [f.signature for f in diagnose([0.95], [0.9999], [1.0])] == ["near-one-hot"]


def test_independent_states_never_look_settled_or_redundant():
    """The best case, states with nothing in common: z still moves by about 1 / 2k at step k, so at K = 100 as well."""
    states = np.random.default_rng(0).normal(size=(100, 512))
    pooled = states.cumsum(0) / np.arange(1, 101)[:, None]
    unit = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
    plain = states / np.linalg.norm(states, axis=1, keepdims=True)
    cosine = np.r_[0.0, (plain[1:] * plain[:-1]).sum(1)]
    assert diagnose([0.3] * 100, cosine.tolist(), (unit @ unit[0]).tolist()) == []


def test_the_threshold_of_movement_is_the_default_of_auto():
    assert inspect.signature(GIRCSE.encode).parameters["tolerance"].default == SETTLED


@pytest.mark.parametrize("arguments", [([], [], []), ([0.1], [0.1, 0.2], [0.1])])
def test_lengths_must_agree(arguments):
    with pytest.raises(ValueError, match="expected the same number >= 1"):
        diagnose(*arguments)
