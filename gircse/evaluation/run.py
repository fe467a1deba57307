"""mteb's tasks at several numbers of steps, every text encoded once."""

from __future__ import annotations

import copy
import random
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gircse.evaluation import STEPS, require
from gircse.evaluation.results import ENGLISH_BENCHMARK, Evaluation, TaskScores, write_results
from gircse.evaluation.step_store import StepStore, check_steps
from gircse.files.lock import folder_lock

mteb = require("mteb")

from mteb.abstasks import AbsTask  # noqa: E402
from mteb.abstasks.aggregated_task import AbsTaskAggregate  # noqa: E402
from mteb.cache import ResultCache  # noqa: E402
from sklearn.exceptions import UndefinedMetricWarning  # noqa: E402

from gircse.evaluation.encoder import GIRCSEEncoder  # noqa: E402
from gircse.evaluation.offline_tasks import OFFLINE, offline_benchmark  # noqa: E402

if TYPE_CHECKING:
    from gircse.model import GIRCSE


def find_tasks(benchmark: str | None = None, names: Sequence[str] = ()) -> list[AbsTask]:
    """The tasks of a benchmark (mteb's, or "offline"), or tasks by name (mteb's, or those of the offline benchmark).

    A task of MTEB(eng, v2) is what it is there: its English part, its test split.

    Raises:
        ValueError: no such benchmark or task; mteb's message names similar ones.
    """
    try:
        if benchmark is not None:
            return list(offline_benchmark().tasks if benchmark == OFFLINE else mteb.get_benchmark(benchmark).tasks)
        known = [*offline_benchmark().tasks, *mteb.get_benchmark(ENGLISH_BENCHMARK).tasks]
        by_name = {task.metadata.name: task for task in known}
        return [by_name[name] if name in by_name else mteb.get_task(name) for name in names]
    except KeyError as error:
        raise ValueError(f"{'tasks' if benchmark is None else 'benchmark'}: {error.args[0]}") from None


def evaluate_tasks(
    model: GIRCSE,
    tasks: Iterable[AbsTask],
    output: str | Path,
    *,
    steps: Sequence[int] = STEPS,
    benchmark: str | None = None,
    name: str | None = None,
    instructions: Mapping[str, str] | None = None,
    max_length: int = 512,
    batch_size: int | None = None,
    overwrite: bool = False,
    log: bool = True,
) -> Evaluation:
    """Scores of a model on mteb's tasks at each K of `steps`, for the price of encoding at the largest.

    Task by task: texts are encoded when the task first asks for them and kept on disk after each of `steps` until the
    task is done (texts x steps x D x 4 bytes below `output`). Results lie in `output` as mteb writes them
    (results/MODEL/REVISION/experiments/..num_steps_K/TASK.json); those that are there already are not computed again,
    so an interrupted run goes on where it stopped. summary.json, scores.txt and the plots are written anew.

    Args:
        tasks: mteb tasks; see `find_tasks`.
        steps: numbers of steps >= 1, or [0] alone.
        benchmark: what the tasks are together; "MTEB(eng, v2)" puts the paper's figures beside them.
        name, instructions, max_length, batch_size: see `GIRCSEEncoder`.
        overwrite: compute results that are there already.
        log: a line on standard error per task.

    Raises:
        ValueError: bad `steps`.
        ModuleNotFoundError: matplotlib, for the plots, is not installed.
        FolderInUse: another process writes to `output` (an OSError).
        ConnectionError: a task's data are neither on this machine nor to be had; results so far are kept.
    """
    output, steps = Path(output), check_steps(steps)
    if len(steps) > 1:
        require("matplotlib")  # now rather than after hours
    cache = ResultCache(output)
    scores: list[TaskScores] = []
    with folder_lock(output), StepStore(steps, output) as store:
        encoder = GIRCSEEncoder(
            model,
            num_steps=steps[-1],
            name=name,
            instructions=instructions,
            max_length=max_length,
            batch_size=batch_size,
            store=store,
        ).with_these_weights()
        tasks = list(tasks)
        for number, task in enumerate(tasks, start=1):
            scores.append(_evaluate_task(encoder, task, steps, cache, overwrite))
            if log:
                values = "  ".join(f"K={k} {100 * value:.2f}" for k, value in scores[-1].scores.items())
                print(f"[{number}/{len(tasks)}] {task.metadata.name}: {values}", file=sys.stderr, flush=True)
        meta = encoder.mteb_model_meta
        evaluation = Evaluation(str(meta.name), str(meta.revision), benchmark, scores, store.encoded)
        write_results(evaluation, output)
    return evaluation


def _evaluate_task(
    encoder: GIRCSEEncoder, task: AbsTask, steps: Sequence[int], cache: ResultCache, overwrite: bool
) -> TaskScores:
    encoders = {k: encoder.at_steps(k) for k in steps}
    if isinstance(task, AbsTaskAggregate):
        for part in task.metadata.tasks:  # one by one, so that only one of them lies on disk
            _evaluate_task(encoder, part, steps, cache, overwrite)
        for k in steps:  # put together anew, from the parts' results
            cache.get_task_result_path(task.metadata.name, encoders[k].mteb_model_meta).unlink(missing_ok=True)
        stale = set()
    else:
        stale = {k for k in steps if overwrite or not _is_current(cache, task, encoders[k])}
    ours = bool(stale) and not task.data_loaded
    if ours:
        _load(task)
    # A task draws its samples from generators of its own: every K gets the same ones, and those of a run by itself.
    generators = copy.deepcopy((task.rng_state, task.np_rng))
    scores = {}
    for k in steps:
        task.rng_state, task.np_rng = copy.deepcopy(generators)
        random.seed(task.seed)
        np.random.seed(task.seed)  # noqa: NPY002 - scikit-learn's default, which mteb seeds as well
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UndefinedMetricWarning)  # a class that is never predicted, many times
            mteb.evaluate(
                encoders[k],
                task,
                cache=cache,
                overwrite_strategy="always" if k in stale else "only-missing",
                show_progress_bar=False,
                co2_tracker=False,
            )
        result = cache.load_task_result(task.metadata.name, encoders[k].mteb_model_meta, raise_if_not_found=True)
        assert result is not None
        scores[k] = float(result.get_score())  # of the file, which has six digits: the same in the next run
    if ours:
        task.unload_data()
    assert encoder.store is not None
    encoder.store.clear()
    return TaskScores(task.metadata.name, task.metadata.type, task.metadata.main_score, scores)


def _is_current(cache: ResultCache, task: AbsTask, encoder: GIRCSEEncoder) -> bool:
    """Whether the cache has the whole result, of this revision of the data (mteb itself takes a complete result of any
    revision)."""
    result = cache.load_task_result(task.metadata.name, encoder.mteb_model_meta)
    return result is not None and not result.get_missing_evaluations(task) and result.is_mergeable(task)


def _load(task: AbsTask) -> None:
    try:
        task.load_data()
    except Exception as error:
        if not isinstance(error, ConnectionError) and type(error).__module__.split(".")[0] not in _HUB:
            raise
        data: Any = task.metadata.dataset
        raise ConnectionError(
            f"task {task.metadata.name}: its data set {data['path']} is not in the cache of this machine and could not "
            f"be downloaded ({error}). With a network: unset HF_HUB_OFFLINE and start again, finished tasks are kept; "
            f"without one: copy the Hugging Face cache (HF_HOME) here, or take --benchmark {OFFLINE}"
        ) from error


_HUB = ("datasets", "huggingface_hub", "httpx", "httpx2", "requests")  # who raises when a download fails
