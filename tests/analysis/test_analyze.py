"""`gircse analyze`: what it says against the same things computed by hand, and its files."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from gircse import GIRCSE
from gircse.analysis.analyze import analyze
from gircse.analysis.anatomy import anatomy
from gircse.analysis.clustering import kmeans, v_measure
from gircse.analysis.encoded_steps import EncodedSteps, Movement, settled_at
from gircse.analysis.plots import plot_analysis
from gircse.analysis.table import analysis_table
from gircse.data.labelled_texts import LabelledTexts
from gircse.data.retrieval_task import RetrievalTask
from gircse.evaluation.metrics import retrieval_metrics
from gircse.inspect.soft_tokens import TAIL_TOKENS
from tests.tiny_models import VOCAB, tiny_model, tiny_tokenizer

QUERIES = ["red fox", "blue whale", "green tea", "old oak", "new moon"]
DOCUMENTS = [f"{text} is what this is about" for text in QUERIES] + ["nothing of the kind", "filler"]
TASK = RetrievalTask("retrieve it", QUERIES, DOCUMENTS, [{i} for i in range(len(QUERIES))])
CLUSTERS = LabelledTexts(["aaaa", "aaab", "zzzz", "zzzy", "aaba", "zzyz"], ["a", "a", "z", "z", "a", "z"])
STEPS = (1, 2, 4, 9)


@pytest.fixture(scope="module")
def model() -> GIRCSE:
    return GIRCSE(tiny_model("llama"), tiny_tokenizer())


@pytest.fixture(scope="module")
def other() -> GIRCSE:
    return GIRCSE(tiny_model("llama", seed=7), tiny_tokenizer())


@pytest.fixture(scope="module")
def result(model, other) -> dict:
    return analyze(model, TASK, baseline=other, clusters=CLUSTERS, steps=STEPS, sample=6)


def test_quality_of_each_k_is_that_of_encoding_with_k(model, other, result):
    def quality(with_model: GIRCSE, k: int) -> dict[str, float]:
        queries = with_model.encode(QUERIES, instruction="retrieve it", num_steps=k)
        return retrieval_metrics(queries, with_model.encode(DOCUMENTS, num_steps=k), TASK.relevant)

    for k in STEPS:
        assert result["quality"][k] == pytest.approx(quality(model, k))
    assert result["baseline"]["metrics"] == pytest.approx(quality(other, 0))
    for k in STEPS:
        gap = result["quality"][k]["ndcg@10"] - result["baseline"]["metrics"]["ndcg@10"]
        assert result["baseline"]["differences"][k]["mean"] == pytest.approx(gap, abs=1e-12)


def test_without_a_baseline_it_is_k_0_of_the_model(model):
    found = analyze(model, TASK, steps=(1,), sample=1)
    queries, documents = (
        model.encode(QUERIES, instruction="retrieve it", num_steps=0),
        model.encode(DOCUMENTS, num_steps=0),
    )
    assert found["baseline"]["metrics"] == pytest.approx(retrieval_metrics(queries, documents, TASK.relevant))
    assert found["clustering"] is None
    assert found["refinement"]["settled_steps"] == {"queries": None, "documents": None}
    assert found["soft_tokens"]["redundant_share"] is None


def test_movement_is_the_cosine_between_prefixes_at_every_step(model, result):
    steps = model.encode(QUERIES, instruction="retrieve it", num_steps=9, return_steps=True).astype(np.float64)
    moved = 1 - (steps[:, 1:] * steps[:, :-1]).sum(-1)
    found = result["movement"]["queries"]
    assert found["steps"] == list(range(2, 10))
    np.testing.assert_allclose(found["mean"], moved.mean(0), atol=1e-6)
    np.testing.assert_allclose(found["std"], moved.std(0), atol=1e-6)


def test_clustering_is_k_means_of_each_prefix(model, result):
    for k in STEPS:
        embeddings = model.encode(CLUSTERS.texts, num_steps=k)
        scores = [v_measure(CLUSTERS.labels, kmeans(embeddings, 2, seed=s, restarts=1).tolist()) for s in range(5)]
        assert result["clustering"]["v_measure"][k]["mean"] == pytest.approx(np.mean(scores))
    assert (result["clustering"]["texts"], result["clustering"]["labels"]) == (6, 2)


def test_anatomy_agrees_with_the_plain_distribution(model):
    found = anatomy(model, [(QUERIES, "retrieve it"), (DOCUMENTS[:2], None), ([], None)], 3)
    assert found["texts"] == 7
    prompts = [f"Instruct: retrieve it\nQuery:{q}" for q in QUERIES] + DOCUMENTS[:2]
    entropies, highest = [], []
    for prompt in prompts:
        ids = torch.tensor([model.tokenizer(prompt, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            shares = model.causal_lm.model(input_ids=ids).logits[0, -1].softmax(-1)
        entropies.append(-(shares * shares.log()).sum().item())
        highest.append(shares.max().item())
    assert found["entropy"]["mean"][0] == pytest.approx(np.mean(entropies), rel=1e-4)
    assert found["max_probability"]["quantiles"]["0.5"][0] == pytest.approx(np.median(highest), rel=1e-4)
    assert len(found["state_cosine"]["mean"]) == 3


def test_tail_mass_is_what_a_top_k_cut_would_lose():
    wide = tiny_model("llama", vocab_size=3 * TAIL_TOKENS)
    model = GIRCSE(wide, tiny_tokenizer())
    step = model.inspect("soft tokens", num_steps=1, top_n=2)[0].steps[0]
    ids = torch.tensor([model.tokenizer("soft tokens", add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        shares = wide(input_ids=ids).logits[0, -1].softmax(-1).sort(descending=True).values
    assert step.tail_mass == pytest.approx(shares[TAIL_TOKENS:].sum().item(), rel=1e-3)
    assert len(step.tokens) == 2
    small = GIRCSE(tiny_model("llama"), tiny_tokenizer()).inspect("a", num_steps=1)[0].steps[0]
    assert VOCAB < TAIL_TOKENS
    assert small.tail_mass == 0.0


def test_encoded_steps_go_through_small_windows_unchanged(model, tmp_path, monkeypatch):
    monkeypatch.setattr("gircse.analysis.encoded_steps._WINDOW_BYTES", 4 * 32 * 9 * 2)  # two texts at once
    found = EncodedSteps.of(
        model, DOCUMENTS, STEPS, tmp_path / "e.npy", instruction=None, batch_size=None, max_length=512
    )
    steps = model.encode(DOCUMENTS, num_steps=9, return_steps=True)
    for k in STEPS:
        np.testing.assert_allclose(found.at(k), steps[:, k - 1], atol=1e-5)
    assert found.embeddings.base is not None  # lies in the file
    assert (tmp_path / "e.npy").stat().st_size >= 4 * len(STEPS) * len(DOCUMENTS) * 32


def test_scratch_files_go_away(model, tmp_path):
    analyze(model, TASK, steps=(1, 2), sample=1, scratch=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("moved", "expected"),
    [
        ([], 0),
        ([1e-4], 0),
        ([1e-4, 1e-4], 3),
        ([0.1, 1e-4, 0.1, 1e-4, 1e-5], 6),
        ([0.1, 0.1, 0.1], 0),
    ],
)
def test_where_a_text_settles(moved, expected):
    assert settled_at(np.array(moved)) == expected


def test_texts_settle_where_auto_stops_them(model):
    """The rule here and the one that stops texts in `encode(num_steps="auto")` are the same rule."""
    steps = model.encode(DOCUMENTS, num_steps=40, return_steps=True)
    stopped = model.encode(DOCUMENTS, num_steps="auto", max_steps=40)
    movement = Movement(40)
    for row, last in zip(steps, stopped, strict=True):
        movement.add(row)
        k = movement.settled[-1] or 40
        np.testing.assert_allclose(row[k - 1], last, atol=1e-5)
    assert any(movement.settled)  # otherwise nothing was compared
    middle = sorted(k or 99 for k in movement.settled)[(len(DOCUMENTS) - 1) // 2]
    assert movement.summary()["settled"]["median"] == (middle if middle != 99 else None)


def test_no_measured_gain_is_a_warning_and_a_gain_is_none(model, monkeypatch):
    def warned(values: dict[int, float]) -> list[str]:
        ranks = iter([[[9]] * len(QUERIES), *([[values[k]]] * len(QUERIES) for k in STEPS)])
        monkeypatch.setattr("gircse.analysis.analyze.relevant_ranks", lambda *args, **options: next(ranks))
        return [w["signature"] for w in analyze(model, TASK, steps=STEPS, sample=1)["warnings"]]

    assert "no-gain" in warned({1: 2, 2: 2, 4: 2, 9: 2})
    assert "no-gain" not in warned({1: 5, 2: 3, 4: 2, 9: 1})


def test_collapsed_soft_tokens_are_found_in_the_data(model):
    """A temperature near zero makes every soft token one word."""
    cold = GIRCSE(model.base, model.tokenizer, model.config.__class__(temperature=1e-3))
    signs = [w["signature"] for w in analyze(cold, TASK, steps=(1, 3), sample=6)["warnings"]]
    assert "near-one-hot" in signs
    assert "near-one-hot" not in [w["signature"] for w in analyze(model, TASK, steps=(1, 3), sample=6)["warnings"]]


@pytest.mark.parametrize(("share", "fires"), [(0.8, True), (0.2, False), (None, False)])
def test_repeated_states_are_found_in_the_data(model, monkeypatch, share, fires):
    monkeypatch.setattr(
        "gircse.analysis.analyze.anatomy",
        lambda *args, **options: {"near_one_hot_share": 0.0, "redundant_share": share},
    )
    signs = [w["signature"] for w in analyze(model, TASK, steps=(1, 3), sample=1)["warnings"]]
    assert ("redundant" in signs) is fires
    assert "near-one-hot" not in signs


def test_table_and_plots(result, tmp_path):
    table = analysis_table(json.loads(json.dumps(result), object_hook=_integer_keys))
    lines = table.splitlines()
    assert lines[0].split()[:2] == ["K", "ndcg@10"]
    assert [line.split()[0] for line in lines[2:7]] == ["0", "1", "2", "4", "9"]
    assert "Refinement: best at K = " in table
    files = plot_analysis(result, tmp_path)
    assert {f.name for f in files} == {
        f"{n}.{s}" for n in ("quality", "movement", "soft_tokens", "clustering") for s in ("png", "svg")
    }
    assert "Where does refinement stop?" in (tmp_path / "quality.svg").read_text()
    before = (tmp_path / "quality.svg").read_bytes()
    plot_analysis(result, tmp_path)
    assert (tmp_path / "quality.svg").read_bytes() == before


def _integer_keys(values: dict) -> dict:
    return {int(k) if k.isdigit() else k: v for k, v in values.items()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": ()}, "steps: got none"),
        ({"steps": (0, 1)}, "steps: got 0, expected integers >= 1"),
        ({"sample": 0}, "sample: got 0"),
    ],
)
def test_bad_arguments_are_named(model, options, message):
    with pytest.raises(ValueError, match=message):
        analyze(model, TASK, **options)
