"""Labels beside lines that lie close together."""

from __future__ import annotations

import itertools

import pytest

from bench.plots import _ABOVE, _LABEL_HEIGHT, stacked


def test_labels_stand_above_their_points():
    assert stacked([100.0, 0.0, 50.0]) == [100.0 + _ABOVE, _ABOVE, 50.0 + _ABOVE]
    assert stacked([]) == []


@pytest.mark.parametrize(
    "heights", [[10.0, 12.0], [12.0, 10.0, 11.0], [5.0, 5.0, 5.0, 5.0], [0.0, 15.0, 30.0, 45.0], [0.0, 15.0, 200.0]]
)
def test_near_labels_are_stacked_in_the_order_of_their_points(heights):
    labels = stacked(heights)
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    for low, high in itertools.pairwise(order):
        assert labels[high] >= labels[low] + _LABEL_HEIGHT
        # nor does a label lie on the point above its own
        assert labels[low] >= heights[high] + _ABOVE or labels[low] + _LABEL_HEIGHT <= heights[high]
