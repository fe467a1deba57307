"""The paper's open checks on a model and data of one's own (`gircse analyze`).

Where does refinement stop (quality and movement for K up to 100), does clustering gain from steps, is GIRCSE better
than an encoder-only baseline on the same data, what are its soft tokens made of. Every text is encoded once, with the
largest K; the embeddings after fewer steps are prefixes of the same pass.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gircse.analysis.anatomy import anatomy
from gircse.analysis.clustering import kmeans, v_measure
from gircse.analysis.encoded_steps import EncodedSteps
from gircse.analysis.statistics import paired_difference, plateau
from gircse.data.labelled_texts import LabelledTexts
from gircse.data.retrieval_task import RetrievalTask
from gircse.evaluation.metrics import metrics_of, relevant_ranks
from gircse.inspect.failures import SHARE, Finding, near_one_hot, no_gain, redundant
from gircse.integers import check_integer
from gircse.lm.prompts import is_symmetric

if TYPE_CHECKING:
    from gircse.model import GIRCSE

METRIC = "ndcg@10"
STEPS = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100)
SAMPLE = 64  # texts whose soft tokens are taken apart
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
        model: to look at; its config's K is taken for the trained one.
        task: queries and documents (`RetrievalTask.from_rows`).
        baseline: encoder-only model, run with K = 0; None: K = 0 of `model` itself.
        clusters: labelled texts, or None: no clustering.
        steps: numbers of steps at which quality is measured; movement is measured at every one up to the largest.
        sample: texts whose soft tokens are taken apart, spread evenly over queries and documents.
        batch_size, max_length: as for `GIRCSE.encode`.
        scratch: folder for temporary files of 4 * (texts) * (number of `steps`) * D bytes, which keeps memory
            independent of the number of texts; default: the system's.

    Returns:
        What `analysis.json` holds (docs/inspecting.md), ready for `json.dumps`.

    Raises:
        ValueError: bad steps or sample.
    """
    steps = _checked_steps(steps)
    sample = check_integer("sample", sample, least=1)
    document_instruction = task.instruction if is_symmetric(task.instruction) else None
    groups = {"queries": (task.queries, task.instruction), "documents": (task.documents, document_instruction)}
    options: dict[str, Any] = {"batch_size": batch_size, "max_length": max_length}
    zero = model if baseline is None else baseline
    with tempfile.TemporaryDirectory(prefix="gircse-analysis-", dir=scratch) as folder:

        def encoded(name: str, with_model: GIRCSE, texts: list[str], instruction: str | None, at: tuple[int, ...]):
            path = Path(folder) / f"{name}-{at[-1]}.npy"
            return EncodedSteps.of(with_model, texts, at, path, instruction=instruction, **options)

        full = {name: encoded(name, model, texts, how, steps) for name, (texts, how) in groups.items()}
        none = {name: encoded(name, zero, texts, how, (0,)) for name, (texts, how) in groups.items()}
        ranks = {
            k: relevant_ranks(
                part["queries"].at(k), part["documents"].at(k), task.relevant, excluded=task.own_documents
            )
            for part, at in ((none, (0,)), (full, steps))
            for k in at
        }
        clustering = None
        if clusters is not None:
            how = (clusters.texts, clusters.instruction)
            parts = (encoded("clusters", zero, *how, (0,)), encoded("clusters", model, *how, steps))
            clustering = _clustering(*parts, clusters.labels)
        movement = {name: part.movement.summary() for name, part in full.items()}
    quality = {k: metrics_of(ranks[k], 10) for k in ranks}
    per_query = {k: _ndcg(ranks[k]) for k in ranks}
    of_baseline = per_query.pop(0)
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
            "differences": {k: paired_difference(per_query[k], of_baseline) for k in steps},
        },
        "clustering": clustering,
        "soft_tokens": tokens,
    }
    result["warnings"] = [vars(finding) for finding in _findings(result, per_query)]
    return result


def _checked_steps(steps: Sequence[int]) -> tuple[int, ...]:
    found = {check_integer("steps", k, least=1, expected="integers >= 1") for k in steps}
    if not found:
        raise ValueError("steps: got none, expected at least one")
    return tuple(sorted(found))


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


def _clustering(none: EncodedSteps, full: EncodedSteps, labels: list[str]) -> dict[str, Any]:
    return {
        "texts": len(labels),
        "labels": len(set(labels)),
        "v_measure": {k: _cluster(full.at(k), labels) for k in full.steps},
        "baseline": _cluster(none.at(0), labels),
    }


def _cluster(embeddings: np.ndarray, labels: list[str]) -> dict[str, float]:
    """Mean and standard deviation over seeds of the V-measure of k-means with as many clusters as labels."""
    count = len(set(labels))
    scores = [
        v_measure(labels, kmeans(embeddings, count, seed=seed, restarts=1).tolist()) for seed in range(CLUSTERING_SEEDS)
    ]
    return {"mean": float(np.mean(scores)), "std": float(np.std(scores))}


def _findings(result: dict[str, Any], per_query: dict[int, np.ndarray]) -> list[Finding]:
    """The three signatures on the whole data; "no gain" by measured quality."""
    found = []
    tokens = result["soft_tokens"]
    if tokens["near_one_hot_share"] >= SHARE:
        found.append(near_one_hot(f"{tokens['near_one_hot_share']:.0%} of the soft tokens are"))
    refinement = result["refinement"]
    if len(per_query) > 1 and refinement["enough_steps"] == min(per_query):
        gain = refinement["gain_over_one_step"]
        found.append(
            no_gain(
                f"{METRIC} at its best K = {refinement['best_steps']} is {gain['mean']:+.4f} against K = "
                f"{min(per_query)}, within its standard error of {gain['standard_error']:.4f}."
            )
        )
    if tokens["redundant_share"] is not None and tokens["redundant_share"] >= SHARE:
        found.append(redundant(f"{tokens['redundant_share']:.0%} of the steps repeat the state of the step before."))
    return found
