"""Batches as plain integers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gircse.engine.config import EngineConfig, Limits
from gircse.engine.schedule import MIN_PREFIX, by_length, common_prefix, next_batch

lengths_of_texts = st.lists(st.integers(1, 300), min_size=1, max_size=80)


DEFAULTS = {"rows": 16, "prefill_tokens": 256, "kv_tokens": 4096, "slot_multiple": 16, "row_buckets": False}


def limits(**overrides):
    return Limits(**DEFAULTS | overrides)


@given(
    lengths_of_texts,
    st.integers(1, 20),
    st.integers(1, 400),
    st.integers(1, 6000),
    st.booleans(),
    st.integers(0, 40),
)
def test_every_row_is_in_one_batch_within_the_limits(lengths, rows, prefill_tokens, kv_tokens, buckets, num_steps):
    bound = limits(rows=rows, prefill_tokens=prefill_tokens, kv_tokens=kv_tokens, row_buckets=buckets)
    order, seen = by_length(lengths), []
    while len(seen) < len(order):
        batch = next_batch(order[len(seen) :], lengths, bound, num_steps)
        seen += batch.rows
        assert 1 <= len(batch.rows) <= max(1, rows)
        assert batch.buffer_rows >= len(batch.rows)
        assert len(batch.rows) == 1 or batch.buffer_rows * batch.slots <= kv_tokens
        assert all(lengths[row] + num_steps <= batch.slots for row in batch.rows)
        covered = [row for start, stop in batch.prefills for row in range(start, stop)]
        assert covered == list(range(len(batch.rows)))
        for start, stop in batch.prefills:
            assert stop - start == 1 or (stop - start) * lengths[batch.rows[start]] <= prefill_tokens
    assert sorted(seen) == list(range(len(lengths)))
    assert [lengths[row] for row in seen] == sorted(lengths, reverse=True)


@given(lengths_of_texts)
def test_batches_do_not_depend_on_the_number_of_steps(lengths):
    order = by_length(lengths)
    assert next_batch(order, lengths, limits(), 1) == next_batch(order, lengths, limits(), 32)


def test_several_prefills_join_one_decode_batch():
    batch = next_batch(list(range(8)), [100] * 8, limits(), 5)
    assert len(batch.rows) == 8
    assert batch.prefills == [(0, 2), (2, 4), (4, 6), (6, 8)]


def test_a_shared_prefix_does_not_count_in_a_prefill():
    batch = next_batch(list(range(8)), [100] * 8, limits(), 5, prefix=36)
    assert batch.prefills == [(0, 4), (4, 8)]


def test_without_steps_a_batch_is_one_prefill():
    assert len(next_batch(list(range(8)), [100] * 8, limits(), 0).rows) == 2


def test_row_buckets_are_powers_of_two_that_fit():
    assert next_batch(list(range(5)), [10] * 5, limits(row_buckets=True), 5).buffer_rows == 8
    # 5 rows fit but their bucket of 8 does not
    batch = next_batch(list(range(5)), [10] * 5, limits(row_buckets=True, kv_tokens=5 * 48), 5)
    assert (len(batch.rows), batch.buffer_rows) == (4, 4)


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=2, max_size=6), st.integers(0, 9))
def test_common_prefix_is_the_longest_that_leaves_a_token(rows, shared):
    rows = [[7] * shared + row for row in rows]
    found = common_prefix(rows)
    longest = max(n for n in range(min(map(len, rows))) if all(row[:n] == rows[0][:n] for row in rows))
    assert found == (longest if longest >= MIN_PREFIX else 0)


def test_one_row_has_no_prefix_in_common():
    assert common_prefix([[1, 2, 3, 4, 5, 6, 7]]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capture": "yes"}, "capture: got 'yes', expected one of"),
        ({"decode_attention": "eager"}, "decode_attention: got 'eager', expected one of"),
        ({"compile": 1}, "compile: got 1, expected True or False"),
        ({"max_rows": 0}, "max_rows: got 0, expected an integer >= 1"),
        ({"kv_bytes": 2.5}, "kv_bytes: got 2.5"),
        ({"prefill_tokens": True}, "prefill_tokens: got True"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        EngineConfig(**options)
