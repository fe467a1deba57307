"""Paired differences and the plateau against textbook values and constructed curves."""

from __future__ import annotations

import numpy as np
import pytest

from gircse.analysis.statistics import paired_difference, plateau


def test_the_plateau_is_the_smallest_k_within_a_standard_error_of_the_best():
    random = np.random.default_rng(0)
    noise = random.normal(0, 0.3, size=200)
    rising = {k: 0.5 + 0.1 * min(k, 5) + noise + random.normal(0, 1e-3, 200) for k in (1, 3, 5, 10, 20)}
    best, enough = plateau(rising)
    assert best >= 5
    assert enough == 5  # noise that all K share does not hide a real difference
    flat = {k: random.normal(0.5, 0.3, 200) for k in (1, 5, 20)}
    assert plateau(flat)[1] in (1, 5)
    assert plateau({3: np.array([1.0])}) == (3, 3)


def test_paired_difference_is_the_textbook_one():
    ours, theirs = np.array([1.0, 0.5, 0.0, 0.5]), np.array([0.5, 0.5, 0.5, 0.0])
    found = paired_difference(ours, theirs)
    assert found["mean"] == pytest.approx(0.125)
    assert found["standard_error"] == pytest.approx(np.std([0.5, 0, -0.5, 0.5], ddof=1) / 2)
