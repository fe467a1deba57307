"""Retrieval quality of a model at many numbers of steps, out of one encoding pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gircse.data.retrieval_task import RetrievalTask
from gircse.evaluation import STEPS
from gircse.evaluation.metrics import retrieval_metrics
from gircse.evaluation.step_store import check_steps

if TYPE_CHECKING:
    from gircse.model import GIRCSE


def evaluate_retrieval(
    model: GIRCSE,
    task: RetrievalTask,
    *,
    steps: Sequence[int] = STEPS,
    batch_size: int | None = None,
    max_length: int | None = None,
    show_progress_bar: bool | None = None,
) -> dict[int, dict[str, float]]:
    """{K: {"ndcg@10", "mrr@10", "recall@10", ..}} for each K of `steps`, ascending.

    Every text is encoded once, at the largest K. Queries carry the task's instruction. Documents carry it if the task
    is symmetric (docs/method.md §2), and then a text is not ranked against itself (`RetrievalTask.own_documents`).
    K = 0 is not a prefix of a rollout, so it must be the only number.

    Args:
        max_length: tokens of a query and of a document; default: the two limits of the model's config.

    Raises:
        ValueError: `steps` is empty, or has 0 among others.
    """
    steps = check_steps(steps)
    options: dict[str, Any] = {
        "num_steps": steps[-1],
        "batch_size": batch_size,
        "return_steps": True,
        "show_progress_bar": show_progress_bar,
    }
    limits = (model.config.query_max_length, model.config.passage_max_length)
    for_queries, for_documents = limits if max_length is None else (max_length, max_length)
    queries = model.encode(task.queries, instruction=task.instruction, max_length=for_queries, **options)
    documents = model.encode(task.documents, instruction=task.document_instruction, max_length=for_documents, **options)
    own = task.own_documents
    return {
        # K = 0 gives one entry, too
        k: retrieval_metrics(queries[:, max(k, 1) - 1], documents[:, max(k, 1) - 1], task.relevant, excluded=own)
        for k in steps
    }
