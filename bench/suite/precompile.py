"""Compile every kernel that the suite is about to time, by processes that do nothing else, into Triton's cache.

    PYTHONPATH=.:kernels python -m bench.suite.precompile --arch 90 --jobs 2

The launches are the ops' own (`bench.static.launches`) and each is compiled through the call that a start makes, for a
driver that only names the device; so the cache answers when the kernel is started, and no GPU is needed here. The
last line is a JSON object with the counts.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

os.environ["TRITON_INTERPRET"] = os.environ.get("TRITON_INTERPRET", "0")

import triton
from gircse_kernels.decoder.attention import SLICE
from gircse_kernels.plan import Device
from triton.backends.compiler import GPUTarget

from bench.cases import BOTH, CASES, SMOKE_CASES, Case
from bench.info_nce import checked
from bench.provenance import ROOT, checkout_environment
from bench.shapes import SHAPES
from bench.static.compile_report import key
from bench.static.launches import DEVICES, Call, Launch, launches
from bench.suite import attention
from bench.suite.alternatives import using
from bench.suite.candidates import read
from bench.suite.model_cases import MODEL_CASES
from bench.suite.ops import SIZES
from bench.suite.steps import ONE_BY_ONE
from gircse.engine.config import STEPS_BUCKET

# `torch.compile` moves Triton's cache to a folder of its own unless one is named, and would find nothing there.
os.environ.setdefault("TRITON_CACHE_DIR", triton.knobs.cache.dir)

_CHECKED_ROWS = (1, 4, 32)


class Job(NamedTuple):
    """One launch of a call, to be compiled for a device; `alternative` is JSON, see `bench.suite.alternatives`."""

    call: Call
    number: int
    device: Device
    alternative: str = "{}"


def calls(sections: Sequence[str], *, smoke: bool = False) -> list[Call]:
    """Every call of an op that these sections of the suite time on a GPU, each once."""
    found: list[Call] = []
    if "ops" in sections:
        found += [op_call(case) for case in (SMOKE_CASES if smoke else CASES)]
    for case in () if smoke else [case for case in MODEL_CASES if case.section in sections]:
        trains = case.section in ("training", "train")
        # the engine's buffers hold a power of two rows; the checks take few rows, in float32 too
        timed = (case.rows, 2 * case.rows) if trains else (1 << (case.rows - 1).bit_length(), *_CHECKED_ROWS)
        for rows, dtype in [(n, case.dtype) for n in timed] + [
            (n, "float32") for n in ((2, 4) if trains else _CHECKED_ROWS)
        ]:
            found.append(_model_call(case.shape, rows, dtype, trains))
            found += [] if trains else _decoder_calls(case.shape, rows, case.length, dtype)
        for k in case.targets if trains else ():
            sizes = (case.rows, 2 * case.rows, max(k, 1), SHAPES[case.shape].settings["hidden_size"])
            found.append(Call("info_nce", sizes, case.dtype, backward=True))
    if "loss" in sections and not smoke:
        found += [
            Call("info_nce", size[:4], "float32", backward=True)
            for timed in SIZES
            for size in (timed, checked(timed.width))
        ]
    if "attention" in sections and not smoke:
        found += attention.calls()
    return list(dict.fromkeys(found))


def op_call(case: Case) -> Call:
    vocab, width, tied = case.matrices
    if case.variant == "logits":
        return Call("soft_embed", (case.rows, vocab, 0, width), case.dtype, False, case.what == BOTH)
    variants = (case.variant,) if case.variant else ()
    return Call("soft_embed", (case.rows, vocab, width, width), case.dtype, tied, case.what == BOTH, variants)


def _model_call(shape: str, rows: int, dtype: str, backward: bool) -> Call:
    settings = SHAPES[shape].settings
    width = settings["hidden_size"]
    sizes = (rows, settings["vocab_size"], width, width)
    return Call("soft_embed", sizes, dtype, settings["tie_word_embeddings"], backward)


def _decoder_calls(shape: str, rows: int, length: int, dtype: str) -> list[Call]:
    """The engine's own decoder: the steps of its layers, and its attention at that length and a shorter one."""
    settings = SHAPES[shape].settings
    heads, kv_heads = settings["num_attention_heads"], settings["num_key_value_heads"]
    width = settings["hidden_size"]
    size = settings.get("head_dim") or width // heads
    sizes = (rows, width, heads, kv_heads, size, size // 2, settings["intermediate_size"])
    slots = {min(length + STEPS_BUCKET, limit) for limit in (SLICE, length + STEPS_BUCKET)}
    attention = [Call("decode_attention", (rows, n, size, size, heads, kv_heads), dtype) for n in sorted(slots)]
    return [Call("decoder", sizes, dtype), *attention]


def jobs_of(found: Iterable[tuple[Call, str]], device: Device) -> list[Job]:
    """One job for each kernel, by the first launch that needs it; calls come with their alternative."""
    jobs: dict[str, Job] = {}
    for call, alternative in found:
        for index, launch in enumerate(_launches(call, device, alternative)):
            jobs.setdefault(key(launch, device.arch), Job(call, index, device, alternative))
    return list(jobs.values())


def compile_all(jobs: Sequence[Job], *, processes: int, seconds: float) -> dict[str, Any]:
    """Counts: {"kernels", "compiled", "cached", "failed": lines, "unfinished", "seconds"}."""
    started = time.perf_counter()
    found: dict[str, Any] = {"kernels": len(jobs), "compiled": 0, "cached": 0, "failed": [], "unfinished": 0}
    # forked: PyTorch has started no thread and no CUDA here, and importing it again would take longer than compiling
    pool = ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("fork"))
    futures = {pool.submit(compile_one, job): job for job in jobs}
    done, late = wait(futures, timeout=seconds)
    for future in done:
        outcome = future.result()
        found["failed"] += [outcome] if outcome not in ("compiled", "cached") else []
        if outcome in ("compiled", "cached"):
            found[outcome] += 1
    found["unfinished"] = len(late)
    for process in list(getattr(pool, "_processes", {}).values()) if late else []:
        process.terminate()
    pool.shutdown(wait=not late, cancel_futures=True)
    return {**found, "seconds": round(time.perf_counter() - started, 1)}


def compile_one(job: Job) -> str:
    """ "compiled", "cached", or what went wrong."""
    pose(job.device.arch)
    launch = _launches(job.call, job.device, job.alternative)[job.number]
    with compilations() as seen:
        try:
            _compile(launch)
        except Exception as error:
            return f"{launch.kernel.__name__} of {job.call}: {type(error).__name__}: {str(error).strip()[:200]}"
    return "compiled" if seen else "cached"


def _compile(launch: Launch) -> None:
    """Has Triton compile it for the active driver's device, through the same call as a real start."""
    config = launch.config
    launch.kernel.warmup(*launch.arguments, grid=launch.grid, **launch.constants, **config.blocks, **config.options)


@contextmanager
def compilations() -> Iterator[list[str]]:
    """Names of our kernels that Triton compiles inside: those that its cache does not have."""
    seen: list[str] = []

    def listener(*, src: Any, cache_hit: bool, **_: Any) -> None:
        if not cache_hit and getattr(src, "fn", None) is not None and src.fn.fn.__module__.startswith("gircse_kernels"):
            seen.append(src.name)

    before = triton.knobs.compilation.listener
    triton.knobs.compilation.listener = listener
    try:
        yield seen
    finally:
        triton.knobs.compilation.listener = before


class _NamedDevice:
    """Stands for Triton's driver where kernels are only compiled."""

    def __init__(self, arch: int) -> None:
        self._target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def pose(arch: int) -> None:
    """From here on Triton compiles for that architecture in this process, whatever is plugged in."""
    triton.runtime.driver.set_active(_NamedDevice(arch))


@lru_cache(maxsize=8)
def _launches(call: Call, device: Device, alternative: str) -> list[Launch]:
    with using(json.loads(alternative)):
        return launches(call, device)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0, 1 a kernel could not be compiled or there was no time for it, 2 bad options."""
    parser = argparse.ArgumentParser(prog="bench.suite.precompile", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--arch", type=int, default=90, help="compute capability without the point (default 90)")
    add("--multiprocessors", type=int, help="of the device; default: those of that architecture's largest chip")
    add("--jobs", type=int, default=os.cpu_count(), help="processes (default: the machine's cores)")
    add("--seconds", type=float, default=3600.0, help="what is not compiled by then is left out")
    add("--sections", default="ops,engine,step,attention,training,loss", help="of the suite, comma-separated")
    add("--candidates", type=Path, metavar="FILE", help="compile these alternatives, too")
    add("--smoke", action="store_true", help="the dry run's tiny shapes")
    options = parser.parse_args(argv)
    device = DEVICES.get(options.arch, DEVICES[90])._replace(arch=options.arch)
    if options.multiprocessors:
        device = device._replace(num_sms=options.multiprocessors)
    sections = options.sections.split(",")
    found = calls(sections, smoke=options.smoke)
    pairs = [(call, "{}") for call in found]
    if "step" in sections and not options.smoke:
        pairs += [(call, json.dumps(ONE_BY_ONE)) for call in calls(["step"])]
    for entry in read(options.candidates) if options.candidates else ():
        pairs += [(op_call(entry.case), json.dumps(alternative)) for alternative in entry.alternatives.values()]
    jobs = jobs_of(pairs, device)
    print(f"{len(pairs)} calls launch {len(jobs)} kernels; compiling for sm_{options.arch}", flush=True)
    counts = compile_all(jobs, processes=max(1, options.jobs), seconds=options.seconds)
    for line in counts["failed"]:
        print(f"FAILED: {line}")
    print(json.dumps(counts))
    return 1 if counts["failed"] or counts["unfinished"] else 0


def run(
    sections: Sequence[str],
    device: Device,
    *,
    processes: int,
    seconds: float,
    candidates: Path | None = None,
    smoke: bool = False,
) -> dict[str, Any]:
    """`main` in a process of its own, without the interpreter. -> its counts, or {"failed": [why]}."""
    command = [sys.executable, "-m", "bench.suite.precompile", "--arch", str(device.arch), "--jobs", str(processes)]
    command += ["--multiprocessors", str(device.num_sms), "--sections", ",".join(sections)]
    command += ["--seconds", str(seconds), *(["--smoke"] if smoke else [])]
    command += ["--candidates", str(candidates.resolve())] if candidates else []
    environment = checkout_environment(TRITON_INTERPRET="0", CUDA_VISIBLE_DEVICES="")
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds + 30, check=False
        )
        return json.loads(done.stdout.strip().splitlines()[-1])
    except subprocess.TimeoutExpired:
        return {"failed": [f"no answer after {seconds + 30:.0f} s"]}
    except (ValueError, IndexError):
        return {"failed": [(done.stderr.strip().splitlines() or ["no output"])[-1]]}


if __name__ == "__main__":
    sys.exit(main())
