"""What Jacobi decoding changes: passes, distances to the sequential embeddings, retrieval; and starts of the passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.quality_corpora import StudyCorpus
from bench.tables import Column, column
from gircse.encode.tokens import pad, tokenize
from gircse.evaluation.metrics import metrics_of, relevant_ranks
from gircse.lm.attention import RolloutKV
from gircse.lm.rollout import rollout
from gircse.model import GIRCSE

LENGTH = 32  # tokens of a prompt at most, as the study trains
DEPTH = 10
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


def measure(model: GIRCSE, corpus: StudyCorpus, steps: Sequence[int], tolerances: Sequence[float]) -> Iterator[Point]:
    """For each K the sequential embeddings, and those of each tolerance; 2 is reached after two passes."""

    def encode(**options: Any) -> tuple[np.ndarray, np.ndarray]:
        shared = {"max_length": LENGTH, "show_progress_bar": False} | options
        queries = model.encode(corpus.queries, instruction=corpus.instruction, **shared)
        return queries, model.encode(corpus.documents, **shared)

    for num_steps in steps:
        exact = encode(num_steps=num_steps, decoding="sequential")
        yield {"num_steps": num_steps, "tolerance": None, "ndcg": _ndcg(*exact, corpus)}
        for tolerance in tolerances:
            before = _passes(model)
            found = encode(num_steps=num_steps, decoding="jacobi", jacobi_tolerance=tolerance)
            taken = {passes: texts - before.get(passes, 0) for passes, texts in _passes(model).items()}
            error = np.concatenate([1 - (ours * theirs).sum(-1) for ours, theirs in zip(found, exact, strict=True)])
            yield {
                "num_steps": num_steps,
                "tolerance": tolerance,
                "ndcg": _ndcg(*found, corpus),
                "passes": sum(passes * texts for passes, texts in taken.items()) / len(error),
                "most_passes": max(passes for passes, texts in taken.items() if texts),
                **_distances(error),
            }


def _passes(model: GIRCSE) -> dict[int, int]:
    with model.inference() as engine:
        return engine.report().passes


def _ndcg(queries: np.ndarray, documents: np.ndarray, corpus: StudyCorpus) -> float:
    return metrics_of(relevant_ranks(queries, documents, corpus.relevant), DEPTH)[f"ndcg@{DEPTH}"]


def _distances(error: np.ndarray) -> dict[str, float]:
    return {"mean": float(error.mean()), "p99": float(np.quantile(error, 0.99)), "largest": float(error.max())}


@torch.inference_mode()
def measure_starts(model: GIRCSE, texts: Sequence[str], num_steps: int) -> Iterator[Point]:
    """The distance of z_K to the sequential one after each pass, for each way to begin and to go on that was tried.
    `passes` counts those of few positions too, which take as long where the weights rule."""
    rows = tokenize(model, list(texts), instruction=None, max_length=LENGTH, num_steps=num_steps)
    ids, mask = (tensor.to(model.device) for tensor in pad(rows, pad_id=model.tokenizer.pad_token_id))
    exact = model.pool(rollout(model.causal_lm, ids, mask, num_steps).steps)[:, -1]
    for name, start in STARTS.items():
        for passes, positions, states in start(model, ids, mask, num_steps):
            error = 1 - F.cosine_similarity(model.pool(states)[:, -1], exact, dim=-1)
            yield {"start": name, "passes": passes, "positions": positions, **_distances(error.cpu().numpy())}


Pass = tuple[int, int, Tensor]  # passes so far, positions that they computed for each text, the states [B, K, D]


class _Passes:
    """The plain definition: every pass computes all of its positions anew."""

    def __init__(self, model: GIRCSE, ids: Tensor, mask: Tensor) -> None:
        self.lm, lengths = model.causal_lm, mask.sum(1)
        self.kv = RolloutKV(lengths)
        self.ids = ids.gather(1, mask.eq(0).to(torch.uint8).argsort(dim=1, stable=True))
        states = self.lm.run_prompt(self.kv, self.ids)
        self.prompt = states[torch.arange(len(lengths), device=ids.device), lengths - 1][:, None]

    def __call__(self, tokens: Tensor) -> Tensor:
        self.kv.steps.clear()
        return self.lm.run_block(self.kv, tokens)

    def tokens(self, states: Tensor) -> Tensor:
        """Those that the next pass begins with."""
        return self.lm.soft_embed(torch.cat([self.prompt, states[:, :-1]], dim=1))

    def go_on(self, tokens: Tensor, first: int, done: int, positions: int) -> Iterator[Pass]:
        """Passes of the tokens from `first` on, one less each time."""
        num_steps = tokens.shape[1]
        while done < MOST_PASSES and first < num_steps:
            states = self(tokens)
            done, positions, first = done + 1, positions + num_steps - first, first + 1
            yield done, positions, states
            tokens = self.tokens(states)


def _first_token(model: GIRCSE, ids: Tensor, mask: Tensor, num_steps: int) -> Iterator[Pass]:
    """d_1 everywhere."""
    passes = _Passes(model, ids, mask)
    yield from passes.go_on(passes.lm.soft_embed(passes.prompt).expand(-1, num_steps, -1), 0, 0, 0)


def _two_steps(model: GIRCSE, ids: Tensor, mask: Tensor, num_steps: int) -> Iterator[Pass]:
    """d_1, d_2, and d_3 everywhere, after two single steps."""
    passes = _Passes(model, ids, mask)
    tokens = passes.lm.soft_embed(passes.prompt)
    for _ in range(2):
        last = passes(tokens)[:, -1:]
        tokens = torch.cat([tokens, passes.lm.soft_embed(last)], dim=1)
    tokens = torch.cat([tokens, tokens[:, -1:].expand(-1, num_steps - 3, -1)], dim=1)
    yield from passes.go_on(tokens, 2, 2, 2)


def _blocks(model: GIRCSE, ids: Tensor, mask: Tensor, num_steps: int, size: int) -> Iterator[Pass]:
    """`size` positions, 1 to 3 times, then the next ones, beginning with the token of the last state."""
    for repeats in range(1, 4):
        passes, states, positions = _Passes(model, ids, mask), torch.empty(0), 0
        tokens = passes.prompt[:, :0]
        for first in range(0, num_steps, size):
            count = min(size, num_steps - first)
            last = states[:, -1:] if first else passes.prompt
            tokens = torch.cat([tokens, passes.lm.soft_embed(last).expand(-1, count, -1)], dim=1)
            for _ in range(repeats):
                states = passes(tokens)
                tokens = passes.tokens(states)
            positions += repeats * count
        yield repeats * -(-num_steps // size), positions, states


def _extrapolated(model: GIRCSE, ids: Tensor, mask: Tensor, num_steps: int) -> Iterator[Pass]:
    """d_1 everywhere; each next token goes half as far again as from the pass before."""
    passes = _Passes(model, ids, mask)
    tokens, positions = passes.lm.soft_embed(passes.prompt).expand(-1, num_steps, -1), 0
    for done in range(MOST_PASSES):
        states = passes(tokens)
        positions += num_steps - done
        yield done + 1, positions, states
        following = passes.tokens(states)
        tokens = following + 0.5 * (following - tokens) if done else following
        tokens = torch.cat([following[:, : done + 2], tokens[:, done + 2 :]], dim=1)  # these are exact


STARTS = {
    "d_1 everywhere": _first_token,
    "two single steps": _two_steps,
    "blocks of 4": lambda *arguments: _blocks(*arguments, size=4),
    "blocks of 8": lambda *arguments: _blocks(*arguments, size=8),
    "extrapolated": _extrapolated,
}

_DISTANCES: list[Column] = [
    column("1 - cosine: mean", "mean", "{:.1e}"),
    column("99%", "p99", "{:.1e}"),
    column("largest", "largest", "{:.1e}"),
]
COLUMNS: list[Column] = [
    column("model", "model"),
    column("corpus", "corpus"),
    column("K", "num_steps"),
    column("tolerance", "tolerance", "{:g}"),
    column("passes", "passes", "{:.1f}"),
    column("most", "most_passes"),
    *_DISTANCES,
    column("nDCG@10", "ndcg", "{:.4f}"),
]
START_COLUMNS: list[Column] = [
    column("model", "model"),
    column("start", "start"),
    column("passes", "passes"),
    column("positions", "positions"),
    *_DISTANCES,
]
