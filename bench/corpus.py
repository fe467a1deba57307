"""A corpus through a real tokenizer: `GIRCSE.encode` against official-style evaluation, from texts to embeddings.

Both make the same prompts of the same texts, and the tokenizer is inside the timed region of both. The official side
takes batches in the order of the file, padded on the left, while ours orders and packs the texts itself. The two
embeddings of every text are compared; where they disagree the speed is marked WRONG.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.agreement import FACTOR, HALF, Difference, compare_each, shapes_differ
from bench.batches import Batch, spaced
from bench.engines import ENGINES, GRAPH, OFFICIAL_EVAL
from bench.points import Point, Trial, point_row, take_turns
from bench.timing import Timing, seconds
from gircse import GIRCSE
from gircse.encode.files import read_texts
from gircse.engine.schedule import common_prefix
from gircse.lm.prompts import format_query
from gircse.ops import l2_normalize
from gircse.roofline import Ceilings, ModelFacts

# Cosine distance that rounding explains, of nearly every text. Twenty soft tokens, each fed back, multiply rounding
# errors: on one text in 25 (SmolLM2, untrained, K = 20) so much that official-style evaluation in float32 is itself
# further than this from float64. The worst of these texts are compared in the higher precision instead, and in half
# precision all that are compared (`compare`).
COSINE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-3, torch.bfloat16: 1e-2}
_HIGHER = {torch.float32: torch.float64, torch.float16: torch.float32, torch.bfloat16: torch.float32}
# Texts that are compared in the higher precision: the worst, and in half precision as many evenly spaced ones.
_SAMPLE = 64
# Share of the texts that may be further away than COSINE in float32 and float64.
_OUTLIERS = 0.1
# Texts that both algorithms embed in float32 where the model is in half precision.
_FEW = 8


class CorpusError(ValueError):
    """A file that holds no texts, or a model that cannot be compared."""


@dataclass(frozen=True)
class CorpusJob:
    """What is embedded, and how.

    Attributes:
        texts: in the order of the file.
        instruction: what every text is embedded for, or None.
        max_length: tokens of a prompt, instruction included; longer ones are cut at the end.
        batch: texts that the official side takes at once.
    """

    texts: list[str]
    instruction: str | None
    max_length: int
    batch: int


def texts_of(path: Path, field: str, limit: int | None) -> list[str]:
    """The texts of a .txt file (one a line) or a .jsonl file (`field` of each object) without the blank ones.

    Raises:
        CorpusError: a line without a text, named by file and number, or a file without texts.
    """
    try:
        blocks = read_texts(str(path), field=field)
        texts = list(islice((text for block in blocks for text in block if text.strip()), limit))
    except ValueError as error:
        raise CorpusError(f"--corpus: {error}") from None
    if not texts:
        raise CorpusError(f"--corpus: {path} holds no text")
    return texts


def load(path: str, dtype: torch.dtype, device: str) -> GIRCSE:
    """Raises CorpusError where the model has settings that official-style evaluation does not know."""
    model = GIRCSE.from_pretrained(path, dtype=dtype, device=device)
    if model.config.temperature != 1:
        raise CorpusError(f"--model: its temperature is {model.config.temperature:g}, {OFFICIAL_EVAL} has only 1")
    if model.config.include_prompt_state:
        raise CorpusError(
            f"--model: its include_prompt_state is true, {OFFICIAL_EVAL} pools the generated states only, g_1..g_K"
        )
    return model


def tokenize(model: GIRCSE, job: CorpusJob, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text's prompt, as the documentation of `GIRCSE.encode` defines them."""
    prompts = [format_query(job.instruction, text, model.config.prompt_template) for text in texts]
    ids = model.tokenizer(prompts, add_special_tokens=False, verbose=False)["input_ids"]
    eos = [model.tokenizer.eos_token_id] if model.config.append_eos else []
    return [row[: job.max_length - len(eos)] + eos or [model.tokenizer.pad_token_id] for row in ids]


def pad_left(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> Batch:
    """Rows of token ids -> [B, N], padded on the left."""
    longest = max(map(len, rows))
    ids = torch.tensor([[pad_id] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return Batch(ids.to(device), mask.to(device))


@torch.no_grad()
def encode_official(model: GIRCSE, job: CorpusJob, num_steps: int) -> np.ndarray:
    """[n, D] float32, length 1: batches in the order of the file."""
    run = ENGINES[OFFICIAL_EVAL].run
    batches = []
    for start in range(0, len(job.texts), job.batch):
        rows = tokenize(model, job, job.texts[start : start + job.batch])
        states = run(model.causal_lm, *pad_left(rows, model.tokenizer.pad_token_id, model.device), num_steps)
        batches.append(l2_normalize(model.pool(states)[:, -1]).float().cpu().numpy())
    return np.concatenate(batches)


def encode_ours(model: GIRCSE, job: CorpusJob, num_steps: int) -> np.ndarray:
    """[n, D] float32, length 1."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*were cut at the end")  # the record counts them
        return model.encode(
            job.texts,
            instruction=job.instruction,
            num_steps=num_steps,
            max_length=job.max_length,
            show_progress_bar=False,
        )


_RUNS = {OFFICIAL_EVAL: encode_official, GRAPH: encode_ours}


def measure(
    model: GIRCSE, job: CorpusJob, facts: ModelFacts, ceilings: Ceilings, steps: list[int], repeats: int
) -> tuple[list[Difference], list[dict[str, Any]], dict[str, Any]]:
    """-> the difference at the largest K, one JSON object per point, what the prompts are.

    Official-style evaluation takes most of the time, so it runs at the largest K only. The warm-up is two batches; on
    CUDA ours encodes the whole corpus once, because its graphs are kept. In the floor, the tokens that all prompts
    start with are encoded once where the engine would do that, too.
    """
    rows, last = tokenize(model, job, job.texts), max(steps)
    lengths, shared = [len(row) for row in rows], common_prefix(rows)
    few = replace(job, texts=job.texts[: 2 * job.batch])
    embeddings: dict[Point, np.ndarray] = {}

    def warm_up(trial: Trial) -> None:
        whole = trial.point.engine == GRAPH and model.device.type == "cuda"
        _timed(model, job if whole else few, trial.point)

    def timed(trial: Trial) -> float:
        took, embeddings[trial.point] = _timed(model, job, trial.point)
        return took

    todo = [*(Point(GRAPH, k) for k in steps), Point(OFFICIAL_EVAL, last)]
    (trials,) = take_turns(todo, warm_up, timed, repeats, model.device, title="corpus")
    checks = compare_each(
        [GRAPH],
        f"{len(rows)} texts, K = {last}",
        lambda: embeddings[Point(OFFICIAL_EVAL, last)],
        lambda name, theirs: compare(model, job, embeddings[Point(name, last)], theirs, last),
    )
    if model.causal_lm.head_weight.dtype in HALF:
        checks += compare_each([GRAPH], f"{_FEW} texts, float32", lambda: last, lambda _, k: compare_few(model, job, k))
    timings = {trial.point: Timing.of(trial.seconds) for trial in trials if trial.seconds}
    at_zero = facts.inference(lengths, 0, shared_prefix=shared)
    points = []
    for trial in trials:
        work = facts.inference(lengths, trial.point.num_steps, shared_prefix=shared)
        failed = trial.failed is not None
        row = trial.failure if failed else point_row(trial.point, timings, lengths, work, at_zero, ceilings)
        points.append(row)
    prompts = {
        "shortest": min(lengths),
        "longest": max(lengths),
        "prompt_tokens": sum(lengths),
        "at_max_length": sum(length == job.max_length for length in lengths),
        "shared_prefix": shared,
    }
    return checks, points, prompts


def compare(model: GIRCSE, job: CorpusJob, ours: np.ndarray, theirs: np.ndarray, num_steps: int) -> Difference:
    """Embeddings [n, D] of the job's texts by the engine and by official-style evaluation.

    In float32 and float64 the median text and all but a few must agree. Those that do not, and in half precision a
    sample of all, are compared with official-style evaluation in the next higher precision: over these texts together
    the engine's error must be at most 1.5 times the official side's.
    """
    dtype = model.causal_lm.head_weight.dtype
    what = f"{len(theirs)} texts, K = {num_steps}"
    if ours.shape != theirs.shape:
        return shapes_differ(GRAPH, what)
    distance = cosine_distance(ours, theirs)
    tolerance = COSINE[dtype]
    anything = 2.0  # explained by what follows
    errors = {
        "median cosine distance": (float(np.median(distance)), anything if dtype in HALF else tolerance),
        "share of texts beyond the tolerance": (
            float(np.mean(~(distance <= tolerance))),
            1.0 if dtype in HALF else _OUTLIERS,
        ),
        "largest cosine distance": (float(distance.max()), tolerance),
    }
    difference = Difference.of(GRAPH, what, errors)
    worst = [int(i) for i in np.argsort(-distance)[:_SAMPLE] if dtype in HALF or distance[i] > tolerance]
    decided = not set(difference.too_large()) <= {"largest cosine distance"} or np.isnan(distance).any()
    if dtype not in _HIGHER or decided:
        return difference
    if dtype in HALF:
        worst = sorted({*worst, *spaced(len(distance), _SAMPLE)})
    if not worst:
        return difference
    exact = _encode_higher(model, job, worst, OFFICIAL_EVAL, num_steps)
    of_ours, of_theirs = (float(cosine_distance(e[worst], exact).mean()) for e in (ours, theirs))
    # distances are squares of errors
    bound = FACTOR**2 * of_theirs + (0 if dtype in HALF else tolerance)
    errors |= {
        "largest cosine distance": (errors["largest cosine distance"][0], anything),
        "their mean distance from higher precision": (of_ours, bound),
        f"of {OFFICIAL_EVAL}": (of_theirs, anything),
    }
    return Difference.of(GRAPH, what, errors)


def compare_few(model: GIRCSE, job: CorpusJob, num_steps: int) -> Difference:
    """The two algorithms on a float32 copy of a model in half precision: the first texts, strictly."""
    few = list(range(min(_FEW, len(job.texts))))
    ours, theirs = (_encode_higher(model, job, few, engine, num_steps) for engine in (GRAPH, OFFICIAL_EVAL))
    what = f"{len(few)} texts, K = {num_steps}, float32"
    if ours.shape != theirs.shape:
        return shapes_differ(GRAPH, what)
    median = float(np.median(cosine_distance(ours, theirs)))
    return Difference.of(GRAPH, what, {"median cosine distance": (median, COSINE[torch.float32])})


def cosine_distance(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """[n, D], [n, D] -> [n] float64."""
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    return 1 - (a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))


def _encode_higher(model: GIRCSE, job: CorpusJob, chosen: list[int], engine: str, num_steps: int) -> np.ndarray:
    """[n, D]: some texts on a copy of the model in the next higher precision."""
    dtype = model.causal_lm.head_weight.dtype
    exact = copy.deepcopy(model.base).to(_HIGHER[dtype])
    few = replace(job, texts=[job.texts[i] for i in chosen], batch=min(job.batch, 8))
    lifted = GIRCSE(exact, model.tokenizer, model.config).eval()
    with ENGINES[engine].attached(lifted.causal_lm):
        return _RUNS[engine](lifted, few, num_steps)


def _timed(model: GIRCSE, job: CorpusJob, point: Point) -> tuple[float, np.ndarray]:
    """-> seconds, embeddings [n, D]."""
    embeddings: list[np.ndarray] = []
    with ENGINES[point.engine].attached(model.causal_lm):
        took = seconds(lambda: embeddings.append(_RUNS[point.engine](model, job, point.num_steps)), model.device)
    return took, embeddings[0]
