"""Scores at several numbers of steps as a table, a JSON file and a plot, next to the paper's figures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gircse.files.atomic import new_file
from gircse.show.tables import text_table

ENGLISH_BENCHMARK = "MTEB(eng, v2)"
ENGLISH_NAMES = (ENGLISH_BENCHMARK, "MTEB(eng)")
ENGLISH_TASKS = 41
# GIRCSE's own averages over the 41 tasks, K = 20 at most (arXiv 2509.24291; docs/method.md §8)
PAPER: Mapping[str, float] = {"paper, Mistral-7B": 67.83, "paper, Qwen2.5-7B": 67.67}


@dataclass(frozen=True)
class TaskScores:
    """A task's main score (0..1) at each number of steps."""

    task: str
    type: str
    metric: str
    scores: Mapping[int, float]


@dataclass(frozen=True)
class Evaluation:
    """All tasks of a run. `encoded_texts`: how many were encoded for it (none, where every result was there)."""

    model: str
    revision: str
    benchmark: str | None
    tasks: Sequence[TaskScores]
    encoded_texts: int

    @property
    def steps(self) -> list[int]:
        return list(self.tasks[0].scores) if self.tasks else []

    @property
    def mean(self) -> dict[int, float]:
        """{K: mean over the tasks}, as mteb's "Mean (Task)"."""
        return _mean(self.tasks, self.steps)

    @property
    def mean_by_type(self) -> dict[str, dict[int, float]]:
        types = list(dict.fromkeys(task.type for task in self.tasks))
        return {name: _mean([t for t in self.tasks if t.type == name], self.steps) for name in types}

    @property
    def paper(self) -> Mapping[str, float]:
        """The paper's averages, where all tasks of its benchmark were run."""
        whole = self.benchmark in ENGLISH_NAMES and len(self.tasks) == ENGLISH_TASKS
        return PAPER if whole else {}


def _mean(tasks: Sequence[TaskScores], steps: Sequence[int]) -> dict[int, float]:
    return {k: sum(task.scores[k] for task in tasks) / len(tasks) for k in steps}


def scores_table(evaluation: Evaluation) -> str:
    """One line a task, then the means by type (where they differ from the tasks) and over all, x 100; the paper's
    figures below where they compare."""

    def line(name: str, metric: str, scores: Mapping[int, float]) -> list[object]:
        return [name, metric, *(f"{100 * scores[k]:.2f}" for k in evaluation.steps)]

    rows = [line(task.task, task.metric, task.scores) for task in evaluation.tasks]
    by_type = evaluation.mean_by_type
    if len(by_type) < len(evaluation.tasks):
        rows += [line(f"mean of {name}", "", scores) for name, scores in by_type.items()]
    if len(evaluation.tasks) > 1:
        rows.append(line(f"mean of {len(evaluation.tasks)} tasks", "", evaluation.mean))
    rows += [[name, "", *([f"{value:.2f}"] * len(evaluation.steps))] for name, value in evaluation.paper.items()]
    return text_table(["task", "metric", *(f"K={k}" for k in evaluation.steps)], rows)


def write_results(evaluation: Evaluation, folder: Path) -> None:
    """Writes summary.json, scores.txt and, where there are two numbers of steps or more, scores.png and scores.svg.

    Raises:
        ModuleNotFoundError: matplotlib, for the plots, is not installed; the other files are there.
    """
    summary: dict[str, Any] = {
        "model": evaluation.model,
        "revision": evaluation.revision,
        "benchmark": evaluation.benchmark,
        "steps": evaluation.steps,
        "tasks": [
            {"task": t.task, "type": t.type, "metric": t.metric, "scores": _keys(t.scores)} for t in evaluation.tasks
        ],
        "mean": _keys(evaluation.mean),
        "mean_by_type": {name: _keys(scores) for name, scores in evaluation.mean_by_type.items()},
        "paper": dict(evaluation.paper),
    }
    with new_file(folder / "summary.json") as partial:
        partial.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    with new_file(folder / "scores.txt") as partial:
        partial.write_text(scores_table(evaluation) + "\n", encoding="utf-8")
    if len(evaluation.steps) > 1:
        plot_scores(evaluation, [folder / "scores.png", folder / "scores.svg"])


def _keys(scores: Mapping[int, float]) -> dict[str, float]:
    return {str(k): value for k, value in scores.items()}


def plot_scores(evaluation: Evaluation, paths: Sequence[Path]) -> None:
    """Score versus K: a line for each type of task, a heavy one for the mean, dashed ones for the paper's averages.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from gircse.evaluation import require

    require("matplotlib").use("Agg")
    from matplotlib import pyplot

    steps, types = evaluation.steps, evaluation.mean_by_type
    figure, axes = pyplot.subplots(figsize=(7, 4.3), layout="constrained")
    if len(evaluation.tasks) > 1:
        for (name, scores), marker in zip(types.items(), "osD^vPX*<>hp" * 3, strict=False):
            count = sum(task.type == name for task in evaluation.tasks)
            label = f"{name} ({count})" if count > 1 else name
            axes.plot(steps, [100 * scores[k] for k in steps], marker=marker, markersize=4, linewidth=1, label=label)
    only = evaluation.tasks[0].task if len(evaluation.tasks) == 1 else f"mean of {len(evaluation.tasks)} tasks"
    mean = [100 * evaluation.mean[k] for k in steps]
    axes.plot(steps, mean, color="black", marker="o", linewidth=2.4, label=only)
    for (name, value), style in zip(evaluation.paper.items(), ("--", ":"), strict=False):
        axes.axhline(value, color="0.35", linestyle=style, linewidth=1.2, label=f"{name}: {value}")
    axes.set(xlabel="soft tokens K at inference", ylabel="main score x 100")
    axes.set_title(f"{evaluation.benchmark or 'mteb tasks'}: {evaluation.model}", fontsize=10)
    axes.set_xticks(steps)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    for path in paths:
        with new_file(path) as partial:
            figure.savefig(partial, dpi=150)
    pyplot.close(figure)
