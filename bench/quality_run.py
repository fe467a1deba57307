"""One run of `bench/quality.py`: train an arm, encode the test set once with K = 20, measure every K."""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from bench.quality_arms import UNTRAINED, Arm, Scale
from bench.quality_corpora import StudyCorpus
from gircse.analysis.anatomy import anatomy
from gircse.analysis.clustering import kmeans, v_measure
from gircse.data.rows import load_rows
from gircse.evaluation.metrics import metrics_of, relevant_ranks
from gircse.model import GIRCSE
from gircse.ops.pooling import POOLINGS, pool_steps
from gircse.train import train
from gircse.train.run_folder import CONFIG_NAME

MAX_STEPS = 20  # K = 0..20 are measured
CLUSTERING_SEEDS = 5
ANATOMY_TEXTS = 16  # queries, and as many documents
DEPTH = 10  # of nDCG and MRR
_MICRO_BATCH_TOKENS = 4096  # the same division on every machine, so that a run can be repeated
_RESAMPLES = 200

Run = dict[str, Any]


def run(
    arm: Arm | None, corpus: StudyCorpus, scale: Scale, *, seed: int, base: str, folder: Path, dtype: str = "float32"
) -> Run:
    """Trains `arm` (None: the base as it is) on `corpus` and measures it.

    Args:
        base: model to train, a folder or hub name.
        folder: of the run; a training that was interrupted there goes on from its last checkpoint.

    Returns:
        What the study's record keeps of a run: see `measure`, and "losses" (first and last step), "course", "seconds".
    """
    started = time.perf_counter()
    found: Run = {"corpus": corpus.name, "fingerprint": corpus.fingerprint, "arm": UNTRAINED, "seed": seed}
    model = GIRCSE.from_pretrained(base, dtype=dtype)
    if arm is not None:
        output = folder / "training"
        config = scale.config(
            arm,
            seed=seed,
            model=base,
            dtype=dtype,
            output=str(output),
            micro_batch_tokens=_MICRO_BATCH_TOKENS,
            save_every=16,
            keep_checkpoints=1,
            resume=(output / CONFIG_NAME).is_file(),
            progress=False,
        )
        result = train(config, rows=load_rows(corpus.rows()), model=model)
        model = result.model
        shutil.rmtree(output / "checkpoints", ignore_errors=True)
        found |= {
            "arm": arm.name,
            "settings": dict(arm.settings),
            "steps": config.max_steps,
            "losses": [result.log[0]["losses"], result.log[-1]["losses"]],
            "course": course(result.log),
            "training_seconds": sum(entry["seconds"] for entry in result.log),
        }
    model.eval()
    model.merge_adapter()
    found |= measure(model, corpus, scale, pooling=model.config.pooling)
    found["seconds"] = time.perf_counter() - started
    return found


def course(log: list[dict[str, Any]]) -> dict[str, list[float]]:
    """How a training went: medians over its first and its last quarter of the contrastive loss after the last step of
    the rollout, and of the gradient's norm before it was clipped."""
    quarter = max(1, len(log) // 4)
    parts = (log[:quarter], log[-quarter:])
    return {
        "loss": [float(np.median([entry["losses"][-1] for entry in part])) for part in parts],
        "grad_norm": [float(np.median([entry["grad_norm"] for entry in part])) for part in parts],
    }


def measure(model: GIRCSE, corpus: StudyCorpus, scale: Scale, *, pooling: str) -> Run:
    """Quality for K = 0..20 and what the soft tokens are made of.

    Returns:
        "ranks": [21] strings, one character a query: the rank of its document, "0" beyond `DEPTH`, "a" for ten, with
        `pooling`; "spearman", "spearman_error" (bootstrap over pairs), "v_measure", "v_measure_std" (over seeds of
        k-means): [21]; "mrr": {pooling: [21]} of all poolings, out of the same states; "centred_mrr": likewise,
        with the mean of all queries and that of all documents taken off: what steps add to every text alike;
        "anatomy": see `gircse.analysis.anatomy`.
    """
    lengths = {key: scale.train[key] for key in ("query_max_length", "passage_max_length")}
    queries = states(model, corpus.queries, corpus.instruction, lengths["query_max_length"])
    documents = states(model, corpus.documents, None, lengths["passage_max_length"])
    with_prompt = model.config.include_prompt_state
    found: Run = {"pooling": pooling, "mrr": {}, "centred_mrr": {}}
    for name in POOLINGS:
        ours, theirs = (pooled(each, name, with_prompt=with_prompt) for each in (queries, documents))
        ranks = [relevant_ranks(ours[:, k], theirs[:, k], corpus.relevant) for k in range(MAX_STEPS + 1)]
        found["mrr"][name] = [metrics_of(each, DEPTH)["mrr@10"] for each in ranks]
        if name == pooling:
            found["ranks"] = ["".join(_digit(row[0]) for row in each) for each in ranks]
            found |= _similarity(theirs, corpus.pairs) | _clusters(theirs, corpus.labels)
        ours, theirs = ours - ours.mean(axis=0), theirs - theirs.mean(axis=0)
        found["centred_mrr"][name] = [
            metrics_of(relevant_ranks(ours[:, k], theirs[:, k], corpus.relevant), DEPTH)["mrr@10"]
            for k in range(MAX_STEPS + 1)
        ]
    groups = [
        (corpus.queries[:ANATOMY_TEXTS], corpus.instruction),
        (corpus.documents[:ANATOMY_TEXTS], None),
    ]
    found["anatomy"] = anatomy(model, groups, MAX_STEPS, max_length=max(lengths.values()))
    return found


def states(model: GIRCSE, texts: list[str], instruction: str | None, max_length: int) -> torch.Tensor:
    """h_0, g_1..g_20 of each text, in one pass: [n, 21, D] float32."""
    config = replace(model.config, include_prompt_state=True, pooling="last", num_steps=MAX_STEPS + 1)
    whole = GIRCSE(model.base, model.tokenizer, config)
    embeddings = whole.encode(texts, instruction=instruction, max_length=max_length, normalize=False, return_steps=True)
    return torch.from_numpy(embeddings)


def pooled(states: torch.Tensor, pooling: str, *, with_prompt: bool = False) -> np.ndarray:
    """h_0, g_1..g_K -> the embeddings for K = 0 (h_0 itself) and 1..K: of g_1..g_k, `with_prompt` of h_0..g_{k-1}."""
    counted = states[:, :-1] if with_prompt else states[:, 1:]
    return torch.cat([states[:, :1], pool_steps(counted, pooling)], dim=1).numpy()


def _digit(rank: int) -> str:
    return "0" if rank > DEPTH else f"{rank:x}"


def scores(ranks: str) -> dict[str, np.ndarray]:
    """A string of "ranks" -> each query's "ndcg@10" and "mrr@10", [n]."""
    rank = np.array([int(digit, 16) for digit in ranks])
    hit = rank > 0
    safe = np.where(hit, rank, 1)
    return {"ndcg@10": hit / np.log2(safe + 1), "mrr@10": hit / safe}


def _similarity(documents: np.ndarray, pairs: list[tuple[int, int, float]]) -> Run:
    """Spearman correlation of cosines with relatedness, and its standard error by resampling the pairs."""
    first, second = (np.array([pair[side] for pair in pairs]) for side in (0, 1))
    wanted = np.array([score for *_, score in pairs])
    unit = documents / np.linalg.norm(documents, axis=-1, keepdims=True)
    rng = np.random.default_rng(0)
    samples = rng.integers(len(pairs), size=(_RESAMPLES, len(pairs)))
    values, errors = [], []
    for k in range(documents.shape[1]):
        cosines = (unit[first, k] * unit[second, k]).sum(-1)
        values.append(_spearman(cosines, wanted))
        errors.append(float(np.std([_spearman(cosines[sample], wanted[sample]) for sample in samples])))
    return {"spearman": values, "spearman_error": errors}


def _spearman(ours: np.ndarray, theirs: np.ndarray) -> float:
    if np.ptp(ours) == 0 or np.ptp(theirs) == 0:
        return 0.0  # constant: nothing is told apart
    value = float(spearmanr(ours, theirs).statistic)
    return value if math.isfinite(value) else 0.0


def _clusters(documents: np.ndarray, labels: list[str]) -> Run:
    unit = documents / np.linalg.norm(documents, axis=-1, keepdims=True)
    count = len(set(labels))
    table = [
        [
            v_measure(labels, kmeans(unit[:, k], count, seed=seed, restarts=1).tolist())
            for seed in range(CLUSTERING_SEEDS)
        ]
        for k in range(documents.shape[1])
    ]
    return {"v_measure": np.mean(table, axis=1).tolist(), "v_measure_std": np.std(table, axis=1).tolist()}
