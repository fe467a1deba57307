"""The objective of a distillation: how far the student's embeddings and similarities are from the teacher's."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gircse.ops.pooling import l2_normalize


class DistillLoss(NamedTuple):
    """The objective and its two parts, scalars, float32 (float64 for float64 embeddings)."""

    total: Tensor
    cosine: Tensor
    kl: Tensor


def distillation_loss(
    student_queries: Tensor,
    student_documents: Tensor,
    teacher_queries: Tensor,
    teacher_documents: Tensor,
    *,
    temperature: float,
    kl_weight: float,
) -> DistillLoss:
    """How far the student's embeddings are from the teacher's, and its similarities from the teacher's::

        cosine = mean over queries and documents of 1 - cos(student, teacher)
        kl     = mean over queries of KL(softmax(teacher . documents / tau) || softmax(student . documents / tau))
        total  = cosine + kl_weight * kl

    Args:
        student_queries, student_documents: [B, D] and [M, D], any norm and floating-point dtype; differentiable.
        teacher_queries, teacher_documents: the same shapes; they get no gradient.
        temperature: tau > 0, of both softmaxes.
        kl_weight: >= 0.

    Raises:
        ValueError: the shapes differ, or the temperature or the weight is out of range.
    """
    for name, student, teacher in (
        ("teacher_queries", student_queries, teacher_queries),
        ("teacher_documents", student_documents, teacher_documents),
    ):
        if teacher.shape != student.shape or teacher.ndim != 2:
            raise ValueError(f"{name}: got shape {tuple(teacher.shape)}, expected the student's {tuple(student.shape)}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature: got {temperature!r}, expected a number > 0")
    if not 0 <= kl_weight < float("inf"):
        raise ValueError(f"kl_weight: got {kl_weight!r}, expected a number >= 0")
    wide = torch.promote_types(student_queries.dtype, torch.float32)
    queries, documents = (l2_normalize(t.to(wide)) for t in (student_queries, student_documents))
    with torch.no_grad():
        wanted_queries, wanted_documents = (l2_normalize(t.to(wide)) for t in (teacher_queries, teacher_documents))
        wanted = F.log_softmax(wanted_queries @ wanted_documents.T / temperature, dim=1)
    cosines = torch.cat([(queries * wanted_queries).sum(1), (documents * wanted_documents).sum(1)])
    cosine = (1 - cosines).mean()
    ours = F.log_softmax(queries @ documents.T / temperature, dim=1)
    kl = F.kl_div(ours, wanted, reduction="batchmean", log_target=True)
    return DistillLoss(cosine + kl_weight * kl, cosine, kl)
