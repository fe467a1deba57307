#!/usr/bin/env python
"""Throughput and latency against K, a corpus, the training step: `python bench/run.py --help`."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

# the checkout that this file belongs to, whatever is installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import PretrainedConfig

from bench import corpus, encode_check, throughput, train_check, training
from bench.batches import draw_lengths, random_batch
from bench.floors import measure_ceilings
from bench.options import parse
from bench.plots import draw
from bench.records import judged, problems, report, save, settings, to_json
from bench.shapes import meta_model, pretrained_model, random_model
from gircse.lm.causal_lm import CausalLM, UnsupportedModelError
from gircse.roofline import ModelFacts


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0, 1 an engine is wrong, was not checked or failed, 2 bad options."""
    options, config = parse(argv)
    mode = _train if options.train else _corpus if options.corpus is not None else _throughput
    try:
        record = mode(options, config)
    except training.WorkerError as error:
        print(f"bench/run.py: {error}", file=sys.stderr)
        return 1
    except (UnsupportedModelError, corpus.CorpusError, OSError) as error:  # what an option names cannot be used
        print(f"bench/run.py: error: {str(error).strip().splitlines()[0]}", file=sys.stderr)
        return 2
    print(report(record))
    save(record, options.out)
    print(f"record: {options.out}")
    print(_plot(record, options.plot))
    found = problems(record)
    for line in found:
        print(f"bench/run.py: {line}", file=sys.stderr)
    print(to_json(record), flush=True)
    return 1 if found else 0


def _throughput(options: argparse.Namespace, config: PretrainedConfig) -> dict[str, Any]:
    dtype, device = getattr(torch, options.dtype), options.device
    facts = ModelFacts.of(meta_model(config, dtype))
    if options.model is not None:
        model = pretrained_model(options.model, dtype=dtype, device=device, layers=options.layers)
    else:
        model = random_model(config, dtype=dtype, device=device, seed=options.seed)
    lm = CausalLM.from_model(model)
    prefix = options.prefix_reuse
    ceilings = measure_ceilings(device, dtype)
    lengths = draw_lengths(options.batch, options.length, distribution=options.distribution, seed=options.seed)
    batch = random_batch(config.vocab_size, lengths, seed=options.seed, device=device, shared_prefix=prefix)
    points = list(
        throughput.measure(
            lm, facts, ceilings, batch, options.engines, options.steps, options.repeats, shared_prefix=prefix
        )
    )
    timed = [encode_check.Timed("the timed batch", batch, points)]
    if options.latency:
        timed.append(_latency(options, lm, config.vocab_size, points))
    reports = throughput.generation_reports(lm, options.engines)
    checks = encode_check.check(
        lm,
        options.engines,
        max(options.steps),
        min(options.length - prefix, 48),
        seed=options.seed,
        shared_prefix=prefix,
        timed=timed,
    )
    found = settings(options, config, facts, lengths)
    found["batch"] |= {"shared_prefix": prefix}
    return {
        "benchmark": "throughput",
        **found,
        "latency_runs": options.latency,
        "generation": reports,
        "ceilings": vars(ceilings),
        **judged([point.row for point in points], checks),
    }


def _latency(
    options: argparse.Namespace, lm: CausalLM, vocab: int, points: list[throughput.Measured]
) -> encode_check.Timed:
    """Adds `latency_p50` and `latency_p95` to the rows that have them, and points that failed. -> what was embedded."""
    text = random_batch(vocab, [options.length], seed=options.seed, device=options.device)
    everywhere = options.device.startswith("cuda")
    steps = options.steps if everywhere else sorted({min(options.steps), max(options.steps)})
    found = list(throughput.latency(lm, text, options.engines, steps, options.latency))
    rows = {measured.point: measured.row for measured in points}
    for measured in found:
        if "failed" in measured.row:
            points.append(measured)
        else:
            rows[measured.point] |= measured.row
    return encode_check.Timed("the single text", text, found)


def _corpus(options: argparse.Namespace, config: PretrainedConfig) -> dict[str, Any]:
    dtype = getattr(torch, options.dtype)
    facts = ModelFacts.of(meta_model(config, dtype))
    texts = corpus.read_texts(options.corpus, options.field, options.limit)
    job = corpus.CorpusJob(texts, options.instruction, options.length, options.batch)
    model = corpus.load(options.model, dtype, options.device)
    ceilings = measure_ceilings(options.device, dtype)
    checks, rows, prompts = corpus.measure(model, job, facts, ceilings, options.steps, options.repeats)
    found = settings(options, config, facts, [])
    found["batch"] |= {
        "texts": len(texts),
        "distribution": "corpus",
        "corpus": options.corpus.name,
        "instruction": options.instruction,
        "official_batch": options.batch,
        **prompts,
    }
    return {"benchmark": "corpus", **found, "ceilings": vars(ceilings), **judged(rows, checks)}


def _train(options: argparse.Namespace, config: PretrainedConfig) -> dict[str, Any]:
    job = training.TrainJob(
        shape=options.shape,
        model=options.model,
        layers=options.layers,
        queries=options.batch,
        negatives=options.negatives,
        length=options.length,
        distribution=options.distribution,
        num_steps=options.steps[-1],
        dtype=options.dtype,
        device=options.device,
        seed=options.seed,
        checkpointing=tuple(options.checkpointing or ()),
    )
    facts = ModelFacts.of(meta_model(config, job.torch_dtype))
    ceilings = measure_ceilings(job.device, job.torch_dtype)
    if torch.device(job.device).type == "cuda":
        lm = training.trainable(job)
        runners = training.here(lm, job, options.engines)
        rows = list(training.measure(runners, job, facts, ceilings, options.steps, options.repeats))
        checks = train_check.check(job, options.engines, lm, runners)
    else:
        with training.workers(job, options.engines) as runners:
            rows = list(training.measure(runners, job, facts, ceilings, options.steps, options.repeats))
            checks = train_check.check(job, options.engines, runners=runners)
    found = settings(options, config, facts, job.lengths())
    found["batch"] |= {"queries": job.queries, "negatives": job.negatives}
    found["checkpointing"] = list(job.checkpointing)
    return {"benchmark": "training", **found, "ceilings": vars(ceilings), **judged(rows, checks)}


def _plot(record: dict[str, Any], path: Path) -> str:
    if problems(record):
        return "plot: none, a curve would not show which points are wrong"
    if importlib.util.find_spec("matplotlib") is None:
        return "plot: none, matplotlib is not installed"
    draw(record)(record, path)
    return f"plot: {path}"


if __name__ == "__main__":
    sys.exit(main())
