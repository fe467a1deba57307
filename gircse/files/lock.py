"""One process at a time in an output folder. A second process gets an error at once and touches nothing.

The lock is the kernel's (flock) on the file `.lock` in the folder. The kernel frees it however its process ends, so the
user never has to clear away what a killed process left. On a file system without locks nothing is protected.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LOCK_NAME = ".lock"
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


class FolderInUse(OSError):
    """Another process works in the folder."""


@contextmanager
def folder_lock(folder: str | os.PathLike[str] | None) -> Iterator[None]:
    """While the block runs, no other block on the same folder does, in this process or another.

    The folder is made if it does not exist, and deleted again if nothing was put into it.

    Args:
        folder: the folder to lock; with None nothing is locked.

    Raises:
        FolderInUse: another block on the folder runs.
        OSError: the folder cannot be made or written to.
    """
    if folder is None:
        yield
        return
    folder = Path(folder)
    new = not folder.exists()
    handle = _held(folder / LOCK_NAME)
    try:
        yield
    finally:
        # The file is unlinked before it is unlocked. A process that has opened it by now sees in `_held` that the name
        # no longer belongs to the file that it locked.
        with suppress(OSError):
            (folder / LOCK_NAME).unlink()
            if new:
                folder.rmdir()  # fails if the folder is not empty
        os.close(handle)


def try_lock(handle: int) -> bool:
    """Locks an open file without waiting. False: another process has locked it. A file system without locks: True."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in _NO_LOCKS
    return True


def _held(path: Path) -> int:
    """Opens and locks the file of that name, and returns its handle."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except (FileNotFoundError, FileExistsError):
            if path.parent.exists() and not path.parent.is_dir():
                raise
            continue  # another process removed the folder between the two calls
        try:
            if not try_lock(handle):
                raise FolderInUse(
                    errno.EAGAIN,
                    f"{path.parent}: another process is at work in it; wait for it, or name another folder",
                )
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), os.stat(path)):
                    return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # another process removed the file between opening and locking
