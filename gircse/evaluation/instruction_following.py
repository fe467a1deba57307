"""Does an embedding follow its instruction? The same texts, told apart by one criterion or by another.

The protocol of the paper's instruction-following average (IntentEmotion and NYTClustering of Peng et al., "Answer is
All You Need", 2024): every text has a label under each of two criteria, and is embedded under the instruction of each.

- Triplets: an anchor, a text that shares only its first label, a text that shares only its second. Under the first
  instruction the former must be nearer (cosine), under the second the latter.
- Clusters: k-means under each instruction is compared with that criterion's labels (V-measure).

A model that ignores instructions ranks a triplet one way under both: its two shares add up to 1, and `both` is 0. One
that the instruction merely shakes adds up to 1 as well, with `both` up to 1/4. Following shows in a sum above 1.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gircse.evaluation import STEPS, require
from gircse.evaluation.stdlib_text import ACTIONS, balanced_grid
from gircse.evaluation.step_store import check_steps
from gircse.show.tables import text_table

if TYPE_CHECKING:
    from gircse.model import GIRCSE

# Areas and actions whose every combination has enough texts
_AREAS = ("e-mail", "web", "files and archives", "tests and logs", "text formats")
_ACTIONS = tuple(name for name in ACTIONS if name not in ("check a condition", "remove or end something"))


@dataclass(frozen=True)
class Criterion:
    """One way to tell the texts apart: what the model is told, and each text's label."""

    name: str
    instruction: str
    labels: tuple[str, ...]


@dataclass(frozen=True)
class InstructionSet:
    """Texts, two criteria, and triplets (anchor, shares only the first label, shares only the second) of indices."""

    texts: tuple[str, ...]
    first: Criterion
    second: Criterion
    triplets: tuple[tuple[int, int, int], ...]

    @classmethod
    def of(
        cls, texts: Sequence[str], first: Criterion, second: Criterion, *, per_text: int = 4, seed: int = 0
    ) -> InstructionSet:
        """Draws `per_text` triplets for each text as the anchor.

        Raises:
            ValueError: a criterion without one label a text, or no triplet to be had.
        """
        for criterion in (first, second):
            if len(criterion.labels) != len(texts):
                raise ValueError(
                    f"criterion {criterion.name}: got {len(criterion.labels)} labels, expected {len(texts)}"
                )
        rng = random.Random(seed)
        triplets = []
        pairs = list(zip(first.labels, second.labels, strict=True))
        for anchor, (one, two) in enumerate(pairs):
            firsts = [i for i, labels in enumerate(pairs) if labels[0] == one and labels[1] != two]
            seconds = [i for i, labels in enumerate(pairs) if labels[0] != one and labels[1] == two]
            if firsts and seconds:
                triplets += [(anchor, rng.choice(firsts), rng.choice(seconds)) for _ in range(per_text)]
        if not triplets:
            raise ValueError("texts: no three of them make a triplet")
        return cls(tuple(texts), first, second, tuple(triplets))


def stdlib_instruction_set() -> InstructionSet:
    """What functions of Python's standard library do, by the area they belong to or by the action they perform.

    Five areas x five actions, equally many texts each (see `stdlib_text`), about 175 texts and 700 triplets.
    """
    texts = balanced_grid(_AREAS, _ACTIONS)
    area = Criterion(
        "area",
        "Identify the area of the standard library that the described function belongs to: " + ", ".join(_AREAS),
        tuple(text.area for text in texts),
    )
    action = Criterion(
        "action",
        "Identify the kind of action that the described function performs: " + ", ".join(_ACTIONS),
        tuple(str(text.action) for text in texts),
    )
    return InstructionSet.of([text.summary for text in texts], area, action)


def evaluate_instruction_following(
    model: GIRCSE,
    data: InstructionSet | None = None,
    *,
    steps: Sequence[int] = STEPS,
    batch_size: int | None = None,
    max_length: int | None = None,
    show_progress_bar: bool | None = None,
) -> dict[int, dict[str, float]]:
    """{K: scores in 0..1} at each K of `steps`; every text is encoded twice, once under each instruction.

    Args:
        data: default: `stdlib_instruction_set()`.
        steps: numbers of steps >= 1, or [0] alone.

    Returns:
        For each K: "CRITERION triplets" (share of triplets ranked right under its instruction), "both" (right under
        both), "CRITERION v_measure", and "score": the mean of the two harmonic means, of triplets and of V-measures.

    Raises:
        ValueError: bad `steps`. ModuleNotFoundError: scikit-learn is not installed.
    """
    steps = check_steps(steps)
    cluster = require("sklearn.cluster")  # before anything is encoded
    data = data or stdlib_instruction_set()
    options: dict[str, Any] = {
        "num_steps": steps[-1],
        "batch_size": batch_size,
        "max_length": max_length,
        "return_steps": True,
        "show_progress_bar": show_progress_bar,
    }
    embeddings = [
        model.encode(list(data.texts), instruction=criterion.instruction, **options)
        for criterion in (data.first, data.second)
    ]
    return {k: _scores(data, [steps_of[:, max(k, 1) - 1] for steps_of in embeddings], cluster) for k in steps}


def _scores(data: InstructionSet, embeddings: Sequence[np.ndarray], cluster: Any) -> dict[str, float]:
    """embeddings: [n, D] normalised, under the first and the second instruction."""
    from sklearn.metrics import v_measure_score

    anchors, firsts, seconds = np.array(data.triplets).T
    # how much nearer the text is that shares the first label; a tie is right under neither
    leads = [((e[anchors] * e[firsts]).sum(1) - (e[anchors] * e[seconds]).sum(1)) for e in embeddings]
    right = [leads[0] > 0, leads[1] < 0]
    criteria = (data.first, data.second)
    measures = []
    for criterion, vectors in zip(criteria, embeddings, strict=True):
        means = cluster.KMeans(n_clusters=len(set(criterion.labels)), n_init=10, random_state=0)
        measures.append(float(v_measure_score(criterion.labels, means.fit_predict(vectors))))
    accuracies = [float(hits.mean()) for hits in right]
    scores = {f"{c.name} triplets": value for c, value in zip(criteria, accuracies, strict=True)}
    scores["both"] = float((right[0] & right[1]).mean())
    scores |= {f"{c.name} v_measure": value for c, value in zip(criteria, measures, strict=True)}
    scores["score"] = (_harmonic(accuracies) + _harmonic(measures)) / 2
    return scores


def _harmonic(values: Sequence[float]) -> float:
    return len(values) / sum(1 / value for value in values) if min(values) > 0 else 0.0


def instruction_table(scores: Mapping[int, Mapping[str, float]]) -> str:
    """One line a number of steps, one column a score, x 100."""
    names = list(next(iter(scores.values())))
    return text_table(
        ["K", *names], [[k, *(f"{100 * values[name]:.2f}" for name in names)] for k, values in scores.items()]
    )
