"""The process behind `bench.training.Worker`: one engine, one model, steps on demand over stdin and stdout."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench.engines import ENGINES
from bench.timing import seconds
from bench.training import TrainJob, results, step, trainable


def main() -> int:
    # whatever prints must not come between the answers
    answers, sys.stdout = sys.stdout, sys.stderr
    setup = json.loads(sys.stdin.readline())
    job, engine = TrainJob(**setup["job"]), setup["engine"]
    device = torch.device(job.device)
    lm = trainable(job, engine)
    queries, passages = job.batches(lm.embed_weight.shape[0])
    loaded = reset_peak(device)
    print(json.dumps({"loaded_bytes": loaded}), file=answers, flush=True)

    losses: list[torch.Tensor] = []

    def one(num_steps: int) -> None:
        losses.append(step(lm, engine, queries, passages, num_steps))

    with ENGINES[engine].attached(lm):
        for count, line in enumerate(sys.stdin):
            num_steps = int(line)
            if device.type == "cuda" and count:  # the memory was handed back: fill the allocator again, untimed
                step(lm, engine, queries, passages, num_steps)
                lm.model.zero_grad(set_to_none=True)
            reset_peak(device)
            took = seconds(partial(one, num_steps), device)
            answer = {"seconds": took, "peak_bytes": peak(device)}
            if count == 0:
                torch.save(results(lm, losses[0]), setup["results"])
            lm.model.zero_grad(set_to_none=True)
            if device.type == "cuda":
                torch.cuda.empty_cache()  # the other engines' processes share the device
            print(json.dumps(answer), file=answers, flush=True)
    return 0


def reset_peak(device: torch.device) -> int:
    """Starts the peak anew where that is possible. -> bytes in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # Linux: VmHWM := VmRSS
    with contextlib.suppress(OSError), open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return peak(device)


def peak(device: torch.device) -> int:
    """Largest resident size (CUDA: allocated) in bytes.

    `VmHWM` where Linux gives it: unlike `ru_maxrss` it does not start at the size of the process that started this one.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError), open("/proc/self/status") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    sys.exit(main())
