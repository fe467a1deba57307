from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from gircse.evaluation.instruction_following import (
    Criterion,
    InstructionSet,
    evaluate_instruction_following,
    instruction_table,
    stdlib_instruction_set,
)

COLOURS, SHAPES = ("red", "green", "blue"), ("circle", "square")


def small_set(**options):
    pairs = [(colour, shape) for colour in COLOURS for shape in SHAPES for _ in range(3)]
    texts = [f"{colour} {shape} {n}" for n, (colour, shape) in enumerate(pairs)]
    first = Criterion("colour", "which colour", tuple(colour for colour, _ in pairs))
    second = Criterion("shape", "which shape", tuple(shape for _, shape in pairs))
    return InstructionSet.of(texts, first, second, **options)


class Judge:
    """A model whose embedding has one dimension for each word. `sees(text, instruction)` gives the words it shows."""

    def __init__(self, sees):
        self.sees = sees

    def encode(self, texts, *, instruction, num_steps, return_steps, **options):
        assert return_steps
        vectors = np.array(
            [[float(word in self.sees(text, instruction)) for word in (*COLOURS, *SHAPES)] for text in texts]
        )
        vectors += 1e-9  # a zero vector would have no direction
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return np.repeat(vectors[:, None].astype(np.float32), max(num_steps, 1), axis=1)


def follows(text, instruction):
    colour, shape, _ = text.split()
    return {colour} if "colour" in instruction else {shape}


def test_a_model_that_follows_scores_everything():
    scores = evaluate_instruction_following(Judge(follows), small_set(), steps=[1, 4])
    names = ["colour triplets", "shape triplets", "both", "colour v_measure", "shape v_measure", "score"]
    assert [list(scores), list(scores[4])] == [[1, 4], names]
    assert all(value == pytest.approx(1) for value in scores[4].values())


@pytest.mark.parametrize(
    ("sees", "expected"),
    [
        # ignores the instruction
        (lambda text, _: {text.split()[0]}, {"colour triplets": 1, "colour v_measure": 1, "shape v_measure": 0}),
        # follows the other instruction
        (lambda text, told: follows(text, "shape" if "colour" in told else "colour"), {"colour triplets": 0}),
        # collapsed embeddings are not half right
        (lambda text, _: set(), {"colour triplets": 0}),
    ],
)
def test_a_model_that_does_not_follow_is_never_right_under_both(sees, expected):
    scores = evaluate_instruction_following(Judge(sees), small_set(), steps=[2])[2]
    expected = {"both": 0, "shape triplets": 0, "score": 0} | expected
    assert {name: scores[name] for name in expected} == pytest.approx(expected, abs=1e-6)


def test_triplets_share_one_label_each():
    data = small_set(per_text=2)
    assert len(data.triplets) == 2 * len(data.texts)
    for anchor, one, two in data.triplets:
        assert data.first.labels[anchor] == data.first.labels[one] != data.first.labels[two]
        assert data.second.labels[anchor] == data.second.labels[two] != data.second.labels[one]
    assert small_set() == small_set()
    assert small_set(seed=1).triplets != small_set().triplets


def test_the_local_set_is_balanced():
    data = stdlib_instruction_set()
    cells = Counter(zip(data.first.labels, data.second.labels, strict=True))
    assert len(cells) == 25
    assert len(set(cells.values())) == 1
    assert len(data.texts) >= 75
    assert len(data.triplets) == 4 * len(data.texts)


def test_with_a_model(model):
    scores = evaluate_instruction_following(model, small_set(), steps=[1, 5], max_length=64)
    assert scores[1] != scores[5]
    alone = evaluate_instruction_following(model, small_set(), steps=[5], max_length=64)
    assert alone[5] == pytest.approx(scores[5])
    assert set(evaluate_instruction_following(model, small_set(), steps=[0], max_length=64)) == {0}
    table = instruction_table(scores).splitlines()
    assert [line.split()[0] for line in table] == ["K", "-", "1", "5"]


def test_wrong_data_are_refused():
    one = Criterion("one", "x", ("a", "b"))
    with pytest.raises(ValueError, match="criterion one: got 2 labels, expected 3"):
        InstructionSet.of(["x", "y", "z"], one, one)
    with pytest.raises(ValueError, match="texts: no three of them"):
        InstructionSet.of(["x", "y"], one, one)
    with pytest.raises(ValueError, match="steps: got"):
        evaluate_instruction_following(Judge(follows), small_set(), steps=[0, 1])
