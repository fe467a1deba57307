"""Sharded encoding in processes, by the command and by torchrun; and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gircse.cli import main
from gircse.cli.encode import _device_of_rank
from gircse.encode.shard_folder import join_shards
from gircse.encode.sharded import Rank, encode_sharded
from tests.encode.sharded_runs import (
    REPOSITORY,
    Encoder,
    embed,
    loaded,
    names,
    run,
    run_ranks,
    start_worker,
    states,
    texts_of,
    wait_for,
)
from tests.tiny_models import tiny_model, tiny_tokenizer


@pytest.mark.parametrize("suffix", ["", ".npy"])
def test_two_jobs_on_one_folder_encode_every_shard_once(make_input, tmp_path, suffix):
    path, out, log = make_input(79), tmp_path / f"out{suffix}", tmp_path / "log"
    workers = [start_worker(path, out, log, 0, 1, 0.05) for _ in range(2)]
    assert [worker.wait(timeout=30) for worker in workers] == [0, 0]
    got = loaded(out) if suffix == "" else np.load(out)
    np.testing.assert_array_equal(got, embed(None, texts_of(79)))
    encoded = log.read_text().splitlines()
    if suffix == "" or len(encoded) == 20:  # a job that starts after the other has joined the file encodes it anew
        assert sorted(encoded) == sorted(texts_of(79)[::4])


@pytest.mark.parametrize("suffix", ["", ".npy"])
def test_processes_killed_at_any_time_lose_and_repeat_nothing_finished(make_input, tmp_path, suffix):
    path, out, log = make_input(199), tmp_path / f"out{suffix}", tmp_path / "log"
    folder = tmp_path / ("out" if suffix == "" else "out.npy.shards")
    finished: dict[str, tuple[int, int]] = {}
    for world_size, shards in ((2, 3), (3, 8), (1, 12)):
        workers = [start_worker(path, out, log, r, world_size, 0.03) for r in range(world_size)]
        wait_for(lambda shards=shards: len(states(folder)) >= shards)
        for worker in workers:
            worker.kill()
            worker.wait()
        now = states(folder)
        assert {name: now[name] for name in finished} == finished
        finished = now
        assert not out.is_file()
    run_ranks([Encoder(), Encoder()], path, out, settings={})
    got = loaded(out) if suffix == "" else np.load(out)
    np.testing.assert_array_equal(got, embed(None, texts_of(199)))
    if suffix == "":
        assert {name: states(out)[name] for name in finished} == finished


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"settings": {"model": "other", "num_steps": 2}}, "model: .*was begun with 'm', got 'other'"),
        ({"settings": {"model": "m", "num_steps": None}}, "num_steps: .* was begun with 2, got None"),
        ({"settings": {"model": "m"}}, "num_steps: .* was begun with 2, got None"),
        ({"settings": {"model": "m", "num_steps": 2, "dtype": "float16"}}, "dtype: .*begun with None, got 'float16'"),
        ({"shard_size": 5}, "shard_size: .* was begun with 4, got 5"),
        ({"field": "body"}, "field: .* was begun with 'text', got 'body'"),
    ],
)
def test_other_settings_are_refused_and_named(make_input, tmp_path, options, message):
    path, out = make_input(11), tmp_path / "out"
    run(Encoder(), path, out)
    encoder = Encoder()
    with pytest.raises(ValueError, match=message):
        run(encoder, path, out, **options)
    assert encoder.loads == 0


def test_another_input_is_refused(make_input, tmp_path):
    path, out = make_input(11), tmp_path / "out"
    run(Encoder(), path, out)
    with pytest.raises(ValueError, match="input_bytes: .*; input_sha256_of_64KiB: "):
        run(Encoder(), make_input(12), out)
    Path(path).rename(tmp_path / "moved.txt")
    make_input(11)
    run(Encoder(), path, out)
    with pytest.raises(ValueError, match="input: .* was begun with .*in.txt', got .*moved.txt'"):
        run(Encoder(), str(tmp_path / "moved.txt"), out)


def test_a_bad_line_is_found_before_anything_is_encoded(make_input, tmp_path):
    path = make_input(11, "in.jsonl")
    with open(path, "a") as file:
        file.write('{"text": 5}\n')
    encoder = Encoder()
    with pytest.raises(ValueError, match=r"in.jsonl:12: expected an object with a string in 'text'"):
        run(encoder, path, tmp_path / "out")
    assert encoder.loads == 0
    assert names(tmp_path) == ["in.jsonl"]


def test_an_input_that_shrinks_meanwhile_is_noticed(make_input, tmp_path):
    path, out = make_input(11), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(Encoder(die_at=1), path, out)
    text = Path(path).read_text()
    Path(path).write_text("\n" + text.replace("\n", " ").strip())  # as long, but with fewer lines
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["settings"] |= {"input_bytes": os.path.getsize(path)}
    with pytest.raises(ValueError, match="input_sha256_of_64KiB"):
        run(Encoder(), path, out)
    manifest["settings"]["input_sha256_of_64KiB"] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="has become shorter, expected 11 texts"):
        run(Encoder(), path, out)


def test_bad_arguments(make_input, tmp_path):
    path, out = make_input(5), tmp_path / "out"
    for options, message in (
        ({"shard_size": 0}, "shard_size: got 0, expected an integer >= 1"),
        ({"shard_size": 2.5}, "shard_size: got 2.5"),
        ({"timeout": 0}, "timeout: got 0"),
        ({"timeout": float("nan")}, "timeout: got nan"),
    ):
        with pytest.raises(ValueError, match=message):
            run(Encoder(), path, out, **options)
    with pytest.raises(ValueError, match=r"input: got - \(standard input\)"):
        run(Encoder(), "-", out)
    with pytest.raises(ValueError, match="is no regular file"):
        run(Encoder(), str(tmp_path), out)
    with pytest.raises(FileNotFoundError):
        run(Encoder(), str(tmp_path / "none.txt"), out)
    with pytest.raises(
        ValueError, match=r"output: got 'o.csv', expected a name that ends in .npy or .jsonl, or a folder"
    ):
        run(Encoder(), path, Path("o.csv"))
    with pytest.raises(ValueError, match=r"output: got .*in.txt"):
        run(Encoder(), path, Path(path))
    assert names(tmp_path) == ["in.txt"]


def test_a_folder_of_other_things_is_left_alone(make_input, tmp_path):
    path, out = make_input(5), tmp_path / "out"
    out.mkdir()
    run(Encoder(), path, out)  # empty: taken
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match=r"output: .*other has files but no manifest.json"):
        run(Encoder(), path, other)
    with pytest.raises(ValueError, match=r"folder: .*other has no manifest.json"):
        join_shards(other, str(tmp_path / "o.npy"))
    (out / "manifest.json").write_text('{"settings": {}}')
    with pytest.raises(ValueError, match=r"folder: .*manifest.json cannot be read: KeyError"):
        run(Encoder(), path, out)


def test_embeddings_of_the_wrong_shape_are_refused(make_input, tmp_path):
    path = make_input(5)
    with pytest.raises(ValueError, match=r"encode: got shape \[3, 2\], expected \[4, D\]"):
        encode_sharded(object, lambda _, texts: np.zeros((3, 2)), path, str(tmp_path / "a"), settings={}, shard_size=4)
    encode_sharded(
        object,
        lambda _, texts: np.zeros((len(texts), len(texts))),
        path,
        str(tmp_path / "b"),
        settings={},
        shard_size=4,
    )
    with pytest.raises(ValueError, match=r"shard-000001.npy has embeddings of shape \[1\], shard 0 \[4\]"):
        join_shards(tmp_path / "b", str(tmp_path / "o.npy"))


def test_shards_of_a_dead_rank_are_named(make_input, tmp_path):
    with pytest.raises(TimeoutError, match=r"misses shards 1, 3, 5 of 6, left to rank 1, and nothing .* for 0.2 s"):
        run(Encoder(), make_input(22), tmp_path / "out", 0, 2, timeout=0.2)


def test_progress_of_another_rank_renews_the_patience(make_input, tmp_path):
    path, out, log = make_input(55), tmp_path / "out", tmp_path / "log"
    worker = start_worker(path, out, log, 1, 2, 0.4)  # seven shards in 2.8 s
    wait_for(lambda: (out / "manifest.json").exists())
    run(Encoder(), path, out, 0, 2, timeout=2.0, settings={})
    assert worker.wait(timeout=10) == 0
    np.testing.assert_array_equal(loaded(out), embed(None, texts_of(55)))


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "2"}, "RANK: not set, expected 0..1 beside WORLD_SIZE=2"),
        ({"WORLD_SIZE": "two", "RANK": "0"}, "WORLD_SIZE: got 'two', expected an integer"),
        ({"WORLD_SIZE": "0", "RANK": "0"}, "WORLD_SIZE: got 0, expected an integer >= 1"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK: got 2, expected less than WORLD_SIZE=2"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK: got '-1'"),
    ],
)
def test_a_bad_environment(environment, message):
    with pytest.raises(ValueError, match=message):
        Rank.of_environment(environment)


def test_the_environment_of_torchrun():
    assert Rank.of_environment({}) == Rank(0, 1, None)
    assert Rank.of_environment({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}) == Rank(5, 8, 1)


def test_every_process_of_a_machine_has_its_own_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert _device_of_rank(None, 3) == "cuda:3"
    assert _device_of_rank("cuda", 1) == "cuda:1"
    assert _device_of_rank("cuda:0", 3) == "cuda:0"
    assert _device_of_rank("cpu", 3) == "cpu"
    assert _device_of_rank(None, None) is None
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert _device_of_rank(None, 3) is None


# ---------------------------------------------------------------- the command, with a real model


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A saved tiny model, an input, and what one process makes of it."""
    folder = tmp_path_factory.mktemp("real")
    tiny_model("llama").save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    lines = [json.dumps({"body": f"{t} and more {t}"}) + "\n" for t in texts_of(46)]
    (folder / "in.jsonl").write_text("".join(lines))
    assert main(command(folder, folder / "expected.npy")) == 0
    return folder


def command(real: Path, output: Path) -> list[str]:
    # fmt: off
    return [
        "encode", str(real / "in.jsonl"), "--model", str(real / "base"), "--output", str(output), "--field", "body",
        "--instruction", "find it", "--num-steps", "3", "--truncate-dim", "20", "--device", "cpu",
        "--shard-size", "8", "--shard-timeout", "20",
    ]
    # fmt: on


def environment(**values: object) -> dict[str, str]:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    inherited = {name: value for name, value in os.environ.items() if name not in names}
    paths = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "kernels")])
    return inherited | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths} | {k: str(v) for k, v in values.items()}


def start_rank(arguments: list[str], rank: int, world_size: int) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "gircse", *arguments],
        env=environment(RANK=rank, WORLD_SIZE=world_size, LOCAL_RANK=rank),
        cwd=REPOSITORY,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_torchrun_gives_what_one_process_gives(real, tmp_path):
    out = tmp_path / "out.npy"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port), "-m", "gircse"]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, *command(real, out)],
        env=environment(),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "rank 1: encoded 3 of 6 shards, 22 of 46 texts" in done.stderr
    assert names(tmp_path) == ["out.npy"]
    got, expected = np.load(out), np.load(real / "expected.npy")
    assert got.shape == (46, 20)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_ranks_killed_after_the_first_shard_and_started_again(real, tmp_path):
    out = tmp_path / "out"
    ranks = [start_rank(command(real, out), r, 2) for r in range(2)]
    ranks[1].send_signal(signal.SIGSTOP)  # hangs, so that the job cannot end before it is killed
    wait_for(lambda: states(out) if out.is_dir() else False, 60)
    for rank in ranks:
        rank.send_signal(signal.SIGKILL)
        rank.communicate()
    before = states(out)
    assert set(before) <= {f"shard-{s:06d}.npy" for s in (0, 2, 4)}

    ranks = [start_rank(command(real, out), r, 2) for r in range(2)]
    errors = [rank.communicate(timeout=60)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    after = states(out)
    assert len(after) == 6
    assert {name: after[name] for name in before} == before
    assert json.loads((out / "manifest.json").read_text())["complete"]
    np.testing.assert_allclose(loaded(out), np.load(real / "expected.npy"), atol=1e-5)


def test_the_command_for_one_process_and_a_folder(real, tmp_path, capsys, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert main(command(real, tmp_path / "out")) == 0
    assert "encoded 6 of 6 shards, 46 of 46 texts" in capsys.readouterr().err
    np.testing.assert_allclose(loaded(tmp_path / "out"), np.load(real / "expected.npy"), atol=1e-5)
    assert main([*command(real, tmp_path / "out"), "--no-normalize"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("gircse encode: error: normalize: ")
    assert len(error.splitlines()) == 1
    assert main(["encode", "-", "--model", str(real / "base"), "--output", str(tmp_path / "other")]) == 2
    assert "input: got - (standard input)" in capsys.readouterr().err
