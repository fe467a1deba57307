"""Factors and schedules of the gradient at the soft token: what is read, what is refused, which step has which."""

from __future__ import annotations

import re

import pytest

from gircse.lm.soft_token_gradient import EXPECTED, SoftTokenGradient


def test_a_constant_factor():
    for value in (0, 1, 0.25):
        schedule = SoftTokenGradient.of(value)
        assert {schedule.at(step, 7) for step in range(7)} == {value}
        assert schedule.largest == value


def test_a_schedule_is_linear_over_its_share_of_the_steps():
    assert [SoftTokenGradient.of("0:1@0.5").at(step, 8) for step in range(8)] == [0, 0.25, 0.5, 0.75, 1, 1, 1, 1]
    assert [SoftTokenGradient.of("1.:.5@1").at(step, 4) for step in range(4)] == [1, 0.875, 0.75, 0.625]
    assert SoftTokenGradient.of("0.3:0@0.01").at(1, 3) == 0  # exactly, so that the steps go by the block
    assert SoftTokenGradient.of("0.3:0@0.5").largest == 0.3


TEXTS = "0 0:1 0:1@ 0:1@0 0:1@1.5 0:2@0.5 -1:1@0.5 a:1@.5 0:1@0.5@1"


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), True, None, *TEXTS.split()])
def test_what_is_no_factor(value):
    with pytest.raises(ValueError, match=re.escape(f"soft_token_gradient: got {value!r}, expected {EXPECTED}")):
        SoftTokenGradient.of(value)
