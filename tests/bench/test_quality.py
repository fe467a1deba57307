"""bench/quality.py: what is measured and how, and that a study goes on where it stopped."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from bench import quality, quality_corpora
from bench.blocks_quality import ablation, negatives, other, poolings, scaling, soft_tokens, steps
from bench.documents import Results
from bench.quality_arms import ARMS, SCALES
from bench.quality_corpora import StudyCorpus, debian_packages
from bench.quality_run import pooled, scores, states
from bench.quality_stats import difference, estimate
from gircse import GIRCSE, GircseConfig
from gircse.evaluation.metrics import metrics_of
from tests.tiny_models import tiny_model, tiny_tokenizer

NEEDS_APT = pytest.mark.skipif(not shutil.which("/usr/lib/apt/apt-helper"), reason="no Debian system")


@pytest.fixture(scope="module")
def corpus() -> StudyCorpus:
    words = ["sea", "tide", "moon", "bread", "oven", "flour", "violin", "chord", "tempo"]
    documents = [f"{first} and {second}" for first in words for second in words if first < second]
    return StudyCorpus(
        name="code",
        instruction="Retrieve it",
        training=[(word, f"{word} {word}") for word in words],
        queries=[document.split()[0] for document in documents[:6]],
        documents=documents,
        relevant=list(range(6)),
        labels=[document[0] for document in documents],
        pairs=[(i, j, float((i + j) % 4)) for i in range(8) for j in range(i)],
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("quality") / "tiny"
    tiny_model("llama-tied").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def test_one_pass_gives_what_every_number_of_steps_gives(base, corpus):
    texts = corpus.documents[:5]
    for pooling, with_prompt in (("mean", False), ("last", False), ("weighted", False), ("mean", True)):
        config = GircseConfig(pooling=pooling, include_prompt_state=with_prompt)
        model = GIRCSE(tiny_model("llama-tied"), tiny_tokenizer(), config).eval()
        found = pooled(states(model, texts, "find", 24), pooling, with_prompt=with_prompt)
        for k in (0, 1, 7, 20):
            expected = model.encode(texts, instruction="find", num_steps=k, max_length=24, normalize=False)
            np.testing.assert_allclose(found[:, k], expected, rtol=0, atol=2e-5)


def test_ranks_in_a_string_are_the_metrics():
    ranks = [1, 3, 10, 11, 240]
    found = scores("13a00")
    expected = metrics_of([[rank] for rank in ranks], 10)
    for name in ("ndcg@10", "mrr@10"):
        assert found[name].mean() == pytest.approx(expected[name])


def test_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(40):
        found = estimate(rng.normal(0.3, 1.0, size=(1, 80)))
        hits += found.low <= 0.3 <= found.high
    assert 34 <= hits <= 40


def test_differences_are_paired_over_common_seeds():
    def runs(*digits: str) -> dict[int, dict]:
        return {seed: {"ranks": [text]} for seed, text in enumerate(digits)}

    better, worse = runs("1111", "2222"), runs("2222", "2222", "0000")
    found = difference(better, worse, 0, 0, "mrr@10")
    assert found is not None
    assert found.mean == pytest.approx(0.25)
    assert found.seeds == 2
    assert difference(better, {7: worse[0]}, 0, 0) is None
    same = difference(better, better, 0, 0)
    assert same is not None
    assert (same.low, same.high, same.clear) == (0.0, 0.0, False)


def test_every_arm_sees_as_many_texts_and_is_a_valid_run():
    scale = SCALES["small"]
    usual = scale.train["max_steps"] * scale.train["batch_size"]
    for arm in ARMS.values():
        config = scale.config(arm, seed=3, model="m", output="o")
        assert config.max_steps is not None
        seen = config.max_steps * config.batch_size
        assert abs(seen - arm.budget * usual) <= config.batch_size / 2


def test_a_study_goes_on_and_is_rendered(base, corpus, tmp_path, monkeypatch, capsys):
    record, work = tmp_path / "results" / "quality-tiny.json", tmp_path / "work"
    corpus.save(work / "tiny" / "code.json")
    common = ["--scale", "tiny", "--corpora", "code", "--base", base, "--work", str(work), "--out", str(record)]
    assert quality.main([*common, "--arms", "untrained,encoder-only,gircse", "--seeds", "0"]) == 0
    assert quality.main([*common, "--arms", "gircse,range,negatives-3", "--seeds", "0,1"]) == 0
    runs = quality.finished(record, corpus)
    wanted = {("code", arm, 0) for arm in ("untrained", "encoder-only", "gircse", "range", "negatives-3")}
    assert set(runs) == wanted | {("code", arm, 1) for arm in ("gircse", "range", "negatives-3")}
    assert capsys.readouterr().out.count("MRR") == 8

    def never(*args, **kwargs):
        raise AssertionError("a finished run was repeated")

    monkeypatch.setattr(quality, "run", never)
    assert quality.main([*common, "--arms", "untrained,gircse", "--seeds", "0,1"]) == 0

    results = Results(record.parent)
    for render in (ablation, steps, scaling, poolings, other, negatives, soft_tokens):
        assert "`gircse`" in render(results) or "negatives a query" in render(results)
    (figure,) = results.figures.values()
    figure.draw(figure.data, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000

    changed = json.loads(record.read_text())
    changed["runs"][0]["fingerprint"] = "another"
    record.write_text(json.dumps(changed))
    assert len(quality.finished(record, corpus)) == len(runs) - 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arms", "gircse,nothing"], "--arms: got 'nothing'"),
        (["--corpora", "poems"], "--corpora: got 'poems'"),
        (["--seeds", "a"], "--seeds: got 'a'"),
    ],
)
def test_bad_options(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        quality.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def _paragraph(name: str, **fields: str) -> str:
    return "\n".join([f"Package: {name}", *(f"{key.replace('_', '-')}: {value}" for key, value in fields.items())])


@NEEDS_APT
def test_packages_are_read_from_the_lists_of_apt(tmp_path):
    sentence = "it shows the tides of a harbour as a curve over days and weeks, for sailors and fishermen."
    index = [
        _paragraph(
            "xtide", Section="science", Tag="field::geology,\n use::viewing, role::program", Description_md5="1"
        ),
        _paragraph("xtide-data", Section="science", Source="xtide (2.1)", Description_md5="2"),
        _paragraph("libtide-dev", Section="libdevel", Description_md5="1"),
        _paragraph("short", Section="net", Description_md5="3"),
    ]
    texts = [
        _paragraph("xtide", Description_md5="1", Description_en=f"tide predictor for sailors\n {sentence}\n .\n More."),
        _paragraph("xtide-data", Description_md5="2", Description_en=f"harmonics of the harbours\n Data: {sentence}"),
        _paragraph("short", Description_md5="3", Description_en="a very small tool\n It is small."),
    ]
    (tmp_path / "here_Packages").write_text("\n\n".join(index) + "\n\n")
    (tmp_path / "here_i18n_Translation-en").write_text("\n\n".join(texts) + "\n\n")
    (found,) = debian_packages(tmp_path)
    assert found.synopsis == "tide predictor for sailors"
    assert found.description == f"{sentence} More."
    assert found.tags == {"field::geology", "use::viewing"}


def test_no_lists_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="apt-get update"):
        debian_packages(tmp_path)


def test_pairs_are_drawn_from_every_level():
    scored = [(0, i, score) for i, score in enumerate([0.0] * 50 + [0.1] * 5 + [0.5] * 5 + [0.9] * 5)]
    drawn = quality_corpora._balanced(scored, 16)
    values, counts = np.unique([score for *_, score in drawn], return_counts=True)
    assert dict(zip(values.tolist(), counts.tolist(), strict=True)) == {0.0: 4, 0.1: 4, 0.5: 4, 0.9: 4}
    with pytest.raises(ValueError, match="level 1"):
        quality_corpora._balanced(scored, 40)


def test_constant_embeddings_say_nothing():
    from bench.quality_run import _similarity

    found = _similarity(torch.ones(9, 2, 4).numpy(), [(i, i + 1, float(i)) for i in range(8)])
    assert found["spearman"] == [0.0, 0.0]
