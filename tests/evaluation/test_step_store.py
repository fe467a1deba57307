from __future__ import annotations

import numpy as np
import pytest

from gircse.evaluation import step_store
from gircse.evaluation.step_store import StepStore, check_steps

K, D = 7, 5


def vectors(text, columns=K):
    return np.random.default_rng(list(text.encode())).standard_normal((columns, D)).astype(np.float32)


class Encoder:
    def __init__(self):
        self.asked = []

    def __call__(self, texts):
        self.asked.append(texts)
        return map(vectors, texts)


@pytest.mark.parametrize("buffer", [1, 4 * K * D * 3, 2**20])  # a text, three texts, all texts at a time
def test_every_text_is_encoded_once_and_read_at_each_step(tmp_path, monkeypatch, buffer):
    monkeypatch.setattr(step_store, "_BUFFER", buffer)
    encode = Encoder()
    texts = [f"text {i % 10}" for i in range(23)]
    with StepStore([7, 1, 3], tmp_path) as store:
        for step in (1, 3, 7):
            got = store.embeddings(texts, step, encode)
            np.testing.assert_array_equal(got, [vectors(text)[step - 1] for text in texts])
        got = store.embeddings(["text 3", "new", "text 0"], 3, encode)
        np.testing.assert_array_equal(got, [vectors(text)[2] for text in ("text 3", "new", "text 0")])
        assert encode.asked == [[f"text {i}" for i in range(10)], ["new"]]
        assert store.encoded == 11
        assert sum(path.stat().st_size for path in tmp_path.rglob("*.f32")) == 11 * 3 * D * 4
        store.clear()
        assert not list(tmp_path.rglob("*.f32"))
        store.embeddings(["new"], 1, encode)
        assert encode.asked[-1] == ["new"]
    assert list(tmp_path.iterdir()) == []


def test_neighbours_are_mapped_and_stay_as_they_are(tmp_path):
    texts, encode = [f"text {i}" for i in range(9)], Encoder()
    with StepStore([2], tmp_path) as store:
        whole = store.embeddings(texts, 2, encode)
        part = store.embeddings(texts[3:7], 2, encode)
        assert all(isinstance(array.base, np.memmap) for array in (whole, part))
        np.testing.assert_array_equal(store.embeddings(texts[::-1], 2, encode), whole[::-1])
        part[:] = 0
        np.testing.assert_array_equal(whole, store.embeddings(texts, 2, encode))
        store.clear()
        store.embeddings(["other"], 2, encode)
    np.testing.assert_array_equal(whole, [vectors(text)[1] for text in texts])


def test_the_key_tells_equal_texts_apart(tmp_path):
    encode = Encoder()
    with StepStore([2], tmp_path) as store:
        for key in (None, "", "a", "1 a"):
            store.embeddings(["text"], 2, encode, key=key)
            store.embeddings(["text"], 2, encode, key=key)
    assert len(encode.asked) == 4


def test_without_steps(tmp_path):
    with StepStore([0], tmp_path) as store:
        got = store.embeddings(["a", "b"], 0, lambda texts: (vectors(text, 1) for text in texts))
        np.testing.assert_array_equal(got, [vectors("a", 1)[0], vectors("b", 1)[0]])
        assert store.embeddings([], 0, Encoder()).shape == (0, D)


def test_a_pass_that_fails_leaves_nothing_half_done(tmp_path, monkeypatch):
    monkeypatch.setattr(step_store, "_BUFFER", 1)

    def failing(texts):
        yield vectors(texts[0])
        raise RuntimeError("out of memory")

    with StepStore([1, 7], tmp_path) as store:
        with pytest.raises(RuntimeError, match="out of memory"):
            store.embeddings(["a", "b"], 7, failing)
        with pytest.raises(ValueError, match="got 1 embeddings, expected 2"):
            store.embeddings(["c", "d"], 7, lambda texts: [vectors(texts[0])])
        encode = Encoder()
        got = store.embeddings(["b", "a", "c"], 7, encode)
        np.testing.assert_array_equal(got, [vectors(text)[6] for text in "bac"])
        assert encode.asked == [["b"]]


@pytest.mark.parametrize("steps", [[], [-1], [0, 5]])
def test_steps_are_checked(steps, tmp_path):
    with pytest.raises(ValueError, match="steps: got "):
        check_steps(steps)
    assert check_steps([5, 1, 5]) == (1, 5)
    with (
        StepStore([1, 5], tmp_path) as store,
        pytest.raises(ValueError, match=r"step: got 2, expected one of \(1, 5\)"),
    ):
        store.embeddings(["a"], 2, Encoder())
