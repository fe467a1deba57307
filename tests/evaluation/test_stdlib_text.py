from __future__ import annotations

from collections import Counter

import pytest

from gircse.evaluation.stdlib_text import ACTIONS, AREAS, _action, balanced_grid, draw, function_texts


def test_texts_of_every_area_and_action():
    texts = function_texts()
    assert len(texts) > 1000
    assert len({text.summary for text in texts}) == len(texts)
    assert set(Counter(text.area for text in texts)) == set(AREAS)
    assert min(Counter(text.area for text in texts).values()) >= 50
    assert {text.action for text in texts} == {*ACTIONS, None}


@pytest.mark.parametrize(
    ("summary", "action"),
    [
        ("Return True if the lock is held.", "check a condition"),
        ("Returns whether the number is infinite", "check a condition"),
        ("Return a new module object", "create something"),
        ("Returns the name of the file", "give back a value"),
        ("Queries the server for its name", "give back a value"),
        ("Copies a tree", "read or write something"),
        ("Parses the header", "convert something"),
        ("Settle the debt", None),
        ("The name of the file", None),
    ],
)
def test_the_first_words_name_the_action(summary, action):
    assert _action(summary) == action


def test_a_grid_is_balanced_and_mixed():
    areas, actions = ["e-mail", "text formats"], ["give back a value", "convert something", "create something"]
    texts = balanced_grid(areas, actions)
    cells = Counter((text.area, text.action) for text in texts)
    assert len(cells) == 6
    assert len(set(cells.values())) == 1
    assert texts == balanced_grid(areas, actions)
    assert texts != sorted(texts, key=lambda text: text.area)
    with pytest.raises(ValueError, match="expected 3 or more"):
        balanced_grid(["e-mail"], ["none such"])


def test_draw_depends_on_the_items_only():
    items = [f"item {n}" for n in range(50)]
    assert draw(items, 5, seed=1) == draw(reversed(items), 5, seed=1) != draw(items, 5, seed=2)
