"""Stopping a run without losing a step: SIGTERM and SIGINT are noted, and the loop stops when the step is done."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class TrainingStopped(SystemExit):
    """A signal stopped the run after a whole step, and the run was saved. Uncaught, it ends the program with code 0.

    Attributes:
        step: the number of steps that were done.
        checkpoint: the folder that a resumed run goes on from.
    """

    def __init__(self, step: int, checkpoint: Path) -> None:
        super().__init__(0)
        self.step, self.checkpoint = step, checkpoint

    def __str__(self) -> str:
        return f"stopped after step {self.step}, saved in {self.checkpoint}"


class StopRequest:
    """The handler of the signals. `name` is that of the last signal, or None before any has come."""

    def __init__(self) -> None:
        self.name: str | None = None

    @property
    def requested(self) -> bool:
        return self.name is not None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.name == signal.Signals(number).name:
            raise KeyboardInterrupt  # the second Ctrl-C ends the run at once
        self.name = signal.Signals(number).name
        print(f"{self.name}: stopping when this step is done and saved", file=sys.stderr, flush=True)


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Notes SIGTERM and SIGINT inside the block, where they no longer end the process. A second SIGINT raises
    KeyboardInterrupt. Python runs handlers in the main thread only, so in another thread nothing changes."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request) for number in _SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
