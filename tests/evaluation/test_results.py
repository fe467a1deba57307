from __future__ import annotations

import json

import pytest

from gircse.evaluation.results import PAPER, Evaluation, TaskScores, scores_table, write_results


def evaluation(count=3, benchmark="MTEB(eng, v2)", steps=(1, 5)):
    tasks = [
        TaskScores(f"Task{n}", "STS" if n % 2 else "Retrieval", "ndcg", {k: n / 100 + k / 1000 for k in steps})
        for n in range(count)
    ]
    return Evaluation("org/model", "abc", benchmark, tasks, 10)


def test_means():
    got = evaluation()
    assert got.mean == pytest.approx({1: 0.011, 5: 0.015})
    assert got.mean_by_type["Retrieval"] == pytest.approx({1: 0.011, 5: 0.015})
    assert got.mean_by_type["STS"] == pytest.approx({1: 0.011, 5: 0.015})


def test_the_paper_is_beside_the_whole_benchmark_only():
    assert evaluation(41).paper == PAPER == {"paper, Mistral-7B": 67.83, "paper, Qwen2.5-7B": 67.67}
    assert evaluation(40).paper == {}
    assert evaluation(41, benchmark="another").paper == {}
    lines = scores_table(evaluation(41)).splitlines()
    assert lines[0].split() == ["task", "metric", "K=1", "K=5"]
    assert lines[-2].split()[-2:] == ["67.83", "67.83"]
    assert lines[-3].startswith("mean of 41 tasks")
    assert lines[-3].split()[-2:] == ["20.10", "20.50"]
    assert lines[-5].startswith("mean of Retrieval")
    assert "paper" not in scores_table(evaluation(40))


def test_means_are_shown_where_they_say_something():
    assert "mean" not in scores_table(evaluation(1))
    assert [line.split()[2] for line in scores_table(evaluation(2)).splitlines() if "mean" in line] == ["2"]


@pytest.mark.parametrize("count", [1, 41])
def test_files(count, tmp_path):
    pytest.importorskip("matplotlib")
    write_results(evaluation(count), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"summary.json", "scores.txt", "scores.png", "scores.svg"}
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["mean"]["5"] == pytest.approx(evaluation(count).mean[5])
    assert summary["tasks"][0]["scores"] == {"1": 0.001, "5": 0.005}
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")


def test_no_plot_of_a_single_point(tmp_path):
    write_results(evaluation(steps=(5,)), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"summary.json", "scores.txt"}
