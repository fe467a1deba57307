"""One process at a time in a folder; nothing is left behind, and a killed one keeps nobody out."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
from pathlib import Path

import pytest

from gircse.files.lock import LOCK_NAME, FolderInUse, folder_lock
from tests.fuzz.outcome import outcome
from tests.training_process import CONTEXT


def test_a_second_one_is_told_so_and_the_next_one_is_let_in(tmp_path):
    folder = tmp_path / "a" / "run"
    with folder_lock(folder):
        (folder / "result").touch()
        with pytest.raises(FolderInUse, match=f"{folder}: another process is at work in it"), folder_lock(folder):
            raise AssertionError
        with folder_lock(tmp_path / "other"):
            pass
    with folder_lock(folder):
        pass
    assert [path.name for path in folder.iterdir()] == ["result"]


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_that_nothing_came_into_goes_again(tmp_path, there):
    folder = tmp_path / "run"
    if there:
        folder.mkdir()
    with pytest.raises(KeyError), folder_lock(folder):
        raise KeyError
    assert folder.exists() == there
    with folder_lock(None):
        pass


def _hold(folder: Path, held) -> None:
    with folder_lock(folder):
        held.set()
        time.sleep(60)


def test_a_killed_process_keeps_nobody_out(tmp_path):
    held = CONTEXT.Event()
    process = CONTEXT.Process(target=_hold, args=(tmp_path, held))
    process.start()
    assert held.wait(60)
    with pytest.raises(FolderInUse), folder_lock(tmp_path):
        raise AssertionError
    process.kill()
    process.join()
    assert (tmp_path / LOCK_NAME).exists()
    with folder_lock(tmp_path):
        pass
    assert not (tmp_path / LOCK_NAME).exists()


def test_only_one_at_a_time_however_they_come_and_go(tmp_path):
    """The file is removed and made again all the time; one that locks the removed one must not take it for the lock."""
    inside, most, entered = 0, 0, 0
    broken: list[BaseException] = []
    counting = threading.Lock()

    def once() -> None:
        nonlocal inside, most, entered
        with folder_lock(tmp_path / "run"):
            with counting:
                inside, entered = inside + 1, entered + 1
                most = max(most, inside)
            time.sleep(0)
            with counting:
                inside -= 1

    def come_and_go() -> None:
        for _ in range(100):
            _, error = outcome(once, OSError)
            if error is not None and not isinstance(error, FolderInUse):
                broken.append(error)

    threads = [threading.Thread(target=come_and_go) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not broken
    assert most == 1
    assert entered > 4


def test_without_locks_on_the_file_system_there_is_none(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    with folder_lock(tmp_path), folder_lock(tmp_path):
        pass


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="file"), folder_lock(tmp_path / "file"):
        raise AssertionError
