"""Whether an embedding follows its instruction: the same texts must group by one criterion or by another.

This is the protocol of the paper's instruction-following average (IntentEmotion and NYTClustering of Peng et al.,
"Answer is All You Need", 2024). Every text has a label under each of two criteria, and is embedded under the
instruction of each.

- Triplets: an anchor, a text that shares only its first label, and a text that shares only its second. Under the first
  instruction the former must be nearer (cosine), under the second the latter.
- Clusters: k-means under each instruction is compared with that criterion's labels (V-measure).

A model that ignores its instruction ranks a triplet the same way under both: its two shares add up to 1, and `both` is
0. In a model that the instruction changes at random they also add up to 1, with `both` up to 1/4. A model that follows
instructions has a sum above 1.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import harmonic_mean
from typing import TYPE_CHECKING, Any

import numpy as np

from gircse.evaluation import STEPS
from gircse.evaluation.clustering import kmeans, v_measure
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
    """One way to group the texts: the instruction that the model gets, and each text's label."""

    name: str
    instruction: str
    labels: tuple[str, ...]


@dataclass(frozen=True)
class InstructionSet:
    """Texts, two criteria, and triplets of indices: (anchor, shares only the first label, shares only the second)."""

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
            ValueError: a criterion has not one label for each text, or no three texts make a triplet.
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
    """Descriptions of functions of Python's standard library, by area or by action (see `stdlib_text`).

    Five areas times five actions with equally many texts each: about 175 texts and 700 triplets.
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
    """{K: scores in 0..1} for each K of `steps`. Every text is encoded twice, once under each instruction.

    Args:
        data: default: `stdlib_instruction_set()`.
        steps: numbers of steps >= 1, or [0] alone.

    Returns:
        For each K: "CRITERION triplets" (share of triplets that are ranked right under its instruction), "both" (share
        ranked right under both), "CRITERION v_measure", and "score": the mean of the two harmonic means, that of the
        triplets and that of the V-measures.

    Raises:
        ValueError: `steps` is wrong.
    """
    steps = check_steps(steps)
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
    return {k: _scores(data, [steps_of[:, max(k, 1) - 1] for steps_of in embeddings]) for k in steps}


def _scores(data: InstructionSet, embeddings: Sequence[np.ndarray]) -> dict[str, float]:
    """Scores of normalised embeddings [n, D] under the first and under the second instruction."""
    anchors, firsts, seconds = np.array(data.triplets).T
    # How much nearer the text is that shares the first label. A tie is right under neither instruction.
    leads = [((e[anchors] * e[firsts]).sum(1) - (e[anchors] * e[seconds]).sum(1)) for e in embeddings]
    right = [leads[0] > 0, leads[1] < 0]
    criteria = (data.first, data.second)
    measures = []
    for criterion, vectors in zip(criteria, embeddings, strict=True):
        clusters = kmeans(vectors, len(set(criterion.labels)), seed=0, restarts=10)
        measures.append(v_measure(criterion.labels, clusters.tolist()))
    accuracies = [float(hits.mean()) for hits in right]
    scores = {f"{c.name} triplets": value for c, value in zip(criteria, accuracies, strict=True)}
    scores["both"] = float((right[0] & right[1]).mean())
    scores |= {f"{c.name} v_measure": value for c, value in zip(criteria, measures, strict=True)}
    scores["score"] = (harmonic_mean(accuracies) + harmonic_mean(measures)) / 2
    return scores


def instruction_table(scores: Mapping[int, Mapping[str, float]]) -> str:
    """One line for each number of steps, one column for each score, times 100."""
    names = list(next(iter(scores.values())))
    return text_table(
        ["K", *names], [[k, *(f"{100 * values[name]:.2f}" for name in names)] for k, values in scores.items()]
    )
