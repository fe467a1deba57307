"""What Jacobi decoding changes: passes, distances to the sequential embeddings, retrieval; and starts of the passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.quality_corpora import StudyCorpus
from bench.tables import Column, column
from gircse.encode.tokens import tokenize
from gircse.engine.body import StockDecoder
from gircse.engine.jacobi import Jacobi, JacobiPass
from gircse.engine.pool import KVPool
from gircse.engine.prefill import PrefillPass
from gircse.evaluation.metrics import metrics_of, relevant_ranks
from gircse.model import GIRCSE

LENGTH = 32  # tokens of a prompt at most, as the study trains
DEPTH = 10
AFTER = (1, 2, 3, 4, 5)  # passes
MOST_PASSES = 8  # of the comparison of starts

Point = dict[str, Any]


def test_set(path: Path, texts: int | None) -> StudyCorpus:
    """The corpus with its first queries and documents only."""
    corpus = StudyCorpus.load(path)
    if texts is None:
        return corpus
    queries = [row for row, document in enumerate(corpus.relevant) if document < texts][:texts]
    return replace(
        corpus,
        documents=corpus.documents[:texts],
        queries=[corpus.queries[row] for row in queries],
        relevant=[corpus.relevant[row] for row in queries],
    )


class Decoded(NamedTuple):
    """Embeddings of n texts, normalised.

    Attributes:
        exact: {K: [n, D]}, one soft token after the other.
        passes: {K: of each text [passes, D], after each pass until it has settled}.
    """

    exact: dict[int, np.ndarray]
    passes: dict[int, list[np.ndarray]]


def decode(model: GIRCSE, texts: Sequence[str], instruction: str | None, steps: Sequence[int], least: float) -> Decoded:
    """The embeddings after each pass, until z_K moves by less than `least`, of all K at once.

    A pass makes the first states of a larger K as it makes those of a smaller one, so the passes of the largest K are
    those of the others too. A text whose z_K of a smaller K still moves at their end is decoded again.
    """
    rows = tokenize(model, texts, instruction=instruction, max_length=LENGTH, num_steps=max(steps))
    config = model.config

    def embeddings(states: Tensor) -> np.ndarray:
        columns = [num_steps - 1 for num_steps in steps if num_steps <= states.shape[1]]
        return F.normalize(model.pool(states)[:, columns].float(), dim=-1).cpu().numpy()

    with model.inference() as engine:
        run = partial(engine.states, temperature=config.temperature, include_prompt=config.include_prompt_state)

        def after_each_pass(chosen: Sequence[int], num_steps: int) -> list[list[np.ndarray]]:
            kept: list[list[np.ndarray]] = [[] for _ in chosen]

            def watch(indices: Sequence[int], states: Tensor, moved: Sequence[float] | None) -> None:
                for index, embedding in zip(indices, embeddings(states), strict=True):
                    kept[index].append(embedding)

            jacobi = Jacobi(config.pooling, least, watch=watch)
            run([rows[text] for text in chosen], num_steps, jacobi=jacobi)
            return kept

        exact, passes = embeddings(run(rows, max(steps))), {}
        found = after_each_pass(range(len(rows)), max(steps))
        for column, num_steps in enumerate(steps):
            lines = [np.stack([embedding[column] for embedding in line[:num_steps]]) for line in found]
            moving = [text for text, line in enumerate(lines) if len(line) < num_steps and _moves(line)[-1] >= least]
            for text, line in zip(moving, after_each_pass(moving, num_steps) if moving else (), strict=True):
                lines[text] = np.stack([embedding[column] for embedding in line])
            passes[num_steps] = lines
    return Decoded({num_steps: exact[:, column] for column, num_steps in enumerate(steps)}, passes)


def _moves(line: np.ndarray) -> np.ndarray:
    """By how much each pass but the first has moved the embedding."""
    return 1 - (line[1:] * line[:-1]).sum(-1)


def passes_taken(line: np.ndarray, tolerance: float) -> int:
    """Passes until the embedding has moved by less, or all that were made."""
    settled = np.flatnonzero(_moves(line) < tolerance)
    return int(settled[0]) + 2 if len(settled) else len(line)


def measure(model: GIRCSE, corpus: StudyCorpus, steps: Sequence[int], tolerances: Sequence[float]) -> Iterator[Point]:
    """For each K the sequential embeddings, those after a number of passes, and those of each tolerance. In all of them
    a text stops that has settled to the smallest tolerance.

    Args:
        steps: ascending.
    """
    decoded = [
        decode(model, texts, instruction, steps, min(tolerances))
        for texts, instruction in ((corpus.queries, corpus.instruction), (corpus.documents, None))
    ]
    for num_steps in steps:
        sides = [side.exact[num_steps] for side in decoded]
        exact, queries = np.concatenate(sides), len(corpus.queries)
        lines = [line for side in decoded for line in side.passes[num_steps]]
        what = {"num_steps": num_steps, "texts": len(lines)}
        yield what | {"ndcg": _ndcg(*sides, corpus)}
        ways: list[tuple[Point, list[int]]] = [
            ({"after": after}, [min(after, len(line)) for line in lines]) for after in AFTER if after <= num_steps
        ]
        ways += [({"tolerance": each}, [passes_taken(line, each) for line in lines]) for each in tolerances]
        for way, taken in ways:
            found = np.stack([line[passes - 1] for line, passes in zip(lines, taken, strict=True)])
            yield {
                **what,
                **way,
                "passes": fmean(taken),
                "most_passes": max(taken),
                "ndcg": _ndcg(found[:queries], found[queries:], corpus),
                **_distances(1 - (found * exact).sum(-1)),
            }


def _ndcg(queries: np.ndarray, documents: np.ndarray, corpus: StudyCorpus) -> float:
    return metrics_of(relevant_ranks(queries, documents, corpus.relevant), DEPTH)[f"ndcg@{DEPTH}"]


def _distances(error: np.ndarray) -> dict[str, float]:
    error = error.clip(min=0)
    return {"mean": float(error.mean()), "p99": float(np.quantile(error, 0.99)), "largest": float(error.max())}


@torch.inference_mode()
def measure_starts(model: GIRCSE, texts: Sequence[str], num_steps: int) -> Iterator[Point]:
    """The distance of z_K to the sequential one after each pass, for each way to begin and to go on that was tried.
    `passes` counts those of few positions too, which take as long where the weights rule."""
    rows = tokenize(model, list(texts), instruction=None, max_length=LENGTH, num_steps=num_steps)
    passes = _Passes(model, sorted(rows, key=len, reverse=True), num_steps)
    tokens, states = passes.lm.soft_embed(passes.prompt), []
    for step in range(num_steps):
        states.append(passes(tokens, step))
        tokens = passes.lm.soft_embed(states[-1])
    exact = model.pool(torch.cat(states, dim=1))[:, -1]
    for name, start in STARTS.items():
        for done, positions, found in start(passes, num_steps):
            error = 1 - F.cosine_similarity(model.pool(found)[:, -1], exact, dim=-1)
            yield {"start": name, "passes": done, "positions": positions, **_distances(error.cpu().numpy())}


Pass = tuple[int, int, Tensor]  # passes so far, positions that they computed for each text, the states [B, K, D]


class _Passes:
    """Passes of any tokens, on buffers where the keys and values of those before them are."""

    def __init__(self, model: GIRCSE, rows: Sequence[Sequence[int]], num_steps: int) -> None:
        self.lm, self.decoder = model.causal_lm, StockDecoder(model.causal_lm)
        self.slots = len(rows[0]) + num_steps
        self.pool = KVPool(len(rows) * self.slots)
        self.position = torch.tensor([len(row) for row in rows], device=model.device)
        prefill = PrefillPass(self.pool, len(rows), self.slots, 0, rows, None, model.device)
        self.prompt = self.decoder.prefill(prefill)[:, None]

    def __call__(self, tokens: Tensor, first: int) -> Tensor:
        """The states of the tokens [B, n, D] from `first` on."""
        kv = JacobiPass(self.pool, len(tokens), self.slots, self.position, first, first + tokens.shape[1])
        kv.begin()
        return self.decoder.block(kv, tokens.flatten(0, 1)).view_as(tokens)

    def go_on(self, states: Tensor, tokens: Tensor, done: int, positions: int) -> Iterator[Pass]:
        """Passes of the tokens behind the exact `states`, one less each time."""
        num_steps = states.shape[1] + tokens.shape[1]
        for first in range(states.shape[1], num_steps):
            if done == MOST_PASSES:
                break
            states = torch.cat([states[:, :first], self(tokens, first)], dim=1)
            done, positions = done + 1, positions + num_steps - first
            yield done, positions, states
            tokens = self.lm.soft_embed(states[:, first:-1])


def _first_token(passes: _Passes, num_steps: int) -> Iterator[Pass]:
    """d_1 everywhere."""
    tokens = passes.lm.soft_embed(passes.prompt).expand(-1, num_steps, -1)
    yield from passes.go_on(passes.prompt[:, :0], tokens, 0, 0)


def _two_steps(passes: _Passes, num_steps: int) -> Iterator[Pass]:
    """d_1, d_2, and d_3 everywhere, after two single steps."""
    states = [passes.prompt]
    for step in range(2):
        states.append(passes(passes.lm.soft_embed(states[-1]), step))
    tokens = passes.lm.soft_embed(states[-1]).expand(-1, num_steps - 2, -1)
    yield from passes.go_on(torch.cat(states[1:], dim=1), tokens, 2, 2)


def _blocks(passes: _Passes, num_steps: int, size: int) -> Iterator[Pass]:
    """`size` positions, 1 to 3 times, then the next ones, beginning with the token of the last state."""
    for repeats in range(1, 4):
        states, done, positions = passes.prompt, 0, 0
        for first in range(0, num_steps, size):
            stop = min(first + size, num_steps)
            tokens = passes.lm.soft_embed(states[:, -1:]).expand(-1, stop - first, -1)
            for start in range(first, min(first + repeats, stop)):  # after each pass one position is exact in its block
                states = torch.cat([states[:, : start + 1], passes(tokens, start)], dim=1)
                done, positions = done + 1, positions + stop - start
                tokens = passes.lm.soft_embed(states[:, start + 1 : -1])
        yield done, positions, states[:, 1:]


def _extrapolated(passes: _Passes, num_steps: int) -> Iterator[Pass]:
    """d_1 everywhere; each next token goes half as far again as from the pass before."""
    tokens, states = passes.lm.soft_embed(passes.prompt).expand(-1, num_steps, -1), passes.prompt[:, :0]
    positions = 0
    for first in range(min(MOST_PASSES, num_steps)):
        states = torch.cat([states[:, :first], passes(tokens, first)], dim=1)
        positions += num_steps - first
        yield first + 1, positions, states
        following = passes.lm.soft_embed(states[:, first:-1])
        further = following + 0.5 * (following - tokens[:, 1:]) if first else following
        tokens = torch.cat([following[:, :1], further[:, 1:]], dim=1)  # the first one is exact


STARTS = {
    "d_1 everywhere": _first_token,
    "two single steps": _two_steps,
    "blocks of 4": partial(_blocks, size=4),
    "blocks of 8": partial(_blocks, size=8),
    "extrapolated": _extrapolated,
}

DISTANCES: list[Column] = [
    column("1 - cosine: mean", "mean", "{:.1e}"),
    column("99%", "p99", "{:.1e}"),
    column("largest", "largest", "{:.1e}"),
]
COLUMNS: list[Column] = [
    column("model", "model"),
    column("corpus", "corpus"),
    column("K", "num_steps"),
    column("texts", "texts"),
    column("after", "after"),
    column("tolerance", "tolerance", "{:g}"),
    column("passes", "passes", "{:.1f}"),
    column("most", "most_passes"),
    *DISTANCES,
    column("nDCG@10", "ndcg", "{:.4f}"),
]
START_COLUMNS: list[Column] = [
    column("model", "model"),
    column("start", "start"),
    column("passes", "passes"),
    column("positions", "positions"),
    *DISTANCES,
]
