"""Sharded encoding: every text once and in order, also after damage, deaths and restarts."""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from gircse.encode.shard_folder import join_shards
from gircse.encode.sharded import Rank, encode_sharded, shard_folder
from tests.encode.sharded_runs import (
    SIZE,
    Encoder,
    embed,
    loaded,
    names,
    run,
    run_ranks,
    states,
    texts_of,
    wait_for,
)

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
