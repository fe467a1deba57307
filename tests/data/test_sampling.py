"""Orders of rows and of sources: pure functions of seed and step, each a permutation, shares by weight."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gircse.data.sampling import BatchSampler, SourceSchedule, draw_number, source_seed

PINNED = ([6, 2, 4, 5], [9, 0, 3, 6])
PINNED_DRAWS = [(1, 8), (1, 9), (0, 4), (1, 10), (1, 11), (0, 5)]


@pytest.mark.parametrize(("rows", "size"), [(10, 3), (8, 4), (5, 5), (1, 1), (1000, 7)])
def test_every_epoch_is_a_permutation_without_its_rest(rows, size):
    sampler = BatchSampler(rows, size, seed=3)
    assert sampler.steps_per_epoch == rows // size
    epochs = []
    for epoch in range(4):
        steps = range(epoch * sampler.steps_per_epoch, (epoch + 1) * sampler.steps_per_epoch)
        drawn = list(itertools.chain.from_iterable(sampler.batch(step) for step in steps))
        assert len(drawn) == len(set(drawn)) == rows // size * size
        assert set(drawn) <= set(range(rows))
        assert {sampler.epoch(step) for step in steps} == {epoch}
        epochs.append(drawn)
    assert rows < 8 or len({tuple(drawn) for drawn in epochs}) == 4


def test_a_batch_depends_on_seed_and_step_alone():
    forward = BatchSampler(50, 8, seed=1)
    batches = [forward.batch(step) for step in range(40)]
    backward = BatchSampler(50, 8, seed=1)
    assert [backward.batch(step) for step in reversed(range(40))] == batches[::-1]
    assert batches != [BatchSampler(50, 8, seed=2).batch(step) for step in range(40)]
    # Runs that were saved by an earlier version or on another machine go on with the same rows.
    assert BatchSampler(10, 4, seed=0).batch(0) == PINNED[0]
    assert BatchSampler(10, 4, seed=7).batch(123) == PINNED[1]


def test_choices_among_positives_and_negatives():
    sampler = BatchSampler(100, 10, seed=5)
    drawn = [sampler.positive(step, 3, 4) for step in range(0, 1000, 10)]
    assert set(drawn) == {0, 1, 2, 3}
    assert all(drawn.count(i) > 10 for i in range(4))
    assert sampler.positive(11, 3, 4) == sampler.positive(19, 3, 4)  # the same epoch
    assert sampler.positive(0, 3, 1) == 0
    assert sorted(sampler.negatives(0, 3, 6, 9)) == list(range(6))
    assert len(set(sampler.negatives(0, 3, 6, 2))) == 2
    assert sampler.negatives(0, 3, 0, 2) == sampler.negatives(0, 3, 5, 0) == []
    assert len({tuple(sampler.negatives(step, 3, 6, 2)) for step in range(0, 1000, 10)}) > 20  # of 30


def test_orders_look_uniform():
    # every row at every place of the epoch about equally often: chi-square with 29 * 29 degrees of freedom
    counts = [[0] * 30 for _ in range(30)]
    sampler = BatchSampler(30, 30, seed=11)
    for step in range(3000):
        for place, row in enumerate(sampler.batch(step)):
            counts[place][row] += 1
    statistic = sum((n - 100) ** 2 / 100 for line in counts for n in line)
    assert abs(statistic - 841) < 5 * (2 * 841) ** 0.5


def test_wrong_arguments():
    for rows, size in ((0, 1), (3, 4), (3, 0)):
        with pytest.raises(ValueError, match=r"batch_size must|a batch needs"):
            BatchSampler(rows, size)
    with pytest.raises(ValueError, match="step must not be negative"):
        BatchSampler(3, 1).batch(-1)
    with pytest.raises(ValueError, match="count must be at least 1"):
        BatchSampler(3, 1).positive(0, 0, 0)
    assert len(BatchSampler(3, 1, seed=-(2**70)).batch(10**15)) == 1


# ---------------------------------------------------------------- SourceSchedule

weights = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(weights, st.integers(1, 40), st.integers(-(2**70), 2**70), st.integers(0, 10**6))
def test_each_period_has_the_shares_rounded_up_or_down(weights, period, seed, first):
    schedule = SourceSchedule(weights, period, seed=seed)
    counts = schedule.counts(first, first + 50)
    shares = period * np.array(weights) / sum(weights)
    assert (counts.sum(axis=1) == period).all()
    assert (counts >= np.floor(shares - 1e-6)).all()
    assert (counts <= np.ceil(shares + 1e-6)).all()


@settings(max_examples=40, deadline=None)
@given(weights, st.integers(1, 20), st.integers(0, 2**64), st.lists(st.integers(0, 500), min_size=1, max_size=8))
def test_a_draw_depends_on_seed_and_number_alone(weights, period, seed, numbers):
    whole = []
    schedule = SourceSchedule(weights, period, seed=seed)
    seen = [0] * len(weights)
    for number in range(max(numbers) + 1):
        source, before = schedule.draw(number)
        assert before == seen[source]  # how often the source was drawn before
        seen[source] += 1
        whole.append((source, before))
    jumping = SourceSchedule(weights, period, seed=seed)
    assert [jumping.draw(number) for number in numbers] == [whole[number] for number in numbers]


def test_shares_are_exact_in_the_long_run():
    weights = [0.003, 1, 2.5, 7]
    counts = SourceSchedule(weights, 10, seed=4).counts(0, 20_000).sum(axis=0)
    np.testing.assert_allclose(counts, 200_000 * np.array(weights) / sum(weights), atol=5)
    assert SourceSchedule([3, 5], 8, seed=1).counts(0, 100).tolist() == [[3, 5]] * 100  # whole shares, every time


def test_the_order_within_a_period_is_shuffled_anew():
    schedule = SourceSchedule([1, 1], 8, seed=0)
    periods = {tuple(schedule.draw(8 * p + i)[0] for i in range(8)) for p in range(30)}
    assert len(periods) > 15  # of 70
    assert [SourceSchedule([1, 2], 6, seed=7).draw(n) for n in range(12, 18)] == PINNED_DRAWS


def test_far_draws_are_found_at_once():
    schedule = SourceSchedule([1, 2, 3], 7, seed=0)
    far = schedule.draw(7 * 10**6)
    assert far[1] == pytest.approx(7 * 10**6 * (1 + far[0]) / 6, abs=10)
    assert schedule.draw(3) == SourceSchedule([1, 2, 3], 7, seed=0).draw(3)


@pytest.mark.parametrize("weights", [[], [0.0], [1, -1], [float("inf")], [float("nan")]])
def test_wrong_weights(weights):
    with pytest.raises(ValueError, match="weights must be numbers > 0"):
        SourceSchedule(weights, 3)


def test_wrong_numbers():
    with pytest.raises(ValueError, match="period must be"):
        SourceSchedule([1], 0)
    with pytest.raises(ValueError, match="number must not be negative"):
        SourceSchedule([1], 1).draw(-1)


def test_numbers_of_a_range_come_equally_often():
    drawn = [draw_number(3, 10, seed=5, step=step) for step in range(8000)]
    counts = np.bincount(drawn, minlength=11)
    assert counts[:3].sum() == 0
    assert ((counts[3:] - 1000) ** 2 / 1000).sum() < 7 + 5 * 14**0.5  # chi-square with 7 degrees of freedom
    assert drawn[:6] == [draw_number(3, 10, seed=5, step=step) for step in range(6)]
    assert {draw_number(4, 4, seed=step, step=step) for step in range(20)} == {4}


def test_sources_have_orders_of_their_own():
    assert source_seed(9, 0) == 9
    assert len({source_seed(seed, source) for seed in range(5) for source in range(5)}) == 25
