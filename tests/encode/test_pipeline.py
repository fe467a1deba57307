from __future__ import annotations

import copy
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import gircse.encode.devices
from gircse import GIRCSE, GircseConfig
from gircse.engine import Engine, EngineConfig
from gircse.inspect.table import inspection_table
from tests.tiny_models import tiny_model, tiny_tokenizer

TEXTS = ["a", "the quick brown fox jumps over the lazy dog", "", "soft tokens", "x" * 70, "two words"]


@pytest.fixture(scope="module")
def model():
    return GIRCSE(tiny_model("llama"), tiny_tokenizer(), GircseConfig(num_steps=4))


@pytest.mark.parametrize(
    ("config", "options", "prompt"),
    [
        ({}, {}, "{}"),
        ({}, {"num_steps": 0, "batch_size": 2}, "{}"),
        ({}, {"truncate_dim": 5}, "{}"),
        ({}, {"instruction": "find {text}"}, "Instruct: find {{text}}\nQuery:{}"),
        ({"append_eos": True}, {"normalize": False}, "{}<eos>"),
    ],
)
def test_embeddings_are_the_mean_states_of_the_rollout(config, options, prompt):
    """Of the prompt's tokens; an empty prompt is the end-of-sequence token."""
    model = GIRCSE(tiny_model("llama"), tiny_tokenizer(), GircseConfig(num_steps=4, **config)).eval()
    embeddings = model.encode(TEXTS, **options)
    assert embeddings.dtype == np.float32
    for text, got in zip(TEXTS, embeddings, strict=True):
        ids = torch.tensor([model.tokenizer(prompt.format(text))["input_ids"] or [model.tokenizer.eos_token_id]])
        with torch.no_grad():
            expected = model.rollout(ids, torch.ones_like(ids), options.get("num_steps")).mean(1)[0, : len(got)]
        if options.get("normalize", True):
            expected = torch.nn.functional.normalize(expected, dim=0)
        np.testing.assert_allclose(got, expected.numpy(), atol=1e-6)


def test_a_single_string_gives_a_single_embedding(model):
    assert model.encode("soft tokens").shape == (32,)
    np.testing.assert_allclose(model.encode("soft tokens"), model.encode(TEXTS)[3], atol=1e-6)


def test_no_texts(model):
    assert model.encode([]).shape == (0, 32)
    assert model.encode([], return_steps=True, num_steps=7).shape == (0, 7, 32)


@pytest.mark.parametrize("pooling", ["mean", "last", "weighted"])
def test_steps_are_exactly_the_prefixes(pooling):
    model = GIRCSE(tiny_model("llama"), tiny_tokenizer(), GircseConfig(num_steps=4, pooling=pooling))
    steps = model.encode(TEXTS, num_steps=20, return_steps=True)
    assert steps.shape == (6, 20, 32)
    for k in (1, 2, 5, 20):
        assert np.array_equal(model.encode(TEXTS, num_steps=k), steps[:, k - 1])


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_jacobi_decoding(pooling):
    """To its tolerance the sequential result, also after each step, in a stream, on other devices and with "auto"
    steps; with tolerance 0 to rounding."""
    model = GIRCSE(tiny_model("qwen3"), tiny_tokenizer(), GircseConfig(num_steps=8, pooling=pooling)).eval()
    steps = model.encode(TEXTS, return_steps=True)
    exact = {"decoding": "jacobi", "jacobi_tolerance": 0}
    np.testing.assert_allclose(model.encode(TEXTS, return_steps=True, **exact), steps, atol=1e-6)
    np.testing.assert_allclose(model.encode(TEXTS, devices=["cpu"], **exact), steps[:, -1], atol=1e-6)
    adaptive = {"num_steps": "auto", "max_steps": 8, "tolerance": 1e-3}
    np.testing.assert_allclose(model.encode(TEXTS, **adaptive, **exact), model.encode(TEXTS, **adaptive), atol=1e-6)
    model.config = model.config.with_decoding("jacobi", 1e-4)
    embeddings = model.encode(TEXTS)
    with model.inference() as engine:
        passes = engine.report().passes
    assert max(passes) == 8 > min(passes)  # the exact ones above, and these
    assert 1e-7 < (1 - (embeddings * steps[:, -1]).sum(1)).max() < 1e-3
    np.testing.assert_allclose(list(model.encode_stream(TEXTS, window=2)), embeddings, atol=1e-6)
    np.testing.assert_array_equal(model.encode(TEXTS, decoding="sequential"), steps[:, -1])


def test_too_long_texts_are_cut_and_counted(model):
    with pytest.warns(UserWarning, match="2 of 6 texts are longer than max_length=12 tokens"):
        cut = model.encode(TEXTS, max_length=12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_allclose(model.encode([t[:12] for t in TEXTS]), cut, atol=1e-6)


def test_max_length_leaves_room_for_the_steps_within_the_positions():
    model = GIRCSE(tiny_model("gpt2"), tiny_tokenizer())
    with pytest.warns(UserWarning, match="1 of 1 texts are longer than max_length=251"):
        assert np.isfinite(model.encode(["x" * 300])).all()


def test_training_mode_is_restored_and_dropout_is_off_meanwhile(model):
    model.train()
    try:
        np.testing.assert_array_equal(model.encode(TEXTS), model.encode(TEXTS))
        assert model.training
    finally:
        model.eval()


@pytest.mark.parametrize("num_steps", [0, 4])
def test_batch_size_bounds_the_rows(model, monkeypatch, num_steps):
    rows, run_batch = [], Engine._run_batch
    monkeypatch.setattr(
        Engine, "_run_batch", lambda self, batch, *rest: rows.append(len(batch.rows)) or run_batch(self, batch, *rest)
    )
    model.encode(TEXTS, batch_size=2, num_steps=num_steps)
    assert rows == [2, 2, 2]


def test_auto_steps_run_to_the_end_where_nothing_settles(model):
    fixed = model.encode(TEXTS, num_steps=7, return_steps=True)
    auto = model.encode(TEXTS, num_steps="auto", tolerance=1e-12, max_steps=7, return_steps=True)
    np.testing.assert_allclose(auto, fixed, atol=1e-6)


def test_auto_steps_stop_after_two_small_moves(model):
    fixed = model.encode(TEXTS, num_steps=20, return_steps=True).astype(np.float64)
    moved = 1 - (fixed[:, 1:] * fixed[:, :-1]).sum(-1)  # moved[:, k - 2] is the move to step k
    tolerance = float(np.median(moved[:, 3]))
    stop = []
    for row in moved:
        small = row < tolerance
        stop.append(next((k for k in range(3, 20) if small[k - 2] and small[k - 3]), 20))
    assert len(set(stop)) > 1  # the texts differ
    expected = fixed[np.arange(len(TEXTS)), np.array(stop) - 1]
    options = {"num_steps": "auto", "tolerance": tolerance, "max_steps": 20}
    np.testing.assert_allclose(model.encode(TEXTS, **options), expected, atol=1e-5)
    steps = model.encode(TEXTS, return_steps=True, **options)
    assert steps.shape == (6, 20, 32)
    for row, k in enumerate(stop):
        np.testing.assert_allclose(steps[row, :k], fixed[row, :k], atol=1e-5)
        np.testing.assert_array_equal(steps[row, k:], np.broadcast_to(steps[row, k - 1], (20 - k, 32)))


def test_engine_settings_are_taken_up(model):
    expected = model.encode(TEXTS)
    model.engine_config = EngineConfig(max_rows=2, reuse_prefix=False)
    try:
        np.testing.assert_allclose(model.encode(TEXTS), expected, atol=1e-5)
        with model.inference() as engine:
            assert engine.report().limits.rows == 2
    finally:
        model.engine_config = EngineConfig()


def test_weights_changed_between_calls_count():
    model = GIRCSE(tiny_model("llama"), tiny_tokenizer())
    prompts = {"instruction": "the same for all"}
    before = model.encode(TEXTS, **prompts)
    with torch.no_grad():
        model.causal_lm.embed_weight.mul_(1.5)
    fresh = GIRCSE(model.base, tiny_tokenizer())
    assert not np.allclose(before, model.encode(TEXTS, **prompts), atol=1e-4)
    np.testing.assert_array_equal(model.encode(TEXTS, **prompts), fresh.encode(TEXTS, **prompts))


def test_a_model_that_was_cast_is_encoded_in_its_new_dtype():
    model = GIRCSE(tiny_model("llama"), tiny_tokenizer())
    single = model.encode(TEXTS)
    np.testing.assert_allclose(model.double().encode(TEXTS), single, atol=1e-5)


AUTOCAST = {"device_type": "cpu", "dtype": torch.bfloat16}


def everything(model):
    """Numbers of every way to encode, prefix and early stopping included."""
    inspections = model.inspect(TEXTS[:2], instruction="the same for all")
    return [
        model.encode(TEXTS),
        model.encode(TEXTS, instruction="the same for all", return_steps=True),
        model.encode(TEXTS, num_steps="auto", tolerance=0.05),
        np.stack(list(model.encode_stream(TEXTS, num_steps=0, window=2))),
        np.array([[s.entropy, s.tail_mass, s.state_cosine, *s.probabilities] for i in inspections for s in i.steps]),
        Engine(model.causal_lm).states([[3, 4, 5], [6]], 2).float().numpy(),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_around_it_changes_no_bit_and_leaves_nothing_behind(dtype):
    expected = everything(GIRCSE(tiny_model("llama", dtype=dtype), tiny_tokenizer()))
    with torch.autocast(**AUTOCAST):
        model = GIRCSE(tiny_model("llama", dtype=dtype), tiny_tokenizer())
        inside = everything(model)
        assert torch.is_autocast_enabled("cpu")
        with model.inference() as engine:
            limits = engine.report().limits
        rollout = model.rollout(torch.tensor([[3, 4]]), torch.ones(1, 2).long())
    with model.inference() as engine:  # the same engine, whose buffers were made inside
        assert engine.report().limits == limits
    for found in (inside, everything(model)):
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    # training is what autocast is for
    plain = model.rollout(torch.tensor([[3, 4]]), torch.ones(1, 2).long())
    assert torch.equal(rollout, plain) == (dtype == torch.bfloat16)


def extended(model):
    """The model with a tokenizer that knows tokens which it has no embeddings for."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<{i}>" for i in range(40)])
    return GIRCSE(model.base, tokenizer, model.config)


@pytest.mark.parametrize(
    "use",
    [
        lambda model: model.encode(["a", "b <39>"]),
        lambda model: model.encode("b <39>", num_steps=0),
        lambda model: list(model.encode_stream(["b <39>"])),
        lambda model: model.inspect("b <39>"),
        lambda model: model.rollout(torch.tensor([[3, 159]]), torch.ones(1, 2).long()),
        lambda model: Engine(model.causal_lm).states([[3], [159, 4]], 1),
    ],
    ids=["encode", "no steps", "stream", "inspect", "rollout", "engine"],
)
def test_tokens_without_an_embedding_are_named(model, use):
    bad = extended(model)
    assert bad.tokenizer("b <39>")["input_ids"][-1] == 159
    with pytest.raises(
        ValueError, match="input_ids: got .* to 159, expected token ids from 0 to 130: the tokenizer has"
    ):
        use(bad)
    assert bad.encode("a").shape == (32,)


def test_negative_token_ids_are_named(model):
    with pytest.raises(ValueError, match="input_ids: got -1 to 4, expected token ids from 0 to 130$"):
        Engine(model.causal_lm).states([[3, -1], [4]], 1)


@pytest.mark.parametrize("append_eos", [False, True])
def test_a_tokenizer_that_truncates_on_the_left_keeps_the_end(append_eos):
    tokenizer = tiny_tokenizer()
    tokenizer.truncation_side = "left"
    model = GIRCSE(tiny_model("llama"), tokenizer, GircseConfig(num_steps=2, append_eos=append_eos))
    room = 12 - append_eos
    with pytest.warns(
        UserWarning, match="2 of 6 texts are longer than max_length=12 tokens and were cut at the beginning"
    ):
        cut = model.encode(TEXTS, max_length=12)
    np.testing.assert_allclose(model.encode([text[-room:] for text in TEXTS]), cut, atol=1e-6)
    assert np.abs(cut[1] - model.encode(TEXTS[1][:room])).max() > 1e-3
    if append_eos:  # no room for the text at all
        with pytest.warns(UserWarning, match="cut at the beginning"):
            np.testing.assert_allclose(model.encode("abc", max_length=1), model.encode(""), atol=1e-6)


def test_copies_and_pickles_work_after_encoding(model):
    expected = model.encode(TEXTS)
    np.testing.assert_array_equal(copy.deepcopy(model).encode(TEXTS), expected)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(model)).encode(TEXTS), expected)


def test_threads_get_their_own_results(model):
    expected = model.encode(TEXTS)
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(model.encode, TEXTS[i % 6 :] + TEXTS[: i % 6]) for i in range(12)]
        for i, future in enumerate(futures):
            np.testing.assert_allclose(np.roll(future.result(), i % 6, axis=0), expected, atol=1e-5)


def test_devices_share_the_texts(model):
    texts = [f"{TEXTS[i % 6]} {i}" for i in range(37)]
    expected = model.encode(texts)
    np.testing.assert_allclose(model.encode(texts, devices=["cpu", "cpu"]), expected, atol=1e-5)
    np.testing.assert_allclose(model.encode(texts[0], devices=["cpu"]), expected[0], atol=1e-5)
    assert model.encode([], devices=["cpu"]).shape == (0, 32)


def test_an_error_on_one_device_ends_the_call(model, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("device lost")

    monkeypatch.setattr(gircse.encode.devices, "encode", broken)
    with pytest.raises(RuntimeError, match="device lost"):
        model.encode(TEXTS, devices=["cpu", "cpu"])


@pytest.mark.parametrize(
    ("texts", "options", "error", "message"),
    [
        (["a", 3], {}, TypeError, r"texts\[1\]: got int"),
        (["a", None], {}, TypeError, r"texts\[1\]: got NoneType"),
        (7, {}, TypeError, "texts: got int"),
        (b"abc", {}, TypeError, "texts: got bytes"),
        ({"a": 1}, {}, TypeError, "texts: got dict"),
        (["a"], {"num_steps": -1}, ValueError, "num_steps: got -1"),
        (["a"], {"num_steps": 2.5}, ValueError, "num_steps: got 2.5"),
        (["a"], {"batch_size": 0}, ValueError, "batch_size: got 0"),
        (["a"], {"max_length": 0}, ValueError, "max_length: got 0"),
        (["a"], {"truncate_dim": 33}, ValueError, "truncate_dim: got 33, expected at most 32"),
        (["a"], {"instruction": 5}, TypeError, "instruction: got int"),
        (["a"], {"num_steps": 300}, ValueError, "num_steps: got 300"),
        (["a"], {"num_steps": "all"}, ValueError, "num_steps: got 'all', expected an integer >= 0 or 'auto'"),
        (["a"], {"num_steps": "auto", "tolerance": 0}, ValueError, "tolerance: got 0"),
        (["a"], {"num_steps": "auto", "max_steps": 0}, ValueError, "max_steps: got 0"),
        (["a"], {"decoding": "fast"}, ValueError, "decoding: got 'fast', expected one of 'sequential'"),
        (["a"], {"jacobi_tolerance": -1}, ValueError, "jacobi_tolerance: got -1, expected a number from 0 to 2"),
        (["a"], {"jacobi_tolerance": True}, ValueError, "jacobi_tolerance: got True"),
        (["a"], {"jacobi_tolerance": 0.1}, ValueError, "jacobi_tolerance: got 0.1 with decoding='sequential'"),
        (["a"], {"devices": []}, ValueError, r"devices: got \[\], expected a list"),
        (["a"], {"devices": ["cup"]}, ValueError, "devices: got 'cup'"),
        (["a"], {"devices": ["cuda:77"]}, ValueError, "devices: got 'cuda:77'"),
    ],
)
def test_bad_input_is_named(model, texts, options, error, message):
    with pytest.raises(error, match=message):
        model.encode(texts, **options)


def test_inspect_agrees_with_the_plain_distribution(model):
    inspections = model.inspect(["soft tokens", "a"], num_steps=3, top_n=4)
    assert [i.text for i in inspections] == ["soft tokens", "a"]
    ids = torch.tensor([model.tokenizer("soft tokens", add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        probs = model.causal_lm.model(input_ids=ids).logits[0, -1].softmax(-1)
    first = inspections[0].steps[0]
    values, indices = probs.topk(4)
    assert first.step == 1
    assert first.token_ids == indices.tolist()
    assert first.tokens == [model.tokenizer.decode([i]) for i in indices.tolist()]
    np.testing.assert_allclose(first.probabilities, values.numpy(), rtol=1e-4)
    assert first.entropy == pytest.approx(-(probs * probs.log()).sum().item(), rel=1e-4)
    assert first.max_probability == pytest.approx(values[0].item(), rel=1e-4)
    steps = model.encode("soft tokens", num_steps=3, return_steps=True)
    assert inspections[0].steps[2].cosine_to_previous == pytest.approx(float(steps[1] @ steps[2]), abs=1e-5)


def test_inspect_tells_how_many_passes_jacobi_decoding_takes(model):
    config = model.config.with_decoding("jacobi", 1e-4)
    jacobi = GIRCSE(model.base, model.tokenizer, config).eval()
    first, other = jacobi.inspect(["soft tokens", "a"], num_steps=12)
    passes = [len(inspection.jacobi_moves) + 1 for inspection in (first, other)]
    assert all(moves[-1] < 1e-4 <= min(moves[:-1]) for moves in (first.jacobi_moves, other.jacobi_moves))
    jacobi.encode(["soft tokens", "a"], num_steps=12)
    with jacobi.inference() as engine:
        assert engine.report().passes == {taken: 2 * passes.count(taken) for taken in passes}
    assert f"Jacobi decoding: {passes[0]} passes" in inspection_table([first])
    assert model.inspect("a", num_steps=2)[0].jacobi_moves == []


@pytest.mark.parametrize(
    ("options", "message"), [({"num_steps": 0}, "num_steps: got 0"), ({"top_n": 0}, "top_n: got 0")]
)
def test_inspect_refuses_nonsense(model, options, message):
    with pytest.raises(ValueError, match=message):
        model.inspect(["a"], **options)
