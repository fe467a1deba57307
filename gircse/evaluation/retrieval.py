"""Retrieval quality of a model at many numbers of steps, out of one encoding pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gircse.data.retrieval_task import RetrievalTask
from gircse.evaluation.metrics import metrics_by_step
from gircse.integers import as_integer
from gircse.lm.prompts import is_symmetric

if TYPE_CHECKING:
    from gircse.model import GIRCSE

DEFAULT_STEPS = (1, 2, 3, 5, 7, 10, 15, 20)


def evaluate_retrieval(
    model: GIRCSE,
    task: RetrievalTask,
    *,
    steps: Sequence[int] = DEFAULT_STEPS,
    batch_size: int | None = None,
    max_length: int | None = None,
    show_progress_bar: bool | None = None,
) -> dict[int, dict[str, float]]:
    """{K: {"ndcg@10", "mrr@10", "recall@10", ..}} at each K of `steps`; every text is encoded once, at the largest.

    Queries carry the task's instruction; documents do when the task is symmetric (docs/method.md §2), and then a
    text is not ranked against itself (`RetrievalTask.own_documents`). K = 0 is not a prefix
    of a rollout; it is encoded separately and must be the only one.

    Args:
        max_length: tokens of a query and of a document; default: the two limits of the model's config.

    Raises:
        ValueError: `steps` is empty, or mixes 0 with others.
    """
    numbers = [as_integer(k) for k in steps] if isinstance(steps, Sequence) else []
    whole = [k for k in numbers if k is not None and k >= 0]
    if not whole or len(whole) < len(numbers) or (0 in whole and len(set(whole)) > 1):
        raise ValueError(f"steps: got {steps!r}, expected a list of integers >= 1, or 0 alone")
    steps = whole
    options: dict[str, Any] = {
        "num_steps": max(steps),
        "batch_size": batch_size,
        "return_steps": True,
        "show_progress_bar": show_progress_bar,
    }
    limits = (model.config.query_max_length, model.config.passage_max_length)
    for_queries, for_documents = limits if max_length is None else (max_length, max_length)
    queries = model.encode(task.queries, instruction=task.instruction, max_length=for_queries, **options)
    both = task.instruction if is_symmetric(task.instruction) else None
    documents = model.encode(task.documents, instruction=both, max_length=for_documents, **options)
    entries = [max(k, 1) for k in steps]
    by_entry = metrics_by_step(queries, documents, task.relevant, entries, excluded=task.own_documents)
    return {k: by_entry[max(k, 1)] for k in steps}
