"""A corpus through a real tokenizer: `GIRCSE.encode` against official-style evaluation, texts in, embeddings out.

Both get the same texts and make the same prompts of them; the tokenizer is inside the timed region of both. The
official side takes batches in the order of the file, padded on the left; ours orders and packs the texts as it likes.
Every text's two embeddings are compared; where they do not agree the speed is marked WRONG.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from bench.agreement import FACTOR, HALF, Difference, compare_each, shapes_differ
from bench.batches import Batch, spaced
from bench.engines import ENGINES, GRAPH, OFFICIAL_EVAL
from bench.throughput import Point, point_row
from bench.timing import Timing, seconds
from gircse import GIRCSE
from gircse.engine.schedule import common_prefix
from gircse.lm.prompts import format_query
from gircse.ops import l2_normalize
from gircse.roofline import Ceilings, ModelFacts

# Cosine distance that rounding explains, of nearly every text. Twenty soft tokens, each fed back, multiply rounding
# errors: on one text in 25 (SmolLM2, untrained, K = 20) so much that float32 official-style evaluation is itself
# further than this from float64. The worst of these are held to the higher precision instead, in half precision all
# that are compared (`compare`).
COSINE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-3, torch.bfloat16: 1e-2}
_HIGHER = {torch.float32: torch.float64, torch.float16: torch.float32, torch.bfloat16: torch.float32}
# Texts that are held to the higher precision: the worst; in half precision as many evenly spaced ones beside them.
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


def read_texts(path: Path, field: str, limit: int | None) -> list[str]:
    """The texts of a .txt file (one a line) or a .jsonl file (`field` of each object); blank lines are left out.

    Raises:
        CorpusError: a line without a text, named by file and number, or a file without texts.
    """
    texts: list[str] = []
    with open(path, encoding="utf-8", newline="\n") as file:  # a text may hold other separators than \\n
        for number, line in enumerate(file, 1):
            if len(texts) == limit:
                break
            if line.strip():
                text = line.rstrip("\r\n")
                texts.append(_field(text, field, f"{path}:{number}") if path.suffix == ".jsonl" else text)
    if not texts:
        raise CorpusError(f"--corpus: {path} holds no text")
    return texts


def _field(line: str, field: str, where: str) -> str:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise CorpusError(f"{where}: no JSON: {error}") from None
    if not isinstance(found, dict) or not isinstance(found.get(field), str):
        raise CorpusError(f"{where}: expected an object with a string in field {field!r}")
    return found[field]


def load(path: str, dtype: torch.dtype, device: str) -> GIRCSE:
    """
    Raises:
        CorpusError: its own settings are none that official-style evaluation knows.
    """
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
def encode_official(model: GIRCSE, job: CorpusJob, num_steps: int, update: Callable[[int], Any]) -> np.ndarray:
    """[n, D] float32, length 1: batches in the order of the file."""
    run = ENGINES[OFFICIAL_EVAL].run
    found = []
    for start in range(0, len(job.texts), job.batch):
        rows = tokenize(model, job, job.texts[start : start + job.batch])
        states = run(model.causal_lm, *pad_left(rows, model.tokenizer.pad_token_id, model.device), num_steps)
        found.append(l2_normalize(model.pool(states)[:, -1]).float().cpu().numpy())
        update(len(rows))
    return np.concatenate(found)


def encode_ours(model: GIRCSE, job: CorpusJob, num_steps: int, update: Callable[[int], Any]) -> np.ndarray:
    """[n, D] float32, length 1."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*were cut at the end")  # the record counts them
        found = model.encode(
            job.texts,
            instruction=job.instruction,
            num_steps=num_steps,
            max_length=job.max_length,
            show_progress_bar=False,
        )
    update(len(found))
    return found


_RUNS = {OFFICIAL_EVAL: encode_official, GRAPH: encode_ours}


def measure(
    model: GIRCSE, job: CorpusJob, facts: ModelFacts, ceilings: Ceilings, steps: list[int], repeats: int
) -> tuple[list[Difference], list[dict[str, Any]], dict[str, Any]]:
    """-> the difference at the largest K, one JSON object per point, what the prompts are.

    Warm-up is two batches; on CUDA ours goes through the whole corpus once, for its graphs are kept from then on. The
    floor has the tokens that all prompts start with encoded once where the engine would do that, too.
    """
    rows = tokenize(model, job, job.texts)
    lengths = [len(row) for row in rows]
    shared = common_prefix(rows)
    # official-style evaluation at the largest K only: it is most of the time
    todo = [Point(GRAPH, k) for k in steps] + [Point(OFFICIAL_EVAL, max(steps))]
    few = CorpusJob(job.texts[: 2 * job.batch], job.instruction, job.max_length, job.batch)
    runs: dict[Point, list[float]] = {point: [] for point in todo}
    found: dict[Point, np.ndarray] = {}
    total = repeats * len(todo) * len(rows)
    with tqdm(total=total, desc="corpus", unit="text", disable=None, leave=False) as progress:
        for point in todo:
            whole = point.engine == GRAPH and model.device.type == "cuda"
            _timed(model, job if whole else few, point, lambda count: None)
        for _ in range(repeats):
            for point in todo:
                progress.set_description(f"{point.engine}, K = {point.num_steps}")
                took, found[point] = _timed(model, job, point, progress.update)
                runs[point].append(took)
    last = max(steps)
    checks = compare_each(
        [GRAPH],
        f"{len(rows)} texts, K = {last}",
        lambda: found[Point(OFFICIAL_EVAL, last)],
        lambda name, theirs: compare(model, job, found[Point(name, last)], theirs, last),
    )
    if model.causal_lm.head_weight.dtype in HALF:
        checks += compare_each([GRAPH], f"{_FEW} texts, float32", lambda: last, lambda _, k: compare_few(model, job, k))
    timings = {point: Timing.of(times) for point, times in runs.items()}
    at_zero = facts.inference(lengths, 0, shared_prefix=shared)
    points = []
    for point in todo:
        work = facts.inference(lengths, point.num_steps, shared_prefix=shared)
        points.append(point_row(point, timings, lengths, work, at_zero, ceilings))
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

    In float32 and float64 the median text and all but a few must agree. Where some do not, and always in half
    precision, both are compared with official-style evaluation in the next higher precision: over the worst texts
    together (and others in half precision) the engine's error must be at most 1.5 times the official side's.
    """
    dtype = model.causal_lm.head_weight.dtype
    what = f"{len(theirs)} texts, K = {num_steps}"
    if ours.shape != theirs.shape:
        return shapes_differ(GRAPH, what)
    distance = cosine_distance(ours, theirs)
    tolerance = COSINE[dtype]
    anything = 2.0  # explained by what follows
    measured = {
        "median cosine distance": float(np.median(distance)),
        "share of texts beyond the tolerance": float(np.mean(~(distance <= tolerance))),
        "largest cosine distance": float(distance.max()),
    }
    bounds = {
        "median cosine distance": anything if dtype in HALF else tolerance,
        "share of texts beyond the tolerance": 1.0 if dtype in HALF else _OUTLIERS,
        "largest cosine distance": tolerance,
    }
    found = Difference(GRAPH, what, measured, bounds)
    worst = [int(i) for i in np.argsort(-distance)[:_SAMPLE] if dtype in HALF or distance[i] > tolerance]
    if dtype not in _HIGHER or not set(found.too_large()) <= {"largest cosine distance"} or np.isnan(distance).any():
        return found
    if dtype in HALF:
        worst = sorted({*worst, *spaced(len(distance), _SAMPLE)})
    if not worst:
        return found
    exact = _encode_higher(model, job, worst, OFFICIAL_EVAL, num_steps)
    of_ours, of_theirs = (float(cosine_distance(e[worst], exact).mean()) for e in (ours, theirs))
    measured |= {"their mean distance from higher precision": of_ours, f"of {OFFICIAL_EVAL}": of_theirs}
    bounds |= {
        "largest cosine distance": anything,
        # distances are squares of errors
        "their mean distance from higher precision": FACTOR**2 * of_theirs + (0 if dtype in HALF else tolerance),
        f"of {OFFICIAL_EVAL}": anything,
    }
    return Difference(GRAPH, what, measured, bounds)


def compare_few(model: GIRCSE, job: CorpusJob, num_steps: int) -> Difference:
    """The two algorithms on a float32 copy of a model in half precision: the first texts, strictly."""
    few = list(range(min(_FEW, len(job.texts))))
    ours, theirs = (_encode_higher(model, job, few, engine, num_steps) for engine in (GRAPH, OFFICIAL_EVAL))
    what = f"{len(few)} texts, K = {num_steps}, float32"
    if ours.shape != theirs.shape:
        return shapes_differ(GRAPH, what)
    measured = {"median cosine distance": float(np.median(cosine_distance(ours, theirs)))}
    return Difference(GRAPH, what, measured, {"median cosine distance": COSINE[torch.float32]})


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
        return _RUNS[engine](lifted, few, num_steps, lambda count: None)


def _timed(model: GIRCSE, job: CorpusJob, point: Point, update: Callable[[int], Any]) -> tuple[float, np.ndarray]:
    """-> seconds, embeddings [n, D]."""
    found: list[np.ndarray] = []

    def run() -> None:
        found.append(_RUNS[point.engine](model, job, point.num_steps, update))

    with ENGINES[point.engine].attached(model.causal_lm):
        return seconds(run, model.device), found[0]
