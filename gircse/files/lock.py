"""One process at a time in an output folder: a second one is told so, at once, and touches nothing.

The lock is the kernel's (flock) on a file `.lock` in the folder: it is freed however its process ends, so what a killed
one leaves behind never has to be cleared away by hand. On a file system without locks there is none, and the user has
to see to it.
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
    """Another process is at work in the folder."""


@contextmanager
def folder_lock(folder: str | os.PathLike[str] | None) -> Iterator[None]:
    """Inside, no other block on the same folder runs, in this process or another. None: nothing is locked.

    The folder is made if need be, and goes again if nothing was put into it.

    Raises:
        FolderInUse: there is another one. OSError: the folder cannot be made or written to.
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
        # while it is still ours: whoever has opened the file by now sees that it is no longer the one of that name
        with suppress(OSError):
            (folder / LOCK_NAME).unlink()
            if new:
                folder.rmdir()  # if it is empty
        os.close(handle)


def try_lock(handle: int) -> bool:
    """Whether this open file is now locked by us; also True where the file system has no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in _NO_LOCKS
    return True


def _held(path: Path) -> int:
    """The open and locked file of that name."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except (FileNotFoundError, FileExistsError):
            if path.parent.exists() and not path.parent.is_dir():
                raise
            continue  # its owner removed the folder in between
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
        os.close(handle)  # its owner removed it between our opening and locking
