#!/usr/bin/env python
"""Throughput against K, and the training step: `python bench/run.py --help`."""

from __future__ import annotations

import argparse
import gc
import importlib.util
import sys
from pathlib import Path
from typing import Any

# the checkout that this file belongs to, whatever is installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import PretrainedConfig

from bench import throughput, training
from bench.agreement import Difference, Disagreement, worst
from bench.batches import draw_lengths, random_batch
from bench.engines import ENGINES
from bench.floors import ModelFacts, measure_ceilings
from bench.options import parse
from bench.plots import plot_throughput, plot_training
from bench.provenance import provenance
from bench.records import report, save, to_json
from bench.shapes import meta_model, pretrained_model, random_model
from gircse.architecture import CausalLM, UnsupportedModelError


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0, 1 the engines disagree or one failed, 2 bad options."""
    options, config = parse(argv)
    try:
        record = (_train if options.train else _throughput)(options, config)
    except (Disagreement, training.WorkerError) as error:
        print(f"bench/run.py: {error}", file=sys.stderr)
        return 1
    except (UnsupportedModelError, OSError) as error:  # --model names something that cannot be loaded
        print(f"bench/run.py: error: {str(error).strip().splitlines()[0]}", file=sys.stderr)
        return 2
    print(report(record))
    save(record, options.out)
    print(f"record: {options.out}")
    print(_plot(record, options.plot))
    print(to_json(record), flush=True)
    return 0


def _throughput(options: argparse.Namespace, config: PretrainedConfig) -> dict[str, Any]:
    dtype, device = getattr(torch, options.dtype), options.device
    facts = ModelFacts.of(meta_model(config, dtype))
    if options.model is not None:
        model = pretrained_model(options.model, dtype=dtype, device=device, layers=options.layers)
    else:
        model = random_model(config, dtype=dtype, device=device, seed=options.seed)
    lm = CausalLM.from_model(model)
    checks = throughput.check_agreement(
        lm, options.engines, max(options.steps), min(options.length, 48), seed=options.seed
    )
    ceilings = measure_ceilings(device, dtype)
    lengths = draw_lengths(options.batch, options.length, mixed=options.mixed, seed=options.seed)
    batch = random_batch(config.vocab_size, lengths, seed=options.seed, device=device)
    more, rows = throughput.measure(lm, facts, ceilings, batch, options.engines, options.steps, options.repeats)
    return {
        "benchmark": "throughput",
        **_settings(options, config, facts, lengths, [*checks, *more]),
        "ceilings": vars(ceilings),
        "points": rows,
    }


def _train(options: argparse.Namespace, config: PretrainedConfig) -> dict[str, Any]:
    job = training.TrainJob(
        shape=options.shape,
        model=options.model,
        layers=options.layers,
        queries=options.batch,
        negatives=options.negatives,
        length=options.length,
        mixed=options.mixed,
        num_steps=options.steps[0],
        dtype=options.dtype,
        device=options.device,
        seed=options.seed,
        checkpointing=options.checkpointing,
    )
    facts = ModelFacts.of(meta_model(config, job.torch_dtype))
    checks = training.check_agreement(job, options.engines)
    gc.collect()
    if torch.device(job.device).type == "cuda":
        torch.cuda.empty_cache()
    ceilings = measure_ceilings(job.device, job.torch_dtype)
    more, rows = training.measure(job, facts, ceilings, options.engines, options.repeats)
    settings = _settings(options, config, facts, job.lengths(), [*checks, *more])
    settings["batch"] |= {"queries": job.queries, "negatives": job.negatives}
    settings["checkpointing"] = job.checkpointing
    return {"benchmark": "training", **settings, "ceilings": vars(ceilings), "points": rows}


def _settings(
    options: argparse.Namespace,
    config: PretrainedConfig,
    facts: ModelFacts,
    lengths: list[int],
    checks: list[Difference],
) -> dict[str, Any]:
    return {
        "provenance": provenance(options.device),
        "model": {
            "name": options.name,
            "architecture": config.model_type,
            "random": options.model is None,
            "truncated": options.layers is not None,
            "dtype": options.dtype,
            "device": options.device,
            **facts.to_json(),
        },
        "batch": {
            "texts": len(lengths),
            "length": options.length,
            "mixed": options.mixed,
            "prompt_tokens": sum(lengths),
            "seed": options.seed,
        },
        "engines": {name: ENGINES[name].summary for name in options.engines},
        "num_steps": options.steps,
        "repeats": options.repeats,
        "agreement": {"worst": worst(checks), "checks": [check.to_json() for check in checks]},
    }


def _plot(record: dict[str, Any], path: Path) -> str:
    if importlib.util.find_spec("matplotlib") is None:
        return "plot: none, matplotlib is not installed"
    (plot_training if record["benchmark"] == "training" else plot_throughput)(record, path)
    return f"plot: {path}"


if __name__ == "__main__":
    sys.exit(main())
