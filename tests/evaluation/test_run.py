"""mteb's tasks from end to end: our offline ones and mteb's own mock tasks, with a tiny random model."""

from __future__ import annotations

import json

import numpy as np
import pytest

mteb = pytest.importorskip("mteb")

from mteb import mocks  # noqa: E402
from mteb.abstasks.aggregate_task_metadata import AggregateTaskMetadata  # noqa: E402
from mteb.abstasks.aggregated_task import AbsTaskAggregate  # noqa: E402

from gircse.evaluation.encoder import GIRCSEEncoder  # noqa: E402
from gircse.evaluation.offline_tasks import StdlibAreaClustering, offline_benchmark  # noqa: E402
from gircse.evaluation.run import evaluate_tasks, find_tasks  # noqa: E402
from gircse.files.lock import FolderInUse, folder_lock  # noqa: E402

# a token of the tiny model is a character: short instructions leave room for the texts
SHORT = {task.metadata.name: "retrieve" if "Code" in task.metadata.name else "x" for task in offline_benchmark().tasks}
OPTIONS = {"instructions": SHORT, "max_length": 64, "log": False}
MOCKS = [task for task in mocks.MOCK_TASK_TEST_GRID_MONOLINGUAL if task.metadata.modalities == ["text"]]


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch):
    """They are looked at in test_results and test_cli."""
    monkeypatch.setattr("gircse.evaluation.results.plot_scores", lambda evaluation, paths: None)


def test_offline_tasks_run_once_and_then_from_the_cache(model, encoded, tmp_path):
    first = evaluate_tasks(model, offline_benchmark().tasks, tmp_path, steps=[5, 20], **OPTIONS)
    types = ["Retrieval", "Reranking", "Classification", "Clustering", "PairClassification", "STS"]
    assert [task.type for task in first.tasks] == types
    # one pass a text set serves both K: no text twice under one instruction
    assert first.encoded_texts == sum(map(len, encoded)) == sum(len(set(texts)) for texts in encoded)
    files = sorted((tmp_path / "results").rglob("Stdlib*.json"))
    assert len(files) == 12
    assert len({path.parent for path in files}) == 2
    for task in first.tasks:
        assert set(task.scores) == {5, 20}
        for k, score in task.scores.items():
            (path,) = [p for p in files if p.stem == task.task and p.parent.name.endswith(f"num_steps_{k}")]
            assert json.loads(path.read_text())["scores"]["test"][0]["main_score"] == score
    assert any(task.scores[5] != task.scores[20] for task in first.tasks)
    assert not list(tmp_path.glob(".steps*"))

    encoded.clear()
    second = evaluate_tasks(model, offline_benchmark().tasks, tmp_path, steps=[5, 20], **OPTIONS)
    assert second.tasks == first.tasks
    assert encoded == []
    assert second.encoded_texts == 0

    # mteb by itself, K by K, finds the same results
    for k in (5, 20):
        encoder = GIRCSEEncoder(model, num_steps=k, instructions=SHORT, max_length=64)
        own = mteb.evaluate(
            encoder, offline_benchmark().tasks, cache=mteb.ResultCache(tmp_path), show_progress_bar=False
        )
        assert [result.get_score() for result in own.task_results] == [task.scores[k] for task in first.tasks]
    assert encoded == []


def test_scores_are_those_of_a_run_by_itself(model, tmp_path):
    # the task draws random samples: K = 20, second in line, must get those that it would get alone
    (task,) = evaluate_tasks(model, [StdlibAreaClustering()], tmp_path, steps=[5, 20], **OPTIONS).tasks
    encoder = GIRCSEEncoder(model, num_steps=20, instructions=SHORT, max_length=64)
    alone = mteb.evaluate(encoder, StdlibAreaClustering(), cache=None, show_progress_bar=False)
    assert task.scores[20] == pytest.approx(alone.task_results[0].get_score(), abs=1e-6)  # mteb's files have six digits


def test_mock_tasks_of_mteb(model, tmp_path):
    got = evaluate_tasks(model, MOCKS, tmp_path, steps=[3], log=False)
    assert len(got.tasks) == len(MOCKS) > 10
    assert all(np.isfinite(list(task.scores.values())).all() for task in got.tasks)


def test_what_is_missing_is_computed_and_what_is_stale(model, encoded, tmp_path):
    def run(steps, task=None, **options):
        encoded.clear()
        evaluate_tasks(model, [task or mocks.MockSTSTask()], tmp_path, steps=steps, log=False, **options)
        return sum(map(len, encoded))

    texts = run([1, 5])
    assert texts > 0
    assert run([1, 5]) == 0
    assert run([1, 2, 5]) == texts
    assert run([1, 5], overwrite=True) == texts
    assert run([1, 5], max_length=40) == texts

    class Newer(mocks.MockSTSTask):
        metadata = mocks.MockSTSTask.metadata.model_copy(update={"dataset": {"path": "NA", "revision": "newer"}})

    assert run([1, 5], Newer()) == texts
    assert run([1, 5], Newer()) == 0


def test_aggregates_are_put_together_from_their_parts(model, encoded, tmp_path):
    class Both(AbsTaskAggregate):
        metadata = AggregateTaskMetadata(
            name="Both",
            description="two tasks",
            tasks=[mocks.MockSTSTask(), mocks.MockPairClassificationTask()],
            main_score="mean",
            type="STS",
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
        )

    whole = evaluate_tasks(model, [Both()], tmp_path, steps=[1, 3], log=False)
    encoded.clear()
    parts = evaluate_tasks(model, Both.metadata.tasks, tmp_path, steps=[1, 3], log=False)
    assert encoded == []
    assert whole.tasks[0].scores == pytest.approx(parts.mean)
    assert evaluate_tasks(model, [Both()], tmp_path, steps=[1, 3], log=False).tasks == whole.tasks
    assert encoded == []


def test_data_that_cannot_be_had_is_a_clear_error_and_keeps_what_is_done(model, tmp_path):
    (task,) = find_tasks(names=["STS12"])

    class Nowhere(type(task)):
        metadata = task.metadata.model_copy(update={"dataset": {"path": "gircse/none-such", "revision": "1"}})

    with pytest.raises(ConnectionError, match="task STS12: its data set gircse/none-such is not in .*HF_HOME"):
        evaluate_tasks(model, [mocks.MockSTSTask(), Nowhere()], tmp_path, steps=[1], log=False)
    assert list(tmp_path.rglob("MockSTSTask.json"))
    assert not list(tmp_path.glob(".steps*"))


def test_tasks_by_name():
    assert len(find_tasks("MTEB(eng, v2)")) == 41
    assert len(find_tasks("offline")) == 6
    own, theirs, other = find_tasks(names=["StdlibRelatednessSTS", "STS22.v2", "NFCorpus"])
    assert own.metadata.name == "StdlibRelatednessSTS"
    assert theirs.hf_subsets == ["en"]  # as the English benchmark has it
    assert other.metadata.type == "Retrieval"
    with pytest.raises(ValueError, match="tasks: .*STS99"):
        find_tasks(names=["STS99"])
    with pytest.raises(ValueError, match=r"benchmark: .*MTEB\(eng, v9\)"):
        find_tasks("MTEB(eng, v9)")


def test_one_process_at_a_time_in_an_output_folder(model, tmp_path):
    with folder_lock(tmp_path), pytest.raises(FolderInUse, match="another process is at work"):
        evaluate_tasks(model, [], tmp_path)
    assert not list(tmp_path.iterdir())
