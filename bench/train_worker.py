"""The process behind `bench.training.Worker`: one engine, one model, steps on demand over stdin and stdout."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench.training import Here, TrainJob, trainable


def main() -> int:
    # whatever prints must not come between the answers
    answers, sys.stdout = sys.stdout, sys.stderr
    setup = json.loads(sys.stdin.readline())
    job, engine = TrainJob(**setup["job"]), setup["engine"]
    device = torch.device(job.device)
    kept: dict[str, torch.Tensor] = {}
    runner = Here(trainable(job), job, engine, kept)
    print(json.dumps(runner.loaded), file=answers, flush=True)
    for count, line in enumerate(sys.stdin):
        num_steps = int(line)
        if device.type == "cuda" and count:  # the memory was handed back: fill the allocator again, untimed
            runner.step(num_steps)
        answer = runner.step(num_steps)
        if count == 0:
            torch.save(kept, setup["results"])
        if device.type == "cuda":
            torch.cuda.empty_cache()  # the other engines' processes share the device
        print(json.dumps(answer), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
