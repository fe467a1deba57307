"""Tables in, tables out: what every framework calls, and two of these frameworks."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pyarrow as pa
import pytest

from gircse.corpora import EncodeJob, TextEncoder
from gircse.corpora.columns import texts_of
from gircse.corpora.job import output_columns

TEXTS = ["red", "a longer text, of many words", "", "blue fox", "{x}"]


def table(texts=TEXTS, **columns):
    return pa.table({"id": list(range(len(texts))), "text": pa.array(texts, pa.string()), **columns})


def values(column) -> np.ndarray:
    return np.array(column.to_pylist(), dtype=np.float32)


@pytest.fixture(scope="module")
def encoder(base):
    return TextEncoder(EncodeJob(base, num_steps=2))


def changed(encoder, **fields):
    """The same model for another job."""
    other = object.__new__(TextEncoder)
    job = EncodeJob(**{**encoder.job.__dict__, **fields})
    other.__dict__.update(encoder.__dict__ | {"job": job})
    return other


def test_equals_encode_bitwise_and_keeps_the_other_columns(encoder, model):
    given = table(extra=[{"a": [i]} for i in range(5)])
    result = encoder(given)
    assert result.column_names == ["id", "text", "extra", "embedding"]
    assert result.select(given.column_names).equals(given)
    assert result.schema.field("embedding").type == pa.list_(pa.float32(), 32)
    np.testing.assert_array_equal(values(result["embedding"]), model.encode(TEXTS, num_steps=2))
    empty = encoder(given.slice(0, 0))
    assert empty.schema == result.schema
    assert len(empty) == 0


def test_all_steps_of_two_columns_with_an_instruction_each(base, model):
    job = EncodeJob(
        base,
        columns=output_columns(["title", "text"]),
        instruction={"title": "find"},
        num_steps=3,
        return_steps=True,
        encode={"truncate_dim": 8},
    )
    result = TextEncoder(job)(table(title=TEXTS[::-1]))
    assert result.column_names[-2:] == ["title_embedding", "text_embedding"]
    assert result.schema.field("text_embedding").type == pa.list_(pa.list_(pa.float32(), 8), 3)
    options = {"num_steps": 3, "return_steps": True, "truncate_dim": 8}
    expected = model.encode(TEXTS[::-1], instruction="find", **options)
    np.testing.assert_array_equal(values(result["title_embedding"]), expected)
    np.testing.assert_array_equal(values(result["text_embedding"]), model.encode(TEXTS, **options))


@pytest.mark.parametrize("return_steps", [False, True])
def test_smaller_types(base, model, return_steps):
    exact = model.encode(TEXTS, num_steps=2, return_steps=return_steps)
    fields = {"num_steps": 2, "return_steps": return_steps}
    half = TextEncoder(EncodeJob(base, output_dtype="float16", **fields))(table())
    np.testing.assert_array_equal(values(half["embedding"]), exact.astype(np.float16).astype(np.float32))
    result = TextEncoder(EncodeJob(base, output_dtype="int8", **fields))(table([*TEXTS, None]))
    assert result["embedding"][-1].as_py() is result["embedding_scale"][-1].as_py() is None
    integers, scales = values(result["embedding"][:-1]), values(result["embedding_scale"][:-1])
    assert np.abs(integers).max(axis=-1).min() == 127
    assert np.abs(integers * scales[..., None] - exact).max() <= scales.max() / 2 * (1 + 1e-5)


def test_nulls_and_bytes_that_are_no_text(encoder, model):
    raw = pa.array([b"red", None, b"\xff\xfe", b"blue fox"], pa.binary())
    column = pa.StringArray.from_buffers(4, raw.buffers()[1], raw.buffers()[2], raw.buffers()[0])
    bad = pa.table({"text": column})
    with pytest.raises(ValueError, match="text: row 1002 cannot be encoded: not UTF-8, at byte 0"):
        encoder(bad, 1000)
    result = changed(encoder, on_error="null")(bad)
    assert result["embedding_error"].to_pylist() == [None, None, "not UTF-8, at byte 0", None]
    assert [row is None for row in result["embedding"].to_pylist()] == [False, True, True, False]
    np.testing.assert_array_equal(
        values(result["embedding"].take([0, 3])), model.encode(["red", "blue fox"], num_steps=2)
    )


def test_a_row_that_fails_is_found(encoder, monkeypatch):
    encode = type(encoder.model).encode

    def fails_on_fox(self, texts, **options):
        if "blue fox" in texts:
            raise RuntimeError("a fox")
        return encode(self, texts, **options)

    monkeypatch.setattr(type(encoder.model), "encode", fails_on_fox)
    with pytest.raises(ValueError, match="text: row 3 of this table .*: 'blue fox': RuntimeError: a fox"):
        encoder(table())
    result = changed(encoder, on_error="null")(table())
    assert result["embedding_error"].to_pylist() == [None, None, None, "RuntimeError: a fox", None]
    assert [row is None for row in result["embedding"].to_pylist()] == [False, False, False, True, False]


@pytest.mark.parametrize(("dtype", "value", "reason"), [("float16", 7e4, "up to 70000"), ("int8", np.nan, "finite")])
def test_a_row_that_the_type_cannot_hold_is_named(encoder, monkeypatch, dtype, value, reason):
    encode = type(encoder.model).encode

    def beyond(self, texts, **options):
        embeddings = encode(self, texts, **options)
        embeddings[[text == "blue fox" for text in texts], 3] = value
        return embeddings

    monkeypatch.setattr(type(encoder.model), "encode", beyond)
    with pytest.raises(
        ValueError, match=f"text: row 3 of this table .*'blue fox': .*output_dtype: got {dtype} .*{reason}"
    ):
        changed(encoder, output_dtype=dtype)(table())
    result = changed(encoder, output_dtype=dtype, on_error="null")(table())
    assert [row is None for row in result["embedding"].to_pylist()] == [False, False, False, True, False]
    assert reason in result["embedding_error"][3].as_py()


def test_columns_that_do_not_fit_are_named(encoder):
    with pytest.raises(ValueError, match="column: got 'text', expected one of id"):
        encoder(table().select(["id"]))
    with pytest.raises(ValueError, match="the input has a column 'embedding' already"):
        encoder(encoder(table()))
    doubled = table().append_column("text", table()["text"])
    with pytest.raises(ValueError, match="column: got 'text', which is the name of several columns"):
        encoder(doubled)
    with pytest.raises(TypeError, match="text: got a column of int64, expected strings"):
        encoder(pa.table({"text": [1]}))
    dictionary = pa.chunked_array([pa.array(["a", None, "a"]).dictionary_encode()])
    assert texts_of("text", dictionary)[0] == ["a", None, "a"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"output_dtype": "int4"}, "output_dtype: got 'int4'"),
        ({"on_error": "skip"}, "on_error: got 'skip'"),
        ({"columns": {}}, "columns: got none"),
        ({"columns": {"a": "e", "b": "e"}}, "columns: got 'e' as a result twice"),
        ({"instruction": {"title": "x"}}, "instruction: got one for 'title'"),
        ({"num_steps": -1}, "num_steps: got -1"),
    ],
)
def test_bad_jobs_are_named_before_a_table_comes(base, fields, message):
    with pytest.raises(ValueError, match=message):
        TextEncoder(EncodeJob(base, **fields))


def test_what_is_written_down_is_json_and_decides_the_result(base, monkeypatch):
    settings = EncodeJob(base, load={"device": "cpu"}, encode={"batch_size": 3, "max_length": 9}).settings()
    assert json.loads(json.dumps(settings)) == settings
    assert settings["load"] == {}
    assert settings["encode"] == {"max_length": 9}


def test_other_weights_in_the_same_folder_are_other_settings(tmp_path):
    def settings():
        return EncodeJob("hub/name", adapter=str(tmp_path)).settings()

    for name in ("adapter_model.safetensors", "README.md"):
        (tmp_path / name).write_bytes(bytes(200_000))
    before = settings()
    (tmp_path / "README.md").write_text("changed")
    assert settings() == before
    (tmp_path / "adapter_model.safetensors").write_bytes(bytes(199_999) + b"\1")
    different = {name for name, value in settings().items() if value != before[name]}
    assert different == {"adapter_sha256"}


def test_datasets_maps_and_does_not_take_another_models_result(encoder, model, tmp_path):
    datasets = pytest.importorskip("datasets")
    ds = datasets.Dataset(datasets.table.InMemoryTable(table())).with_format("arrow")
    result = ds.map(encoder, batched=True, batch_size=5).with_format("numpy")
    np.testing.assert_array_equal(np.stack(result["embedding"][:]), model.encode(TEXTS, num_steps=2))
    weight = encoder.model.base.lm_head.weight
    before = pickle.dumps(encoder)
    weight.data.mul_(1.5)
    assert pickle.dumps(encoder) != before  # its hash is the name of a cached result
    weight.data.div_(1.5)
    with pytest.raises(RuntimeError, match="called in another process than the one that loaded the model"):
        ds.map(encoder, batched=True, num_proc=2)


def test_a_copy_does_not_encode(encoder):
    with pytest.raises(RuntimeError, match=r"num_proc=.* expected one process, or a TextEncoder made in each"):
        pickle.loads(pickle.dumps(encoder))(table())
