"""Sharded encoding: every text once and in order, whoever does it, whoever dies, and however often it is started."""

from __future__ import annotations

import fcntl
import hashlib
import inspect
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gircse.cli import main
from gircse.cli.encode import _device_of_rank
from gircse.encode.shard_folder import join_shards
from gircse.encode.sharded import Rank, ShardReport, encode_sharded, shard_folder
from tests.tiny_models import tiny_model, tiny_tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
SIZE = 4  # texts of a shard, unless a test says otherwise


def embed(_model: object, texts: list[str]) -> np.ndarray:
    """[n, 3]: the number in the text, and two things that tell texts apart."""
    rows = [[float(text.split()[-1]), len(text), text.count("o")] for text in texts]
    return np.array(rows, dtype=np.float32).reshape(len(texts), 3)


def texts_of(n: int) -> list[str]:
    return [f"text {'o' * (i % 5)} {i}" for i in range(n)]


@pytest.fixture
def make_input(tmp_path):
    def make(n: int, name: str = "in.txt") -> str:
        path = tmp_path / name
        lines = [json.dumps({"text": t}) if name.endswith("l") else t for t in texts_of(n)]
        path.write_text("".join(line + "\n" for line in lines))
        return str(path)

    return make


class Encoder:
    """Remembers what it was asked; raises at its `die_at`-th call, as a process that is killed."""

    def __init__(self, die_at: int | None = None) -> None:
        self.calls: list[list[str]] = []
        self.loads = 0
        self.die_at = die_at

    def load(self) -> object:
        self.loads += 1
        return object()

    def __call__(self, model: object, texts: list[str]) -> np.ndarray:
        if self.die_at is not None and len(self.calls) == self.die_at:
            raise KeyboardInterrupt
        self.calls.append(texts)
        return embed(model, texts)


def run(encoder: Encoder, input: str, output: Path, rank: int = 0, world_size: int = 1, **options: Any) -> ShardReport:
    options = {"settings": {"model": "m", "num_steps": 2}, "shard_size": SIZE, "timeout": 10.0, **options}
    return encode_sharded(encoder.load, encoder, input, str(output), rank=Rank(rank, world_size), **options)


def run_ranks(encoders: list[Encoder], input: str, output: Path, **options: Any) -> list[ShardReport]:
    """All ranks of a world at the same time, in threads: what they share is the folder."""
    reports: list[ShardReport | BaseException] = [KeyboardInterrupt()] * len(encoders)

    def work(rank: int) -> None:
        try:
            reports[rank] = run(encoders[rank], input, output, rank, len(encoders), **options)
        except BaseException as error:
            reports[rank] = error

    threads = [threading.Thread(target=work, args=(r,)) for r in range(len(encoders))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for report in reports:
        if isinstance(report, BaseException):
            raise report
    return reports  # type: ignore[return-value]


def loaded(folder: Path) -> np.ndarray:
    return np.concatenate([np.load(path) for path in sorted(folder.glob("shard-*.npy"))])


def states(folder: Path) -> dict[str, tuple[int, int]]:
    """What changes when a file is written again."""
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.glob("shard-*.npy")}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------- order, sizes, formats


@pytest.mark.parametrize("name", ["in.txt", "in.jsonl"])
@pytest.mark.parametrize("n", [1, 4, 11, 12])
def test_a_folder_holds_the_texts_in_order(make_input, tmp_path, name, n):
    encoder, out = Encoder(), tmp_path / "out"
    report = run(encoder, make_input(n, name), out)
    shards = -(-n // SIZE)
    assert (report.texts, report.shards, report.encoded_shards, report.encoded_texts) == (n, shards, shards, n)
    np.testing.assert_array_equal(loaded(out), embed(None, texts_of(n)))
    assert [len(call) for call in encoder.calls] == [min(SIZE, n - s * SIZE) for s in range(shards)]
    assert encoder.loads == 1
    assert names(out) == ["manifest.json", *(f"shard-{s:06d}.npy" for s in range(shards))]
    assert np.load(out / "shard-000000.npy").dtype == np.float32


def test_an_empty_input_is_one_shard_that_tells_the_dimension(make_input, tmp_path):
    report = run(Encoder(), make_input(0), tmp_path / "out")
    assert (report.texts, report.shards) == (0, 1)
    assert loaded(tmp_path / "out").shape == (0, 3)
    join_shards(tmp_path / "out", str(tmp_path / "out.npy"))
    assert np.load(tmp_path / "out.npy").shape == (0, 3)


def test_the_manifest_tells_settings_and_counts(make_input, tmp_path):
    path = make_input(5)
    run(Encoder(), path, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["texts"], manifest["shards"], manifest["complete"]) == (5, 2, True)
    assert manifest["settings"]["input"] == path
    assert manifest["settings"]["input_bytes"] == os.path.getsize(path)
    assert manifest["settings"]["model"] == "m"
    assert manifest["settings"]["shard_size"] == SIZE


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("suffix", ["", ".npy", ".jsonl"])
def test_ranks_share_the_work(make_input, tmp_path, world_size, suffix):
    encoders, out = [Encoder() for _ in range(world_size)], tmp_path / f"out{suffix}"
    reports = run_ranks(encoders, make_input(22), out)
    assert [r.encoded_shards for r in reports] == [len(range(rank, 6, world_size)) for rank in range(world_size)]
    assert [e.loads for e in encoders] == [int(r.encoded_shards > 0) for r in reports]
    expected = embed(None, texts_of(22))
    if suffix == "":
        np.testing.assert_array_equal(loaded(out), expected)
        return
    if suffix == ".npy":
        np.testing.assert_array_equal(np.load(out), expected)
    else:
        got = [json.loads(line)["embedding"] for line in out.read_text().splitlines()]
        np.testing.assert_array_equal(np.array(got), expected)
    assert names(tmp_path) == ["in.txt", out.name]  # no folder of shards, nothing hidden


@pytest.mark.parametrize("suffix", [".npy", ".jsonl"])
def test_joining_a_folder_afterwards(make_input, tmp_path, suffix):
    run(Encoder(), make_input(11), tmp_path / "out")
    joined = tmp_path / f"joined{suffix}"
    join_shards(tmp_path / "out", str(joined))
    if suffix == ".npy":
        got = np.load(joined)
    else:
        got = np.array([json.loads(line)["embedding"] for line in joined.read_text().splitlines()])
    np.testing.assert_array_equal(got, embed(None, texts_of(11)))
    assert len(loaded(tmp_path / "out")) == 11  # the folder stays


def test_embeddings_of_every_step_keep_their_axes(make_input, tmp_path):
    def encode(model, texts):
        return np.stack([embed(model, texts), 2 * embed(model, texts)], axis=1)

    out = tmp_path / "out.npy"
    encode_sharded(object, encode, make_input(7), str(out), settings={}, shard_size=3)
    assert np.load(out).shape == (7, 2, 3)
    np.testing.assert_array_equal(np.load(out)[:, 1], 2 * embed(None, texts_of(7)))


def test_at_most_a_shard_and_a_block_of_texts_are_held(make_input, tmp_path, monkeypatch):
    from gircse.encode import sharded as encode_shards

    alive = most = 0
    original = encode_shards.read_texts

    class Text(str):
        def __new__(cls, value):
            nonlocal alive, most
            alive += 1
            most = max(most, alive)
            return super().__new__(cls, value)

        def __del__(self):
            nonlocal alive
            alive -= 1

    def read(path, *, field):
        for block in original(path, field=field, block=10):
            yield [Text(text) for text in block]

    monkeypatch.setattr(encode_shards, "read_texts", read)
    path = make_input(1000)
    for rank in (1, 0):
        encode_sharded(object, embed, path, str(tmp_path / "out"), settings={}, shard_size=50, rank=Rank(rank, 2))
    assert most <= 2 * (50 + 10)  # a call's texts may live on while the next shard is read
    np.testing.assert_array_equal(loaded(tmp_path / "out"), embed(None, texts_of(1000)))


# ---------------------------------------------------------------- starting again


def test_a_second_start_encodes_only_what_is_missing(make_input, tmp_path):
    path, out = make_input(22), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(Encoder(die_at=2), path, out)
    before = states(out)
    assert sorted(before) == ["shard-000000.npy", "shard-000001.npy"]
    encoder = Encoder()
    report = run(encoder, path, out)
    assert report.encoded_shards == 4
    assert [call[0] for call in encoder.calls] == [texts_of(22)[i] for i in (8, 12, 16, 20)]
    assert {name: state for name, state in states(out).items() if name in before} == before
    np.testing.assert_array_equal(loaded(out), embed(None, texts_of(22)))
    assert not list(out.glob("*.lock"))

    third = Encoder()
    assert run(third, path, out).encoded_shards == 0
    assert (third.loads, third.calls) == (0, [])


@pytest.mark.parametrize(("first", "second"), [(2, 3), (3, 1), (1, 2), (2, 1)])
@pytest.mark.parametrize("suffix", ["", ".npy"])
def test_going_on_with_another_number_of_ranks(make_input, tmp_path, first, second, suffix):
    path, out = make_input(41), tmp_path / f"out{suffix}"
    folder = tmp_path / ("out" if suffix == "" else "out.npy.shards")
    last = first - 1
    with pytest.raises(KeyboardInterrupt):
        run(Encoder(die_at=2), path, out, last, first)
    done = states(folder)
    assert len(done) == 2
    encoders = [Encoder() for _ in range(second)]
    run_ranks(encoders, path, out)
    assert sum(len(e.calls) for e in encoders) == 11 - 2
    got = loaded(out) if suffix == "" else np.load(out)
    np.testing.assert_array_equal(got, embed(None, texts_of(41)))


def test_one_process_takes_up_the_shards_that_several_left(make_input, tmp_path):
    assert shard_folder(str(tmp_path / "out.npy"), 1) is None
    assert shard_folder(str(tmp_path / "out.npy"), 2) == tmp_path / "out.npy.shards"
    with pytest.raises(KeyboardInterrupt):
        run(Encoder(die_at=1), make_input(16), tmp_path / "out.npy", 1, 2)
    assert shard_folder(str(tmp_path / "out.npy"), 1) == tmp_path / "out.npy.shards"


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def _other_count(path: Path) -> None:
    np.save(path, np.load(path)[:-1])


def _other_dtype(path: Path) -> None:
    np.save(path, np.load(path).astype(np.float64))


@pytest.mark.parametrize(
    "damage",
    [
        _cut,
        _lengthen,
        _other_count,
        _other_dtype,
        lambda p: p.write_bytes(b""),
        lambda p: p.write_bytes(b"\x93NUMPY\x01\x00"),
        lambda p: p.write_bytes(b"\x93NUMPY\x01\x00\x10\x00{'descr': ((((((("),
        lambda p: p.write_bytes(b"garbage " * 30),
    ],
    ids=["cut", "longer", "count", "dtype", "empty", "magic", "header", "garbage"],
)
def test_a_damaged_shard_is_encoded_again(make_input, tmp_path, damage):
    path, out = make_input(11), tmp_path / "out"
    run(Encoder(), path, out)
    before = states(out)
    damage(out / "shard-000001.npy")
    with pytest.raises(ValueError, match=r"folder: .* misses shard 1 of 3"):
        join_shards(out, str(tmp_path / "out.npy"))
    assert not (tmp_path / "out.npy").exists()
    encoder = Encoder()
    run(encoder, path, out)
    assert [call[0] for call in encoder.calls] == [texts_of(11)[4]]
    np.testing.assert_array_equal(loaded(out), embed(None, texts_of(11)))
    after = states(out)
    assert after["shard-000000.npy"] == before["shard-000000.npy"]


def test_what_killed_processes_left_is_cleared_away(make_input, tmp_path):
    path, out = make_input(11), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(Encoder(die_at=1), path, out)
    (out / ".shard-000001.npy.abc.partial.npy").write_bytes(b"half")
    assert (out / "shard-000001.lock").exists()
    run(Encoder(), path, out)
    assert names(out) == ["manifest.json", *(f"shard-{s:06d}.npy" for s in range(3))]


def test_killed_between_join_and_removal(make_input, tmp_path, monkeypatch):
    path, out = make_input(11), tmp_path / "out.npy"

    def die(folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("gircse.encode.sharded.remove_folder", die)
        with pytest.raises(KeyboardInterrupt):
            run(Encoder(), path, out)
    encoders = [Encoder(), Encoder()]
    run_ranks(encoders, path, out)
    assert [e.calls for e in encoders] == [[], []]
    np.testing.assert_array_equal(np.load(out), embed(None, texts_of(11)))
    assert names(tmp_path) == ["in.txt", "out.npy"]


def test_rank_0_does_not_remove_the_folder_before_the_last_rank_has_come(make_input, tmp_path):
    """A rank that comes to no folder would begin it anew."""
    path, out, reports = make_input(3), tmp_path / "out.npy", []
    early = threading.Thread(target=lambda: reports.append(run(Encoder(), path, out, 0, 2)))
    early.start()
    folder = tmp_path / "out.npy.shards"
    wait_for(lambda: (folder / "shard-000000.npy").exists())
    time.sleep(0.3)
    assert folder.is_dir()
    late = Encoder()
    run(late, path, out, 1, 2)
    early.join()
    assert (len(reports), late.loads) == (1, 0)
    assert names(tmp_path) == ["in.txt", "out.npy"]


def test_a_mark_of_an_earlier_start_does_not_stand_for_a_rank(make_input, tmp_path):
    path, out = make_input(3), tmp_path / "out.npy"
    with pytest.raises(TimeoutError, match="no sign of rank 1"):
        run(Encoder(), path, out, 0, 2, timeout=0.2)
    folder = tmp_path / "out.npy.shards"
    (folder / "rank-000001.done").touch()
    with pytest.raises(TimeoutError, match="no sign of rank 1"):
        run(Encoder(), path, out, 0, 2, timeout=0.2)


# ---------------------------------------------------------------- several processes at one shard


def test_a_shard_another_process_holds_is_left_to_it(make_input, tmp_path):
    path, out = make_input(11), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(Encoder(die_at=0), path, out)
    with open(out / "shard-000001.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        encoder = Encoder()
        with pytest.raises(TimeoutError, match=r"another process holds shard 1, and nothing was finished for 0.3 s"):
            run(encoder, path, out, timeout=0.3)
        assert [call[0] for call in encoder.calls] == [texts_of(11)[i] for i in (0, 8)]
    # its holder has died: the lock file is there, the lock is not
    encoder = Encoder()
    run(encoder, path, out)
    assert [call[0] for call in encoder.calls] == [texts_of(11)[4]]
    np.testing.assert_array_equal(loaded(out), embed(None, texts_of(11)))


def test_a_shard_whose_holder_dies_meanwhile_is_taken_over(make_input, tmp_path):
    path, out = make_input(11), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(Encoder(die_at=0), path, out)
    lock = open(out / "shard-000000.lock", "w")  # noqa: SIM115
    fcntl.flock(lock, fcntl.LOCK_EX)
    threading.Timer(0.8, lock.close).start()
    encoder = Encoder()
    run(encoder, path, out)
    assert [call[0] for call in encoder.calls] == [texts_of(11)[i] for i in (4, 8, 0)]  # goes back in the input
    np.testing.assert_array_equal(loaded(out), embed(None, texts_of(11)))


def test_without_locks_the_result_is_the_same(make_input, tmp_path, monkeypatch):
    def flock(handle, how):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    run_ranks([Encoder(), Encoder()], make_input(22), tmp_path / "out.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), embed(None, texts_of(22)))


WORKER = f"""
from __future__ import annotations
import sys, time
import numpy as np
from gircse.encode.sharded import Rank, encode_sharded

{inspect.getsource(embed)}
input, output, log, rank, world_size, seconds = sys.argv[1:]

def encode(model, texts):
    time.sleep(float(seconds))
    with open(log, "a") as file:
        file.write(texts[0] + chr(10))
    return embed(model, texts)

rank = Rank(int(rank), int(world_size))
encode_sharded(object, encode, input, output, settings={{}}, shard_size=4, rank=rank, timeout=20)
"""


def start_worker(input: str, output: Path, log: Path, rank: int, world_size: int, seconds: float) -> subprocess.Popen:
    arguments = [input, str(output), str(log), str(rank), str(world_size), str(seconds)]
    return subprocess.Popen([sys.executable, "-c", WORKER, *arguments], cwd=REPOSITORY)


def wait_for(happened, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.005)


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
