"""What the suite's guard against deprecations sees, and what it leaves alone."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from gircse.lm.token_ids import check_rows
from tests.own_warnings import caused_by_us


@pytest.fixture
def row() -> Any:
    """Of a class of another library, which warns whenever it is asked for its length."""
    namespace: dict[str, Any] = {"__name__": "transformers.rows", "warnings": warnings}
    exec(
        "class Row(list):\n"
        "    kind = FutureWarning\n"
        "    def __len__(self):\n"
        "        warnings.warn('rows are going to have no length', self.kind)\n"
        "        return 1\n",
        namespace,
    )
    return namespace["Row"]([3])


def test_a_deprecation_that_we_cause_is_found_where_we_do(row):
    with caused_by_us() as found, pytest.warns(FutureWarning, match="no length"):
        check_rows([row], 5)
    (line,) = found
    assert line.startswith("token_ids.py:")
    assert line.endswith("FutureWarning: rows are going to have no length")


def test_what_a_test_causes_itself_is_not(row):
    with caused_by_us() as found, pytest.warns(FutureWarning, match="no length"):
        assert len(row) == 1
    assert found == []


def test_what_we_silence_is_not(row):
    with caused_by_us() as found, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_rows([row], 5)
    assert found == []


def test_other_warnings_are_not(row):
    row.kind = UserWarning
    with caused_by_us() as found, pytest.warns(UserWarning, match="no length"):
        check_rows([row], 5)
    assert found == []
