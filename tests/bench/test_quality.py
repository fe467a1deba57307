"""bench/quality.py: what is measured and how, and that a study goes on where it stopped."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from bench import plots, quality, quality_corpora
from bench.blocks_quality import figure, main_table, tried
from bench.documents import Results
from bench.quality_arms import ARMS, MOST_BUDGET, SCALES
from bench.quality_corpora import StudyCorpus, debian_packages
from bench.quality_groups import Trainer
from bench.quality_measure import ndcg
from bench.quality_stats import difference, estimate
from bench.quality_tokens import GroupTokens
from gircse import GIRCSE
from gircse.data.rows import parse_row
from gircse.evaluation.metrics import metrics_of
from gircse.train import train
from gircse.train.config import TrainConfig
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


def study_tokens(corpus: StudyCorpus, path: Path, seeds: list[int]) -> GroupTokens:
    config = SCALES["tiny"].config(ARMS["block"], max_steps=2 * MOST_BUDGET)
    GroupTokens.of([corpus], seeds, tiny_tokenizer(), config).save(path)
    return GroupTokens.load(path)


@pytest.mark.parametrize("name", ["factor-0.1", "ten-steps"])
def test_each_run_of_a_group_is_trained_as_by_itself(name, base, corpus, tmp_path):
    """`gircse.train.train` from the same adapter on the same rows ends with the same adapter."""
    seeds = [4, 7]
    config = SCALES["tiny"].config(ARMS[name])
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokens = study_tokens(corpus, tmp_path / "tokens.npz", seeds)
    trainer = Trainer(model, tokens, config)
    trainer.adapters.reset(seeds)
    trainer.adapters.save(tmp_path / "start", 1, config)
    with torch.no_grad():  # what float16 kept of it
        for layer in trainer.adapters.layers:
            layer.a.copy_(layer.a.half())
    found = trainer.train(ARMS[name], config)

    settings = {"adapter": str(tmp_path / "start"), "model": base, "output": str(tmp_path / "run"), "device": "cpu"}
    lora = {name: TrainConfig.__dataclass_fields__[name].default for name in ("lora_r", "lora_alpha", "lora_dropout")}
    single = replace(config, seed=7, progress=False, micro_batch_tokens=4096, dtype="float32", **settings, **lora)
    expected = train(single, rows=[parse_row(row) for row in corpus.rows()])
    for step, entry in enumerate(expected.log):
        assert found["losses"][step][1] == pytest.approx(entry["losses"], rel=1e-4)
        assert found["grad_norm"][step][1] == pytest.approx(entry["grad_norm"], rel=1e-3)
    ends = dict(expected.model.base.named_parameters())
    for path, layer in zip(trainer.adapters.names, trainer.adapters.layers, strict=True):
        end = ends[f"base_model.model.{path}.lora_B.default.weight"]
        torch.testing.assert_close(layer.b[1], end, rtol=1e-3, atol=2e-5)
        assert end.abs().max() > 1e-4


def test_ranks_in_a_string_are_the_metrics():
    ranks = [1, 3, 10, 11, 240]
    assert ndcg("13a00").mean() == pytest.approx(metrics_of([[rank] for rank in ranks], 10)["ndcg@10"])


def test_a_study_is_measured_as_the_model_that_it_saves(base, corpus, tmp_path, capsys):
    study_tokens(corpus, tmp_path / "tokens.npz", [0, 1])
    out, record = tmp_path / "runs", tmp_path / "results" / "quality-tiny.json"
    command = ["--scale", "tiny", "--base", base, "--tokens", str(tmp_path / "tokens.npz"), "--out", str(out)]
    arms = ["--arms", "ten-steps-long,distilled,block,new-part,dropped-keys", "--device", "cpu"]
    assert quality.main([*command, *arms]) == 0
    assert capsys.readouterr().out.count("measured in") == 5
    assert quality.main([*command, *arms]) == 0
    assert "measured in" not in capsys.readouterr().out  # a finished arm is not repeated

    model = GIRCSE.from_pretrained(base, adapter=out / "adapters" / "ten-steps-long" / "code-1")
    found = json.loads((out / "ten-steps-long.code.1.json").read_text())
    ours = model.encode(corpus.queries, instruction=corpus.instruction, num_steps=3, max_length=40)
    theirs = model.encode(corpus.documents, num_steps=3, max_length=12)
    rank = 1 + (ours @ theirs.T > (ours * theirs[: len(ours)]).sum(1)[:, None] + 1e-4).sum(1)
    assert [int(digit, 16) for digit in found["ranks"][3]] == [0 if r > 10 else r for r in rank.tolist()]

    assert quality.main([*command, "--collect", str(record)]) == 0
    results = Results(record.parent)
    for render in (main_table, tried, figure):
        assert "block" in render(results) or "figures/quality-tiny.png" in render(results)
    plots.draw(results.figures["quality-tiny"], tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(40):
        found = estimate(rng.normal(0.3, 1.0, size=(1, 80)))
        hits += found.low <= 0.3 <= found.high
    assert 34 <= hits <= 40


def test_differences_are_paired_over_common_seeds():
    def runs(*digits: str) -> dict[int, dict]:
        return {seed: {"ranks": {"0": text}} for seed, text in enumerate(digits)}

    better, worse = runs("1111", "2222"), runs("2222", "2222", "0000")
    found = difference(better, worse, 0, 0)
    assert found is not None
    assert found.mean == pytest.approx((1 - 1 / np.log2(3)) / 2)
    assert found.seeds == 2
    assert difference(better, {7: worse[0]}, 0, 0) is None
    same = difference(better, better, 0, 0)
    assert same is not None
    assert (same.low, same.high, same.clear) == (0.0, 0.0, False)


def test_bad_options(capsys):
    with pytest.raises(SystemExit) as stopped:
        quality.main(["--arms", "block,nothing"])
    assert stopped.value.code == 2
    assert "--arms: got 'nothing'" in capsys.readouterr().err


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
    drawn = quality_corpora.balanced(scored, 16)
    values, counts = np.unique([score for *_, score in drawn], return_counts=True)
    assert dict(zip(values.tolist(), counts.tolist(), strict=True)) == {0.0: 4, 0.1: 4, 0.5: 4, 0.9: 4}
    with pytest.raises(ValueError, match="level 1"):
        quality_corpora.balanced(scored, 40)
