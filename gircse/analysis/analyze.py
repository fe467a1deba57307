"""All checks of `gircse analyze`.

They answer four questions. Where does refinement stop (quality and movement for K up to 100)? Does clustering gain from
steps? Is GIRCSE better than an encoder-only baseline on the same data? What are its soft tokens made of? Every text is
encoded once, with the largest K; the embeddings after fewer steps are prefixes of the same pass.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gircse.analysis import SAMPLE, STEPS
from gircse.analysis.anatomy import anatomy
from gircse.analysis.movement import Movement
from gircse.analysis.statistics import paired_difference, plateau
from gircse.data.labelled_texts import LabelledTexts
from gircse.data.retrieval_task import RetrievalTask
from gircse.evaluation.clustering import kmeans, v_measure
from gircse.evaluation.metrics import metrics_of, relevant_ranks
from gircse.evaluation.step_store import StepStore, check_steps, encode_steps
from gircse.inspect.failures import SHARE, Finding, near_one_hot, no_gain, redundant
from gircse.integers import check_integer

if TYPE_CHECKING:
    from gircse.model import GIRCSE

METRIC = "ndcg@10"
CLUSTERING_SEEDS = 5


def analyze(
    model: GIRCSE,
    task: RetrievalTask,
    *,
    baseline: GIRCSE | None = None,
    clusters: LabelledTexts | None = None,
    steps: Sequence[int] = STEPS,
    sample: int = SAMPLE,
    batch_size: int | None = None,
    max_length: int | None = None,
    scratch: Path | None = None,
) -> dict[str, Any]:
    """Runs all checks.

    Args:
        model: the model to analyze. Its config's K counts as the K that it was trained with.
        task: queries and documents (`RetrievalTask.from_rows`). Movement counts a text that occurs twice once.
        baseline: encoder-only model, run with K = 0; None: K = 0 of `model` itself.
        clusters: labelled texts, or None: no clustering.
        steps: numbers of steps at which quality is measured; movement is measured at every one up to the largest.
        sample: how many texts' soft tokens are examined, spread evenly over queries and documents.
        batch_size, max_length: as for `GIRCSE.encode`.
        scratch: folder for temporary files of 4 * (texts) * (number of `steps` + 1) * D bytes, which keep memory
            independent of the number of texts; default: the system's.

    Returns:
        The contents of `analysis.json` (docs/inspecting.md), ready for `json.dumps`.

    Raises:
        ValueError: `steps` or `sample` is wrong.
        OSError: `scratch` is full.
    """
    steps = check_steps(steps, least=1)
    sample = check_integer("sample", sample, least=1)
    groups = {"queries": (task.queries, task.instruction), "documents": (task.documents, task.document_instruction)}
    movements = {name: Movement(steps[-1]) for name in groups}
    zero = model if baseline is None else baseline
    folder = Path(tempfile.gettempdir() if scratch is None else scratch)
    with StepStore([0], folder) as of_baseline, StepStore(steps, folder) as of_model:

        def embed(name: str, texts: list[str], instruction: str | None, k: int) -> np.ndarray:
            """[n, D] after k steps of the model, or for k = 0 of the baseline."""
            store, encoder = (of_model, model) if k else (of_baseline, zero)

            def encode(missing: list[str]) -> Iterable[np.ndarray]:
                stream = encode_steps(
                    encoder,
                    missing,
                    store.steps[-1],
                    instruction=instruction,
                    batch_size=batch_size,
                    max_length=max_length,
                )
                return movements[name].watch(stream) if k and name in movements else stream

            return store.embeddings(texts, k, encode, key=name)

        ranks = {}
        for k in (0, *steps):
            queries, documents = (embed(name, *group, k) for name, group in groups.items())
            ranks[k] = relevant_ranks(queries, documents, task.relevant, excluded=task.own_documents)
        clustering = None
        if clusters is not None:
            group = (clusters.texts, clusters.instruction)
            scores = {k: _cluster(embed("clusters", *group, k), clusters.labels) for k in (0, *steps)}
            clustering = {
                "texts": len(clusters.texts),
                "labels": len(set(clusters.labels)),
                "baseline": scores.pop(0),
                "v_measure": scores,
            }
    movement = {name: moved.summary() for name, moved in movements.items()}
    quality = {k: metrics_of(ranks[k], 10) for k in ranks}
    per_query = {k: _ndcg(ranks[k]) for k in ranks}
    baseline_per_query = per_query.pop(0)
    per_group = -(-sample // 2)
    tokens = anatomy(model, [_spread(*group, per_group) for group in groups.values()], steps[-1], max_length=max_length)
    result: dict[str, Any] = {
        "steps": list(steps),
        "trained_steps": model.config.num_steps,
        "texts": {name: len(texts) for name, (texts, _) in groups.items()},
        "metric": METRIC,
        "quality": {k: quality[k] for k in steps},
        "refinement": _refinement(per_query, movement),
        "movement": movement,
        "baseline": {
            "model": "K = 0 of the same model" if baseline is None else "K = 0 of the baseline model",
            "metrics": quality[0],
            "differences": {k: paired_difference(per_query[k], baseline_per_query) for k in steps},
        },
        "clustering": clustering,
        "soft_tokens": tokens,
    }
    result["warnings"] = [vars(warning) for warning in _warnings(result, per_query)]
    return result


def _spread(texts: list[str], instruction: str | None, count: int) -> tuple[list[str], str | None]:
    """At most `count` of the texts, evenly spaced."""
    count = min(count, len(texts))
    return [texts[i * len(texts) // count] for i in range(count)], instruction


def _ndcg(ranks: list[list[int]]) -> np.ndarray:
    """Each query's own nDCG@10."""
    return np.array([metrics_of([row], 10)[METRIC] for row in ranks])


def _refinement(per_query: dict[int, np.ndarray], movement: dict[str, Any]) -> dict[str, Any]:
    best, enough = plateau(per_query)
    return {
        "best_steps": best,
        "enough_steps": enough,
        "gain_over_one_step": paired_difference(per_query[best], per_query[min(per_query)]),
        "settled_steps": {name: part["settled"]["median"] for name, part in movement.items()},
    }


def _cluster(embeddings: np.ndarray, labels: list[str]) -> dict[str, float]:
    """Mean and standard deviation, over seeds, of the V-measure of k-means with as many clusters as labels."""
    count = len(set(labels))
    scores = [
        v_measure(labels, kmeans(embeddings, count, seed=seed, restarts=1).tolist()) for seed in range(CLUSTERING_SEEDS)
    ]
    return {"mean": float(np.mean(scores)), "std": float(np.std(scores))}


def _warnings(result: dict[str, Any], per_query: dict[int, np.ndarray]) -> list[Finding]:
    """The signatures of failure that the whole data show. "No gain" is decided by measured quality."""
    warnings = []
    tokens = result["soft_tokens"]
    if tokens["near_one_hot_share"] >= SHARE:
        warnings.append(near_one_hot(f"{tokens['near_one_hot_share']:.0%} of the soft tokens are"))
    refinement = result["refinement"]
    if len(per_query) > 1 and refinement["enough_steps"] == min(per_query):
        gain = refinement["gain_over_one_step"]
        warnings.append(
            no_gain(
                f"{METRIC} at its best K = {refinement['best_steps']} is {gain['mean']:+.4f} against K = "
                f"{min(per_query)}, within its standard error of {gain['standard_error']:.4f}."
            )
        )
    if tokens["redundant_share"] is not None and tokens["redundant_share"] >= SHARE:
        warnings.append(redundant(f"{tokens['redundant_share']:.0%} of the steps repeat the state of the step before."))
    return warnings
