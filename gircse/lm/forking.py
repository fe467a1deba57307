"""What a forked process finds: a copy of everything but the other threads, whose locks stay taken for good.

Whoever guards work with a lock is told in the child (`tell_after_fork`) and takes a new one. Weights are rewritten
under one lock that a fork waits for (`rewriting_weights`), so that no child gets an adapter that is merged by half.
"""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch


class Forked(Protocol):
    def after_fork(self) -> None:
        """Called in the child, by the thread that forked, the only one there is."""


_told: weakref.WeakSet[Forked] = weakref.WeakSet()
_rewriting = threading.RLock()
_in_child = False


def tell_after_fork(owner: Forked) -> None:
    """Calls `owner.after_fork()` in every process that is forked from now on, as long as the owner lives."""
    _told.add(owner)


def is_lost(lock: threading.RLock) -> bool:
    """Whether a lock was held, when this process was forked, by a thread that it does not have: nobody gives it back.

    A lock that the forking thread held itself is its own in the child as well.
    """
    if lock.acquire(blocking=False):
        lock.release()
        return False
    return True


@contextmanager
def rewriting_weights() -> Iterator[None]:
    """A fork waits until the block is left; short, unlike encoding."""
    with _rewriting:
        yield


def compute_on_one_thread_in_child() -> None:
    """To be called before a forked process computes with a model of its parent.

    GNU's OpenMP, on which PyTorch runs, has no threads in a child that was forked after they had been used, and waits
    for them for ever. With one thread nothing waits.
    """
    global _in_child
    if _in_child and torch.get_num_threads() > 1:
        warnings.warn(
            "this process was forked from one that had computed with several threads, which a child can no longer use; "
            "it computes with one (start processes by 'spawn' to have more)",
            stacklevel=4,
        )
        torch.set_num_threads(1)
    _in_child = False


def _after_fork_in_child() -> None:
    global _in_child
    _in_child = True
    _rewriting.release()
    for owner in list(_told):
        owner.after_fork()


if hasattr(os, "register_at_fork"):  # no Windows
    os.register_at_fork(
        before=_rewriting.acquire, after_in_parent=_rewriting.release, after_in_child=_after_fork_in_child
    )
