"""`SentenceTransformer` over a `GIRCSEModule` gives what `GIRCSE.encode` gives, for every option the two share."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch

pytest.importorskip("sentence_transformers")
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize

from gircse import GIRCSE, GircseConfig
from gircse.sentence_transformers import GIRCSEModule, modeling_gircse
from tests.tiny_models import tiny_model, tiny_tokenizer

TEXTS = ["a text", "another, longer text", "", "x", "Instruct: {instruction} {text}", "word " * 9]
KEYS = ("sentence_embedding", "step_embeddings")
TASK = "Given a question, retrieve passages that answer it"


@pytest.fixture
def model() -> GIRCSE:
    return GIRCSE(tiny_model("qwen2"), tiny_tokenizer(), GircseConfig(num_steps=3)).eval()


@pytest.fixture
def st(model) -> SentenceTransformer:
    module = GIRCSEModule(model)
    return SentenceTransformer(modules=[module], prompts={"query": module.format_prompt(TASK)}, device="cpu")


def close(ours, expected) -> None:
    assert ours.shape == expected.shape
    np.testing.assert_allclose(ours, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("num_steps", [None, 0, 1, 6])
def test_same_embeddings(model, st, num_steps):
    steps = {} if num_steps is None else {"num_steps": num_steps}
    close(st.encode(TEXTS, **steps), model.encode(TEXTS, **steps))
    close(st.encode(TEXTS, batch_size=2, **steps), model.encode(TEXTS, **steps))
    close(st.encode_query(TEXTS, **steps), model.encode(TEXTS, instruction=TASK, **steps))
    close(st.encode_document(TEXTS, **steps), model.encode(TEXTS, **steps))
    close(st.encode(TEXTS, prompt_name="query", **steps), model.encode(TEXTS, instruction=TASK, **steps))
    prompt = st[0].format_prompt("Sort by topic")
    close(st.encode(TEXTS, prompt=prompt, **steps), model.encode(TEXTS, instruction="Sort by topic", **steps))


def test_a_single_text_tensors_and_lengths(model, st):
    close(st.encode("one text"), model.encode("one text"))
    as_tensor = st.encode(TEXTS, convert_to_tensor=True)
    assert as_tensor.dtype == torch.float32
    assert torch.allclose(as_tensor.norm(dim=-1), torch.ones(len(TEXTS)))
    close(st.encode(TEXTS, truncate_dim=7, normalize_embeddings=True), model.encode(TEXTS, truncate_dim=7))
    assert st.get_embedding_dimension() == 32
    assert st.encode([]).shape == (0,)


def test_all_steps_from_one_call(model, st):
    expected = model.encode(TEXTS, num_steps=4, return_steps=True)
    close(st.encode(TEXTS, num_steps=4, return_steps=True), expected)
    # the library scales along dimension 1, which are the steps here
    close(st.encode(TEXTS, num_steps=4, return_steps=True, normalize_embeddings=True), expected)
    close(
        st.encode(TEXTS, num_steps=4, return_steps=True, truncate_dim=7, normalize_embeddings=True),
        model.encode(TEXTS, num_steps=4, return_steps=True, truncate_dim=7),
    )
    dense = Dense(32, 8, bias=False, activation_function=torch.nn.Identity())
    behind = np.einsum("nkd,ed->nke", expected, dense.linear.weight.detach().numpy())
    for module, raw in ((Normalize(), expected), (dense, behind)):
        longer = SentenceTransformer(modules=[*st, module], device="cpu")
        unit = raw / np.linalg.norm(raw, axis=-1, keepdims=True)
        close(longer.encode(TEXTS, num_steps=4, return_steps=True), raw)
        close(longer.encode(TEXTS, num_steps=4, return_steps=True, normalize_embeddings=True), unit)
        with torch.no_grad():
            close(longer(longer.preprocess(TEXTS), num_steps=4, return_steps=True)["sentence_embedding"].numpy(), raw)
    rows = st.encode(TEXTS, num_steps=4, output_value=None)
    close(np.stack([row["step_embeddings"] for row in rows]), expected)


def test_plain_tensors_leave(st):
    """Every way out: the type, and the value after `F.normalize` over the steps, which a subclass would turn around."""
    options = {"num_steps": 4, "return_steps": True}
    expected = torch.from_numpy(st.encode(TEXTS, **options))
    features = st.preprocess(TEXTS)
    ways = {
        "convert_to_tensor": st.encode(TEXTS, convert_to_tensor=True, **options),
        "a list": torch.stack(st.encode(TEXTS, convert_to_numpy=False, **options)),
    }
    every = [*st.encode(TEXTS, convert_to_numpy=False, **options), *ways["a list"]]
    every += [row[name] for row in st.encode(TEXTS, output_value=None, **options) for name in KEYS]
    every += [st.encode("x", convert_to_tensor=True, **options), ways["a list"][:, -1], ways["convert_to_tensor"][0]]
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            ways[str(context)] = st(features, **options)["sentence_embedding"]
            every += [st(features)[name] for name in KEYS]
    every.append(st.similarity(ways["a list"][0], ways["convert_to_tensor"][1]))
    for name, way in ways.items():
        close(way.numpy(), expected.numpy())
        assert torch.equal(torch.nn.functional.normalize(way, dim=1).norm(dim=1).round(), torch.ones(6, 32)), name
    assert {type(tensor) for tensor in [*every, *ways.values()]} == {torch.Tensor}


def test_prompts_are_the_template_tokens(model, st):
    features = st.preprocess(["a text"], prompt=st.prompts["query"])
    expected = model.tokenizer(f"Instruct: {TASK}\nQuery:a text", add_special_tokens=False)["input_ids"]
    assert features["input_ids"].tolist() == [expected]
    suffix = GIRCSE(tiny_model("llama"), tiny_tokenizer(), GircseConfig(prompt_template="{instruction}: {text}."))
    with pytest.raises(ValueError, match="goes on after the text"):
        GIRCSEModule(suffix).format_prompt("x")


def test_settings_of_module_and_model_are_one(model, st):
    st[0].num_steps = 5
    st[0].append_eos = True
    assert model.config == GircseConfig(num_steps=5, append_eos=True)
    close(st.encode(TEXTS), model.encode(TEXTS))
    st[0].decoding = "jacobi"
    st.encode(TEXTS)
    with model.inference() as engine:
        assert sum(engine.report().passes.values()) == len(TEXTS)
    with pytest.raises(ValueError, match="pooling: got 'max'"):
        st[0].pooling = "max"


def test_long_texts_are_cut_where_ours_are(model, st):
    texts = ["ab" * 30, "short"]
    st.max_seq_length = 11
    with pytest.warns(UserWarning, match="longer than 11 tokens"):
        ours = st.encode(texts)
    with pytest.warns(UserWarning, match="max_length=11"):
        close(ours, model.encode(texts, max_length=11))
    st.max_seq_length = None  # 256 positions, of which 3 are the steps'
    with pytest.warns(UserWarning, match="longer than 253 tokens"):
        assert st.preprocess(["y" * 300])["input_ids"].shape == (1, 253)
    with pytest.raises(ValueError, match="256 positions"):
        st.encode(["x"], num_steps=256)


@pytest.mark.parametrize("precision", ["int8", "uint8", "binary", "ubinary"])
@pytest.mark.parametrize(
    "module", [lambda t: plain_module(t), lambda t: GIRCSEModule(engine(t))], ids=["plain", "engine"]
)
def test_every_step_is_quantised_by_itself(module, precision):
    """Exactly as `encode` quantises that many steps."""
    st = SentenceTransformer(modules=[module(tiny_tokenizer())], device="cpu")
    texts = [f"text {i}" for i in range(40)]
    options = {"precision": precision, "return_steps": True, "num_steps": 4}
    found = st.encode(texts, **options)
    assert found.dtype == (np.uint8 if precision.startswith("u") else np.int8)
    for k in range(4):
        expected = st.encode(texts, precision=precision, num_steps=k + 1)
        if precision.endswith("int8"):  # one unit where rounding decides
            assert np.abs(found[:, k].astype(int) - expected).max() <= 1
            exact = st.encode(texts, num_steps=k + 1)
            columns = zip(found[:, k].T, exact.T, strict=True)
            assert min(np.corrcoef(ours, theirs)[0, 1] for ours, theirs in columns) > 0.999
        else:
            np.testing.assert_array_equal(found[:, k], expected)
    assert type(st.encode(texts, convert_to_tensor=True, **options)) is torch.Tensor
    rows = st.encode(texts, convert_to_numpy=False, **options)
    assert {(type(row), tuple(row.shape)) for row in rows} == {(torch.Tensor, found.shape[1:])}
    np.testing.assert_array_equal(st.encode_document(texts, **options), found)
    for other in (copy.deepcopy(st), pickle.loads(pickle.dumps(st))):
        np.testing.assert_array_equal(other.encode(texts, **options), found)
        assert other.encode.args[0] is other
    positional = st.encode(texts, None, None, 32, None, "sentence_embedding", precision, return_steps=True, num_steps=4)
    np.testing.assert_array_equal(positional, found)
    assert st.encode([], **options).shape == (0,)
    if precision.endswith("int8"):
        with pytest.raises(ValueError, match="from a single embedding"):
            st.encode("one", **options)
    else:
        assert st.encode("one", **options).shape == found.shape[1:]


def plain_module(tokenizer):
    """The one of a saved folder, without the package."""
    return modeling_gircse.GIRCSEModule(tiny_model("qwen2"), tokenizer, num_steps=3).eval()


@pytest.mark.parametrize("module", [plain_module, lambda tokenizer: GIRCSEModule(engine(tokenizer))])
def test_a_tokenizer_that_truncates_on_the_left_keeps_the_end(module):
    tokenizer = tiny_tokenizer()
    tokenizer.truncation_side = "left"
    st = SentenceTransformer(modules=[module(tokenizer)], device="cpu")
    st.max_seq_length = 5
    with pytest.warns(UserWarning, match="longer than 5 tokens are cut at the beginning"):
        close(st.encode(["0123456789", "ab"]), engine(tiny_tokenizer()).encode(["56789", "ab"]))


@pytest.mark.parametrize("module", [plain_module, lambda tokenizer: GIRCSEModule(engine(tokenizer))])
def test_tokens_without_an_embedding_are_named(module):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<{i}>" for i in range(40)])
    st = SentenceTransformer(modules=[module(tokenizer)], device="cpu")
    with pytest.raises(
        ValueError, match="input_ids: got .* to 159, expected token ids from 0 to 130: the tokenizer has"
    ):
        st.encode(["a", "b <39>"])


def engine(tokenizer):
    return GIRCSE(tiny_model("qwen2"), tokenizer, GircseConfig(num_steps=3)).eval()


def test_a_chat_template_does_not_wrap_plain_text(model, st):
    expected = st.encode(TEXTS)
    model.tokenizer.chat_template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    assert np.array_equal(st.encode(TEXTS), expected)
    with pytest.raises(ValueError, match="message"):
        st.encode([[{"role": "user", "content": "a text"}]])


def test_what_runs_underneath(model, st, monkeypatch):
    st.encode(TEXTS)
    assert model._engine is not None
    model._engine = None
    features = st.preprocess(["a text"])
    assert st(features)["sentence_embedding"].requires_grad  # gradients are recorded: the rollout
    st.train()
    with torch.no_grad():
        st(features)
    assert model._engine is None  # training mode: the rollout too, so that dropout is the same in both passes
    st.eval()
    with torch.no_grad():
        assert torch.allclose(st(features)["sentence_embedding"], torch.from_numpy(model.encode(["a text"])), atol=1e-5)


def test_a_compiled_model_leaves_the_engine_alone(st):
    """`compile()` compiles what is around it: traced, every number of rows and tokens would be another graph."""
    texts = [["y" * (i + 1)] * (i % 3 + 1) for i in range(10)]
    expected = [st.encode(rows) for rows in texts]
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    st.compile(backend=backend)
    for rows, embeddings in zip(texts, expected, strict=True):
        np.testing.assert_array_equal(st.encode(rows), embeddings)
    assert 0 < len(graphs) < 8


def test_left_padded_features(st):
    ours = st.preprocess(["a text", "x"])
    left = {name: value.flip(1) for name, value in ours.items()}
    left["input_ids"] = torch.where(left["attention_mask"] > 0, left["input_ids"], 0)
    for row in range(2):
        real = ours["attention_mask"][row].bool()
        left["input_ids"][row, left["attention_mask"][row].bool()] = ours["input_ids"][row, real]
    with torch.no_grad():
        assert torch.allclose(st(left)["sentence_embedding"], st(ours)["sentence_embedding"], atol=1e-6)


def test_bad_arguments(model, st):
    with pytest.raises(ValueError, match="num_steps: got -1"):
        st.encode(TEXTS, num_steps=-1)
    with pytest.raises(ValueError, match="num_steps: got 'auto'"):
        st.encode(TEXTS, num_steps="auto")
    with pytest.raises(TypeError, match=r"inputs\[1\]: got int, expected str"):
        st[0].preprocess(["a", 3])
    for texts, words in (
        (["a", 3], r"\[1\]: got int, expected str; it is 3\. .* remove others, such as ids"),
        (
            (text for text in TEXTS),
            r"\[0\]: got generator, expected str: encode takes it for one text, hand over a list",
        ),
    ):
        with pytest.raises(TypeError, match=words):
            st.encode(texts)
    with pytest.raises(ValueError, match=r"\[1\]: got '\\ud800' at character 1 of 'b\\ud800'"):
        st.encode(["a longer text", "b\ud800"])
    with pytest.raises(ValueError, match=r"prompt: got '\\udcff' at character 0 of"):
        st.encode(TEXTS, prompt="\udcff: ")
    with pytest.raises(
        ValueError, match="output_value: got 'token_embeddings', expected 'sentence_embedding', or None"
    ):
        st.encode(TEXTS, output_value="token_embeddings")
    with pytest.raises(ValueError, match="processing_kwargs: not supported"):
        st.encode(TEXTS, processing_kwargs={"text": {"max_length": 8}})
    with pytest.raises(ValueError, match="additional keyword arguments"):
        st.encode(TEXTS, steps=3)
    with pytest.raises(TypeError, match="model: got LlamaForCausalLM, expected gircse.GIRCSE"):
        GIRCSEModule(tiny_model("llama"))


def test_copies_and_pickles(st):
    expected = st.encode(TEXTS)
    for other in (copy.deepcopy(st), pickle.loads(pickle.dumps(st))):
        assert type(other[0]) is GIRCSEModule
        assert other[0].model.base is not st[0].model.base
        assert np.array_equal(other.encode(TEXTS), expected)


def test_a_multi_process_pool(model, st):
    pool = st.start_multi_process_pool(["cpu"])
    try:
        close(st.encode_query(TEXTS, pool=pool), model.encode(TEXTS, instruction=TASK))
        options = {"num_steps": 2, "return_steps": True}
        close(st.encode(TEXTS, pool=pool, chunk_size=2, **options), model.encode(TEXTS, **options))
        for more in ({}, {"normalize_embeddings": True}):
            found = st.encode(TEXTS, pool=pool, convert_to_tensor=True, **more, **options)
            assert type(found) is torch.Tensor
            close(found.numpy(), model.encode(TEXTS, **options))
    finally:
        st.stop_multi_process_pool(pool)
