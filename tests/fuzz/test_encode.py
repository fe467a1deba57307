"""`encode`, `encode_stream`, `rollout`, `inspect`, any texts and options: what a plain uncached rollout gives, or an
error that names the argument."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gircse import GIRCSE, GircseConfig
from tests.fuzz.outcome import outcome
from tests.fuzz.profiles import fuzz
from tests.fuzz.tensors import garbage, laid_out
from tests.tiny_models import tiny_model, tiny_tokenizer

CONFIGS = [
    GircseConfig(num_steps=2),
    GircseConfig(num_steps=3, pooling="weighted", append_eos=True),
    GircseConfig(num_steps=3, pooling="last", include_prompt_state=True, temperature=0.3),
]
TEXTS = st.text(max_size=30) | st.sampled_from(
    ["", " ", "\0", "a" * 300, "<eos>", "<unk>", "{text}", "{instruction}", "\u202e", "\U0001f600"]
)


@pytest.fixture(scope="module")
def models() -> list[GIRCSE]:
    return [GIRCSE(tiny_model("llama"), tiny_tokenizer(), config).eval() for config in CONFIGS]


@torch.no_grad()
def plain(model: GIRCSE, text: str, *, steps: int, max_length: int, instruction: str | None) -> np.ndarray:
    """[K, D] not normalised embeddings of one text: the whole sequence through the model again for every step."""
    config, lm, tokenizer = model.config, model.base, model.tokenizer
    prompt = text
    if instruction:
        before, after = config.prompt_template.split("{text}")
        prompt = before.replace("{instruction}", instruction) + text + after.replace("{instruction}", instruction)
    eos = [tokenizer.eos_token_id] if config.append_eos else []
    limit = min(max_length, 256 - steps)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"][: limit - len(eos)] + eos
    inputs = lm.get_input_embeddings()(torch.tensor([ids or [tokenizer.pad_token_id]]))
    states = []
    for _ in range(steps + 1):
        hidden = lm.model(inputs_embeds=inputs, use_cache=False).last_hidden_state[:, -1]
        states.append(hidden[0].double())
        token = torch.softmax(lm.lm_head(hidden) / config.temperature, -1) @ lm.get_input_embeddings().weight
        inputs = torch.cat([inputs, token[:, None]], 1)
    kept = states[:1] if not steps else states[:-1] if config.include_prompt_state else states[1:]
    pooled = []
    for k in range(1, len(kept) + 1):
        weights = {"mean": [1.0] * k, "last": [0.0] * (k - 1) + [1.0], "weighted": list(range(1, k + 1))}[
            config.pooling
        ]
        pooled.append(sum(w * state for w, state in zip(weights, kept, strict=False)) / sum(weights))
    return torch.stack(pooled).numpy()


@fuzz(30)
@given(data=st.data())
def test_embeddings(models, data):
    model = data.draw(st.sampled_from(models))
    texts = data.draw(st.lists(TEXTS, max_size=4))
    steps = data.draw(st.sampled_from([None, 0, 1, 4]))
    max_length = data.draw(st.sampled_from([2, 7, 512]))
    instruction = data.draw(st.none() | st.sampled_from(["", "find", "{text}{instruction}"]))
    dim, normalize = data.draw(st.sampled_from([None, 1, 5, np.int64(32)])), data.draw(st.booleans())
    return_steps, batch_size = data.draw(st.booleans()), data.draw(st.sampled_from([None, 1, 3]))
    options: dict[str, Any] = {
        "instruction": instruction,
        "num_steps": steps,
        "max_length": max_length,
        "batch_size": batch_size,
    }
    options |= {"truncate_dim": dim, "normalize": normalize, "return_steps": return_steps}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of texts that are cut
        found = model.encode(texts, **options)
        stream = list(model.encode_stream(iter(texts), window=data.draw(st.integers(1, 5)), **options))
    count = model.num_steps if steps is None else steps
    expected = [plain(model, text, steps=count, max_length=max_length, instruction=instruction) for text in texts]
    assert found.dtype == np.float32
    assert found.shape == (len(texts), *([max(count, 1)] if return_steps else []), int(dim or 32))
    assert len(stream) == len(texts)
    for row, streamed, whole in zip(found, stream, expected, strict=True):
        wanted = whole[..., : int(dim or 32)]
        wanted = wanted if return_steps else wanted[-1]
        if normalize:
            norms = np.linalg.norm(wanted, axis=-1, keepdims=True)
            wanted = wanted / np.where(norms > 0, norms, 1)  # the padding token's embedding is zero
        np.testing.assert_allclose(row, wanted, atol=2e-5)
        np.testing.assert_allclose(streamed, wanted, atol=2e-5)


def not_text() -> Any:
    return garbage.filter(lambda value: not isinstance(value, str))


@pytest.mark.parametrize("name", ["encode", "encode_stream", "inspect", "rollout"])
@fuzz(50)
@given(data=st.data())
def test_an_error_names_the_argument(models, name, data):
    call = getattr(models[0], name)
    listed = models[0].encode if name == "encode_stream" else call  # whose arguments it passes on
    names = [n for n in inspect.signature(listed).parameters if n not in ("show_progress_bar", "observer")]
    if name == "encode_stream":
        names = [*(n for n in names if n != "devices"), "window"]
    arguments: dict[str, Any] = {"texts": ["a", "b"]}
    if name == "rollout":
        arguments = {"input_ids": torch.ones(2, 3, dtype=torch.long), "attention_mask": torch.ones(2, 3)}
        arguments["attention_mask"] = arguments["attention_mask"].long()
    chosen = data.draw(st.sampled_from(names))
    arguments[chosen] = data.draw(garbage)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found, error = outcome(lambda: call(**arguments), TypeError, ValueError)
        if error is None and name == "encode_stream":
            found, error = outcome(lambda: list(found), TypeError, ValueError)
    assert error is None or any(str(error).startswith(n) for n in names)
    assert not models[0].training


@fuzz(20)
@given(data=st.data())
def test_texts_that_are_none(model, data):
    texts = ["a", "b", "c"]
    place = data.draw(st.integers(0, 2))
    texts[place] = data.draw(not_text() | st.sampled_from(["\ud800", "a\udfffb"]))
    for call in (model.encode, lambda t: list(model.encode_stream(t, window=2)), model.inspect):
        _, error = outcome(lambda call=call: call(texts), TypeError, ValueError)
        assert str(error).startswith(f"texts[{place}]: ")


@fuzz(25)
@given(data=st.data())
def test_rollout_of_any_padding_and_layout(model, data):
    rows = data.draw(st.lists(st.lists(st.integers(0, 130), min_size=1, max_size=6), min_size=1, max_size=4))
    width, steps = max(map(len, rows)) + data.draw(st.integers(0, 2)), data.draw(st.integers(0, 3))
    ids = torch.full((len(rows), width), data.draw(st.integers(0, 130)))
    mask = torch.zeros(len(rows), width, dtype=data.draw(st.sampled_from([torch.int64, torch.bool, torch.uint8])))
    for r, row in enumerate(rows):
        places = sorted(data.draw(st.permutations(range(width)))[: len(row)])  # padding anywhere, also in between
        ids[r, places], mask[r, places] = torch.tensor(row), torch.ones((), dtype=mask.dtype)
    layout = data.draw(st.sampled_from(["contiguous", "transposed"]))
    found = model.rollout(laid_out(ids, layout), laid_out(mask, layout), steps)
    assert found.shape == (len(rows), max(steps, 1), 32)
    wrong = ids.clone()
    wrong[0, 0] = data.draw(st.sampled_from([-1, 131, 2**40]))
    with pytest.raises(ValueError, match="input_ids: got"):
        model.rollout(wrong, mask, steps)
    for r, row in enumerate(rows):
        alone = model.rollout(torch.tensor([row]), torch.ones(1, len(row), dtype=torch.long), steps)
        torch.testing.assert_close(found[r], alone[0], atol=2e-5, rtol=1e-4)
