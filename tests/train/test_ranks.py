"""Several processes: the losses and gradients of one, and one clear message when they cannot go on."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from gircse.train.checkpoint import list_checkpoints
from gircse.train.ranks import Ranks, digest_of, digest_of_rows, join_ranks, step_seed
from gircse.train.step import contrastive_backward
from tests.forkserver import CONTEXT
from tests.full_precision import keep_float64
from tests.training_batches import NUM_STEPS, adapted, batch, config, gradients, share_of
from tests.training_process import command

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def in_processes(size: int, task, *arguments) -> None:
    method = CONTEXT.get_start_method()
    mp.start_processes(_enter, (size, free_port(), task, arguments), nprocs=size, start_method=method)


def _enter(rank: int, size: int, port: int, task, arguments) -> None:
    torch.set_num_threads(1)
    os.environ |= {"WORLD_SIZE": str(size), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with join_ranks("cpu", timeout=60) as ranks:
        task(ranks, *arguments)


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def compare(ranks: Ranks, rows: int, sharded: bool) -> None:
    """This process's share against the whole batch in this process, in float64."""
    with pytest.MonkeyPatch.context() as patch:
        keep_float64(patch)
        compare_in_float64(ranks, rows, sharded)


def compare_in_float64(ranks: Ranks, rows: int, sharded: bool) -> None:
    tolerance, whole = 1e-10, batch(rows)
    # in one piece; by the block and gradient caching, with other numbers of passes in each process, and checkpointing
    for factor, options in ((1.0, {}), (0.0, {"gradient_checkpointing": True, "micro_batch_tokens": 60})):
        steps = {"num_steps": NUM_STEPS, "soft_token_gradient": factor}
        model = adapted(config())
        loss, losses, _ = contrastive_backward(model, whole, config(), **steps)
        expected = gradients(model)
        settings = config(fsdp=sharded, **options)
        model = adapted(settings, ranks=ranks)
        own = share_of(whole, ranks.share(rows))
        shared = contrastive_backward(model, own, settings, **steps, ranks=ranks)
        digest = ranks.sum_gradients([p for p in model.parameters() if p.requires_grad])
        assert relative(shared[0], loss) < tolerance
        assert relative(shared[1], losses) < tolerance
        assert relative(gradients(model), expected) < tolerance
        assert len({values[0] for values in ranks.gather([digest % 2**50])}) == 1
        if sharded:
            base = [p for p in model.causal_lm.body.layers.parameters() if not p.requires_grad]
            kept = sum(p.to_local().numel() for p in base)
            assert kept < 0.6 * sum(p.numel() for p in base)


def test_the_same_as_one_process_with_the_whole_batch():
    in_processes(3, compare, 5, False)


def test_a_shared_out_base_gives_the_same():
    """FSDP2 on the CPU; passes differ in number between the processes, which would hang if they were not evened out."""
    in_processes(2, compare, 5, True)


def disagree(ranks: Ranks, folder: str) -> None:
    values = {"rows": 7, "weights": 9, "stop": False}
    assert not ranks.same(1, **values)
    assert ranks.same(1, **{**values, "stop": ranks.rank == 1})
    for number, name in enumerate(("rows", "weights")):
        wrong = {**values, name: values[name] + ranks.rank // 2}  # of ranks 2 and 3
        with pytest.raises(ValueError, match=r"step 5: rank 2, 3 of 4 turned out to (read other rows|hold other)"):
            ranks.same(5, **wrong)
        Path(folder, f"{number}-{ranks.rank}").touch()
    with pytest.raises(ValueError, match=r"rank 1, 2, 3 of 4 turned out to be at another step"):
        ranks.same(5 + (ranks.rank > 0), **values)


def test_processes_that_see_different_things_are_named(tmp_path):
    in_processes(4, disagree, str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 8


@pytest.mark.parametrize(
    ("case", "speakers"), [("1 alone", {1}), ("all", {0, 1, 2}), ("all, 0 late", {1, 2}), ("all, 0 early", {0})]
)
def test_one_process_alone_speaks(case, speakers, tmp_path):
    """Whichever process fails, and whichever is late, although the store through which they agree ends with rank 0."""
    port = free_port()
    processes = [CONTEXT.Process(target=_enter_to_fail, args=(rank, 3, port, case, tmp_path)) for rank in range(3)]
    for process in processes:
        process.start()
    codes = ended(processes)
    told = [(tmp_path / str(rank)).read_text() for rank in range(3)]
    assert sorted(told) == ["SystemExit 1", "SystemExit 1", f"ValueError {case}"], told
    speaker = told.index(f"ValueError {case}")
    assert speaker in speakers
    assert codes[speaker] == 2


def _enter_to_fail(rank: int, size: int, port: int, case: str, folder: Path) -> None:
    try:
        _enter(rank, size, port, fail, (case,))
    except BaseException as error:
        (folder / str(rank)).write_text(f"{type(error).__name__} {error}")
        sys.exit(1 if isinstance(error, SystemExit) else 2)


def fail(ranks: Ranks, case: str) -> None:
    ranks.wait()
    if case.startswith("all"):
        late = {"all, 0 late": ranks.rank == 0, "all, 0 early": ranks.rank > 0}
        time.sleep(0.5 * late.get(case, False))
        raise ValueError(case)
    if case == f"{ranks.rank} alone":
        raise ValueError(case)
    ranks.wait()


def test_shares_are_contiguous_and_cover_the_batch():
    for size in (1, 2, 3, 5):
        shares = [Ranks(torch.device("cpu"), rank, size).share(11) for rank in range(size)]
        assert [i for share in shares for i in range(11)[share]] == list(range(11))
        assert max(s.stop - s.start for s in shares) - min(s.stop - s.start for s in shares) <= 1
    with pytest.raises(ValueError, match="batch_size: got 2 rows for 3 processes"):
        Ranks(torch.device("cpu"), 0, 3).share(2)


def test_digests_and_seeds():
    tensors = [torch.randn(3, 5), torch.randn(7, dtype=torch.bfloat16)]
    before = digest_of(tensors)
    assert before == digest_of([t.clone() for t in tensors])
    tensors[1][6] += 1
    assert digest_of(tensors) != before
    assert digest_of_rows(["a", "bc"]) != digest_of_rows(["ab", "c"])
    assert len({step_seed(seed, step, rank) for seed in range(3) for step in range(5) for rank in range(4)}) == 60


def test_alone_there_is_nothing_to_exchange():
    with join_ranks("cpu", timeout=1) as ranks:
        assert (ranks.rank, ranks.size, ranks.group) == (0, 1, None)
        assert ranks.gather([1.5, 2.0]) == [[1.5, 2.0]]
    assert not dist.is_initialized()


# ---------------------------------------------------------------- whole jobs


@pytest.fixture(scope="module")
def job(base, tmp_path_factory):
    """The folder of a base model and rows, as `gircse train` takes them."""
    folder = tmp_path_factory.mktemp("job")
    (folder / "base").symlink_to(base)
    words = ["red", "blue", "fox", "dog", "tree", "sea"]
    rows = [{"prompt": "find it", "query": a, "pos": [f"{b} {a}"]} for a in words for b in words]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def options(job: Path, output: Path, *extra: str) -> list[str]:
    # fmt: off
    return [
        "--model", str(job / "base"), "--data", str(job / "rows.jsonl"), "--output", str(output),
        "--batch-size", "5", "--num-steps", "2", "--max-steps", "6", "--save-every", "2", "--lora-dropout", "0",
        "--learning-rate", "3e-3", "--device", "cpu", "--no-progress", *extra,
    ]
    # fmt: on


def start(job: Path, output: Path, size: int, *extra: str) -> list:
    """The processes of a training job."""
    return start_processes(["train", *options(job, output, *extra)], output, size)


def start_processes(arguments: list[str], output: Path, size: int) -> list:
    """The processes of a job, without torchrun, which would end the others itself when one dies."""
    port, processes = str(free_port()), []
    for rank in range(size):
        places = {"WORLD_SIZE": str(size), "RANK": str(rank), "LOCAL_RANK": str(rank)}
        places |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        own = [each.replace("{rank}", str(rank)) for each in arguments]
        processes.append(command(own, output.parent / f"errors-{rank}", **places))
    return processes


def torchrun(job: Path, output: Path, size: int, *extra: str) -> None:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
    }
    runner = ["-m", "torch.distributed.run", "--nproc-per-node", str(size), "--master-port", str(free_port())]
    line = [sys.executable, *runner, "-m", "gircse.train", *options(job, output, *extra)]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trained 6 steps") == 1


def ended(processes: list) -> list[int]:
    for process in processes:
        process.join(100)
    return [process.exitcode for process in processes]


def read(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "train_log.jsonl").read_text().splitlines()]


def wait_for_lines(output: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    log = output / "train_log.jsonl"
    while not (log.exists() and log.read_bytes().count(b"\n") >= count):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_torchrun_trains_like_one_process_and_one_goes_on_where_two_stopped(job, tmp_path):
    alone = start(job, tmp_path / "1", 1)
    torchrun(job, tmp_path / "2", 2)
    assert ended(alone) == [0]
    one, two = read(tmp_path / "1"), read(tmp_path / "2")
    assert [entry["batch"] for entry in one] == [entry["batch"] for entry in two]
    for name in ("losses", "entropy", "grad_norm"):
        close([e[name] for e in one], [e[name] for e in two])
    assert (tmp_path / "2" / "model" / "adapter_model.safetensors").is_file()
    # another number of processes goes on at the exact row: from step 4, steps 5 and 6 again
    (tmp_path / "2" / "checkpoints" / "step-000006").rename(tmp_path / "away")
    assert ended(start(job, tmp_path / "2", 1, "--resume")) == [0]
    again = read(tmp_path / "2")
    assert again[:4] == two[:4]
    assert [entry["batch"] for entry in again] == [entry["batch"] for entry in one]
    close([e["losses"] for e in again], [e["losses"] for e in one])


def close(ours: list, theirs: list) -> None:
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-4, atol=1e-5)


def test_two_processes_distil_like_one(job, tmp_path):
    """With gradient caching in both processes; queries and documents are shared unequally."""
    logs = []
    for size in (1, 2):
        output = tmp_path / str(size) / "run"
        output.parent.mkdir()
        # fmt: off
        arguments = [
            "distill", "--teacher", str(job / "base"), "--data", str(job / "rows.jsonl"), "--output", str(output),
            "--num-steps", "2", "--batch-size", "5", "--max-steps", "3", "--learning-rate", "3e-3", "--device", "cpu",
            "--micro-batch-tokens", "60", "--no-progress",
        ]
        # fmt: on
        assert ended(start_processes(arguments, output, size)) == [0] * size, said(output.parent)
        logs.append([json.loads(line) for line in (output / "distill_log.jsonl").read_text().splitlines()])
    for name in ("loss", "cosine", "kl", "grad_norm"):
        close(*([entry[name] for entry in log] for log in logs))
    assert [entry["batch"] for entry in logs[0]] == [entry["batch"] for entry in logs[1]]
    results = [json.loads((tmp_path / size / "run" / "distill_result.json").read_text()) for size in "12"]
    close(*(list(result["agreement"].values()) for result in results))


def test_a_rank_that_dies_ends_the_job_with_one_message(job, tmp_path):
    processes = start(job, tmp_path / "run", 3, "--max-steps", "100000", "--rank-timeout", "60")
    wait_for_lines(tmp_path / "run", 3)
    os.kill(processes[1].pid, signal.SIGKILL)
    killed = time.monotonic()
    codes = ended(processes)
    assert time.monotonic() - killed < 30
    assert codes[1] == -signal.SIGKILL
    assert sorted(codes[::2]) == [1, 2]
    errors = said(tmp_path)
    assert errors.count("gircse train: error: ") == 1
    assert "error: rank 1 of 3 processes died or no longer answers, so rank " in errors
    assert "start again with --resume" in errors
    assert "Traceback" not in errors


def test_a_rank_that_hangs_ends_the_job_with_one_message(job, tmp_path):
    processes = start(job, tmp_path / "run", 2, "--max-steps", "100000", "--rank-timeout", "6")
    wait_for_lines(tmp_path / "run", 3)
    os.kill(processes[1].pid, signal.SIGSTOP)
    try:
        assert ended(processes[:1]) == [2]
    finally:
        os.kill(processes[1].pid, signal.SIGKILL)
    errors = said(tmp_path)
    assert errors.count("gircse train: error: ") == 1
    assert "error: rank 1 of 2 processes died or no longer answers, so rank 0 ends the job" in errors


def test_other_rows_in_one_process_end_the_job_with_one_message(job, tmp_path):
    """Another seed is another order of the rows."""
    assert sorted(ended(start(job, tmp_path / "run", 2, "--seed", "{rank}"))) == [1, 2]
    errors = said(tmp_path)
    assert errors.count("step 1: rank 1 of 2 turned out to read other rows than rank 0") == 1
    assert "Traceback" not in errors


def test_a_signal_to_one_process_stops_them_all_and_all_end_well(job, tmp_path):
    processes = start(job, tmp_path / "run", 2, "--max-steps", "100000", "--save-every", "100000")
    wait_for_lines(tmp_path / "run", 3)
    os.kill(processes[1].pid, signal.SIGTERM)
    assert ended(processes) == [0, 0]
    done = len(read(tmp_path / "run"))
    assert f"stopped after step {done}, saved in " in said(tmp_path)
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == [f"step-{done:06d}"]


def said(folder: Path) -> str:
    return "".join(path.read_text() for path in folder.glob("errors-*"))
